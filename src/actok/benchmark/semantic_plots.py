"""Pictures of the semantic figures, as inline SVG: probes by level, the map of codes, what frequent codes do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark.plots import COLOURS, INK, MARKERS, _figure, _legend, _styles
from actok.benchmark.semantic_table import PROBED, measured, semantic_facts
from actok.benchmark.table import dataset_units
from actok.core.files import write_bytes

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

# Labels that a map tells apart by colour; the others are grey.
COLOURED = 7

__all__ = [
    "code_examples_figure",
    "map_figure",
    "overview_figures",
    "probe_figure",
    "unit_figures",
    "write_pictures",
]


def overview_figures(
    results: Mapping[str, Any], dataset: Mapping[str, Any], units: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """(title, SVG) of the figures that hold all tokenizers of a dataset."""
    facts, good = semantic_facts(results, dataset["name"]), measured(units)
    if facts is None or not good:
        return []
    return [
        (f"Linear probe: {label}", probe_figure(good, label, facts["raw"].get(label)))
        for label in PROBED
        if any(label in level["probes"] for u in good for level in u["semantics"]["figures"]["levels"])
    ]


def unit_figures(
    results: Mapping[str, Any], dataset: Mapping[str, Any], unit: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(title, SVG) of one tokenizer's map of codes, by phase and by task, and of what its most used codes do."""
    facts, figures = semantic_facts(results, dataset["name"]), unit["semantics"]["figures"]
    found = []
    if facts is not None and figures["map"] is not None:
        found = [
            (f"First-level codes by {label}", map_figure(figures["map"], facts["names"], label))
            for label in ("phase", "task")
            if label in facts["names"]
        ]
    if any(e["motion"] is not None for e in figures["examples"]):
        names = dataset["space"]["names"]
        found.append(
            ("Mean decoded motion of the chunks with a code", code_examples_figure(figures["examples"], names))
        )
    return found


def write_pictures(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every figure as an SVG file of its own, `<dataset>-<tokenizer>-<number>.svg`; none where nothing was measured."""
    written = []
    for dataset in results["datasets"]:
        units = [u for u in dataset_units(results, dataset["name"]) if u["status"] == "ok"]
        sets = [("all", overview_figures(results, dataset, units))]
        sets += [(u["tokenizer"], unit_figures(results, dataset, u)) for u in measured(units)]
        for name, figures in sets:
            for number, (title, svg) in enumerate(figures, 1):
                stem = re.sub(r"[^0-9A-Za-z._-]+", "_", f"{dataset['name']}-{name}-{number}")
                # On a white ground: what takes the page's colour is black where there is no page.
                ground = f'><title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>'
                head = svg.replace("<svg", f'<svg xmlns="{SVG}" xmlns:xlink="{XLINK}"', 1).replace(">", ground, 1)
                written.append(write_bytes(folder / f"{stem}.svg", head + "\n"))
    return written


def probe_figure(units: Sequence[Mapping[str, Any]], label: str, raw: Mapping[str, Any] | None) -> str:
    """Accuracy of the probe by level; whole sequences at the right; `raw`, the probe on the chunks, as a line."""
    levels = 1 + max((m["level"] or 0) for u in units for m in u["semantics"]["figures"]["levels"])
    with _figure((5.2, 3.4)) as (axes, out):
        for style, name in _styles(units):
            unit = next(u for u in units if u["tokenizer"] == name)
            found = [
                (levels if m["level"] is None else m["level"], m["probes"][label])
                for m in unit["semantics"]["figures"]["levels"]
                if label in m["probes"]
            ]
            if not found:
                continue
            x, probes = [f[0] for f in found], [f[1] for f in found]
            y = np.array([100 * p["accuracy"] for p in probes])
            spread = np.abs(np.array([[100 * p["low"], 100 * p["high"]] for p in probes]).T - y)
            axes.errorbar(x, y, yerr=spread, capsize=2, label=name, **{**style, "markersize": 5})
        if raw is not None:
            axes.axhline(100 * raw["accuracy"], color=INK, linewidth=1, linestyle=":", label="linear probe of actions")
            axes.axhline(100 * raw["majority"], color="#8C8C8C", linewidth=1, label="most frequent")
        axes.set(ylabel=f"{label}: held-out accuracy, %", xlabel="level of the codes", ylim=(-3, 103))
        axes.set_xticks(range(levels + 1), [*map(str, range(levels)), "all"])
        _legend(axes)
    return out.svg


def map_figure(found: Mapping[str, Any], names: Mapping[str, Sequence[str]], label: str) -> str:
    """t-SNE of first-level codes, the most frequent labels in colour."""
    points, ids = np.array(found["points"], float), np.array(found["labels"][label])
    which, counts = np.unique(ids[ids >= 0], return_counts=True)
    shown = which[np.argsort(-counts, kind="stable")][:COLOURED]
    with _figure((5.2, 4.6)) as (axes, out):
        rest = ~np.isin(ids, shown)
        if rest.any():
            axes.scatter(*points[rest].T, s=7, color="#8C8C8C", alpha=0.45, linewidths=0, label="others")
        for i, value in enumerate(shown):
            at = ids == value
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axes.scatter(
                *points[at].T, s=13, color=colour, marker=marker, linewidths=0, label=_short(names[label][value])
            )
        axes.set_xticks([])
        axes.set_yticks([])
        _legend(axes)
    return out.svg


def code_examples_figure(examples: Sequence[Mapping[str, Any]], dims: Sequence[str]) -> str:
    """Mean decoded motion of the chunks that have each of the most used codes, normalised units."""
    drawn = [e for e in examples if e["motion"] is not None]
    columns = min(5, len(drawn))
    rows = -(-len(drawn) // columns)
    motions = [np.array([[np.nan if v is None else v for v in step] for step in e["motion"]], float) for e in drawn]
    moving = np.argsort(-np.nanmax([np.nanmax(np.abs(m), 0) for m in motions], 0), kind="stable")[: len(COLOURS)]
    with _figure((7.5, 0.7 + 1.5 * rows), rows=rows, columns=columns) as (grid, out):
        all_axes = np.atleast_1d(np.array(grid, dtype=object)).reshape(-1)
        for axes, example, motion in zip(all_axes, drawn, motions, strict=False):
            for i, dim in enumerate(sorted(moving)):
                axes.plot(motion[:, dim], color=COLOURS[i], linewidth=1.2, label=dims[dim])
            axes.set_ylim(-1.15, 1.15)
            axes.set_title(f"code {example['symbol']}", fontsize=8)
            axes.tick_params(labelsize=6)
        for axes in all_axes[len(drawn) :]:
            axes.set_axis_off()
        _legend(all_axes[0])
    return out.svg


def _short(text: str) -> str:
    return text if len(text) <= 28 else text[:27] + "…"
