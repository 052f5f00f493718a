"""CARP: multi-scale tokens of single action dimensions, from coarse to fine (Gong et al., arXiv 2412.06782, section 3.2).

Each dimension of a chunk is a signal of its own. A strided convolutional network turns its T steps into T / 4 latents of
8 channels; a multi-scale quantiser writes them as 1, then 2, 3 and 4 codes, each scale saying what the coarser ones left
over. All dimensions' codes of one scale are one block, so a policy emits a chunk in as many passes as there are scales.
Published setting: T = 16, scales 1, 2, 3, 4, one codebook of 512 codes, nearest by angle, commitment 0.25.

Deviations, each deliberate:
* The paper trains one autoencoder for each dimension. Here one network and one codebook serve all of them, told by
  learned marks which channel and which physical kind it works on: since the decoder knows the dimension too, a code can
  mean something else in each, so nothing is lost in rate, and the vocabulary stays 512 on a robot of any D. Dimensions
  never mix, as in the paper.
* Scales are stated for the published 4 latents. At another horizon they grow with the number of latents: 1, 3, 4, 5 for
  5 of them (T = 17 to 20). A horizon that is no multiple of 4 is continued by its last step and cut after decoding.
* The paper states no width, depth or learning rate; those of the presets are ours.
* Mean absolute instead of squared error, as in the other codecs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from actok.core import ActionSpace, CodecBatch, CodecOutput, ConfigError, TokenLayout
from actok.nn.convolution import ConvBlock, TimeConv
from actok.quantizers import make_quantizer
from actok.tokenizers.codec import Codec, CodecShape
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

# Rows of the table of marks: their order is part of saved weights, so a new kind goes to the end.
KINDS = ("position", "rotation", "gripper", "joint", "velocity", "base", "hand", "raw")

__all__ = ["CarpCodec", "CarpConfig", "CarpTokenizer", "fit_scales"]


@dataclass(frozen=True, kw_only=True)
class CarpConfig:
    """Settings of CarpTokenizer.

    Attributes:
        width: channels of the convolutional networks at their coarsest resolution; halved at each finer one.
        latent: C, channels of a latent.
        halvings: how often time is halved: T steps give ceil(T / 2^halvings) latents.
        depth: residual blocks at each resolution.
        normaliser: see actok.signal.normalise.
        quantizer: see actok.quantizers. Of "multi_scale", `scales` end at the number of latents of the published
            horizon and are widened to that of the fitted one.
    """

    width: int = 64
    latent: int = 8
    halvings: int = 2
    depth: int = 2
    normaliser: str = "quantile"
    quantizer: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "multi_scale", "scales": (1, 2, 3, 4), "codes": 512, "distance": "direction"}
    )

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("latent", 1), ("halvings", 1), ("depth", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
        if self.width % 2 ** (self.halvings - 1):
            raise ConfigError(
                f"width is {self.width}; give a multiple of {2 ** (self.halvings - 1)} (2 ** (halvings - 1))"
            )
        fit_scales(self.scales or (1,), 1)

    @property
    def scales(self) -> tuple[int, ...] | None:
        """The scales as stated; None where the quantiser has none."""
        if not isinstance(self.quantizer, Mapping) or self.quantizer.get("kind") != "multi_scale":
            return None
        return tuple(self.quantizer.get("scales", (1, 2, 3, 4)))


def fit_scales(scales: tuple[int, ...], latents: int) -> tuple[int, ...]:
    """Rising scales widened or narrowed in proportion so that they end at `latents`; those that coincide become one.

    Raises ConfigError where scales are no whole numbers that rise from at least 1.
    """
    whole = all(isinstance(s, int) and s >= 1 for s in scales)
    if not scales or not whole or list(scales) != sorted(set(scales)):
        raise ConfigError(f"scales are {scales!r}; give whole numbers that rise from at least 1, e.g. [1, 2, 3, 4]")
    return tuple(sorted({max(1, (2 * s * latents + scales[-1]) // (2 * scales[-1])) for s in scales}))


class CarpCodec(Codec):
    """Signals of single dimensions [B x D, T, 1] to latents [B x D, L, C]. S = D x L, dimension by dimension.

    Attributes:
        level, part, time: [M] scale (or quantiser level), dimension and place of each of the M tokens of a window.
        table: [M] which codebook each of them reads.
    """

    into_tokens: Tensor

    def __init__(self, config: CarpConfig, shape: CodecShape) -> None:
        super().__init__()
        self.channels, self.steps, self.factor = shape.channels, shape.horizon, 2**config.halvings
        self.length = -(-shape.horizon // self.factor)
        width, marks = config.width, nn.Embedding(shape.channels + len(KINDS), config.width)
        nn.init.normal_(marks.weight, std=0.02)
        self.marks = marks
        widths = [1] + [width // 2**i for i in reversed(range(config.halvings))]  # from fine to coarse
        self.down = nn.ModuleList(
            nn.Sequential(TimeConv(fine, coarse, 4, stride=2), *(ConvBlock(coarse) for _ in range(config.depth)))
            for fine, coarse in pairwise(widths)
        )
        self.to_latent = nn.Linear(width, config.latent)
        self.from_latent = nn.Linear(config.latent, width)
        self.up = nn.ModuleList(  # each step becomes two
            nn.Sequential(*(ConvBlock(coarse) for _ in range(config.depth)), TimeConv(coarse, 2 * fine))
            for coarse, fine in pairwise(reversed(widths))
        )
        settings = config.quantizer
        self.scales = config.scales and fit_scales(config.scales, self.length)
        if self.scales:
            settings = {**settings, "scales": self.scales}
        self.quantizer = make_quantizer(settings, config.latent)
        self._lay_out()

    def _lay_out(self) -> None:
        """Tokens in order: by level, then dimension, then time. Without scales every level has all places."""
        counts = self.scales or (self.length,) * self.quantizer.levels
        level = np.repeat(np.arange(len(counts)), counts)
        place = np.concatenate([np.arange(n) for n in counts])
        part, code = np.divmod(np.arange(self.channels * len(level)), len(level))
        sequence = np.lexsort((place[code], part, level[code]))
        self.level, self.part, self.time = level[code][sequence], part[sequence], place[code][sequence]
        self.table = np.zeros_like(self.level) if self.scales else self.level
        self.register_buffer("into_tokens", torch.from_numpy(sequence), persistent=False)

    @classmethod
    def structure(cls, config: CarpConfig, space: ActionSpace, shape: CodecShape) -> dict[str, np.ndarray]:
        """kind: [D] index of each channel's physical kind (of absent channels any)."""
        kind = np.zeros(shape.channels, np.int64)
        for group in space.groups:
            kind[list(group.dims)] = KINDS.index(group.kind)
        return {"kind": kind}

    def _mark(self, batch: CodecBatch) -> Float[Tensor, "rows 1 W"]:
        channel = torch.arange(self.channels, device=batch.present.device)
        return (self.marks(channel) + self.marks(self.channels + batch.structure["kind"])).flatten(0, 1)[:, None]

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec."""
        x = batch.actions.transpose(1, 2).flatten(0, 1)
        x = F.pad(x, (0, self.length * self.factor - self.steps), mode="replicate")
        x = x[:, :, None]
        for stage in self.down:
            x = stage(x)
        return self._join(self.to_latent(x + self._mark(batch)))

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec."""
        x = self.from_latent(self._rows(latents)) + self._mark(batch)
        for stage in self.up:
            x = stage(x).unflatten(2, (2, -1)).flatten(1, 2)
        return x[:, : self.steps, 0].unflatten(0, (-1, self.channels)).transpose(1, 2)

    def forward(self, batch: CodecBatch) -> CodecOutput:
        """See Codec; absent dimensions count in no statistic of the codebook."""
        latents = self.encode(batch)
        rows = self._rows(latents)
        found = self.quantizer(rows, batch.present.flatten()[:, None].expand(rows.shape[:2]))
        quantised = self._join(found.quantised)
        reconstruction = self.decode(quantised, batch) * batch.present[:, None]
        return CodecOutput(
            latents=latents,
            quantised=quantised,
            level_vectors=self._join(found.level_vectors),
            codes=self._join(found.codes),
            reconstruction=reconstruction,
            losses={**self.reconstruction_losses(batch, reconstruction), **found.losses},
            usage=found.usage,
        )

    def tokenize(self, batch: CodecBatch) -> Int[Tensor, "B M"]:
        """Tokens of all D channels, absent ones included."""
        codes = self.quantizer.encode(self._rows(self.encode(batch))).transpose(1, 2).flatten(1)
        return self._join(codes)[:, self.into_tokens]

    def detokenize(self, ids: Int[Tensor, "B M"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """Inverse of `tokenize`, also of its first levels; 0 where a channel is absent."""
        codes = self._rows(ids[:, self.into_tokens[: ids.shape[1]].argsort()])
        codes = codes.unflatten(1, (1, -1) if self.scales else (-1, self.length)).transpose(1, 2)
        return self.decode(self._join(self.quantizer.lookup(codes)), batch) * batch.present[:, None]

    def _rows(self, x: Tensor) -> Tensor:
        """[B, D x n, ...] to [B x D, n, ...]."""
        return x.unflatten(1, (self.channels, -1)).flatten(0, 1)

    def _join(self, x: Tensor) -> Tensor:
        """[B x D, n, ...] to [B, D x n, ...]."""
        return x.unflatten(0, (-1, self.channels)).flatten(1, 2)


class CarpTokenizer(NeuralTokenizer):
    """10 tokens for each dimension at T = 16, scale by scale, in 4 blocks. Any such sequence decodes, and its first blocks.

    N follows the embodiment's own D; `coords` are (scale, place within the scale, dimension).
    """

    kind = "carp"
    config_class = CarpConfig
    codec_class = CarpCodec
    codec: CarpCodec

    def _kept(self, embodiment: Embodiment) -> Bool[np.ndarray, "M"]:
        return self.codec.part < embodiment.space.dim

    def _window_layout(self, embodiment: Embodiment) -> TokenLayout:
        codec, kept = self.codec, self._kept(embodiment)
        table = codec.table[kept]
        return self._by_level(
            TokenLayout.uniform(
                np.array(codec.quantizer.sizes)[table],
                np.stack([codec.level, codec.time, codec.part], 1)[kept],
                table=table,
            )
        )

    def _layout_of(self, windows: int, embodiment: Embodiment) -> TokenLayout:
        return self._by_level(super()._layout_of(windows, embodiment))  # one block a scale, over all windows

    def _by_level(self, layout: TokenLayout) -> TokenLayout:
        """The layout with one block a level; the first blocks decode where levels are residuals of one another."""
        ends = np.cumsum(np.bincount(layout.coords[:, 0])).tolist()
        residual = self.config.quantizer.get("kind") in ("multi_scale", "residual")
        return replace(
            layout,
            blocks=tuple(tuple(range(a, b)) for a, b in pairwise([0, *ends])),
            prefixes=tuple(ends) if residual and len(ends) > 1 else (),
        )
