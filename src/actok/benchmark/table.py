"""Tables from results.json: for a terminal of 120 columns, for Markdown, and as columns for the report."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 120

__all__ = [
    "Column",
    "behaviour_columns",
    "dataset_units",
    "error_columns",
    "notes",
    "number",
    "percent",
    "render_columns",
    "replay_columns",
    "shown_error",
    "text_table",
]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its title, what it means in words, and a cell for each tokenizer."""

    title: str
    meaning: str
    cells: tuple[str, ...]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without exponents where these are short; a dash for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        rounded = float(f"{value:.{digits}g}")
        return f"{rounded:.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"
    return f"{value:.{digits - 1}e}"


def percent(value: float | None) -> str:
    """A fraction as per cent, one decimal where it is not whole."""
    return "-" if value is None else f"{100 * value:.3g} %"


def dataset_units(results: Mapping[str, Any], dataset: str, *, sweep: bool = False) -> list[Mapping[str, Any]]:
    """The units of one dataset, in order: the tokenizers themselves, or the points of their curves."""
    return [u for u in results["results"] if u["dataset"] == dataset and u["sweep"] == sweep]


def shown_error(group: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """What a table shows of a group's error, and its unit: the accumulated path where there is one, else the step."""
    if group["path"] is not None:
        return group["path"], f"path {group['path_unit']}"
    return group["step"], group["unit"]


def error_columns(units: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Size and reconstruction error of units that succeeded."""

    def column(title: str, meaning: str, cell: Callable[[Mapping[str, Any]], str]) -> Column:
        return Column(title=title, meaning=meaning, cells=tuple(cell(u["metrics"]) for u in units))

    columns = [
        Column(title="tokenizer", meaning="", cells=tuple(str(u["tokenizer"]) for u in units)),
        column("tokens", "mean per chunk (99th percentile where it varies)", _tokens),
        column("vocab", "codes per position, at most", lambda m: str(m["vocab_size"])),
        column("bits", "per chunk at fixed rate", lambda m: number(m["rate"]["bits_fixed"])),
        column("coded", "bits per chunk, order-0 entropy coded", lambda m: number(m["rate"]["bits_entropy"])),
        column("x bins", "compression against 8 bits a value", lambda m: number(m["rate"]["over_bins"])),
        column("l1", "mean error, normalised units", lambda m: number(m["normalised"]["l1"])),
    ]
    for kind, unit in _error_kinds(units):
        columns.append(
            column(
                unit if unit.removeprefix("path ") in ("mm", "deg") else f"{kind} {unit}",
                f"{kind} error: mean / 95th percentile" + (", accumulated over the chunk" if "path" in unit else ""),
                lambda m, kind=kind, unit=unit: _worst_group(m, kind, unit),  # type: ignore[misc]
            )
        )
    columns += [
        column(
            "VRR",
            "steps with an l1 norm of the error below 0.01 / 0.1 normalised",
            lambda m: f"{percent(_vrr_at(m, 0.01)).removesuffix(' %')} / {percent(_vrr_at(m, 0.1))}",
        ),
        column("invalid", "chunks that did not decode", lambda m: percent(m["normalised"]["undecodable"])),
    ]
    return columns


def behaviour_columns(units: Sequence[Mapping[str, Any]]) -> list[Column]:
    """What a model that has to predict the codes will meet."""

    def column(title: str, meaning: str, cell: Callable[[Mapping[str, Any]], str]) -> Column:
        return Column(title=title, meaning=meaning, cells=tuple(cell(u["metrics"]) for u in units))

    return [
        Column(title="tokenizer", meaning="", cells=tuple(str(u["tokenizer"]) for u in units)),
        column("used", "codes used, mean over tables (uniform draws would use)", _used),
        column("H/Hmax", "normalised entropy of the codes", lambda m: number(_mean(m["codes"], "entropy"))),
        column(
            "ppl (n)",
            "perplexity of held-out codes under the best n-gram model, and its n (1 to 3)",
            lambda m: f"{number(_best_ngram(m)['perplexity'])} ({_best_ngram(m)['order']})",
        ),
        column("n-gram b", "bits per chunk under that model", lambda m: number(_best_ngram(m)["bits_per_chunk"])),
        column(
            "noise",
            "token error rate at the largest input noise",
            lambda m: percent(m["noise"]["token_error_rate"][-1]),
        ),
        column("1 wrong", "change of the chunk by one wrong token, l1", lambda m: number(m["wrong_token"]["l1"])),
        column("breaks", "one wrong token makes it undecodable", lambda m: percent(m["wrong_token"]["undecodable"])),
        column("random", "random sequences that decode", lambda m: percent(m["valid"]["random"])),
        column("jerk x", "jerk against the demonstration's", lambda m: number(m["jerk"]["ratio"])),
        column("clipped", "decoded values moved inside the limits", lambda m: percent(m["range"]["clipped"])),
        column("enc ms", "one chunk, median", lambda m: number(m["latency"]["encode"]["p50_ms"])),
        column("dec ms", "one chunk, median", lambda m: number(m["latency"]["decode"]["p50_ms"])),
    ]


def replay_columns(replay: Mapping[str, Any]) -> list[Column]:
    """Success of decoded demonstrations replayed in simulation."""
    names = list(replay["tokenizers"])
    each = [replay["tokenizers"][n] for n in names]
    return [
        Column(title="tokenizer", meaning="", cells=tuple(names)),
        Column(
            title="success",
            meaning="replayed demonstrations that succeed",
            cells=tuple(f"{percent(t['rate'])} of {len(t['success'])}" for t in each),
        ),
        Column(
            title="95 % CI",
            meaning="confidence interval",
            cells=tuple(f"{percent(t['ci95'][0])} to {percent(t['ci95'][1])}" for t in each),
        ),
        Column(
            title="l1", meaning="mean error, normalised units", cells=tuple(number(t["normalised_l1"]) for t in each)
        ),
        Column(
            title="invalid",
            meaning="demonstrations with a chunk that did not decode",
            cells=tuple(str(t["invalid"]) for t in each),
        ),
    ]


def text_table(results: Mapping[str, Any], *, markdown: bool = False) -> str:
    """All datasets' tables as plain text of at most 120 columns, or as Markdown."""
    from actok.benchmark.semantic_table import semantic_notes, semantic_tables  # which is made of this module's columns

    lines: list[str] = []
    legend: dict[str, str] = {}
    for dataset in results["datasets"]:
        units = dataset_units(results, dataset["name"])
        good = [u for u in units if u["status"] == "ok"]
        heading = describe(dataset)
        lines += [f"### {dataset['name']}", "", heading] if markdown else [dataset["name"], *_wrap(heading)]
        lines.append("")
        if good:
            semantic = semantic_tables(results, dataset["name"], good)
            for columns in (error_columns(good), behaviour_columns(good), *semantic):
                lines += [*render_columns(columns, markdown), ""]
                legend |= {c.title: c.meaning for c in columns if c.meaning}
        for unit in units:
            if unit["status"] != "ok":
                lines += _wrap(f"{unit['tokenizer']}: FAILED: {unit['error']}")
        told = [*notes(units), *semantic_notes(results, dataset["name"], units)]
        lines += [line for text in told for line in _wrap(text)]
        lines.append("")
    if results.get("replay"):
        replay = results["replay"]
        title = f"Replay in {replay['env']}, {len(replay['episodes'])} demonstrations"
        lines += [f"### {title}" if markdown else title, "", *render_columns(replay_columns(replay), markdown), ""]
    if legend:
        lines += [*_wrap("; ".join(f"{title}: {meaning}" for title, meaning in legend.items())), ""]
    p = results["provenance"]
    lines += _wrap(
        f"actok {p['actok']}, commit {p['commit'] or 'unknown'}, {p['cpu']}, {p['created']}, seed {p['seed']}"
    )
    return "\n".join(lines).rstrip()


def notes(units: Sequence[Mapping[str, Any]]) -> list[str]:
    """What fitting and measuring warned of, each once, with the tokenizers it concerns."""
    concerned: dict[str, list[str]] = {}
    for unit in units:
        for text in unit.get("warnings", []):
            concerned.setdefault(text, []).append(unit["tokenizer"])
    return [f"note on {', '.join(names)}: {text}" for text, names in concerned.items()]


def describe(dataset: Mapping[str, Any]) -> str:
    """One sentence on a dataset: space, horizon, split."""
    space = dataset["space"]
    seconds = "" if dataset["seconds"] is None else f" ({dataset['seconds']:.3g} s)"
    rate = "unknown rate" if space["rate_hz"] is None else f"{space['rate_hz']:g} Hz"
    e = dataset["episodes"]
    constant = f" Constant: {', '.join(dataset['constant'])}." if dataset["constant"] else ""
    return (
        f"{space['embodiment']}, {space['dim']} dimensions, {rate}; action space: {dataset['space_origin']}. Chunks of"
        f" {dataset['horizon']} steps{seconds}; {e['train']} episodes to fit on, {dataset['test_chunks']['used']} chunks"
        f" of {e['test']} held-out episodes to judge on.{constant}"
    )


def render_columns(columns: Sequence[Column], markdown: bool = False) -> list[str]:
    """Lines of one table, aligned; the first column left, figures right."""
    widths = [max(len(c.title), *(len(cell) for cell in c.cells)) for c in columns]
    rows = [[c.title for c in columns], *zip(*(c.cells for c in columns), strict=True)]
    padded = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    if markdown:
        rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        return ["| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]]]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else 1
    body = [(" " * gap).join(row).rstrip() for row in padded]
    return [body[0], "-" * max(map(len, body)), *body[1:]]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False) or [""]


def _tokens(metrics: Mapping[str, Any]) -> str:
    rate = metrics["rate"]
    if metrics["fixed_length"] is not None:
        return number(rate["tokens_mean"])
    return f"{number(rate['tokens_mean'])} ({number(rate['tokens_p99'])})"


def _used(metrics: Mapping[str, Any]) -> str:
    return f"{percent(_mean(metrics['codes'], 'used'))} ({percent(_mean(metrics['codes'], 'used_if_uniform'))})"


def _best_ngram(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The order that predicts best: longer histories can be too rare in the training codes to help."""
    best: Mapping[str, Any] = min(metrics["ngram"], key=lambda fit: fit["bits_per_chunk"])
    return best


def _mean(tables: Sequence[Mapping[str, Any]], key: str) -> float | None:
    drawn = [t[key] for t in tables if t["drawn"]]
    return sum(drawn) / len(drawn) if drawn else None


def _error_kinds(units: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(kind of group, unit) of the physical columns, in the space's order."""
    return list(dict.fromkeys((g["kind"], shown_error(g)[1]) for u in units for g in u["metrics"]["physical"]))[:3]


def _worst_group(metrics: Mapping[str, Any], kind: str, unit: str) -> str:
    spreads = [shown_error(g)[0] for g in metrics["physical"] if g["kind"] == kind and shown_error(g)[1] == unit]
    known = [s for s in spreads if s is not None]
    if not known:
        return "-"
    worst = max(known, key=lambda s: float(s["p95"]))
    return f"{number(worst['mean'], 2)} / {number(worst['p95'], 2)}"


def _vrr_at(metrics: Mapping[str, Any], tolerance: float) -> float | None:
    vrr = metrics["vrr"]
    found = [v for t, v in zip(vrr["tolerances"], vrr["literal"], strict=True) if abs(t / tolerance - 1) < 1e-6]
    return found[0] if found else None
