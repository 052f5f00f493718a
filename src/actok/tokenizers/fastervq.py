"""FASTerVQ (FASTer, arXiv 2512.04952, section 3.1): patches of physical groups -> TAAE -> residual VQ.

    actions [T, D] -> patches: uniform in time (h steps), one per physical group (padded to the widest)
            -> conv + Transformer encoder over time x group -> learned resampling to C_h x C_a latents
            -> residual VQ, N_c levels -> the same way back

Tokens are ordered codebook, then horizon, then part: index (q * C_h + h) * C_a + a (the paper's text; the caption of its
figure 3b says otherwise). Every sequence decodes.

What the paper leaves open, and what is done here:

* C_a is neither the number of physical groups nor of dimensions (six on WidowX, yet C_a = 7), so the encoder resamples its
  m x n patches to C_h x C_a latents by a learned linear map, and the decoder back (`Resample`).
* A patch knows its time, and of its group the kind (position, rotation, gripper, ...), the mode (absolute, delta, ...) and
  which of that kind it is, through learned embeddings. One codec thereby serves any number of groups; absent ones are
  masked. A group wider than `group_width` (a hand) is cut into several patches.
* Depth, width and the order of convolutions and attention are not published; ours are `arch`, `depth`, `width`.
* DCT of eq. (1) is orthonormal, along time; padded steps count in neither term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ActionSpace, CodecBatch, ConfigError, SpaceMismatchError
from actok.core.spaces import Kind, Mode
from actok.nn.convolution import ConvBlock
from actok.nn.transformer import Block, FeedForward
from actok.quantizers import make_quantizer
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape, dct_matrix, masked_mean, weights
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

Arch = Literal["taae", "cnn", "transformer"]
KINDS, MODES = get_args(Kind), get_args(Mode)
# Most patches of one kind (two arms have two grippers; a 24-joint hand is several patches).
SAME_KIND = 16

__all__ = ["FasterVq", "FasterVqConfig", "FasterVqTokenizer"]


@dataclass(frozen=True, kw_only=True)
class FasterVqConfig:
    """Settings of FASTerVQ.

    Attributes:
        latent_steps, latent_parts: C_h and C_a, the latents of a window (Table 4: 1 x 7, 2 x 14, 2 x 21).
        latent_dim: d, channels of a latent (the paper: 128).
        patch_steps: h, time steps of a patch.
        group_width: dimensions of a patch at most.
        arch: "taae" alternates convolution and attention, "cnn" and "transformer" have one of them only (Table 6a).
        width, heads, depth: of the blocks on patches; depth counts pairs of them, in encoder and decoder each.
        latent_depth: blocks on latents, in encoder and decoder each.
        dct: weight of the DCT term of eq. (1).
        block: tokens of one step of block-wise decoding (Table 4: 7).
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of the actions.
    """

    latent_steps: int = 1
    latent_parts: int = 7
    latent_dim: int = 128
    patch_steps: int = 4
    group_width: int = 8
    arch: Arch = "taae"
    width: int = 256
    heads: int = 4
    depth: int = 2
    latent_depth: int = 1
    dct: float = 1.0
    block: int = 7
    quantizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "residual", "levels": 3, "codes": 4096})
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        for name in (
            "latent_steps",
            "latent_parts",
            "latent_dim",
            "patch_steps",
            "group_width",
            "width",
            "heads",
            "block",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"fastervq: {name} is {value!r}; give a whole number, at least 1")
        for name in ("depth", "latent_depth"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"fastervq: {name} is {value!r}; give a whole number, 0 or more")
        if self.arch not in get_args(Arch):
            raise ConfigError(f"fastervq: arch is {self.arch!r}; use one of {', '.join(get_args(Arch))}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(
                f"fastervq: width {self.width} and {self.heads} heads; a head's size width / heads must be even and whole"
            )
        if not self.dct >= 0:
            raise ConfigError(f"fastervq: dct is {self.dct!r}; give a weight, 0 or more")


class PatchMixer(nn.Module):
    """One block on patches [B, m, n, W]: convolution along time within each group, or attention over all patches."""

    def __init__(self, kind: Literal["conv", "attention"], width: int, heads: int) -> None:
        super().__init__()
        self.kind = kind
        self.mix = ConvBlock(width) if kind == "conv" else Block(width, heads)
        if kind == "conv":
            self.feed_norm = nn.RMSNorm(width)
            self.feed = FeedForward(width)

    def forward(self, x: Float[Tensor, "B m n W"], seen: Bool[Tensor, "#B 1 1 L"]) -> Float[Tensor, "B m n W"]:
        """`seen`: which of the L = m n patches are there."""
        count, steps, groups, width = x.shape
        if self.kind == "attention":
            return self.mix(x.flatten(1, 2), mask=seen).unflatten(1, (steps, groups))
        along = x.transpose(1, 2).reshape(count * groups, steps, width)
        x = self.mix(along).unflatten(0, (count, groups)).transpose(1, 2)
        return x + self.feed(self.feed_norm(x))


def mixers(config: FasterVqConfig) -> nn.ModuleList:
    """2 x depth blocks, by architecture."""
    pair = {"taae": ("conv", "attention"), "cnn": ("conv", "conv"), "transformer": ("attention", "attention")}
    return nn.ModuleList(PatchMixer(kind, config.width, config.heads) for kind in pair[config.arch] * config.depth)  # type: ignore[arg-type]


class Resample(nn.Module):
    """Learned linear resampling between a set of patches and a set of slots, head by head.

    Slot s of head e is the sum over patches p of <key of s, key of p> times a projection of p; there is no softmax, so that
    at random initialisation nothing is averaged away. The key of a patch is the product of those of its time and its group.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.feed = FeedForward(width)

    def forward(
        self, x: Float[Tensor, "B M W"], to: Float[Tensor, "*b L W"], of: Float[Tensor, "*c M W"]
    ) -> Float[Tensor, "B L W"]:
        """`to`, `of`: keys of what is wanted and of what is given, 0 where absent."""
        to, of = (k.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for k in (to, of))
        there = of.any(-1).sum(-1).clamp(min=1)[..., None, None]  # how many are summed
        mixing = to @ of.transpose(-1, -2) * (to.shape[-1] * there) ** -0.5
        values = self.value(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.out((mixing @ values).transpose(1, 2).flatten(2))
        return y + self.feed(self.feed_norm(y))


class FasterVq(Codec):
    """The network; slots are ordered horizon, then part (s = h * C_a + a), and levels come first in a sequence."""

    order = "level"

    def __init__(self, config: FasterVqConfig, shape: CodecShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        width, heads, h = config.width, config.heads, config.patch_steps
        self.group = shape.extra["group_width"]
        self.steps = -(-shape.horizon // h)  # m
        slots = config.latent_steps * config.latent_parts
        self.patch_in = nn.Linear(h * self.group, width)
        self.patch_out = nn.Linear(width, h * self.group)
        self.encoder, self.decoder = mixers(config), mixers(config)
        self.pool, self.unpool = Resample(width, heads), Resample(width, heads)
        self.latent_encoder, self.latent_decoder = (
            nn.ModuleList(Block(width, heads) for _ in range(config.latent_depth)) for _ in range(2)
        )
        self.to_latent = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, config.latent_dim))
        self.from_latent = nn.Linear(config.latent_dim, width)
        self.out_norm = nn.RMSNorm(width)
        # What a patch is: one table of embeddings each, for the encoder's patches and for the decoder's queries.
        self.time = nn.Parameter(0.02 * torch.randn(2, self.steps, 1, width))
        self.kind = nn.Embedding(1 + len(KINDS) * len(MODES), 2 * width)
        self.which = nn.Embedding(SAME_KIND, 2 * width)
        for table in (self.kind, self.which):
            nn.init.normal_(table.weight, std=0.02)
        self.slots = nn.Parameter(0.02 * torch.randn(2, slots, width))
        # Keys of resampling.
        self.slot_key = nn.Parameter(torch.randn(2, slots, width))
        self.time_key = nn.Parameter(torch.randn(2, self.steps, 1, width))
        self.kind_key = nn.Embedding(1 + len(KINDS) * len(MODES), 2 * width)
        self.which_key = nn.Embedding(SAME_KIND, 2 * width)
        self.quantizer = make_quantizer(config.quantizer, config.latent_dim)
        self.register_buffer("dct", dct_matrix(shape.horizon), persistent=False)

    @classmethod
    def measure(cls, config: FasterVqConfig, spaces: Sequence[ActionSpace]) -> dict[str, int]:
        """The patches' width: the widest group, at most `group_width`."""
        widest = max(len(g.dims) for s in spaces for g in s.groups)
        return {"group_width": min(widest, config.group_width)}

    @classmethod
    def structure(cls, config: FasterVqConfig, space: ActionSpace, shape: CodecShape) -> dict[str, np.ndarray]:
        """The embodiment's groups as patches.

        channels: int64 [n, d], 1 + channel that stands at each place of a patch, 0 where there is none.
        kind: int64 [n], 1 + kind and mode of the group. which: int64 [n], the how manieth of its kind.
        """
        width = shape.extra["group_width"]
        seen: dict[int, int] = {}
        channels, kinds, which = [], [], []
        for group in space.groups:
            for start in range(0, len(group.dims), width):
                dims = [d + 1 for d in group.dims[start : start + width]]
                channels.append(dims + [0] * (width - len(dims)))
                kind = 1 + KINDS.index(group.kind) * len(MODES) + MODES.index(group.mode)
                kinds.append(kind)
                which.append(seen.get(kind, 0))
                seen[kind] = seen.get(kind, 0) + 1
        if (most := max(seen.values())) > SAME_KIND:
            raise SpaceMismatchError(
                f"space {space.embodiment!r} makes {most} patches of one kind, fastervq tells {SAME_KIND} apart; put"
                f" dimensions of a kind into fewer groups, or raise group_width ({config.group_width})"
            )
        return {
            "channels": np.array(channels, np.int64),
            "kind": np.array(kinds, np.int64),
            "which": np.array(which, np.int64),
        }

    # -- patches --------------------------------------------------------------------------------------------------

    def patchify(self, batch: CodecBatch) -> Float[Tensor, "B m n P"]:
        """Actions [B, T, D] as patches [B, m, n, h d]; the last step is repeated to fill the last patch."""
        x, h = batch.actions, self.config.patch_steps
        if missing := self.steps * h - x.shape[1]:
            x = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], 1)
        x = nn.functional.pad(x, (1, 0))  # channel 0: nothing
        index = batch.structure["channels"].flatten(1)
        x = x.gather(2, index[:, None].expand(-1, x.shape[1], -1))
        return x.unflatten(2, (-1, self.group)).unflatten(1, (self.steps, h)).transpose(2, 3).flatten(3)

    def unpatchify(self, patches: Float[Tensor, "B m n P"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """The inverse of `patchify`."""
        x = patches.unflatten(3, (self.config.patch_steps, self.group)).transpose(2, 3).flatten(1, 2).flatten(2)
        x = x[:, : self.shape.horizon]
        index = batch.structure["channels"].flatten(1)[:, None].expand(-1, x.shape[1], -1)
        out = x.new_zeros(*x.shape[:2], self.shape.channels + 1)
        return out.scatter(2, index, x)[:, :, 1:]

    @staticmethod
    def groups(batch: CodecBatch) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        """Kind and number of each group, and one row of them (b = 1) where the batch holds one table for all chunks.

        A batch of one embodiment does (`NeuralTokenizer.batch`); what depends on nothing else is then worked out once.
        """
        kind, which = batch.structure["kind"], batch.structure["which"]
        shared = kind.stride(0) == which.stride(0) == 0
        return (kind[:1], which[:1]) if shared else (kind, which)

    def describe(self, batch: CodecBatch, side: int) -> Float[Tensor, "b m n W"]:
        """Embedding of what each patch is, for the encoder (side 0) or decoder (side 1)."""
        kind, which = self.groups(batch)
        what = (self.kind(kind) + self.which(which)).chunk(2, -1)[side]
        return self.time[side] + what[:, None]

    def keys(self, batch: CodecBatch, side: int) -> Float[Tensor, "b L W"]:
        """Key of each patch for resampling, 0 where it is absent."""
        kind, which = self.groups(batch)
        what = (self.kind_key(kind) * self.which_key(which)).chunk(2, -1)[side]
        what = what * (kind > 0)[:, :, None]
        return (self.time_key[side] * what[:, None]).flatten(1, 2)

    def seen(self, batch: CodecBatch) -> Bool[Tensor, "b 1 1 L"]:
        """Which patches are there."""
        return (self.groups(batch)[0] > 0).repeat(1, self.steps)[:, None, None]

    # -- codec ----------------------------------------------------------------------------------------------------

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode."""
        parts = self.by_size(batch)
        if len(parts) == 1:
            return self._encode(batch)
        found = torch.cat([self._encode(part) for _, part in parts])
        return found[torch.cat([rows for rows, _ in parts]).argsort()]

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode."""
        parts = self.by_size(batch)
        if len(parts) == 1:
            return self._decode(latents, batch)
        found = torch.cat([self._decode(latents[rows], part) for rows, part in parts])
        return found[torch.cat([rows for rows, _ in parts]).argsort()]

    def by_size(self, batch: CodecBatch) -> list[tuple[Tensor, CodecBatch]]:
        """In training, the rows of a mixed batch by their number of patches, so that none carries another's padding.

        Elsewhere a batch is of one embodiment, and reading its sizes would only keep it from being compiled or exported.
        """
        if not self.training:
            return [(torch.empty(0), batch)]
        counts = (batch.structure["kind"] > 0).sum(1)
        parts = []
        for count in counts.unique().tolist():
            rows = torch.nonzero(counts == count)[:, 0]
            part = CodecBatch(
                actions=batch.actions[rows],
                present=batch.present[rows],
                real=batch.real[rows],
                embodiment=batch.embodiment[rows],
                structure={name: table[rows, :count] for name, table in batch.structure.items()},
            )
            parts.append((rows, part))
        return parts

    def _encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        seen = self.seen(batch)
        x = self.patch_in(self.patchify(batch)) + self.describe(batch, 0)
        for block in self.encoder:
            x = block(x, seen)
        z = self.pool(x.flatten(1, 2), self.slot_key[0], self.keys(batch, 0)) + self.slots[0]
        for block in self.latent_encoder:
            z = block(z)
        return self.to_latent(z)

    def _decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        z = self.from_latent(latents) + self.slots[1]
        for block in self.latent_decoder:
            z = block(z)
        what = self.describe(batch, 1)
        x = self.unpool(z, self.keys(batch, 1), self.slot_key[1]).unflatten(1, what.shape[1:3]) + what
        seen = self.seen(batch)
        for block in self.decoder:
            x = block(x, seen)
        return self.unpatchify(self.patch_out(self.out_norm(x)), batch)

    def reconstruction_losses(self, batch: CodecBatch, reconstruction: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Eq. (1) without the commitment term, which is the quantizer's: l1 in time and l1 of the DCT along time."""
        mask = weights(batch)
        error = (reconstruction - batch.actions) * mask
        losses = {"l1": masked_mean(error.abs(), mask)}
        if self.config.dct:
            spectrum = torch.einsum("kt,btd->bkd", self.dct.to(error.dtype), error)
            losses["dct"] = self.config.dct * masked_mean(spectrum.abs(), batch.present[:, None].expand_as(spectrum))
        return losses


class FasterVqTokenizer(NeuralTokenizer):
    """FASTerVQ behind the contract of every tokenizer."""

    kind = "fastervq"
    config_class = FasterVqConfig
    codec_class = FasterVq
    config: FasterVqConfig

    def _slots(self, embodiment: Embodiment) -> int:
        return self.config.latent_steps * self.config.latent_parts

    def _places(self, slot: Int[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        time, part = np.divmod(slot, self.config.latent_parts)
        return time, part

    def _block(self) -> int:
        return self.config.block
