"""report.html from results.json: one file without any outside resource, for desktop and phone, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from actok.benchmark import plots, semantic_plots
from actok.benchmark.semantic_table import measured, semantic_facts, semantic_notes, semantic_tables
from actok.benchmark.table import (
    Column,
    behaviour_columns,
    dataset_units,
    describe,
    error_columns,
    notes,
    number,
    percent,
    replay_columns,
)
from actok.core.files import write_bytes

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin: 1.8rem 0 .4rem; } p { max-width: 75ch; margin: .4rem 0; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .4rem; }
.note { opacity: .75; font-size: .88rem; } .error { color: #c33; }
.scroll { overflow-x: auto; max-width: 100%; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
.plots { display: grid; gap: 1.2rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: .6rem 0; max-width: 560px; min-width: 0; } figcaption { font-size: .88rem; font-weight: 600; }
svg { display: block; width: 100%; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .88rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { body { font-size: 15px; padding: .7rem .7rem 2rem; } dl { grid-template-columns: 1fr; } dt { font-weight: 600; } }
""".strip()

__all__ = ["html_facts", "html_page", "html_table", "made_under", "render_report", "write_report"]


def write_report(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write report.html atomically. Raises MissingExtraError without matplotlib."""
    return write_bytes(path, render_report(results))


def render_report(results: Mapping[str, Any]) -> str:
    """The whole page as HTML."""
    parts = [_introduction(results)]
    if results.get("replay"):
        parts.append(_replay(results["replay"]))
    parts += [_dataset(results, dataset) for dataset in results["datasets"]]
    parts.append(_provenance(results))
    return html_page("actok benchmark", parts)


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, in HTML already, without any outside resource."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def html_facts(facts: Mapping[str, Any]) -> str:
    """Names and values as a list."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def made_under(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of a result, in words, by name."""
    p = provenance
    return {
        "command": p["command"],
        "created": p["created"],
        "seed": p["seed"],
        "actok": f"{p['actok']}, commit {p['commit'] or 'unknown'}, code {p['code']}",
        "processor": f"{p['cpu']}, {p['cores']} cores; threads {', '.join(f'{k}={v}' for k, v in p['threads'].items())}",
        "platform": p["platform"],
        "versions": f"python {p['python']}, " + ", ".join(f"{k} {v}" for k, v in p["packages"].items() if v),
    }


def _introduction(results: Mapping[str, Any]) -> str:
    p = results["provenance"]
    names = ", ".join(dict.fromkeys(u["tokenizer"] for u in results["results"] if not u["sweep"]))
    datasets = ", ".join(d["name"] for d in results["datasets"])
    return (
        f"<h1>Action tokenizers compared</h1>\n<p>{escape(names)} on {escape(datasets)}. Fitted on training episodes,"
        " judged on held-out episodes; all errors with the same normaliser, made from the training episodes. Padding"
        f" is left out everywhere.</p>\n<p class=note>actok {escape(p['actok'])}, {escape(p['created'])}</p>"
    )


def _dataset(results: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    units = dataset_units(results, dataset["name"])
    good = [u for u in units if u["status"] == "ok"]
    lines = [f"<h2>{escape(dataset['name'])}</h2>", f"<p>{escape(describe(dataset))}</p>"]
    failed = [u for u in units if u["status"] != "ok"]
    lines += [f"<p class=error>{escape(u['tokenizer'])} failed: {escape(u['error'])}</p>" for u in failed]
    lines += [f"<p class=note>{escape(note)}</p>" for note in notes(units)]
    if not good:
        return "\n".join([*lines, "<p>No tokenizer could be measured on this dataset.</p>"])
    lines += ["<h3>Size and error</h3>", html_table(error_columns(good))]
    lines += ["<h3>Rate and distortion</h3>"]
    swept = any(u["status"] == "ok" for u in dataset_units(results, dataset["name"], sweep=True))
    lines.append(
        "<p class=note>Large markers: the settings of the table above."
        + (" Lines: the preset's settings from coarse to fine, on a subsample of the chunks." if swept else "")
        + "</p>"
    )
    lines.append(_plots([("", svg) for svg in plots.rate_distortion_figures(results, dataset)]))
    lines += [
        "<h3>Valid reconstruction rate</h3>",
        "<p class=note>Share of time steps whose error is below the tolerance (FASTer, eq. 4): as printed, the l1 norm"
        " over the action vector; and in physical units, where the action space states them.</p>",
        _plots([("", svg) for svg in plots.vrr_figures(results, dataset)]),
        "<h3>Reconstructions</h3>",
        "<p class=note>The same held-out chunks for each tokenizer: original (solid) within a band of"
        f" ±{plots.BAND:g} normalised units (1 % of the range), reconstruction dashed.</p>",
        _plots([(u["tokenizer"], plots.reconstruction_figure(dataset, u)) for u in good]),
        "<h3>Error by dimension, use of the codes</h3>",
        _plots(
            [
                ("Error by dimension", plots.dimension_figure(results, dataset)),
                ("Codes by frequency", plots.code_use_figure(results, dataset)),
            ]
        ),
        "<h3>What a model has to predict</h3>",
        html_table(behaviour_columns(good)),
        "<h3>Error in physical units</h3>",
        html_table(_group_columns(good)),
        *_semantics(results, dataset, good),
    ]
    return "\n".join(lines)


def _semantics(results: Mapping[str, Any], dataset: Mapping[str, Any], units: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the codes say; nothing where it was not asked for."""
    reasons = [f"<p class=note>{escape(n)}</p>" for n in semantic_notes(results, dataset["name"], units)]
    tables = semantic_tables(results, dataset["name"], units)
    if not tables:
        return ["<h3>Is it semantic?</h3>", *reasons] if reasons else []
    teacher = (semantic_facts(results, dataset["name"]) or {})["teacher"]
    read = f" Features for retrieval: {escape(str(teacher.get('model', teacher)))}." if teacher else ""
    lines = [
        "<h3>Is it semantic?</h3>",
        "<p class=note>Linear models read task, phase and verb off the codes of a chunk; trained on chunks of the training"
        f" episodes, judged on those of held-out episodes. docs/semantics.md defines every figure.{read}</p>",
        *map(html_table, tables),
        *reasons,
        _plots(semantic_plots.overview_figures(results, dataset, units)),
    ]
    for unit in measured(units):
        examples = unit["semantics"]["figures"]["examples"]
        columns = [
            Column(title="code", meaning="of the first level", cells=tuple(str(e["symbol"]) for e in examples)),
            Column(title="share", meaning="of its codes", cells=tuple(percent(e["share"]) for e in examples)),
            Column(
                title="instructions",
                meaning="under which it occurs most, with their share of its chunks",
                cells=tuple(", ".join(f"{words} ({percent(share)})" for words, share in e["words"]) for e in examples),
            ),
        ]
        lines += [
            f"<details><summary>{escape(unit['tokenizer'])}: where its most used codes occur, and what they do</summary>",
            html_table(columns),
            _plots(semantic_plots.unit_figures(results, dataset, unit)),
            "</details>",
        ]
    return lines


def _replay(replay: Mapping[str, Any]) -> str:
    tasks = len({e["task"] for e in replay["episodes"]})
    horizon = "" if replay["horizon"] is None else f" of {replay['horizon']} steps"
    where = f"{len(replay['episodes'])} demonstrations of {tasks} tasks in {escape(str(replay['env']))}"
    if replay.get("mode") == "closed loop":
        what = (
            f"From the start states of {where}: the scripted expert's next actions from the robot's current state, encoded"
            f" and decoded in chunks{horizon} and executed. The line and band are these chunks without a tokenizer."
        )
    else:
        what = (
            f"{where}, encoded and decoded in chunks{horizon} and executed open loop from their start state. The line and"
            " band are the demonstrations themselves."
        )
    lines = [
        f"<h2>Replay in simulation{', closed loop' if replay.get('mode') else ''}</h2>",
        f"<p>{what}</p>",
        html_table(replay_columns(replay)),
        _plots([("Success against error, 95 % intervals", plots.replay_figure(replay))]),
    ]
    if replay.get("paired"):
        columns = [
            Column(title="a against b", meaning="", cells=tuple(f"{p['a']} / {p['b']}" for p in replay["paired"])),
            *(
                Column(title=title, meaning=meaning, cells=tuple(str(p[key]) for p in replay["paired"]))
                for title, key, meaning in (
                    ("both", "both", "succeed with both"),
                    ("only a", "only_a", "with a alone"),
                    ("only b", "only_b", "with b alone"),
                    ("neither", "neither", "with neither"),
                )
            ),
            Column(
                title="difference",
                meaning="a - b, 95 % CI",
                cells=tuple(
                    f"{percent(p['difference'])} ({percent(p['ci95'][0])} to {percent(p['ci95'][1])})"
                    for p in replay["paired"]
                ),
            ),
            Column(title="p", meaning="exact McNemar", cells=tuple(number(p["p_value"]) for p in replay["paired"])),
        ]
        lines += [
            "<details><summary>Every two tokenizers on the same demonstrations</summary>",
            html_table(columns),
            "</details>",
        ]
    return "\n".join(lines)


def _group_columns(units: Sequence[Mapping[str, Any]]) -> list[Column]:
    """One column a group and figure, of the step and of the path."""
    columns = [Column(title="tokenizer", meaning="", cells=tuple(u["tokenizer"] for u in units))]
    for index, group in enumerate(units[0]["metrics"]["physical"]):
        for key, unit in (("step", group["unit"]), ("path", group["path_unit"])):
            if group[key] is None:
                continue
            spreads = [u["metrics"]["physical"][index][key] for u in units]
            columns.append(
                Column(
                    title=f"{group['group']}, {unit}" + (" (path)" if key == "path" else ""),
                    meaning=f"{group['measure']}: mean / p95 / max",
                    cells=tuple(
                        "-" if s is None else " / ".join(number(s[k]) for k in ("mean", "p95", "maximum"))
                        for s in spreads
                    ),
                )
            )
    return columns


def html_table(columns: Sequence[Column]) -> str:
    """Rows below their titles, and what the columns mean."""
    head = "".join(f'<th title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in zip(*(c.cells for c in columns), strict=True)
    )
    legend = "; ".join(f"<b>{escape(c.title)}</b> {escape(c.meaning)}" for c in columns if c.meaning)
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
        f"<p class=note>{legend}</p>"
    )


def _plots(figures: Sequence[tuple[str, str]]) -> str:
    return (
        "<div class=plots>"
        + "\n".join(
            f"<figure>{f'<figcaption>{escape(title)}</figcaption>' if title else ''}{svg}</figure>"
            for title, svg in figures
        )
        + "</div>"
    )


def _provenance(results: Mapping[str, Any]) -> str:
    facts = {
        **made_under(results["provenance"]),
        "settings": ", ".join(f"{k} {v}" for k, v in results["settings"].items()),
    } | {f"data: {d['name']}": f"{d['source']}, identity {d['identity'][:16]}" for d in results["datasets"]}
    facts |= {
        f"{u['tokenizer']} on {u['dataset']}": f"{u['source']} {u['settings']}"
        + (f", weights {u['weights_hash'][:16]}" if u["status"] == "ok" else "")
        for u in results["results"]
        if not u["sweep"]
    }
    return f"<h2>Provenance</h2>\n{html_facts(facts)}"
