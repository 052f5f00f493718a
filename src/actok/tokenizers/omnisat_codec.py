"""The network of OmniSAT and its settings: splines of body parts, and a residual quantiser for each class of them.

What it is, and what the paper leaves open: `actok.tokenizers.omnisat`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from actok.core import (
    ActionSpace,
    CodecBatch,
    CodecOutput,
    ConfigError,
    SpaceMismatchError,
)
from actok.core.config import merge_settings
from actok.nn.transformer import FeedForward
from actok.quantizers import Quantised, Quantizer, Usage, make_quantizer
from actok.signal.bpe import LARGEST_ALPHABET
from actok.signal.bspline import control_points, design_matrix
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape

CLASSES = ("position", "rotation", "gripper")

__all__ = ["CLASSES", "OmniSatCodec", "OmniSatConfig", "PartQuantizer", "parts_of"]


@dataclass(frozen=True, kw_only=True)
class OmniSatConfig:
    """Settings of OmniSatTokenizer.

    Attributes:
        points: control points of a dimension.
        degree: of the splines of everything but grippers.
        part_width: dimensions of a part at most; 6 keeps a 6-D rotation whole.
        latent: C, channels of a part's latent.
        width, depth: of the perceptrons, residual blocks of `width` units.
        vocab: V of the BPE, the symbols of single codes included.
        normaliser: see actok.signal.normalise.
        quantizer: see actok.quantizers.
        rotation_quantizer, gripper_quantizer: what differs from `quantizer` for parts of that class; one of another `kind`
            stands for itself. All have the same number of levels.
    """

    points: int = 8
    degree: int = 4
    part_width: int = 6
    latent: int = 64
    width: int = 256
    depth: int = 2
    vocab: int = 2048
    normaliser: NormaliserKind = "quantile"
    quantizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "residual", "levels": 8, "codes": 256})
    rotation_quantizer: Mapping[str, Any] = field(default_factory=dict)
    gripper_quantizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "residual", "codes": 64})

    def __post_init__(self) -> None:
        for name in ("points", "part_width", "latent", "width", "depth", "vocab"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a whole number of at least 1")
        if not isinstance(self.degree, int) or not 0 <= self.degree < self.points:
            raise ConfigError(
                f"degree is {self.degree!r}; a spline of {self.points} points takes a whole number from 0 to"
                f" {self.points - 1}"
            )
        if self.vocab > LARGEST_ALPHABET:
            raise ConfigError(f"vocab is {self.vocab}; give at most {LARGEST_ALPHABET}")

    def quantizer_of(self, part_class: str) -> Mapping[str, Any]:
        """Settings of the quantiser of a class of parts."""
        own = getattr(self, f"{part_class}_quantizer", {})
        return merge_settings({"quantizer": self.quantizer}, {"quantizer": own})["quantizer"]


def parts_of(space: ActionSpace, width: int) -> dict[str, list[np.ndarray]]:
    """Dimensions of each part of a space, by class; groups wider than `width` are cut about equally."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in CLASSES}
    for group in space.groups:
        cuts = np.array_split(np.array(group.dims), -(-len(group.dims) // width))
        found[group.kind if group.kind in CLASSES else "position"] += cuts
    return found


class PartQuantizer(Quantizer):
    """A quantiser for each class of parts, whose slots follow one another. Losses and usage are means over slots."""

    def __init__(self, config: OmniSatConfig, slots: Mapping[str, int]) -> None:
        made = {name: make_quantizer(config.quantizer_of(name), config.latent) for name, n in slots.items() if n}
        for name, quantizer in made.items():
            if quantizer.slots is not None:
                raise ConfigError(
                    f"the {name} quantizer is of kind {config.quantizer_of(name)['kind']!r}, which spreads its codes over"
                    " slots; a part has a single one: choose another kind"
                )
        levels = {name: quantizer.levels for name, quantizer in made.items()}
        if len(set(levels.values())) > 1:
            raise ConfigError(f"quantizers have different numbers of levels: {levels}; give all of them the same")
        super().__init__(config.latent, [max(sizes) for sizes in zip(*(q.sizes for q in made.values()), strict=True)])
        self.parts = nn.ModuleDict(made)
        self.counts = {name: slots[name] for name in made}

    def each(self) -> list[tuple[str, Quantizer, slice]]:
        """Class, quantiser and slots, in order."""
        found, start = [], 0
        for name, count in self.counts.items():
            found.append((name, self.parts[name], slice(start, start + count)))
            start += count
        return found  # type: ignore[return-value]

    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """See Quantizer."""
        found = [q(z[:, where], None if mask is None else mask[:, where]) for _, q, where in self.each()]
        share = torch.tensor([n / z.shape[1] for n in self.counts.values()], device=z.device)
        sizes = torch.tensor([q.sizes for _, q, _ in self.each()], device=z.device)
        names = {name for part in found for name in part.losses}
        return Quantised(
            quantised=torch.cat([part.quantised for part in found], 1),
            codes=torch.cat([part.codes for part in found], 1),
            level_vectors=torch.cat([part.level_vectors for part in found], 1),
            losses={
                name: sum(
                    (w * part.losses[name] for w, part in zip(share, found, strict=True) if name in part.losses),
                    z.new_zeros(()),
                )
                for name in sorted(names)
            },
            usage=Usage(
                share=(torch.stack([part.usage.share for part in found]) * sizes).sum(0) / sizes.sum(0),
                perplexity=(share @ torch.stack([part.usage.perplexity for part in found]).log()).exp(),
            ),
        )

    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B S Q"]:
        """See Quantizer."""
        return torch.cat([q.encode(z[:, where]) for _, q, where in self.each()], 1)

    def lookup(self, codes: Int[Tensor, "B S q"]) -> Float[Tensor, "B S C"]:
        """See Quantizer."""
        return torch.cat([q.lookup(codes[:, where]) for _, q, where in self.each()], 1)


class Perceptron(nn.Module):
    """`depth` residual feed-forward blocks between two linear maps."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.blocks = nn.ModuleList(FeedForward(width, width, gated=False) for _ in range(depth))
        self.leave = nn.Linear(width, outputs)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Last axis only."""
        x = self.enter(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.leave(x)


class OmniSatCodec(Codec):
    """One latent a part. Slots: position parts first, then rotations, then grippers, as many as any embodiment has."""

    order = "slot"
    quantizer: PartQuantizer

    def __init__(self, config: OmniSatConfig, shape: CodecShape) -> None:
        super().__init__()
        self.quantizer = PartQuantizer(config, {name: shape.extra[name] for name in CLASSES})
        symbols = self.class_sizes.sum()
        if symbols > config.vocab:
            raise ConfigError(
                f"vocab is {config.vocab}, but single codes alone take {symbols} symbols; give a larger vocab or fewer"
                " codes"
            )
        self.points, self.widths = config.points, {name: shape.extra[f"{name}_width"] for name in CLASSES}
        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        for name, _, _ in self.quantizer.each():
            numbers = config.points * self.widths[name]
            self.encoders[name] = Perceptron(numbers, config.latent, config.width, config.depth)
            self.decoders[name] = Perceptron(config.latent, numbers, config.width, config.depth)
            degree = 0 if name == "gripper" else config.degree
            fit = control_points(np.eye(shape.horizon)[None], config.points, degree)[0]
            draw = design_matrix(shape.horizon, config.points, degree)
            self.register_buffer(f"fit_{name}", torch.tensor(fit, dtype=torch.float32), persistent=False)
            self.register_buffer(f"draw_{name}", torch.tensor(draw, dtype=torch.float32), persistent=False)

    @property
    def class_sizes(self) -> Int[np.ndarray, "classes"]:
        """Most codes of any level, for each class of parts that there is."""
        return np.array([max(q.sizes) for _, q, _ in self.quantizer.each()])

    @property
    def slot_class(self) -> Int[np.ndarray, "S"]:
        """Which class (of those there are) each slot is of."""
        counts = list(self.quantizer.counts.values())
        return np.repeat(np.arange(len(counts)), counts)

    @classmethod
    def measure(cls, config: OmniSatConfig, spaces: Sequence[ActionSpace]) -> dict[str, int]:
        """Of each class of parts the most that any space has, and their greatest width."""
        found = [parts_of(space, config.part_width) for space in spaces]
        counts = {name: max(len(f[name]) for f in found) for name in CLASSES}
        return counts | {
            f"{name}_width": max((len(dims) for f in found for dims in f[name]), default=0) for name in CLASSES
        }

    @classmethod
    def structure(cls, config: OmniSatConfig, space: ActionSpace, shape: CodecShape) -> dict[str, np.ndarray]:
        """channels: [S, W] channel at each place of each slot, D where there is none; place: [D] the inverse, flat."""
        width = max(shape.extra[f"{name}_width"] for name in CLASSES)
        rows = []
        for name, parts in parts_of(space, config.part_width).items():
            most, widest = shape.extra[name], shape.extra[f"{name}_width"]
            if len(parts) > most or any(len(dims) > widest for dims in parts):
                raise SpaceMismatchError(
                    f"space {space.embodiment!r} has {len(parts)} {name} parts of up to {max(map(len, parts))} dimensions,"
                    f" this codec {most} of {widest}; train one with such an embodiment among its data"
                )
            table = np.full((most, width), shape.channels)
            for row, dims in zip(table, parts, strict=False):
                row[: len(dims)] = dims
            rows.append(table)
        channels = np.concatenate(rows).astype(np.int64)
        place = np.zeros(shape.channels + 1, np.int64)
        place[channels.ravel()] = np.arange(channels.size)
        return {"channels": channels, "place": place[:-1]}

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec."""
        x = F.pad(batch.actions, (0, 1)).transpose(1, 2)  # channel D holds zeros
        channels = batch.structure["channels"]
        index = channels.flatten(1)[:, :, None].expand(-1, -1, x.shape[2])
        parts = x.gather(1, index).unflatten(1, channels.shape[1:])
        found = []
        for name, _, where in self.quantizer.each():
            fit = getattr(self, f"fit_{name}")
            found.append(self.encoders[name](torch.matmul(parts[:, where, : self.widths[name]], fit.T).flatten(2)))
        return torch.cat(found, 1)

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec."""
        found, width = [], batch.structure["channels"].shape[2]
        for name, _, where in self.quantizer.each():
            controls = self.decoders[name](latents[:, where]).unflatten(2, (self.widths[name], self.points))
            curves = torch.matmul(controls, getattr(self, f"draw_{name}").T)
            found.append(F.pad(curves, (0, 0, 0, width - self.widths[name])))
        parts = torch.cat(found, 1).flatten(1, 2)
        index = batch.structure["place"][:, :, None].expand(-1, -1, parts.shape[2])
        return parts.gather(1, index).transpose(1, 2)

    def forward(self, batch: CodecBatch) -> CodecOutput:
        """See Codec; absent parts count in no statistic of the codebooks."""
        latents = self.encode(batch)
        channels = batch.structure["channels"]
        there = F.pad(batch.present, (0, 1)).gather(1, channels.flatten(1)).unflatten(1, channels.shape[1:]).any(2)
        found = self.quantizer(latents, there)
        reconstruction = self.decode(found.quantised, batch) * batch.present[:, None]
        return CodecOutput(
            latents=latents,
            quantised=found.quantised,
            level_vectors=found.level_vectors,
            codes=found.codes,
            reconstruction=reconstruction,
            losses={**self.reconstruction_losses(batch, reconstruction), **found.losses},
            usage=found.usage,
        )
