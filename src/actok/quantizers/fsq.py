"""Finite scalar quantisation: a few bounded channels, each rounded to a few values; the codebook is their product.

Source: Mentzer et al. 2023 (arXiv 2309.15505, section 3.1 and appendix A.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ConfigError
from actok.quantizers.base import Quantizer, check_count, full_precision, straight_through
from actok.quantizers.result import Quantised, measure_usage

__all__ = ["FiniteScalarConfig", "FiniteScalarQuantizer"]

# How far the bound reaches beyond the outermost value, so that rounding can reach it (appendix A.1).
REACH = 1e-3
# From here on the reach would go half a step too far, and rounding take it to a value that does not exist.
MOST_VALUES = round(1 / REACH)


@dataclass(frozen=True, kw_only=True)
class FiniteScalarConfig:
    """Settings of FiniteScalarQuantizer: `levels`, how many values each code channel has; K is their product."""

    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not isinstance(self.levels, tuple) or not self.levels:
            raise ConfigError(f"levels is {self.levels!r}; give a list of numbers of values, such as [8, 5, 5, 5]")
        for count in self.levels:
            if check_count("levels", count) < 3:
                raise ConfigError(f"levels has {count}; give at least 3 a channel, or use kind='lfq' for binary codes")
        if prod(self.levels) > 2**24:
            raise ConfigError(f"levels {self.levels!r} make {prod(self.levels)} codes; stay within {2**24}")
        if max(self.levels) > MOST_VALUES:
            raise ConfigError(f"levels has {max(self.levels)}; give at most {MOST_VALUES} a channel, and more channels")


class FiniteScalarQuantizer(Quantizer):
    """One code a slot (Q = 1), without codebook or losses: there is nothing to update and no code to die.

    Latents are projected to one channel per entry of `levels` and back, unless C is that number already. The first
    channel varies fastest in a code.
    """

    def __init__(self, config: FiniteScalarConfig, dim: int) -> None:
        super().__init__(dim, (prod(config.levels),))
        self.config = config
        width = len(config.levels)
        self.project_in = nn.Identity() if width == dim else nn.Linear(dim, width)
        self.project_out = nn.Identity() if width == dim else nn.Linear(width, dim)
        # Constants of the config: not part of the weights.
        counts = torch.tensor(config.levels)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("strides", torch.cat([counts.new_ones(1), counts[:-1].cumprod(0)]), persistent=False)
        reach = (counts - 1) * (1 + REACH) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.atanh(offset / reach), persistent=False)

    counts: Tensor
    strides: Tensor
    reach: Tensor
    offset: Tensor
    shift: Tensor

    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """See Quantizer."""
        with full_precision(z):
            bounded = self._bound(z)
            steps = bounded.round()
            codes = self._codes(steps)
            half = self.counts // 2
            quantised = self.project_out(straight_through(bounded / half, steps / half))
            return Quantised(
                quantised=quantised,
                codes=codes,
                level_vectors=quantised[:, :, None],
                losses={},
                usage=measure_usage(codes, self.sizes, mask),
            )

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B S 1"]:
        """See Quantizer."""
        with full_precision(z):
            return self._codes(self._bound(z).round())

    def lookup(self, codes: Int[Tensor, "B S 1"]) -> Float[Tensor, "B S C"]:
        """See Quantizer."""
        with full_precision(codes):
            half = self.counts // 2
            steps = (codes // self.strides % self.counts - half).float()
            return self.project_out(steps / half)

    def _bound(self, z: Tensor) -> Tensor:
        """Channels [B, S, L] within what rounding takes to -(L // 2) ... (L - 1) // 2."""
        return torch.tanh(self.project_in(z.float()) + self.shift) * self.reach - self.offset

    def _codes(self, steps: Tensor) -> Tensor:
        return ((steps.long() + self.counts // 2) * self.strides).sum(-1, keepdim=True)
