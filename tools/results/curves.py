"""Figures of a unit, and rate-distortion curves read off between their points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Of the valid reconstruction rate that learned tokenizers are compared at.
TOLERANCES = (0.03, 0.1)

__all__ = ["TOLERANCES", "Figures", "Rate", "curve", "expected_entropy", "expected_share", "figures", "read_off"]

Rate = Callable[["Figures"], float]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Size and error of a tokenizer on a data set.

    Attributes:
        tokens, bits: of a chunk, mean; bits at fixed rate.
        l1: mean error, normalised units.
        vrr: valid reconstruction rate at each of TOLERANCES.
    """

    tokens: float
    bits: float
    l1: float
    vrr: tuple[float, ...]

    def text(self) -> str:
        """l1 and both rates, for a cell."""
        return f"{self.l1:.3g}; " + " / ".join(f"{v:.2f}" for v in self.vrr)


def figures(unit: Mapping[str, Any] | None) -> Figures | None:
    """Of a measured unit; None where it failed or there is none, or where no chunk decoded."""
    if unit is None or unit["status"] != "ok" or unit["metrics"]["normalised"]["l1"] is None:
        return None
    m = unit["metrics"]
    known = m["vrr"]["tolerances"]
    return Figures(
        tokens=m["rate"]["tokens_mean"],
        bits=m["rate"]["bits_fixed"],
        l1=m["normalised"]["l1"],
        vrr=tuple(m["vrr"]["literal"][int(np.argmin(np.abs(np.array(known) - t)))] for t in TOLERANCES),
    )


def curve(units: Sequence[Mapping[str, Any]], name: str) -> list[Figures]:
    """The points of a preset's sweep."""
    found = [figures(u) for u in units if u["tokenizer"] == name and u["sweep"]]
    return [f for f in found if f is not None]


def read_off(points: Sequence[Figures], rate: Rate, at: float) -> Figures | None:
    """A sweep between its points at a rate (of tokens or bits): l1 linear in both logarithms, VRR in that of the rate.

    None outside the sweep.
    """
    points = sorted(points, key=rate)
    if not points or not rate(points[0]) <= at <= rate(points[-1]):
        return None
    rates = np.log([rate(p) for p in points])

    def between(values: Sequence[float]) -> float:
        return float(np.interp(np.log(at), rates, values))

    return Figures(
        tokens=float(np.exp(between(np.log([p.tokens for p in points]).tolist()))),
        bits=float(np.exp(between(np.log([p.bits for p in points]).tolist()))),
        l1=float(np.exp(between(np.log([p.l1 for p in points]).tolist()))),
        vrr=tuple(between([p.vrr[i] for p in points]) for i in range(len(TOLERANCES))),
    )


def expected_share(size: int, drawn: int) -> float:
    """Share of `size` codes that so many uniform draws are expected to see: 1 - (1 - 1 / size)^drawn."""
    return float(-np.expm1(drawn * np.log1p(-1 / size)))


def expected_entropy(size: int, drawn: int, repeats: int = 20) -> float:
    """Mean normalised entropy of the histogram of so many uniform draws from `size` codes, simulated with seed 0."""
    counts = np.random.default_rng(0).multinomial(drawn, np.full(size, 1 / size), repeats)
    return float(np.mean([entropy(row) for row in counts]))


def entropy(counts: np.ndarray) -> float:
    """Entropy of a histogram over the logarithm of its size."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts)))
