"""Statistics of success rates: how sure a proportion is, and whether two of them differ on the same episodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from actok.core.errors import DataError

CONFIDENCE = 0.95

__all__ = [
    "CONFIDENCE",
    "PairedComparison",
    "compare_all",
    "compare_paired",
    "mcnemar",
    "paired_difference",
    "success_rates",
    "wilson",
]


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two procedures on the same episodes.

    Attributes:
        both, only_a, only_b, neither: episodes by who succeeded.
        difference: success rate of a minus that of b.
        low, high: confidence interval of the difference (`paired_difference`).
        p_value: exact McNemar test (`mcnemar`) that neither is better.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    low: float
    high: float
    p_value: float


def _check_confidence(confidence: float) -> float:
    """The normal quantile of a two-sided interval."""
    if not 0 < confidence < 1:
        raise DataError(f"confidence is {confidence}; give a value between 0 and 1, e.g. 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count != int(count) or count < 0:
            raise DataError(f"{name} is {count}; give a whole number, at least 0")


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper end of Wilson's score interval for a proportion (Wilson 1927, JASA 22:209).

    Unlike the normal approximation it stays inside [0, 1] and has a sensible width at 0 and n successes. Raises
    DataError for n < 1 or successes outside 0..n.
    """
    z = _check_confidence(confidence)
    _check_counts(successes=successes, n=n)
    if n < 1 or successes > n:
        raise DataError(f"{successes} successes of {n} trials is not a proportion; give 0 <= successes <= n and n >= 1")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the interval begins at p exactly; rounding must not place it beside.
    low = 0.0 if successes == 0 else centre - margin
    high = 1.0 if successes == n else centre + margin
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: a fair coin decides each episode on which a and b disagree.

    Source: McNemar 1947, Psychometrika 12:153, with the binomial distribution in place of its approximation. It is 1
    where they never disagree.
    """
    _check_counts(only_a=only_a, only_b=only_b)
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def paired_difference(
    both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Lower and upper end of the interval of rate a minus rate b, on the same episodes.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10: the Wilson intervals of both rates, squared and
    added, less the correlation between them (phi, with continuity correction where it is positive). Raises DataError
    where there is no episode.
    """
    _check_counts(both=both, only_a=only_a, only_b=only_b, neither=neither)
    n = both + only_a + only_b + neither
    if n < 1:
        raise DataError("no episode to compare; give at least one")
    rate_a, rate_b = (both + only_a) / n, (both + only_b) / n
    low_a, high_a = wilson(both + only_a, n, confidence)
    low_b, high_b = wilson(both + only_b, n, confidence)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = 0.0
    if margins:
        cross = both * neither - only_a * only_b
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins)

    def reach(first: float, second: float) -> float:
        return math.sqrt(max(first * first - 2 * phi * first * second + second * second, 0.0))

    difference = (only_a - only_b) / n
    return (
        max(-1.0, difference - reach(rate_a - low_a, high_b - rate_b)),
        min(1.0, difference + reach(high_a - rate_a, rate_b - low_b)),
    )


def compare_paired(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> PairedComparison:
    """Compare successes bool [E] of two procedures on the same E episodes, in the same order."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape:
        raise DataError(
            f"successes have dtypes {a.dtype}, {b.dtype} and shapes {a.shape}, {b.shape}; give two bool arrays of the"
            " same episodes"
        )
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    neither = len(a) - both - only_a - only_b
    low, high = paired_difference(both, only_a, only_b, neither, confidence)
    return PairedComparison(
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        difference=(only_a - only_b) / len(a),
        low=low,
        high=high,
        p_value=mcnemar(only_a, only_b),
    )


def success_rates(success: np.ndarray, tasks: Sequence[str]) -> dict[str, Any]:
    """Successes bool [E] of episodes of these tasks, as JSON values.

    {success: [bool], rate, ci95 (Wilson), per_task: {task: {n, success, rate, ci95}}}, tasks by first appearance.
    """
    names = np.array(tasks)
    per_task = {}
    for task in dict.fromkeys(names.tolist()):
        part = success[names == task]
        per_task[task] = {"n": len(part), "success": int(part.sum()), **_proportion(part)}
    return {"success": success.tolist(), **_proportion(success), "per_task": per_task}


def compare_all(success: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every two names' successes on the same episodes, as JSON values (`compare_paired`)."""
    found = []
    for a, b in itertools.combinations(success, 2):
        c = compare_paired(success[a], success[b], CONFIDENCE)
        found.append(
            {
                "a": a,
                "b": b,
                "both": c.both,
                "only_a": c.only_a,
                "only_b": c.only_b,
                "neither": c.neither,
                "difference": c.difference,
                "ci95": [c.low, c.high],
                "p_value": c.p_value,
            }
        )
    return found


def _proportion(success: np.ndarray) -> dict[str, Any]:
    count = int(success.sum())
    return {"rate": count / len(success), "ci95": list(wilson(count, len(success), CONFIDENCE))}
