"""What every quantiser offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ConfigError
from actok.quantizers.result import Quantised, Usage

__all__ = [
    "Quantizer",
    "check_choice",
    "check_count",
    "check_range",
    "full_precision",
    "masked_mean",
    "straight_through",
]


class Quantizer(nn.Module, ABC):
    """Latents [B, S, C] to Q codes a slot and back.

    Everything is computed in float32, also under autocast. In training mode, `forward` also updates codebooks, from the
    slots where `mask` is True only; in evaluation mode nothing changes.

    Attributes:
        dim: C of the latents.
        levels: Q codes a slot.
        sizes: K of each level.
        slots: None where every latent slot has its own codes; else how many code slots there are whatever S is.
        bypassed: True lets latents through as they are, without codes, losses or updates: the first steps of a training
            that starts the codebooks from latents worth clustering.
    """

    slots: int | None = None
    bypassed: bool = False

    def __init__(self, dim: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.sizes = tuple(sizes)
        self.levels = len(self.sizes)

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Quantised:
        """As `forward`, unless `bypassed`."""
        if not self.bypassed:
            found: Quantised = super().__call__(z, mask)
            return found
        shape = (len(z), z.shape[1] if self.slots is None else self.slots, self.levels)
        nothing = z.new_zeros(self.levels, dtype=torch.float32)
        return Quantised(
            quantised=z.float(),
            codes=torch.zeros(shape, dtype=torch.int64, device=z.device),
            level_vectors=z.new_zeros(*shape, self.dim, dtype=torch.float32),
            losses={},
            usage=Usage(share=nothing, perplexity=nothing),
        )

    @abstractmethod
    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """Quantise latents; `mask` is False at padded slots, which then count nowhere."""

    @abstractmethod
    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B slots Q"]:
        """Codes [B, S, Q] int64 of latents, at inference. No gradient, no update."""

    @abstractmethod
    def lookup(self, codes: Int[Tensor, "B slots q"]) -> Float[Tensor, "B S C"]:
        """Latents [B, S, C] of the first q <= Q levels' codes: the sum of these levels."""

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"dim={self.dim}, sizes={self.sizes}"


def full_precision(z: Tensor) -> torch.autocast:
    """A context in which autocast does nothing: a codebook of bfloat16 would lose its small EMA steps."""
    return torch.autocast(z.device.type, enabled=False)


def straight_through(z: Float[Tensor, "*any"], value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Exactly `value`, with the gradient of z."""
    return value.detach() + (z - z.detach())


def masked_mean(values: Float[Tensor, "N C"], mask: Bool[Tensor, "N"] | None) -> Float[Tensor, ""]:
    """Mean over the rows where `mask` is True and over C; 0 where no row is."""
    if mask is None:
        return values.mean()
    weight = mask.to(values.dtype)
    return (values.mean(1) * weight).sum() / weight.sum().clamp(min=1.0)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
    return value


def check_range(name: str, value: Any, low: float, high: float = float("inf")) -> float:
    """A finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or not low <= value <= high:
        limit = f"from {low:g} to {high:g}" if isfinite(high) else f"of at least {low:g}"
        raise ConfigError(f"{name} is {value!r}; give a number {limit}")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    return str(value)
