"""Pictures of level-0 codes, drawn from the JSON beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark.plots import COLOURS, MARKERS
from actok.core.files import atomic_path

# Labels with a colour of their own; the others are grey.
COLOURED = 12
SHOWN_LABELS = ("phase", "task")
SHOWN_CODES = 5
GREY = "#C0C0C0"
DPI = 110

__all__ = ["draw_codes", "draw_maps"]


def draw_maps(pictures: Mapping[str, Any], path: Path) -> Path | None:
    """One panel for each variant and label; None where there is no map."""
    from matplotlib.figure import Figure

    variants = {name: found for name, found in pictures["variants"].items() if found["map"]}
    if not variants:
        return None
    figure = Figure(figsize=(6.8 * len(SHOWN_LABELS), 4.4 * len(variants)), layout="constrained")
    axes = figure.subplots(len(variants), len(SHOWN_LABELS), squeeze=False)
    for row, (variant, found) in enumerate(variants.items()):
        points = np.array(found["map"]["points"])
        for column, label in enumerate(SHOWN_LABELS):
            panel = axes[row][column]
            panel.set(xticks=[], yticks=[], title=f"{variant}, by {label}")
            ids = found["map"]["labels"].get(label)
            if ids is None:
                panel.scatter(*points.T, s=8, color=GREY)
                continue
            _scatter(panel, points, np.array(ids), pictures["names"].get(label))
    return _save(figure, path)


def _scatter(panel: Any, points: np.ndarray, ids: np.ndarray, names: Any) -> None:
    common = [i for i, _ in Counter(ids[ids >= 0].tolist()).most_common(COLOURED)]
    rest = ~np.isin(ids, common)
    panel.scatter(*points[rest].T, s=6, color=GREY, label="others" if rest.any() else None)
    for k, one in enumerate(common):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        panel.scatter(*points[ids == one].T, s=12, label=str(names[one] if names else one)[:40], **style)
    panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_codes(pictures: Mapping[str, Any], path: Path, dims: Sequence[str]) -> Path | None:
    """Mean decoded motion of the most used codes, a row for each variant, a line for each of `dims`; None where there are
    none."""
    from matplotlib.figure import Figure

    variants = {
        name: shown
        for name, found in pictures["variants"].items()
        if (shown := [e for e in found["examples"] or [] if e["motion"] is not None][:SHOWN_CODES])
    }
    if not variants:
        return None
    figure = Figure(figsize=(2.3 * SHOWN_CODES, 2.0 * len(variants)), layout="constrained")
    axes = figure.subplots(len(variants), SHOWN_CODES, squeeze=False, sharex=True, sharey=True)
    for row, (variant, shown) in enumerate(variants.items()):
        axes[row][0].set_ylabel(variant)
        for panel, one in zip(axes[row], shown, strict=False):
            panel.set_title(f"code {one['symbol']}, {100 * one['share']:.1f} %", fontsize=8)
            for d, line in enumerate(np.array(one["motion"]).T):
                panel.plot(line, color=COLOURS[d % len(COLOURS)], linewidth=1.2, label=dims[d])
    for panel in axes[-1]:
        panel.set_xlabel("step", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(dims), fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    return path
