"""The pages on closed-form tokenizers: one second of control a chunk, on every data set at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark import run_benchmark, text_table
from actok.benchmark.replays import replay_text
from actok.core import ActokError
from actok.core.files import write_bytes
from actok.data import open_dataset
from actok.training import fit
from results.places import CLOSED_FORM, METAWORLD, ROOT, SEED, Places, Source, portable, slim

# Bits a chunk at which tokenizers are compared, between the points of their sweeps.
RATES = (100, 200, 400, 800, 1600)
# What fit(tolerance=...) is asked for on each data set.
TOLERANCES: Mapping[str, str] = {
    "metaworld": "2 mm, p95",
    "robosuite": "2 mm, 1 deg, p95",
    "aloha_sim": "1 deg",
    "libero": "2 mm, 1 deg, p95",
    "unitree_g1_inspire": "2 deg",
    "bridge_widowx": "5 mm, 3 deg, p95",
}


__all__ = ["make_pages"]


def make_pages(places: Places) -> None:
    """Measure and write the pages."""
    tokenizers = [*CLOSED_FORM, *([places.fast_plus] if places.fast_plus else [])]
    rows = []
    for name, source in places.sources.items():
        print(f"== {name}", flush=True)
        results = run_benchmark(
            [source.path],
            tokenizers,
            places.work / "bench" / name,
            horizon=open_dataset(source.path, space=source.space).space.default_horizon,
            spaces=source.space,
            seed=SEED,
            sweep=True,
            replay=METAWORLD if name == METAWORLD else None,
        )
        figures = json.dumps(slim(results), indent=1) + "\n"
        write_bytes(places.pages / f"{name}.json", portable(figures, places.data_root))
        write_bytes(places.pages / f"{name}.md", page(name, results))
        facts = results["datasets"][0]
        rows.append(
            f"| [{name}]({name}.md) | {facts['space']['dim']} | {facts['space']['rate_hz'] or '-'} | {facts['horizon']}"
            f" | {sum(facts['episodes'].values())} | {facts['frames']} |"
        )
    write_bytes(places.pages / "speed.md", speed_page(places))
    write_bytes(places.pages / "tolerance.md", tolerance_page(places.sources))
    write_bytes(places.pages / "README.md", index(rows, policies=(places.pages / "policies").is_dir()))


def page(name: str, results: Mapping[str, Any]) -> str:
    """One data set's tables, with what the columns mean and the command that makes them."""
    text = (
        f"# {name}\n\nMade by `make results` ([figures as JSON]({name}.json)); columns: [metrics](../metrics.md).\n\n"
    )
    text += text_table(results, markdown=True) + "\n\n" + matched(results)
    if results.get("replay"):
        against = [line for line in replay_text(results["replay"]).splitlines() if " against " in line]
        text += "\nReplay, paired on the same episodes (95 % interval, exact McNemar test):\n\n"
        text += "".join(f"* {line}\n" for line in against)
    return text


def matched(results: Mapping[str, Any]) -> str:
    """Mean normalised error at equal bits: each sweep read off between its points, linearly in both logarithms."""
    lines = [
        "Mean error in normalised units at equal bits a chunk (fixed rate), read off each preset's sweep between its points:",
        "",
        "| tokenizer | " + " | ".join(f"{rate} bits" for rate in RATES) + " |",
        "|---|" + "---|" * len(RATES),
    ]
    for name in CLOSED_FORM:
        units = [u for u in results["results"] if u["tokenizer"] == name and u["sweep"] and u["status"] == "ok"]
        points = sorted((u["metrics"]["rate"]["bits_fixed"], u["metrics"]["normalised"]["l1"]) for u in units)
        bits, error = np.log(np.array(points)).T
        found = [
            f"{np.exp(np.interp(np.log(rate), bits, error)):.3g}" if bits[0] <= np.log(rate) <= bits[-1] else "-"
            for rate in RATES
        ]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def speed_page(places: Places) -> str:
    """What the speed benchmarks measure, one thread each; their JSON is written beside the page."""
    fast = measured("fast_speed", ["--published", places.fast_plus] if places.fast_plus else [], places.pages)
    chunks = measured("chunk_speed", [], places.pages)
    rows = []
    for name, figures in fast["results"].items():
        for how, key in (("batch of 512", "batch"), ("one chunk", "single_chunk")):
            times = figures[f"{key}_microseconds_per_chunk" if key == "batch" else f"{key}_microseconds"]
            rows += [
                f"| {name}: {what}, {how} | {times[f'{what}_published']:.0f} | {times[what]:.1f}"
                f" | {figures[f'{key}_ratio'][what]:.1f} |"
                for what in ("encode", "decode")
            ]
    c = fast["conditions"]
    return "\n".join(
        [
            "# Speed",
            "",
            "Made by `make results`, one thread.",
            "",
            "## FAST against the published algorithm",
            "",
            f"Microseconds per chunk at T = {c['T']}, D = {c['D']}, in one run, with identical ids; what is compared is told in"
            " [FAST](../tokenizers/fast.md#speed). `python benchmarks/fast_speed.py --published FOLDER`,"
            " [JSON](fast_speed.json).",
            "",
            "| | published | here | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
            f"{c['cpu']}, Python {c['python']}, tokenizers {c['tokenizers']}, commit {c['commit']}.",
            "",
            "## Chunks from a memory-mapped cache",
            "",
            f"{chunks['chunks_per_second']:,} chunks/s of T = {chunks['horizon']}, D = {chunks['data']['dimensions']}, drawn"
            f" at random in batches of {chunks['batch_size']} from {chunks['data']['frames']:,} frames; statistics at"
            f" {chunks['statistics_frames_per_second']:,} frames/s. `python benchmarks/chunk_speed.py`,"
            " [JSON](chunk_speed.json).",
            "",
        ]
    )


def measured(script: str, options: list[str], pages: Path) -> dict[str, Any]:
    """Run a benchmark on one thread; keep and return its JSON."""
    print(f"== {script}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    write_bytes(pages / f"{script}.json", portable(done.stdout, None))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tolerance_page(sources: Mapping[str, Source]) -> str:
    """What fit(tolerance=...) chooses, tokenizer by tokenizer."""
    lines = [
        "# The coarsest setting within a tolerance",
        "",
        "Made by `make results`: `actok.fit(name, data, tolerance=...)` chooses on validation episodes; the last column is"
        " measured on test episodes, which took no part in the choice. In delta spaces the bound is on the path accumulated"
        " over the chunk.",
        "",
        "| data | tolerance | tokenizer | setting | bits a chunk | worst error / bound on test |",
        "|---|---|---|---|---|---|",
    ]
    for name, source in sources.items():
        if name not in TOLERANCES:
            continue
        for tokenizer in CLOSED_FORM:
            head = f"| {name} | {TOLERANCES[name]} | {tokenizer} |"
            try:
                report = fit(tokenizer, source.path, space=source.space, tolerance=TOLERANCES[name], seed=SEED).meta[
                    "tolerance"
                ]
            except ActokError as error:
                lines.append(f"{head} none: {str(error).split('; ')[1]} | - | - |")
                continue
            ratio = max(e["error"] / e["bound"] for e in report["test"].values() if e["bound"])
            setting = ", ".join(f"{k}={v}" for k, v in report["setting"].items())
            lines.append(f"{head} {setting} | {report['bits_per_chunk']:.0f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def index(rows: list[str], *, policies: bool = False) -> str:
    """The list of pages; what is said about the figures stands in FINDINGS.md, which is written by hand."""
    return "\n".join(
        [
            "# Results",
            "",
            "Every table here is made by `make results` (work files in `runs/results`, seed 0, hardware and commit below each"
            " table). [What they say](FINDINGS.md). [Learned tokenizers](learned/README.md). [Semantic codes](semantic/README.md)."
            f"{' [Policies](policies/README.md).' if policies else ''} [Tolerances](tolerance.md). [Speed](speed.md).",
            "",
            "Meta-World is collected by the command itself; the other sets are added with `DATA_ROOT=...` where they are at"
            " hand.",
            "",
            "| data | D | Hz | T | episodes | steps |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
