"""Figures of the report as inline SVG: small, sharp at any size, and readable on light and dark pages.

Needs matplotlib (extra "report"), imported when the first figure is drawn. Text and axes take the page's own colour.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from actok.benchmark.table import dataset_units
from actok.core import MissingExtraError
from actok.core.spaces import ActionSpace
from actok.evaluation.physical import reported_unit

# Okabe and Ito's palette for colour-blind readers, less black and yellow, which vanish on dark or light pages; with
# markers and dashes, so that no two tokenizers differ in colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))
# Stands for the page's text colour until the SVG is written; no other element has it.
INK = "#010203"
# Half width of the tolerance band in reconstructions: normalised units, 1 % of the range.
BAND = 0.02
# Rows of a replay that are no tokenizer's, open and closed loop.
BASELINES = {"exact": "exact demonstration", "expert": "the expert's chunks"}
# Characters of a dimension's name from which its unit takes a second line beside a small plot.
LONG_NAME = 12

__all__ = [
    "BAND",
    "code_use_figure",
    "dimension_figure",
    "rate_distortion_figures",
    "reconstruction_figure",
    "replay_figure",
    "vrr_figures",
]


def rate_distortion_figures(results: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str]:
    """Error against bits per chunk: normalised, and for the first physical group; curves where settings were swept."""
    units = _good(results, dataset) + _good(results, dataset, sweep=True)
    measures: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("mean error, normalised units", lambda m: m["normalised"]["l1"])
    ]
    for index, group in enumerate(units[0]["metrics"]["physical"] if units else []):
        path = group["path"] is not None
        unit = group["path_unit"] if path else group["unit"]
        if unit == "raw":
            continue
        label = f"{group['group']} error{' of the path' if path else ''}, p95, {unit}"
        measures.append((label, lambda m, i=index, path=path: _p95(m["physical"][i], path)))  # type: ignore[misc]
        break
    figures = []
    for label, value in measures:
        with _figure((5.2, 3.9)) as (axes, out):
            for style, name in _styles(units):
                own = [u for u in units if u["tokenizer"] == name]
                points = [(u["metrics"]["rate"]["bits_fixed"], value(u["metrics"]), u["sweep"]) for u in own]
                curve = sorted((b, e) for b, e, sweep in points if sweep and e)
                if curve:
                    axes.plot(*zip(*curve, strict=True), **{**style, "markersize": 3.5}, linewidth=1.3)
                head = [(b, e) for b, e, sweep in points if not sweep and e]
                if head:
                    axes.plot(*zip(*head, strict=True), **{**style, "linestyle": "none", "markersize": 8}, label=name)
            axes.set(xscale="log", yscale="log", xlabel="bits per chunk (fixed rate)", ylabel=label)
            _plain_ticks(axes)
            _legend(axes)
        figures.append(out.svg)
    return figures


def vrr_figures(results: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[str]:
    """Valid reconstruction rate over tolerances: as printed, in millimetres, in degrees."""
    units = _good(results, dataset)
    columns = (
        ("literal", "tolerance on the l1 norm, normalised units", 1.0),
        ("position", "tolerance on the position, mm", 1e3),
        ("angle", "tolerance on rotation or joints, degrees", 180 / np.pi),
    )
    figures = []
    for key, label, factor in columns:
        if not any(u["metrics"]["vrr"][key] for u in units):
            continue
        with _figure((5.2, 3.6)) as (axes, out):
            for style, name in _styles(units):
                vrr = next(u for u in units if u["tokenizer"] == name)["metrics"]["vrr"]
                axes.plot(
                    np.array(vrr["tolerances"]) * factor,
                    100 * np.array(vrr[key]),
                    **{**style, "markersize": 4},
                    label=name,
                )
            axes.set(xscale="log", xlabel=label, ylabel="valid steps, %", ylim=(-3, 103))
            _plain_ticks(axes)
            _legend(axes)
        figures.append(out.svg)
    return figures


def dimension_figure(results: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    """Mean error of every dimension, one row of markers each."""
    units = _good(results, dataset)
    names = dataset["space"]["names"]
    with _figure((5.2, max(2.2, 1.2 + 0.24 * len(names)))) as (axes, out):
        for style, name in _styles(units):
            values = next(u for u in units if u["tokenizer"] == name)["metrics"]["normalised"]["l1_by_dim"]
            rows = [(v, i) for i, v in enumerate(values) if v]
            if rows:
                axes.plot(*zip(*rows, strict=True), **{**style, "linestyle": "none", "markersize": 6}, label=name)
        axes.set(xscale="log", xlabel="mean error, normalised units", ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        _plain_ticks(axes, y=False)
        _legend(axes)
    return out.svg


def code_use_figure(results: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    """Frequency of codes by rank; one faint line a table where a tokenizer has several."""
    units = _good(results, dataset)
    with _figure((5.2, 3.6)) as (axes, out):
        for style, name in _styles(units):
            tables = [
                t for t in next(u for u in units if u["tokenizer"] == name)["metrics"]["codes"] if t["frequencies"]
            ]
            for index, table in enumerate(_spread(tables, 8)):
                label = f"{name} ({len(tables)} tables)" if len(tables) > 1 else name
                axes.plot(
                    table["ranks"],
                    table["frequencies"],
                    color=style["color"],
                    linestyle=style["linestyle"],
                    linewidth=1.5 if len(tables) == 1 else 0.9,
                    alpha=1 if index == 0 else 0.55,
                    label=label if index == 0 else None,
                )
        axes.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="frequency among held-out codes")
        _plain_ticks(axes, y=False)
        _legend(axes)
    return out.svg


def reconstruction_figure(dataset: Mapping[str, Any], unit: Mapping[str, Any]) -> str:
    """Held-out chunks, original with tolerance band and reconstruction: the liveliest dimensions of two chunks."""
    space = ActionSpace.from_dict(dataset["space"])
    reference = np.array(dataset["examples"]["reference"], float)
    found = np.array(unit["metrics"]["examples"]["reconstruction"], float)
    real = dataset["examples"]["real_steps"]
    half = np.array(dataset["normaliser"]["half"])
    dims, chunks = _liveliest(space, reference / half), min(2, len(reference))
    rate = space.rate_hz
    with _figure((5.2, 0.9 + 1.25 * len(dims)), rows=len(dims), columns=chunks) as (grid, out):
        for row, dim in enumerate(dims):
            label, factor = _axis(space, dim)
            for column in range(chunks):
                axes = grid[row][column]
                steps = slice(0, real[column])
                x = np.arange(real[column]) / (rate or 1.0)
                truth, band = reference[column, steps, dim] * factor, BAND * half[dim] * factor
                axes.fill_between(x, truth - band, truth + band, color="#8C8C8C", alpha=0.35, linewidth=0)
                axes.plot(x, truth, color=INK, linewidth=1.0)
                axes.plot(x, found[column, steps, dim] * factor, color=COLOURS[1], linewidth=1.3, linestyle=DASHES[1])
                _at_least(axes, 10 * band)
                axes.tick_params(labelsize=7, labelbottom=row == len(dims) - 1)
                if column == 0:
                    axes.set_ylabel(label, fontsize=8)
                if row == len(dims) - 1:
                    axes.set_xlabel("time, s" if rate else "step", fontsize=8)
    return out.svg


def replay_figure(replay: Mapping[str, Any]) -> str:
    """Success of replayed demonstrations against reconstruction error, with 95 % intervals."""
    entries = {n: t for n, t in replay["tokenizers"].items() if n != "exact" and t["normalised_l1"]}
    with _figure((5.2, 3.6)) as (axes, out):
        baseline = next((n for n in BASELINES if n in replay["tokenizers"]), None)
        if baseline is not None:
            exact = replay["tokenizers"][baseline]
            axes.axhspan(*(100 * v for v in exact["ci95"]), color="#8C8C8C", alpha=0.25, linewidth=0)
            axes.axhline(100 * exact["rate"], color=INK, linewidth=1, label=BASELINES[baseline])
        for style, name in _styles([{"tokenizer": n} for n in entries]):
            t = entries[name]
            low, high = t["ci95"]
            spread = [[100 * max(0.0, t["rate"] - low)], [100 * max(0.0, high - t["rate"])]]
            axes.errorbar(
                [t["normalised_l1"]],
                [100 * t["rate"]],
                yerr=spread,
                capsize=3,
                label=name,
                **{**style, "linestyle": "none", "markersize": 7},
            )
        axes.set(xlabel="mean error, normalised units", ylabel="replay success, %", ylim=(-3, 103), xscale="log")
        _plain_ticks(axes)
        _legend(axes)
    return out.svg


# -- shared ------------------------------------------------------------------------------------------------------------


class _Drawing:
    """Takes the SVG when a figure is finished."""

    svg: str = ""


@contextmanager
def _figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, _Drawing]]:
    """Axes (or a grid of them) to draw on; afterwards the drawing holds the SVG."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "the HTML report") from None
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "actok",
        "font.family": "sans-serif",
        "font.size": 9,
        "path.simplify": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.18,
        "grid.linewidth": 0.6,
    } | dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    )
    drawing = _Drawing()
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharex="col")
        yield (grid if rows * columns > 1 else grid[0][0]), drawing
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing.svg = _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """An SVG file as an element of an HTML page: no prologue, metadata or namespaces, page colour, short numbers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # Two decimals of a point are enough for paths and positions; text between the tags is left as it is.
    rest = re.sub(
        r' (?:d|x|y|transform)="[^"]*"',
        lambda a: re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), a[0]),
        rest,
    )
    # The page's own font, and only those identifiers that something refers to, unique within the page.
    rest = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "sans-serif", rest)
    wanted = set(re.findall(r"#([\w.-]+)", " ".join(re.findall(r'href="[^"]*"|url\([^)]*\)', rest))))
    rest = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in wanted else "", rest)
    prefix = f"f{zlib.crc32(rest.encode()):08x}-"
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", rest)
    rest = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", rest))
    return f'{head} role="img">{rest}'.replace(INK, "currentColor")


def _styles(units: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Colour, marker and dash of each tokenizer, in the order of first appearance."""
    names = list(dict.fromkeys(u["tokenizer"] for u in units))
    return [
        (
            {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": DASHES[i % len(DASHES)],
            },
            name,
        )
        for i, name in enumerate(names)
    ]


def _at_least(axes: Any, span: float) -> None:
    """Widen a y axis to that span, so that a constant dimension does not look like an error."""
    low, high = axes.get_ylim()
    if high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)


def _legend(axes: Any) -> None:
    """Below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 3 if max(map(len, labels)) < 16 else 2
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _plain_ticks(axes: Any, *, x: bool = True, y: bool = True) -> None:
    """0.01 rather than a power of ten on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if wanted and axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            narrow = high / max(low, 1e-300) < 200  # fewer than three powers of ten may fall inside
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=9))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())


def _good(results: Mapping[str, Any], dataset: Mapping[str, Any], *, sweep: bool = False) -> list[Mapping[str, Any]]:
    return [u for u in dataset_units(results, dataset["name"], sweep=sweep) if u["status"] == "ok"]


def _p95(group: Mapping[str, Any], path: bool) -> float | None:
    spread = group["path"] if path else group["step"]
    return None if spread is None else spread["p95"]


def _spread(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _axis(space: ActionSpace, dim: int) -> tuple[str, float]:
    """Label of a dimension and the factor from raw units to the label's."""
    group = next(g for g in space.groups if dim in g.dims)
    unit, factor = reported_unit(group)
    if group.kind == "rotation" and group.rotation not in ("axis_angle", "euler_xyz", "euler_zyx"):
        unit, factor = "", 1.0  # a component of a quaternion or matrix is no angle
    elif group.mode == "delta":
        unit += "/step"  # how far each step goes, not where it leads
    name = space.names[dim]
    return (f"{name}, {unit}" if len(name) < LONG_NAME else f"{name}\n{unit}") if unit else name, factor


def _liveliest(space: ActionSpace, normalised: np.ndarray, most: int = 3) -> list[int]:
    """Dimensions to show: the one that moves most of each group first, then whatever moves most."""
    motion = normalised.std((0, 1))
    first = sorted((max(g.dims, key=lambda d: motion[d]) for g in space.groups), key=lambda d: -motion[d])
    rest = [d for d in np.argsort(-motion) if d not in first]
    return sorted(int(d) for d in [*first, *rest][:most])
