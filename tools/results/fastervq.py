"""FASTerVQ's page: against FAST, code use, the ablations of Table 6, scaling, and robots left out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from results.curves import Figures, curve, entropy, expected_entropy, expected_share, figures, read_off
from results.jobs import JOBS

MAIN = "fastervq-tiny"
Units = Sequence[Mapping[str, Any]]
# The paper (arXiv 2512.04952), Table 8 and section A.5, on BridgeData.
PAPER_USED, PAPER_ENTROPY = 1.0, 0.91
# Table 6 of the paper: l1 of (a), utilisation in per cent of (b). It gives success rates alone for (c).
PAPER_L1 = {"ablate-base": 0.0021, "ablate-cnn": 0.0027, "ablate-transformer": 0.0036}
PAPER_CODES = {"ablate-base": 99.6, "ablate-codes-512": 100.0, "ablate-codes-1024": 100.0, "ablate-codes-8192": 95.1}
ARCH = ("ablate-cnn", "ablate-transformer", "ablate-base")
CODES = ("ablate-codes-512", "ablate-codes-1024", "ablate-base", "ablate-codes-8192")
DEPTH = ("ablate-levels-1", "ablate-levels-2", "ablate-base", "ablate-levels-8")
SCALES = {"S": "scale-s", "L": "scale-l", "XL": "ablate-base"}

__all__ = ["page", "tables"]


def tables(measured: Mapping[str, Units]) -> dict[str, Any]:
    """All figures of the page as JSON values, from the units of each data set."""
    return {
        "against_fast": [row for name, units in measured.items() if (row := _against_fast(name, units))],
        "code_use": _code_use(measured),
        "ablations": {name: _summary(name, measured) for name in dict.fromkeys((*ARCH, *CODES, *DEPTH))},
        "scaling": {scale: _summary(name, measured) for scale, name in SCALES.items()},
        "left_out": _left_out(measured),
    }


def _unit(units: Units, name: str, *, light: bool = False) -> Mapping[str, Any] | None:
    """A tokenizer's own unit; the full one where there are two, unless the light one is asked for."""
    found = [u for u in units if u["tokenizer"] == name and not u["sweep"] and (not light or "counts" in u)]
    return found[0] if found else None


def _json(found: Figures | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


# -- figures ----------------------------------------------------------------------------------------------------------


def _against_fast(name: str, units: Units) -> dict[str, Any] | None:
    own = figures(_unit(units, MAIN))
    if own is None:
        return None
    fast = curve(units, "fast")
    return {
        "data": name,
        "fastervq": asdict(own),
        "fast_equal_tokens": _json(read_off(fast, lambda f: f.tokens, own.tokens)),
        "fast_equal_bits": _json(read_off(fast, lambda f: f.bits, own.bits)),
        "fast": _json(figures(_unit(units, "fast"))),
        "fast_plus": _json(figures(_unit(units, "fast_plus"))),
    }


def _counts(unit: Mapping[str, Any]) -> dict[int, np.ndarray]:
    return {int(level): np.array(counts) for level, counts in unit["counts"].items()}


def _use(counts: np.ndarray) -> dict[str, Any]:
    """Use of one code table by so many draws, and what uniform draws would give."""
    size, drawn = len(counts), int(counts.sum())
    return {
        "codes": size,
        "drawn": drawn,
        "used": float((counts > 0).mean()),
        "used_if_uniform": expected_share(size, drawn),
        "entropy": entropy(counts),
        "entropy_if_uniform": expected_entropy(size, drawn),
    }


def _code_use(measured: Mapping[str, Units]) -> list[dict[str, Any]]:
    """Per data set and level, and for all data sets' draws together."""
    rows: list[dict[str, Any]] = []
    total: dict[int, np.ndarray] = {}
    for name, units in measured.items():
        unit = _unit(units, MAIN, light=True)
        if unit is None or unit["status"] != "ok":
            continue
        for level, counts in _counts(unit).items():
            rows.append({"data": name, "level": level + 1, **_use(counts)})
            total[level] = total.get(level, np.zeros_like(counts)) + counts
    return rows + [{"data": "all", "level": level + 1, **_use(counts)} for level, counts in total.items()]


def _summary(name: str, measured: Mapping[str, Units]) -> dict[str, Any]:
    """A tokenizer's figures on each data set (None where its codec cannot serve it), and its code use over all."""
    each: dict[str, Any] = {}
    total: dict[int, np.ndarray] = {}
    for data, units in measured.items():
        unit = _unit(units, name, light=True)
        each[data] = _json(figures(unit))
        if unit is not None and each[data] is not None:
            for level, counts in _counts(unit).items():
                total[level] = total.get(level, np.zeros_like(counts)) + counts
    return {"job": name, "data": each, "codes": [_use(counts) for counts in total.values()]}


def _left_out(measured: Mapping[str, Units]) -> list[dict[str, Any]]:
    """The robots that a tokenizer was not trained on: it, the same training with them, and FAST."""
    rows = []
    for name, job in JOBS.items():
        if job.part != "left_out":
            continue
        for data in job.without:
            units = measured.get(data, [])
            own = figures(_unit(units, name))
            if own is None:
                continue
            rows.append(
                {
                    "data": data,
                    "job": name,
                    "left_out": asdict(own),
                    "trained_on": _json(figures(_unit(units, "ablate-base"))),
                    "fast_equal_bits": _json(read_off(curve(units, "fast"), lambda f: f.bits, own.bits)),
                    "fast": _json(figures(_unit(units, "fast"))),
                    "fast_plus": _json(figures(_unit(units, "fast_plus"))),
                }
            )
    return rows


# -- text -------------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Any], conditions: str) -> str:
    """The page. Cells are l1 in normalised units, then steps valid at 0.03 / 0.1."""
    return "\n".join(
        [
            "# FASTerVQ",
            "",
            f"{conditions} [Figures as JSON](fastervq.json); how each was trained: [training](training.md).",
            "",
            "Cells: mean error in normalised units; share of steps valid at 0.03 / 0.1 (eq. 4 of the paper as printed). FAST"
            " is fitted on each data set, FASTerVQ trained on all together; FAST+ is as published.",
            "",
            *_against_fast_text(found["against_fast"]),
            *_code_use_text(found["code_use"]),
            *_ablation_text(found["ablations"]),
            *_scaling_text(found["scaling"]),
            *_left_out_text(found["left_out"]),
        ]
    )


def _cell(f: Mapping[str, Any] | None, *, size: bool = False) -> str:
    if f is None:
        return "-"
    text = f"{f['l1']:.3g}; " + " / ".join(f"{v:.2f}" for v in f["vrr"])
    return f"{text} ({f['tokens']:.3g} tokens, {f['bits']:.0f} bits)" if size else text


def _against_fast_text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Against FAST",
        "",
        "FAST's sweep read off at FASTerVQ's tokens and at its bits a chunk (fixed rate), - where the sweep does not reach;"
        " its own setting and FAST+ with what they cost.",
        "",
        "| data | tokens | bits | FASTerVQ | FAST, equal tokens | FAST, equal bits | FAST's own setting | FAST+ |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        own = row["fastervq"]
        lines.append(
            f"| {row['data']} | {own['tokens']:.0f} | {own['bits']:.0f} | {_cell(own)} | {_cell(row['fast_equal_tokens'])} |"
            f" {_cell(row['fast_equal_bits'])} | {_cell(row['fast'], size=True)} | {_cell(row['fast_plus'], size=True)} |"
        )
    return [*lines, ""]


def _code_use_text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Code use",
        "",
        f"Of held-out chunks; beside each figure what as many uniform draws would give (used: 1 - (1 - 1/K)^n; entropy:"
        f" simulated). The paper tells {PAPER_USED:.0%} of 4096 used and a normalised entropy of {PAPER_ENTROPY} on"
        " BridgeData, and no number of draws.",
        "",
        "| data | level | codes | drawn | used | if uniform | entropy | if uniform |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['data']} | {r['level']} | {r['codes']} | {r['drawn']} | {r['used']:.1%} | {r['used_if_uniform']:.1%} |"
        f" {r['entropy']:.3f} | {r['entropy_if_uniform']:.3f} |"
        for r in rows
    ]
    return [*lines, ""]


def _served(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Data sets that every one of these tokenizers was measured on."""
    names = [n for s in found.values() for n in s["data"]]
    return [n for n in dict.fromkeys(names) if all(s["data"].get(n) is not None for s in found.values())]


def _mean(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    each = [summary["data"][n] for n in names]
    l1 = np.mean([f["l1"] for f in each])
    vrr = np.mean([f["vrr"] for f in each], axis=0)
    return f"{l1:.4f}; " + " / ".join(f"{v:.3f}" for v in vrr)


def _ablation_text(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    shown = {name: s for name, s in found.items() if any(s["data"].values())}
    names = _served(shown)
    lines = [
        "## Ablations (Table 6)",
        "",
        "Equal steps on all data together; mean over the data sets. used and entropy: of the draws of all data sets, mean"
        " over levels, and as many uniform draws. The paper's success rates have no counterpart here.",
        "",
    ]
    groups = (("Architecture", ARCH, PAPER_L1, "l1"), ("Codes a level", CODES, PAPER_CODES, "used %"))
    for title, jobs, paper, what in (*groups, ("Levels", DEPTH, {}, "")):
        head = f"| {title} | tokens | bits | mean | used | if uniform | entropy | if uniform |"
        lines += [
            head + (f" the paper's {what} |" if paper else ""),
            "|---|---:|---:|---:|---:|---:|---:|---:|" + ("---:|" if paper else ""),
        ]
        for name in jobs:
            if name not in shown or not names:
                continue
            one = shown[name]["data"][names[0]]
            codes = shown[name]["codes"]
            keys = ("used", "used_if_uniform", "entropy", "entropy_if_uniform")
            used, uniform, spread, even = (np.mean([c[k] for c in codes]) for k in keys)
            lines.append(
                f"| {_variant(name, title)} | {one['tokens']:.0f} | {one['bits']:.0f} | {_mean(shown[name], names)} |"
                f" {used:.1%} | {uniform:.1%} | {spread:.3f} | {even:.3f} |"
                + (f" {paper.get(name, '-')} |" if paper else "")
            )
        lines.append("")
    return lines


def _variant(name: str, title: str) -> str:
    """What a row of that ablation varies."""
    if name == "ablate-base":
        return {"Architecture": "taae", "Codes a level": "4096", "Levels": "3"}[title]
    return name.rpartition("-")[2]


def _scaling_text(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    shown = {name: s for name, s in found.items() if any(s["data"].values())}
    names = list(dict.fromkeys(n for s in shown.values() for n in s["data"]))
    common = _served(shown)
    trained = {
        scale: ", ".join(JOBS[name].only) if JOBS[name].only else "all data sets" for scale, name in SCALES.items()
    }
    lines = [
        "## More data",
        "",
        "Equal steps, judged on the same held-out chunks. "
        + "; ".join(f"{scale}: trained on {text}" for scale, text in trained.items())
        + ". What was not trained on is served through adapt (its normaliser only); - where a codec has fewer channels than"
        " the robot.",
        "",
        "| data | " + " | ".join(shown) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    lines += [f"| {n} | " + " | ".join(_cell(s["data"].get(n)) for s in shown.values()) + " |" for n in names]
    if common:
        lines.append("| mean of those that all serve | " + " | ".join(_mean(s, common) for s in shown.values()) + " |")
    return [*lines, ""]


def _left_out_text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Robots left out of training",
        "",
        "Trained without the data of that robot and adapted to it (its normaliser only), beside the same training with it"
        " (equal steps), FAST fitted on it, and FAST+.",
        "",
        "| data | left out by | bits | left out | trained on | FAST, equal bits | FAST's own setting | FAST+ |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['data']} | {r['job']} | {r['left_out']['bits']:.0f} | {_cell(r['left_out'])} | {_cell(r['trained_on'])} |"
        f" {_cell(r['fast_equal_bits'])} | {_cell(r['fast'], size=True)} | {_cell(r['fast_plus'], size=True)} |"
        for r in rows
    ]
    return [*lines, ""]
