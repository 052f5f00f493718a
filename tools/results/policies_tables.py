"""Figures of rolled-out policies: pooled over seeds, compared on the same start states, beside the tokenizers' errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actok.evaluation.intervals import CONFIDENCE, compare_paired, success_rates

# Pairings of the permutation test of a rank correlation.
RESAMPLES = 9999
TOLD = 15  # differences, by name
LEAST_FOR_RANKS = 4

__all__ = ["Rolls", "exceeding", "holm", "pairs", "rank_correlation", "slim_rollout", "summary"]

# Rollouts of one variant by seed.
Rolls = Mapping[int, Mapping[str, Any]]


def slim_rollout(rolled: Mapping[str, Any]) -> dict[str, Any]:
    """Of a rollout.json, what the tables rest on. Successes of each task are a text of 0 and 1, episode by episode."""
    meta = rolled["policy"]["meta"]
    by_task: dict[str, str] = {}
    for episode in rolled["episodes"]:
        by_task[episode["task"]] = by_task.get(episode["task"], "") + str(int(episode["success"]))
    single = rolled["latency"]["single"]
    return {
        "n": len(rolled["episodes"]),
        "success": int(sum(rolled["success"])),
        "rate": rolled["rate"],
        "ci95": rolled["ci95"],
        "episodes": by_task,
        "limits": {task: row["limit"] for task, row in rolled["per_task"].items()},
        "invalid": rolled["invalid"],
        "clipped": rolled["clipped"],
        "chunks": rolled["chunks"],
        "passes": rolled["passes"],
        "steps_to_success": rolled["steps_to_success"],
        "ms": {stage: value["p50"] for stage, value in single["ms"].items()},
        "ms_p95": single["ms"]["total"]["p95"],
        "tokens": (meta.get("tokens") or {}).get("mean"),
        "parameters": rolled["policy"]["parameters"],
        "training": {
            key: (meta.get("training") or {}).get(key) for key in ("steps", "seconds", "losses", "validation")
        },
        "commit": rolled["provenance"]["commit"],
        "created": rolled["provenance"]["created"],
    }


def _outcomes(rolls: Rolls) -> dict[tuple[int, str, int], bool]:
    """Success of every episode by (seed, task, number), which name its start state."""
    return {
        (seed, task, number): mark == "1"
        for seed, roll in rolls.items()
        for task, marks in roll["episodes"].items()
        for number, mark in enumerate(marks)
    }


def summary(rolls: Rolls) -> dict[str, Any]:
    """All seeds of a variant together; {} for none. Intervals are Wilson's over all episodes."""
    if not rolls:
        return {}
    outcomes = _outcomes(rolls)
    rates = success_rates(np.array(list(outcomes.values())), [task for _, task, _ in outcomes])
    found = list(rolls.values())
    chunks = sum(roll["chunks"] for roll in found)
    tokens = [roll["tokens"] for roll in found if roll["tokens"] is not None]
    return {
        "n": len(outcomes),
        "success": sum(outcomes.values()),
        "rate": rates["rate"],
        "ci95": rates["ci95"],
        "per_task": rates["per_task"],
        "invalid": sum(roll["invalid"] for roll in found),
        "clipped": sum(roll["clipped"] for roll in found),
        "passes": sum(roll["passes"] * roll["chunks"] for roll in found) / chunks,
        "tokens": float(np.mean(tokens)) if tokens else None,
        "ms": float(np.median([roll["ms"]["total"] for roll in found])),
        "parameters": found[0]["parameters"],
        "seeds": {str(seed): roll for seed, roll in rolls.items()},
    }


def pairs(variants: Mapping[str, Rolls]) -> list[dict[str, Any]]:
    """Every two variants on the start states that both met: difference of success with Newcombe's paired interval,
    McNemar's exact test, and its p-value after Holm's correction for all these pairs.
    """
    outcomes = {name: _outcomes(rolls) for name, rolls in variants.items() if rolls}
    names = list(outcomes)
    found = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            common = [key for key in outcomes[a] if key in outcomes[b]]
            if not common:
                continue
            c = compare_paired(
                np.array([outcomes[a][key] for key in common]),
                np.array([outcomes[b][key] for key in common]),
                CONFIDENCE,
            )
            found.append(
                {
                    "a": a,
                    "b": b,
                    "n": len(common),
                    "only_a": c.only_a,
                    "only_b": c.only_b,
                    "difference": c.difference,
                    "ci95": [c.low, c.high],
                    "exceeds": c.low > 0 or c.high < 0,
                    "p_value": c.p_value,
                }
            )
    for row, corrected in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = corrected
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979, Scandinavian Journal of Statistics 6:65): p-values for that many tests at once."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.zeros(len(p_values))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return [float(value) for value in corrected]


def exceeding(found: Sequence[Mapping[str, Any]]) -> str:
    """Which differences exceed their interval, as a sentence or two; of many the largest are told."""
    if not found:
        return "There are not two to compare yet."
    rows = sorted((row for row in found if row["exceeds"]), key=lambda row: -abs(row["difference"]))
    count = f"{len(rows)} of {len(found)} differences" if len(found) > 1 else f"{len(rows)} of 1 difference"
    lines = [f"{count} exceed their 95 % interval (Newcombe, on the same start states)"]
    if rows:
        told = []
        for row in rows[:TOLD]:
            better, worse = (row["a"], row["b"]) if row["difference"] > 0 else (row["b"], row["a"])
            low, high = sorted(abs(value) for value in row["ci95"])
            told.append(
                f"{better} over {worse} by {100 * abs(row['difference']):.1f} points ({100 * low:.1f} to {100 * high:.1f})"
            )
        told += [f"and {len(rows) - TOLD} smaller ones"] if len(rows) > TOLD else []
        lines[0] += ": " + "; ".join(told)
    left = sum(row["p_holm"] < 1 - CONFIDENCE for row in found)
    lines.append(
        f"Where nothing differed, {(1 - CONFIDENCE) * len(found):.1g} would be expected; by McNemar's test with Holm's"
        f" correction {left} remain. Intervals count episodes as independent; they say nothing of other training seeds."
    )
    return ". ".join(lines)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Spearman's rho of two figures of the same things with the p-value of a permutation test (seed 0); None for fewer than
    four, or where one of them never changes.
    """
    from scipy.stats import permutation_test, rankdata

    if len(x) < LEAST_FOR_RANKS or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = np.linalg.norm(a) * np.linalg.norm(b)

    def rho(shuffled: np.ndarray, axis: int) -> np.ndarray:
        return np.tensordot(shuffled, b, (axis, 0)) / scale

    test = permutation_test(
        (a,), rho, permutation_type="pairings", n_resamples=RESAMPLES, vectorized=True, rng=np.random.default_rng(0)
    )
    return {"rho": float(test.statistic), "p_value": float(test.pvalue), "n": len(x)}
