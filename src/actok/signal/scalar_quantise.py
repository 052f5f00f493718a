"""Bits for decorrelated scalars, and the uniform quantiser of each.

Bits are given out greedily, each to where it removes the most of the error that a Gaussian of that variance would have
left, variance * 4 ** -bits (reverse water-filling; Cover and Thomas, Elements of Information Theory, section 10.3). A
scalar has no bit or at least `smallest`: two or four levels on a heavy-tailed scalar can do worse than its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core.errors import ConfigError
from actok.signal.normalise import RANGE_SLACK

SMALLEST_BITS = 2
# Shares of the training values cut off at each end; a scalar takes the one whose range leaves the least squared error.
TAILS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.16)

__all__ = ["SMALLEST_BITS", "UniformQuantiser", "allocate_bits"]


def allocate_bits(
    variance: Float[np.ndarray, "S"], budget: int, *, largest: int = 8, smallest: int = SMALLEST_BITS
) -> Int[np.ndarray, "S"]:
    """Bits int64 [S], each 0 or from `smallest` to `largest`, that sum to `budget`; more variance never has fewer.

    Where all scalars that vary have `largest` bits, what is left of the budget stays unspent. Raises ConfigError for a
    budget below `smallest`.
    """
    if not 1 <= smallest < largest:
        raise ConfigError(f"bits from {smallest} to {largest}; give a largest number above the smallest")
    if budget < smallest:
        raise ConfigError(f"a budget of {budget} bits is below the {smallest} of one scalar; give more bits")
    order = np.argsort(-variance, kind="stable")
    ranked = np.asarray(variance, np.float64)[order]
    varying = int((ranked > 0).sum())
    budget = min(budget, varying * largest)
    bits = np.zeros(len(ranked), np.int64)
    # Logarithms of the gain per bit, so that no variance is too small to compare; -inf where no bit may go.
    with np.errstate(divide="ignore"):
        log_variance = np.log2(ranked)
    gain = log_variance + np.log2((1 - 4.0**-smallest) / smallest)  # of the first `smallest` bits together
    left = budget
    while left > 0:
        cost = np.where(bits == 0, smallest, 1)
        i = int(np.argmax(np.where(cost <= left, gain, -np.inf)))
        if gain[i] == -np.inf or cost[i] > left:
            # Only scalars without bits remain and the rest does not open one: the last one served makes up for it.
            served = int((bits > 0).sum())
            donor = int(np.flatnonzero(bits == bits[:served].max())[-1])
            need = smallest - left
            if bits[donor] - need < smallest:
                break
            bits[donor] -= need
            bits[served] = smallest
            break
        bits[i] += cost[i]
        left -= int(cost[i])
        gain[i] = -np.inf if bits[i] == largest else log_variance[i] + np.log2(0.75) - 2.0 * bits[i]
    result = np.empty_like(bits)
    result[order] = bits
    return result


@dataclass(frozen=True, kw_only=True, eq=False)
class UniformQuantiser:
    """S uniform scalar quantisers; code c stands for the centre low + (c + 0.5) * step of its bin.

    Attributes:
        bits: int64 [S].
        low: float64 [S], lower edge of the lowest bin.
        step: float64 [S], width of a bin; 0 where the scalar did not vary.
    """

    bits: Int[np.ndarray, "S"]
    low: Float[np.ndarray, "S"]
    step: Float[np.ndarray, "S"]

    @classmethod
    def fit(cls, values: Float[np.ndarray, "_ S"], bits: Int[np.ndarray, "S"]) -> Self:
        """Ranges for training values [M, S]: the quantiles at one of TAILS that leave the least squared error."""
        levels = 2.0**bits
        quantiles = np.quantile(values, [*TAILS, *(1 - t for t in TAILS)], axis=0)
        best = np.full(len(bits), np.inf)
        low, step = np.zeros(len(bits)), np.zeros(len(bits))
        for bottom, top in zip(quantiles[: len(TAILS)], quantiles[len(TAILS) :], strict=True):
            width = (top - bottom) / levels
            # A range that a spike has emptied is a single level; only a scalar that never varies may keep it.
            safe = np.where(width > 0, width, 1.0)
            codes = np.clip(np.floor((values - bottom) / safe), 0, levels - 1)
            error = ((bottom + (codes + 0.5) * width - values) ** 2).mean(0)
            better = (error < best) & ((width > 0) | (best == np.inf))
            best = np.where(better, error, best)
            low, step = np.where(better, bottom, low), np.where(better, width, step)
        return cls(bits=bits.astype(np.int64), low=low, step=step)

    @property
    def levels(self) -> Int[np.ndarray, "S"]:
        """int64 [S]: 2 ** bits."""
        return 2**self.bits

    def encode(
        self, values: Float[np.ndarray, "*batch S"]
    ) -> tuple[Int[np.ndarray, "*batch S"], Bool[np.ndarray, "*batch S"]]:
        """Codes int64 and whether each value lay outside its range (and takes the end bin), both shaped as [..., S]."""
        flat = self.step == 0
        position = (values - self.low) / np.where(flat, 1.0, self.step)
        codes = np.where(flat, 0, np.clip(np.floor(position), 0, self.levels - 1)).astype(np.int64)
        slack = RANGE_SLACK * self.levels
        outside = np.where(flat, np.abs(position) > RANGE_SLACK, (position < -slack) | (position > self.levels + slack))
        return codes, outside

    def decode(self, codes: Int[np.ndarray, "*batch ranks"]) -> Float[np.ndarray, "*batch ranks"]:
        """Bin centres float64 [..., R] of codes [..., R] of the first R <= S scalars."""
        ranks = codes.shape[-1]
        return self.low[:ranks] + (codes + 0.5) * self.step[:ranks]
