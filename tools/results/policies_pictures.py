"""Success against tokens per chunk, drawn from the JSON beside it, and sheets of filmed episodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actok.benchmark.plots import COLOURS, MARKERS
from actok.core.files import atomic_path

DPI = 110
PALETTE = 128  # colours of a sheet: a third of its size

__all__ = ["copy_sheet", "draw_success"]


def draw_success(body: Mapping[str, Any], path: Path) -> Path | None:
    """One point a tokenizer with its interval; on the right against the error of its chunks. None where there is no point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    variants = {name: row for name, row in body["variants"].items() if row["tokens"] is not None}
    if not variants:
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set(xscale="log", xlabel="tokens a chunk, mean", ylabel="success, % (95 % interval)", ylim=(-3, 103))
    panels[1].set(xscale="log", xlabel="l1 error of held-out chunks, normalised units")
    for k, (name, row) in enumerate(variants.items()):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        rate, (low, high) = 100 * row["rate"], (100 * value for value in row["ci95"])
        spread = [[rate - low], [high - rate]]
        panels[0].errorbar(row["tokens"], rate, yerr=spread, capsize=2, linestyle="none", label=name, **style)
        if row["codec"] is not None:
            panels[1].errorbar(row["codec"]["l1"], rate, yerr=spread, capsize=2, linestyle="none", **style)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    return path


def copy_sheet(sheet: Path, path: Path) -> Path:
    """A contact sheet with a palette instead of full colour. (Chosen to cover all colours: the median cut, which is the
    default, gives none to a small red cube.)
    """
    from PIL import Image

    with Image.open(sheet) as picture, atomic_path(path) as temporary:
        chosen = picture.convert("RGB").quantize(PALETTE, method=Image.Quantize.MAXCOVERAGE)
        chosen.save(temporary, format="PNG", optimize=True)
    return path
