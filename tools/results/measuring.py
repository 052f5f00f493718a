"""Judge closed-form and trained tokenizers on every data set at chunks of 20 steps.

Three kinds of figures, each kept in a UnitStore, so that a trained tokenizer is measured again when its weights change:
the whole list of the benchmark's metrics (`run_benchmark`), lighter units of ablations (`light.json`), and on Meta-World
the replay of held-out episodes (`replay.json`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark import run_benchmark
from actok.benchmark.measure import embodiment_for, measure
from actok.benchmark.prepare import Prepared, prepare
from actok.benchmark.replays import held_out_episodes
from actok.benchmark.results import UnitStore, plain, provenance, write_results
from actok.benchmark.suite import REPLAYS_PER_TASK
from actok.core import ActionTokenizer, ActokError, ChunkContext, find_preset
from actok.envs import make_env
from actok.evaluation.codes import CodeSequences
from actok.evaluation.intervals import compare_paired
from actok.evaluation.metrics import TOLERANCES
from actok.evaluation.replay import EXACT, replay
from actok.training import fit_parts, load
from results.jobs import HORIZON, JOBS
from results.places import CLOSED_FORM, METAWORLD, SEED, Places, Source
from results.training import ONE_THREAD, finished, tokenizer_folder

# The tolerances that the learned papers are compared at are among them.
LEVELS = tuple(sorted({*TOLERANCES, 0.03}))
LIGHT_CHUNKS, LIGHT_FIT_CHUNKS = 2_000, 4_000
# Coarser than FAST's own sweep, whose curve they continue to the bits of learned tokenizers.
COARSE_FAST = ({"scale": 0.25}, {"scale": 0.5}, {"scale": 1.0})
FULL_PARTS = ("main", "matched")

__all__ = ["FULL_PARTS", "LEVELS", "Judged", "kept", "light_unit", "measure_all"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A tokenizer to judge: a trained job, a closed-form preset with settings, or a saved folder."""

    label: str
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sweep: bool = False

    def made(self, prepared: Prepared) -> ActionTokenizer:
        """Loaded, or fitted on the data's training chunks."""
        if self.folder is not None:
            return load(self.folder)
        assert self.preset is not None
        tokenizer: ActionTokenizer = fit_parts(self.preset, [prepared.held_out.train], **self.settings)
        return tokenizer

    def identity(self) -> dict[str, Any]:
        """What its figures depend on, beside data and code."""
        if self.folder is not None:
            artifact = load(self.folder).to_artifact()
            return {"weights": [artifact.weights_hash, artifact.embodiments]}
        assert self.preset is not None
        return {"preset": self.preset, "settings": {**find_preset(self.preset).settings, **self.settings}}


def measure_all(places: Places, *, jobs: int) -> list[str]:
    """Judge on every data set, some at a time in processes of one thread; what failed is named."""
    left = [name for name, job in JOBS.items() if not finished(job, places)]
    if left:
        print(f"not trained, so not measured: {', '.join(left)}", flush=True)
    os.environ.update(ONE_THREAD)  # of the processes to come
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {name: pool.submit(_measure, source, places) for name, source in places.sources.items()}
        for name, future in futures.items():
            try:
                found = future.result()
            except Exception as error:  # one data set must not take the others with it
                found = [f"{type(error).__name__}: {error}"]
            print(f"== {name}: {len(found)} failed", *found, sep="\n   ", flush=True)
            failed += [f"{name}: {text}" for text in found]
    return failed


def _measure(source: Source, places: Places) -> list[str]:
    import torch

    torch.set_num_threads(1)
    out = places.judged / source.name
    trained = [name for name, job in JOBS.items() if finished(job, places)]
    closed = [Judged(label=name, preset=name) for name in CLOSED_FORM]
    if places.fast_plus:
        closed.append(Judged(label="fast_plus", folder=Path(places.fast_plus)))
    learned = [
        Judged(label=name, folder=tokenizer_folder(places, name))
        for name in trained
        if JOBS[name].part in FULL_PARTS and (not JOBS[name].only or source.name in JOBS[name].only)
    ]
    results = run_benchmark(
        [source.path],
        [j.preset if j.folder is None else (j.label, j.folder, {}) for j in (*closed, *learned)],
        out,
        horizon=HORIZON,
        spaces=source.space,
        seed=SEED,
        sweep=True,
        tolerances=LEVELS,
        progress=False,
    )
    failed = [f"{u['tokenizer']}: {u['error']}" for u in results["results"] if u["status"] != "ok"]
    light = [Judged(label="fast", preset="fast", settings=point, sweep=True) for point in COARSE_FAST]
    light += [
        Judged(label=name, folder=tokenizer_folder(places, name))
        for name in trained
        if JOBS[name].part not in FULL_PARTS or name == "fastervq-tiny"
    ]
    _light(source, light, out)
    if source.name == METAWORLD:
        failed += _replay(source, [*closed, *learned], out)
    return failed


# -- lighter units ----------------------------------------------------------------------------------------------------


def _light(source: Source, wanted: list[Judged], out: Path) -> None:
    """Size, errors and code counts of each, in light.json; what a codec cannot serve is told there as an error."""
    options: dict[str, Any] = {"horizon": HORIZON, "seed": SEED, "tolerances": LEVELS}
    [prepared] = prepare(
        [source.path], source.space, **options, max_chunks=LIGHT_CHUNKS, max_fit_chunks=LIGHT_FIT_CHUNKS
    )
    store = UnitStore(out / "units")
    units = []
    for judged in wanted:
        key = store.key(light=2, dataset=prepared.key, seed=SEED, **judged.identity())
        head = {
            "dataset": source.name,
            "tokenizer": judged.label,
            "settings": dict(judged.settings),
            "sweep": judged.sweep,
        }
        units.append({**head, **kept(store, key, partial(light_unit, judged, prepared))})
    write_results({"provenance": provenance(SEED), "results": units}, out / "light.json")


def light_unit(judged: Judged, prepared: Prepared) -> dict[str, Any]:
    """Size, errors and code counts of one tokenizer, or the error that it cannot serve the data with."""
    data = prepared.held_out
    try:
        tokenizer, embodiment, adapted = embodiment_for(judged.made(prepared), data)
    except ActokError as error:
        return {"status": "error", "error": str(error)}
    metrics = measure(tokenizer, data, embodiment, seed=SEED, full=False)
    context = ChunkContext(horizon=HORIZON, embodiment=embodiment, anchor=data.anchor, pad_mask=data.pad_mask)
    layout = tokenizer.layout_for(HORIZON, embodiment)
    codes = CodeSequences.of(tokenizer.encode(data.test, context), layout)
    counts = {
        str(table): np.bincount(codes.flat[codes.table == table], minlength=size).tolist()
        for table, size in codes.sizes.items()
    }
    return {"status": "ok", "error": None, "adapted": adapted, "metrics": metrics, "counts": counts}


def kept(store: UnitStore, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the store has under the key, else made and put there."""
    found = store.get(key)
    if found is None:
        found = plain(make())
        store.put(key, found)
    return found


# -- replay -----------------------------------------------------------------------------------------------------------


def _replay(source: Source, wanted: list[Judged], out: Path) -> list[str]:
    """Replay of held-out episodes in replay.json; each tokenizer's row is kept by itself, and compared with `exact`."""
    [prepared] = prepare(
        [source.path],
        source.space,
        horizon=HORIZON,
        seed=SEED,
        tolerances=LEVELS,
        max_chunks=LIGHT_CHUNKS,
        max_fit_chunks=20_000,
    )
    episodes = held_out_episodes(prepared.dataset, seed=SEED, per_task=REPLAYS_PER_TASK)
    store = UnitStore(out / "units")
    keys = {
        j.label: store.key(replay=METAWORLD, dataset=prepared.key, episodes=episodes, **j.identity()) for j in wanted
    }
    rows = {label: store.get(key) for label, key in keys.items()}
    missing, failed = {}, []
    for judged in wanted:
        if rows[judged.label] is None:
            try:
                missing[judged.label] = embodiment_for(judged.made(prepared), prepared.held_out)[0]
            except ActokError as error:
                failed.append(f"replay of {judged.label}: {error}")
    exact_key = store.key(replay=METAWORLD, dataset=prepared.key, episodes=episodes, exact=True)
    exact = store.get(exact_key)
    if missing or exact is None:
        env = make_env(METAWORLD)
        found = replay(env, prepared.dataset, missing, episodes=episodes, horizon=HORIZON, workers=1, progress=False)
        exact = {**found["tokenizers"].pop(EXACT), "env": found["env"], "episodes": found["episodes"]}
        store.put(exact_key, exact)
        for label, row in found["tokenizers"].items():
            store.put(keys[label], row)
            rows[label] = row
    listed = exact.pop("episodes")
    env_name = exact.pop("env")
    tokenizers = {EXACT: exact, **{label: row for label, row in rows.items() if row is not None}}
    body = {
        "env": env_name,
        "horizon": HORIZON,
        "episodes": listed,
        "tokenizers": tokenizers,
        "paired": [_pair(label, row, exact) for label, row in tokenizers.items() if label != EXACT],
        "provenance": provenance(SEED),
    }
    write_results(body, out / "replay.json")
    return failed


def _pair(label: str, row: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer against the demonstrations themselves, as `actok.evaluation.replay.replay` tells it."""
    c = compare_paired(np.array(exact["success"], bool), np.array(row["success"], bool))
    counts = {"both": c.both, "only_a": c.only_a, "only_b": c.only_b, "neither": c.neither}
    return {
        "a": EXACT,
        "b": label,
        **counts,
        "difference": c.difference,
        "ci95": [c.low, c.high],
        "p_value": c.p_value,
    }
