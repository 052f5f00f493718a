"""VQ-VLA's action tokenizer (Wang et al. 2025, arXiv 2507.01016): a chunk as a picture of time x channel.

    actions [T, D] -> causal 2-D convolutions with strides in time and channel -> a small grid of latents
            -> residual VQ, N_q levels -> transposed way back -> [T, D]

With four widths both axes shrink by 8: the paper's 5 x 7 is one latent and thus 4 tokens (4 levels). Slots go by time,
then by part (a strip of 8 channels), and a slot's levels follow each other. Convolutions are causal in time, so a slot of
time j depends on the steps before 8 (j + 1) and a step t is decoded from the slots up to time t // 8: codes of a motion's
beginning do not change with its continuation. Every sequence decodes.

Losses: mean squared error, plus the quantiser's commitment, which the presets weigh with the paper's 5.

What differs from the paper, or is not stated there:

* Group normalisation takes its statistics within each time step. Over all steps, as usual, it would tell early latents
  about late actions, and the convolutions would be causal in vain.
* What is known of a position, its step and channel, is added as a learned vector for each, where values become features
  and again where the decoder reaches the full resolution.
* No attention in the middle; a residual block is two convolutions.
* T and D are filled up to multiples of the stride, with the last step and with zeros, and cut after decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from actok.core import CodecBatch, ConfigError
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape, masked_mean, weights
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

__all__ = ["VqVla", "VqVlaConfig", "VqVlaTokenizer"]


@dataclass(frozen=True, kw_only=True)
class VqVlaConfig:
    """Settings of VQ-VLA's tokenizer.

    Attributes:
        widths: features at each resolution; each after the first halves both axes (the paper: 128, 256, 256, 512).
        blocks: residual blocks at each resolution, in encoder and decoder each (the published code: 4).
        groups: of the normalisation (the paper: 32).
        latent_dim: channels of a latent (the paper: 128).
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of the actions.
    """

    widths: tuple[int, ...] = (128, 256, 256, 512)
    blocks: tuple[int, ...] = (4, 4, 4, 4)
    groups: int = 32
    latent_dim: int = 128
    quantizer: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "residual", "levels": 4, "codes": 256, "commitment": 5.0}
    )
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        for name in ("groups", "latent_dim"):
            check_count(f"vqvla: {name}", getattr(self, name))
        if not isinstance(self.widths, tuple) or not self.widths:
            raise ConfigError(f"vqvla: widths is {self.widths!r}; give a list of numbers of features")
        for width in self.widths:
            # A group of one feature and one channel would be normalised to nothing.
            if check_count("vqvla: widths", width) % self.groups or width < 2 * self.groups:
                raise ConfigError(
                    f"vqvla: width {width} and {self.groups} groups; give widths that are at least twice the groups and"
                    " multiples of them"
                )

        if not isinstance(self.blocks, tuple) or len(self.blocks) != len(self.widths):
            raise ConfigError(
                f"vqvla: blocks is {self.blocks!r} for {len(self.widths)} widths; give one number a width"
            )
        for count in self.blocks:
            check_count("vqvla: blocks", count, least=0)

    @property
    def stride(self) -> int:
        """Steps, and channels, of one latent."""
        return 2 ** (len(self.widths) - 1)


class GridConv(nn.Module):
    """3 x 3 convolution over [B, W, T, D], causal in time: output t sees steps up to the last of its own stride.

    T and D must be multiples of the stride (1 or 2), by which they shrink.
    """

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, stride=stride)
        # Variance is kept and biases start at 0. PyTorch's own start leaves a third of a signal's variance at every convolution until
        # random biases outweigh them: all chunks then have nearly one latent, and learning starts late.
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear")
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        self.padding = (1, 2 - stride, 3 - stride, 0)  # channels before and after, steps before and after

    def forward(self, x: Float[Tensor, "B W T D"]) -> Float[Tensor, "B X t d"]:
        """[B, width, T, D] to [B, out, T / stride, D / stride]."""
        return self.conv(F.pad(x, self.padding))


class StepNorm(nn.Module):
    """Group normalisation of [B, W, T, D] with statistics of each step by itself."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, x: Float[Tensor, "B W T D"]) -> Float[Tensor, "B W T D"]:
        """Same shape."""
        steps = x.transpose(1, 2)
        return self.norm(steps.flatten(0, 1)).unflatten(0, steps.shape[:2]).transpose(1, 2)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, added to what came in."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        layers = [StepNorm(groups, width), nn.SiLU(), GridConv(width, width)]
        self.body = nn.Sequential(*layers, StepNorm(groups, width), nn.SiLU(), GridConv(width, width))

    def forward(self, x: Float[Tensor, "B W T D"]) -> Float[Tensor, "B W T D"]:
        """Same shape."""
        return x + self.body(x)


class VqVla(Codec):
    """The network; S = ceil(T / stride) * ceil(D / stride), by time, then by part."""

    order = "slot"

    def __init__(self, config: VqVlaConfig, shape: CodecShape) -> None:
        super().__init__()
        self.shape = shape
        self.times, self.parts = grid(config, shape)
        self.size = (self.times * config.stride, self.parts * config.stride)
        widths, groups, last = config.widths, config.groups, config.widths[-1]
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for (fine, coarse), count in zip(pairwise(widths), config.blocks[1:], strict=True):
            down += [GridConv(fine, coarse, stride=2), *residuals(coarse, groups, count)]
            up = [*residuals(coarse, groups, count), nn.Upsample(scale_factor=2), GridConv(coarse, fine), *up]
        self.lift = GridConv(1, widths[0])
        self.encoder = nn.Sequential(*residuals(widths[0], groups, config.blocks[0]), *down)
        self.to_latent = nn.Sequential(StepNorm(groups, last), nn.SiLU(), nn.Conv2d(last, config.latent_dim, 1))
        self.from_latent = GridConv(config.latent_dim, last)
        self.decoder = nn.Sequential(*up)
        self.settle = nn.Sequential(*residuals(widths[0], groups, config.blocks[0]))
        self.drop = nn.Sequential(StepNorm(groups, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 1, 1))
        # What a position is, for the encoder and for the decoder.
        self.step = nn.Parameter(0.02 * torch.randn(2, widths[0], shape.horizon, 1))
        self.channel = nn.Parameter(0.02 * torch.randn(2, widths[0], 1, shape.channels))
        self.quantizer = make_quantizer(config.quantizer, config.latent_dim)

    def fill(self, x: Float[Tensor, "B W T D"]) -> Float[Tensor, "B W t d"]:
        """Up to multiples of the stride, with the last step and with zeros."""
        if missing := self.size[0] - x.shape[2]:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2)
        return F.pad(x, (0, self.size[1] - x.shape[3]))

    def place(self, side: int) -> Float[Tensor, "1 W t d"]:
        """Embedding of each position for the encoder (side 0) or decoder (side 1)."""
        return self.fill((self.step[side] + self.channel[side])[None])

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode."""
        x = self.lift(self.fill(batch.actions[:, None])) + self.place(0)
        return self.to_latent(self.encoder(x)).flatten(2).transpose(1, 2)

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode."""
        x = self.from_latent(latents.transpose(1, 2).unflatten(2, (self.times, self.parts)))
        x = self.settle(self.decoder(x) + self.place(1))
        return self.drop(x)[:, 0, : self.shape.horizon, : self.shape.channels]

    def reconstruction_losses(self, batch: CodecBatch, reconstruction: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Mean squared error over real steps and present channels."""
        return {"mse": masked_mean((reconstruction - batch.actions).square(), weights(batch))}


def residuals(width: int, groups: int, count: int) -> list[nn.Module]:
    """`count` residual blocks."""
    return [Residual(width, groups) for _ in range(count)]


def grid(config: VqVlaConfig, shape: CodecShape) -> tuple[int, int]:
    """Times and parts of a window's latents."""
    return -(-shape.horizon // config.stride), -(-shape.channels // config.stride)


class VqVlaTokenizer(NeuralTokenizer):
    """VQ-VLA's tokenizer behind the contract of every tokenizer."""

    kind = "vqvla"
    config_class = VqVlaConfig
    codec_class = VqVla
    config: VqVlaConfig

    def _slots(self, embodiment: Embodiment) -> int:
        times, parts = grid(self.config, self.shape)
        return times * parts

    def _places(self, slot: Int[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        time, part = np.divmod(slot, grid(self.config, self.shape)[1])
        return time, part
