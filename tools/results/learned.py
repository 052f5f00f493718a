"""The pages on learned tokenizers, written from the measured JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actok.benchmark import text_table
from actok.benchmark.replays import replay_text
from actok.core.files import write_bytes
from results import fastervq
from results.curves import curve, figures, read_off
from results.jobs import HORIZON, JOBS, calibrated_steps
from results.places import CLOSED_FORM, RATIOS, SEED, Places, portable
from results.training import finished, tokenizer_folder

COMMAND = "make results DATA_ROOT=..."

__all__ = ["write_learned_pages"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on one data set: results.json, light.json, and replay.json where there is one."""

    name: str
    results: Mapping[str, Any]
    light: Mapping[str, Any]
    replay: Mapping[str, Any] | None

    @property
    def units(self) -> list[Mapping[str, Any]]:
        """All units, the full ones first."""
        return [*self.results["results"], *self.light["results"]]


def write_learned_pages(places: Places) -> None:
    """All pages and the JSON that they rest on."""
    pages = places.learned_pages

    def write(name: str, page: str, body: Mapping[str, Any]) -> None:
        write_bytes(pages / f"{name}.md", page.rstrip() + "\n")
        write_bytes(pages / f"{name}.json", portable(json.dumps(body, indent=1) + "\n", places.data_root))

    found = [_read(places.judged / name, name) for name in places.sources]
    measured = [m for m in found if m is not None]
    trained = {name: training_facts(places, name) for name, job in JOBS.items() if finished(job, places)}
    for one in measured:
        body = {"benchmark": _slim(one.results), "light": _slim(one.light), "replay": one.replay}
        write(one.name, dataset_page(one), body)
    by_name = {m.name: m.units for m in measured}
    conditions = _conditions(measured[0].light["provenance"]) if measured else ""
    write("training", training_page(trained), {"jobs": trained})
    tables = fastervq.tables(by_name)
    write("fastervq", fastervq.page(tables, conditions), {"tables": tables})
    write_bytes(pages / "README.md", index_page(measured, places))


def _read(folder: Path, name: str) -> Measured | None:
    def load(file: str) -> Any:
        path = folder / file
        return json.loads(path.read_text()) if path.exists() else None

    results, light = load("results.json"), load("light.json")
    if results is None or light is None:
        return None
    return Measured(name=name, results=results, light=light, replay=load("replay.json"))


def _slim(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without example chunks, code counts, and the curves of code use."""
    units = []
    for unit in body["results"]:
        metrics = {k: v for k, v in (unit.get("metrics") or {}).items() if k != "examples"}
        if "codes" in metrics:
            metrics["codes"] = [
                {k: v for k, v in t.items() if k not in ("frequencies", "ranks")} for t in metrics["codes"]
            ]
        units.append({**{k: v for k, v in unit.items() if k != "counts"}, "metrics": metrics})
    slim = {**body, "results": units}
    if "datasets" in body:
        slim["datasets"] = [{k: v for k, v in d.items() if k != "examples"} for d in body["datasets"]]
    return slim


def _conditions(p: Mapping[str, Any]) -> str:
    return (
        f"Made by `{COMMAND}`: actok {p['actok']}, commit {p['commit'] or 'unknown'}, {p['cpu']}, torch"
        f" {p['packages']['torch']}, one thread, {p['created']}, seed {p['seed']}."
    )


# -- one data set -----------------------------------------------------------------------------------------------------


def dataset_page(one: Measured) -> str:
    """Every tokenizer at its own setting, each learned one beside the closed-form ones at its bits, and replay."""
    results = {**one.results, "replay": one.replay}
    alone = [u["tokenizer"] for u in one.results["results"] if getattr(JOBS.get(u["tokenizer"]), "only", ())]
    except_for = f" ({', '.join(alone)}: on this one alone)" if alone else ""
    text = (
        f"# {one.name}, chunks of {HORIZON} steps\n\n{_conditions(one.results['provenance'])} [Figures as"
        f" JSON]({one.name}.json); columns: [metrics](../../metrics.md); what each name is: [index](README.md). Learned"
        f" tokenizers were trained on all data sets together{except_for}, closed-form ones fitted on this one; fast_plus is as published.\n\n"
    )
    text += text_table(results, markdown=True) + "\n\n" + matched_table(one)
    if one.replay is not None:
        against = [line for line in replay_text(one.replay).splitlines() if " against " in line]
        text += "\n## Replay, paired on the same episodes\n\n95 % interval, exact McNemar test.\n\n"
        text += "".join(f"* {line}\n" for line in against)
    return text


def matched_table(one: Measured) -> str:
    """Each learned tokenizer beside the sweeps of closed-form ones at its bits."""
    lines = [
        "## At equal bits",
        "",
        "Mean error in normalised units; steps valid at 0.03 / 0.1. Closed-form sweeps are read off at the learned"
        " tokenizer's bits (fixed rate): l1 linearly in both logarithms, the rates linearly in that of the bits; - where"
        " the sweep does not reach. FAST's sweep is continued by coarser scales (0.25, 0.5, 1).",
        "",
        "| learned | tokens | bits | itself | " + " | ".join(CLOSED_FORM) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(CLOSED_FORM),
    ]
    curves = {name: curve(one.units, name) for name in CLOSED_FORM}
    for unit in one.results["results"]:
        own = figures(unit)
        if unit["tokenizer"] not in JOBS or own is None:
            continue
        read = [read_off(points, lambda f: f.bits, own.bits) for points in curves.values()]
        cells = ["-" if f is None else f.text() for f in read]
        lines.append(
            f"| {unit['tokenizer']} | {own.tokens:.3g} | {own.bits:.0f} | {own.text()} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


# -- training ---------------------------------------------------------------------------------------------------------


def training_facts(places: Places, name: str) -> dict[str, Any]:
    """What the artifact and the run folder tell of a training."""
    config = json.loads((tokenizer_folder(places, name) / "config.json").read_text())
    run = json.loads((places.trained / name / "run" / "run.json").read_text())
    spec = json.loads((places.trained / name / "spec.json").read_text())
    keys = ("created", "commit", "cpu", "cores", "threads", "packages", "python", "platform")
    data = [{k: v for k, v in d.items() if k != "source"} for d in config["meta"]["data"]]
    return {"spec": spec, "training": config["meta"]["training"], "data": data, "conditions": {k: run[k] for k in keys}}


def training_page(trained: Mapping[str, Mapping[str, Any]]) -> str:
    """How each tokenizer was trained."""
    lines = [
        "# Training",
        "",
        f"Made by `{COMMAND}`, two jobs at a time with one thread each; [settings and figures as JSON](training.json)."
        " Steps were calibrated once for the seconds each job is meant to take (`--only calibrate`) and are kept in"
        " `tools/results/steps.json`; s: what they took. val l1: on validation episodes, mean over data sets, of the weights"
        " that were kept.",
        "",
        "| job | data sets | parameters | batch | steps | epochs | s | chunks/s | kept step | val l1 | codes used |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, facts in trained.items():
        t = facts["training"]
        best = t["validation"]
        used = f"{100 * sum(best['codes_used']) / len(best['codes_used']):.0f} %" if best else "-"
        lines.append(
            f"| {name} | {len(facts['data'])} | {t['parameters']:,} | {t['config']['batch_size']} | {t['steps']} |"
            f" {t['epochs']:.2g} | {t['seconds']:.0f} | {t['chunks_per_s']:.0f} | {best['step'] if best else '-'} |"
            f" {best['l1'] if best else float('nan'):.4f} | {used} |"
        )
    lines += ["", "codes used: mean over levels and data sets, on at most 256 validation chunks of each.", ""]
    warned = [f"* {name}: {text}" for name, facts in trained.items() for text in facts["training"]["warnings"]]
    lines += [*warned, ""] if warned else []
    made: dict[str, list[str]] = {}
    for name, facts in trained.items():
        c = facts["conditions"]
        what = f"commit {c['commit'] or 'unknown'}, {c['cpu']}, {c['cores']} cores, torch {c['packages']['torch']}"
        made.setdefault(what, []).append(name)
    lines += [f"* {what}, seed {SEED}: {', '.join(names)}" for what, names in made.items()]
    return "\n".join(lines)


# -- index ------------------------------------------------------------------------------------------------------------


def index_page(measured: Sequence[Measured], places: Places) -> str:
    """List of pages, data sets and trained tokenizers."""
    trial = "" if places.scale == 1 else f"\n**A trial with {places.scale:g} of all steps; no results.**\n"
    lines = [
        "# Learned tokenizers",
        trial,
        f"Every figure is made by `{COMMAND}`: all tokenizers on the same held-out episodes (80/10/10, seed {SEED}), chunks"
        f" of {HORIZON} steps, beside the closed-form ones. Training is short, minutes on one thread of a CPU, so this"
        " compares what the designs learn quickly, not what their papers' training gives.",
        "",
        "* [FASTerVQ](fastervq.md): against FAST, code use, ablations, scaling, left-out robots",
        "* [Training](training.md): steps, seconds, parameters",
        "",
        "share: of a training batch, where a tokenizer is trained on all (about the square root of a data set's size).",
        "",
        "| data | D | Hz | T | s | test chunks | steps | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in measured:
        facts = one.results["datasets"][0]
        seconds = "-" if facts["seconds"] is None else f"{facts['seconds']:.2g}"
        lines.append(
            f"| [{one.name}]({one.name}.md) | {facts['space']['dim']} | {facts['space']['rate_hz'] or '-'} |"
            f" {facts['horizon']} | {seconds} | {facts['test_chunks']['used']} of {facts['test_chunks']['of']} |"
            f" {facts['frames']} | {RATIOS[one.name] / sum(RATIOS.values()):.0%} |"
        )
    lines += ["", "| trained | preset | settings | data | steps |", "|---|---|---|---|---:|"]
    for name, job in JOBS.items():
        data = ", ".join(job.only) or ("all" + (f" but {', '.join(job.without)}" if job.without else ""))
        settings = json.dumps(job.settings) if job.settings else "the preset's"
        state = calibrated_steps(job, places.scale) if finished(job, places) else "not trained"
        lines.append(f"| {name} | {job.preset} | {settings} | {data} | {state} |")
    return "\n".join(lines) + "\n"
