"""Judge X-Tokenizer's jobs: semantics of the ablation, errors on every robot, codes that arms share.

    ablation-<seed>   `actok bench --semantics` of all variants of one seed on Meta-World
    arms.json         every tokenizer of all robots, those that left one out, and those of one, on each robot's test chunks
    shared.json       `actok.evaluation.shared_motion`, arm against arm
    speed.json        benchmarks/alignment_speed.py

Everything measured is kept while weights, data and code are the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark.measure import embodiment_for
from actok.benchmark.prepare import Prepared, prepare
from actok.benchmark.results import UnitStore, plain, provenance, write_results
from actok.core import ActionTokenizer, ActokError, find_preset
from actok.core.files import write_bytes
from actok.data import open_dataset, split_dataset
from actok.evaluation.achieved import ArmChunks, arm_chunks
from actok.evaluation.shared_motion import SameMotion, shared_codes
from actok.training import fit_parts, load
from actok.training.fitting import FRACTIONS
from results.jobs import HORIZON
from results.measuring import LEVELS, Judged, kept, light_unit
from results.places import METAWORLD, ROOT, SEED, Source
from results.training import ONE_THREAD, Task, run_tasks
from results.xtokenizer import ABLATION, ARMS, SEEDS, SEMANTIC_JOBS, SemanticJob, Workshop, trained

# Closed-form tokenizers beside the ablation; FAST once more, fitted on the training chunks of all robots.
REFERENCES = ("bins", "fast")
FAST_UNION = "union-fast"
TEST_CHUNKS, FIT_CHUNKS = 1_000, 2_000
# Arms that are compared: the first one's held-out episodes with all of the second's. Two data sets that share phases but
# no task are compared by phase alone.
PAIRS = (
    ("arm_panda", "arm_ur5e"),
    ("arm_panda", "arm_iiwa"),
    ("arm_panda", "arm_kinova3"),
    ("arm_panda", "arm_xarm7"),
    ("arm_ur5e", "arm_xarm7"),
    ("arm_panda", "arm_libero"),
)
BY_PHASE = ("arm_libero",)
SHARING = ("union", "union-plain-rvq", "union-fastervq", "without-arm_ur5e")
CRITERION = SameMotion(position_m=0.015)
SPEED_SECONDS = 300.0

__all__ = ["REFERENCES", "measure_arms", "measure_semantic", "measure_shared"]

Jobs = Mapping[str, SemanticJob]


def measure_semantic(work: Workshop, *, jobs: int, chosen: Jobs = SEMANTIC_JOBS) -> list[str]:
    """Everything, some at a time in processes of one thread; what failed is named."""
    if left := [name for name in chosen if name not in trained(work, [chosen[name].part], chosen)]:
        print(f"not trained, so not measured: {', '.join(left)}", flush=True)
    failed = run_tasks(ablation_tasks(work, chosen), work.places, jobs=jobs)
    os.environ.update(ONE_THREAD)  # of the processes to come
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {name: pool.submit(one, work, chosen) for name, one in (("arms", _arms), ("shared", _shared))}
        for name, future in futures.items():
            try:
                failed += [f"{name}: {text}" for text in future.result()]
            except Exception as error:  # one must not take the other with it
                failed.append(f"{name}: {type(error).__name__}: {error}")
    return failed + measure_speed(work)


# -- ablation ---------------------------------------------------------------------------------------------------------


def ablation_tasks(work: Workshop, chosen: Jobs = SEMANTIC_JOBS) -> list[Task]:
    """`actok bench --semantics` of the finished jobs of each seed; the closed-form tokenizers go with the first."""
    done = trained(work, ["ablation"], chosen)
    source = work.sources[METAWORLD]
    tasks = []
    for seed in SEEDS:
        names = [f"{variant}-{seed}" for variant in ABLATION if f"{variant}-{seed}" in done]
        given = [*(REFERENCES if seed == SEEDS[0] else ()), *(str(work.tokenizer(name)) for name in names)]
        if not names:
            continue
        folder = work.root / "bench" / f"ablation-{seed}"
        command = [sys.executable, "-m", "actok", "bench", "--data", source.path, "--tokenizers", ",".join(given)]
        command += ["--horizon", str(HORIZON), "--seed", str(SEED), "--semantics", "--out", str(folder)]
        command += ["--features", str(work.features)]
        tasks.append(
            Task(
                name=f"bench of seed {seed}",
                folder=work.root / "bench" / f"log-{seed}",
                spec={"tokenizers": names},
                files={},
                command=command,
                said=f"{len(given)} tokenizers",
            )
        )
    return tasks


# -- every robot ------------------------------------------------------------------------------------------------------


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _arms(work: Workshop, chosen: Jobs) -> list[str]:
    _one_thread()
    return measure_arms(work, chosen)


def measure_arms(work: Workshop, chosen: Jobs = SEMANTIC_JOBS) -> list[str]:
    """Errors of every tokenizer on the test chunks of every robot it is meant for, in arms.json; what failed is named.

    Those of all robots are meant for each, one without a robot for that robot through `adapt`, one of a robot for that one.
    """
    everywhere = [Judged(label=n, folder=work.tokenizer(n)) for n in trained(work, ["union"], chosen)]
    single = trained(work, ["left_out", "alone"], chosen)
    robots = {name for job in chosen.values() if job.part != "ablation" for name in _names(job, work)}
    sources = [s for name, s in work.sources.items() if name in robots]
    prepared = {s.name: _prepared(s) for s in sources}
    if prepared:
        everywhere.append(Judged(label=FAST_UNION, folder=_fast_of_all(work, prepared)))
    store = UnitStore(work.root / "bench" / "units")
    units, failed = [], []
    for source in sources:
        own = [n for n in single if (source.name,) in (chosen[n].only, chosen[n].without)]
        for judged in [*everywhere, *(Judged(label=n, folder=work.tokenizer(n)) for n in own)]:
            one = prepared[source.name]
            key = store.key(semantic=1, dataset=one.key, seed=SEED, **judged.identity())
            unit = kept(store, key, partial(light_unit, judged, one))
            units.append({"dataset": source.name, "tokenizer": judged.label, **unit})
            if unit["status"] != "ok":
                failed.append(f"{judged.label} on {source.name}: {unit['error']}")
    facts = {name: _facts(one) for name, one in prepared.items()}
    write_results(
        {"provenance": provenance(SEED), "robots": facts, "results": units}, work.root / "bench" / "arms.json"
    )
    return failed


def _names(job: SemanticJob, work: Workshop) -> list[str]:
    return [source.name for source in job.drawn(work) or []]


def _prepared(source: Source) -> Prepared:
    options: dict[str, Any] = {"horizon": HORIZON, "seed": SEED, "tolerances": LEVELS}
    [one] = prepare([source.path], source.space, **options, max_chunks=TEST_CHUNKS, max_fit_chunks=FIT_CHUNKS)
    return one


def _facts(one: Prepared) -> dict[str, Any]:
    facts = one.facts
    return {
        "embodiment": facts["space"]["embodiment"],
        "dim": facts["space"]["dim"],
        "rate_hz": facts["space"]["rate_hz"],
        "frames": facts["frames"],
        "test_chunks": facts["test_chunks"]["used"],
    }


def _fast_of_all(work: Workshop, prepared: Mapping[str, Prepared]) -> Path:
    """FAST fitted on the training chunks of all robots, saved."""
    folder = work.root / "trained" / FAST_UNION / FAST_UNION
    made_from = {"data": {n: one.key for n, one in prepared.items()}, "settings": dict(find_preset("fast").settings)}
    note = folder.parent / "spec.json"
    if folder.exists() and note.exists() and json.loads(note.read_text()) == made_from:
        return folder
    fit_parts("fast", [one.held_out.train for one in prepared.values()]).save_pretrained(folder)
    write_bytes(note, json.dumps(made_from, indent=1) + "\n")
    return folder


# -- shared codes -----------------------------------------------------------------------------------------------------


def _shared(work: Workshop, chosen: Jobs) -> list[str]:
    _one_thread()
    return measure_shared(work, chosen)


def measure_shared(
    work: Workshop, chosen: Jobs = SEMANTIC_JOBS, *, pairs: tuple[tuple[str, str], ...] = PAIRS, stride: int = 2
) -> list[str]:
    """Share of equal codes of two arms for the same achieved motion, in shared.json; what failed is named."""
    tokenizers = {n: load(work.tokenizer(n)) for n in trained(work, ["union", "left_out"], chosen) if n in SHARING}
    store = UnitStore(work.root / "bench" / "units")
    rows, failed = [], []
    for first, second in pairs:
        if first not in work.sources or second not in work.sources:
            continue
        by_task = not {first, second} & set(BY_PHASE)
        a, b = (open_dataset(work.sources[name].path) for name in (first, second))
        split = split_dataset(a, fractions=FRACTIONS, seed=SEED)
        held_out = np.sort(np.concatenate([split.validation, split.test]))
        chunks_a = arm_chunks(a, HORIZON, held_out, by_task=by_task)
        chunks_b = arm_chunks(b, HORIZON, stride=stride, by_task=by_task)
        for label, tokenizer in tokenizers.items():
            artifact = tokenizer.to_artifact()
            key = store.key(
                shared=1,
                arms=[work.sources[n].identity() for n in (first, second)],
                weights=[artifact.weights_hash, artifact.embodiments],
                criterion=CRITERION,
                stride=stride,
            )

            compare = partial(_compare, tokenizer, work, (first, second), chunks_a, chunks_b)
            try:
                row = kept(store, key, compare)
            except ActokError as error:
                failed.append(f"{label}, {first} and {second}: {error}")
                continue
            left_out = [name for name in (first, second) if name not in tokenizer.spaces]
            rows.append({"tokenizer": label, "by_task": by_task, "adapted": left_out, **row})
    write_results({"provenance": provenance(SEED), "results": rows}, work.root / "bench" / "shared.json")
    return failed


def _compare(
    tokenizer: ActionTokenizer, work: Workshop, arms: tuple[str, str], a: ArmChunks, b: ArmChunks
) -> dict[str, Any]:
    found = shared_codes(_serving(tokenizer, work, arms), a, b, criterion=CRITERION, seed=SEED)
    result: dict[str, Any] = plain(found)
    return result


def _serving(tokenizer: ActionTokenizer, work: Workshop, arms: tuple[str, ...]) -> ActionTokenizer:
    """The tokenizer, adapted to the arms it has not seen."""
    for name in arms:
        if name in ARMS and name not in tokenizer.spaces:
            tokenizer = embodiment_for(tokenizer, _prepared(work.sources[name]).held_out)[0]
    return tokenizer


# -- speed ------------------------------------------------------------------------------------------------------------


def measure_speed(work: Workshop, say: Callable[[str], None] = print) -> list[str]:
    """Time of a training step with the objectives against one without, in speed.json (measured once)."""
    script, out = ROOT / "benchmarks" / "alignment_speed.py", work.root / "bench" / "speed.json"
    if out.exists():
        return []
    if not script.exists():
        say(f"speed: {script.relative_to(ROOT)} is missing")
        return []
    environment = {**os.environ, **ONE_THREAD}
    command = [sys.executable, str(script)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SPEED_SECONDS, env=environment, check=True
        )
        write_bytes(out, json.dumps(json.loads(done.stdout), indent=1) + "\n")
    except (subprocess.SubprocessError, ValueError) as error:
        return [f"speed: {error}"]
    return []
