"""LeRobot's statistics of a dataset: per feature min, max, mean, std, count and quantiles, merged episode by episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from actok.data.lerobot_tables import Frames

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
# Image statistics are over at most this many frames of an episode, evenly spaced, and every PIXEL_STRIDE-th pixel of
# images of a side above PIXEL_LIMIT: they only serve to normalise.
IMAGE_FRAMES = 100
PIXEL_LIMIT = 300
PIXEL_STRIDE = 4

Stats = dict[str, dict[str, np.ndarray]]

__all__ = ["Stats", "episode_stats", "merge_stats", "stats_columns", "to_lists"]


def episode_stats(frames: Frames, images: Mapping[str, np.ndarray]) -> Stats:
    """By feature: min, max, mean, std and quantiles [D] ([3, 1, 1] of pixels in 0..1 for images), and count [1]."""
    stats = {key: _describe(values.reshape(len(values), -1)) for key, values in frames.vectors.items()}
    for view, video in images.items():
        chosen = video[np.linspace(0, len(video) - 1, min(len(video), IMAGE_FRAMES)).round().astype(int)]
        if max(chosen.shape[1:3]) > PIXEL_LIMIT:
            chosen = chosen[:, ::PIXEL_STRIDE, ::PIXEL_STRIDE]
        found = _describe(chosen.reshape(-1, 3) / 255.0)
        stats[frames.views[view]] = {k: v.reshape(3, 1, 1) for k, v in found.items() if k != "count"} | {
            "count": np.array([len(chosen)])
        }
    return stats


def _describe(values: np.ndarray) -> dict[str, np.ndarray]:
    values = values.astype(np.float64)
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
    }
    return found | dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True))


def merge_stats(left: Stats, right: Stats) -> Stats:
    """Statistics of both together: exact for min, max, mean, std and count (Chan et al. 1979); quantiles are averaged
    with the counts as weights, LeRobot's own rule."""
    merged = {**left, **right}
    for key in left.keys() & right.keys():
        a, b = left[key], right[key]
        share = b["count"][0] / (a["count"][0] + b["count"][0])
        gap = b["mean"] - a["mean"]
        variance = (1 - share) * a["std"] ** 2 + share * b["std"] ** 2 + share * (1 - share) * gap**2
        merged[key] = {
            "min": np.minimum(a["min"], b["min"]),
            "max": np.maximum(a["max"], b["max"]),
            "mean": a["mean"] + share * gap,
            "std": np.sqrt(variance),
            "count": a["count"] + b["count"],
        } | {q: (1 - share) * a[q] + share * b[q] for q in QUANTILES}
    return merged


def to_lists(stats: Stats, *, quantiles: bool) -> dict[str, dict[str, Any]]:
    """As JSON values; the v2.1 layout knows no quantiles."""
    return {
        key: {name: value.tolist() for name, value in found.items() if quantiles or name not in QUANTILES}
        for key, found in stats.items()
    }


def stats_columns(stats: Stats) -> dict[str, Any]:
    """As columns `stats/FEATURE/NAME` of the v3.0 layout's episode table."""
    return {f"stats/{key}/{name}": value.tolist() for key, found in stats.items() for name, value in found.items()}
