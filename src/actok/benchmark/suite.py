"""The benchmark: datasets x tokenizers -> results.json, then table and report from it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from actok.benchmark.measure import embodiment_for, measure
from actok.benchmark.prepare import Prepared, prepare
from actok.benchmark.report import write_report
from actok.benchmark.results import FORMAT, SCHEMA_VERSION, UnitStore, module_hash, plain, provenance, write_results
from actok.benchmark.semantic_plots import write_pictures
from actok.benchmark.semantics import LabelledSource
from actok.benchmark.table import text_table
from actok.core import (
    ActionTokenizer,
    ActokError,
    ConfigError,
    MissingExtraError,
    find_preset,
    split_settings,
    tokenizer_presets,
)
from actok.core.errors import follows_interrupt
from actok.core.files import write_bytes
from actok.evaluation.metrics import TOLERANCES
from actok.training import fit_parts, load
from actok.training.fitting import FRACTIONS

# What a point of a rate-distortion curve is fitted and judged on, at most.
SWEEP_CHUNKS, SWEEP_FIT_CHUNKS = 500, 4000
# Held-out demonstrations of each task that are replayed where an environment is named.
REPLAYS_PER_TASK = 5

__all__ = ["Candidate", "run_benchmark", "write_outputs"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One tokenizer to judge.

    Attributes:
        label: what tables call it.
        source: a preset's name, a folder or Hub id to load, or a fitted tokenizer.
        settings: override the preset's.
        loaded: the fitted tokenizer where there is one already; None for a preset.
        sweep: whether this is a point of the label's rate-distortion curve.
    """

    label: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    loaded: ActionTokenizer | None = None
    sweep: bool = False

    @classmethod
    def of(cls, given: Any) -> Candidate:
        """From a name, "name:key=value", a folder, a fitted tokenizer, or (label, any of these, settings)."""
        label, source, settings = given if isinstance(given, (tuple, list)) and len(given) == 3 else (None, given, {})
        if isinstance(source, ActionTokenizer):
            if settings:
                raise ConfigError(
                    f"settings {dict(settings)} are given for a fitted tokenizer; fit it with them instead"
                )
            return cls(label=label or source.kind, source=source.kind, loaded=source)
        if not isinstance(source, (str, Path)):
            raise ConfigError(f"{given!r} names no tokenizer; give a preset, a folder, or (label, preset, settings)")
        name = str(source)
        if isinstance(source, str) and not settings:
            name, settings = split_settings(name)
            source, label = name, label or (str(given) if settings else None)
        if name in tokenizer_presets() and not isinstance(source, Path):
            return cls(label=label or name, source=name, settings=dict(settings))
        if not Path(name).exists() and "/" not in name:
            find_preset(name)  # raises with the nearest name
        if settings:
            raise ConfigError(
                f"settings {dict(settings)} are given for the saved tokenizer {name}; fit it with them instead"
            )
        return cls(label=label or Path(name).name, source=name, loaded=load(source))


def run_benchmark(
    data: Sequence[Any],
    tokenizers: Sequence[Any],
    out_dir: str | Path,
    *,
    horizon: int | None = None,
    spaces: Any = None,
    seed: int = 0,
    sweep: bool = False,
    tolerances: Sequence[float] = TOLERANCES,
    replay: Mapping[str, Any] | str | None = None,
    semantics: bool = False,
    features: str | Path | None = None,
    max_chunks: int = 2_000,
    max_fit_chunks: int = 20_000,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit every tokenizer on every dataset's training episodes and judge it on the test episodes.

    Writes results.json first, then table.txt, table.md and report.html from it. Finished units are kept in
    `out_dir/units` and reused by a later run of the same code on the same data. A tokenizer that fails on a dataset is
    recorded with its error and the rest goes on; without matplotlib everything but the report is written, with a
    warning.

    Args:
        data: sources that `actok.data.open_dataset` understands.
        tokenizers: preset names, with settings as in "fast:scale=20", folders, fitted tokenizers, or (label, name,
            settings).
        out_dir: where to write.
        horizon: T of all datasets. None: that of the loaded tokenizers where they agree, else one second of each
            dataset's control, 10 to 50 steps (`ActionSpace.default_horizon`).
        spaces: action space for all datasets, or a list with one (or None) each.
        seed: of split, noise and damage.
        sweep: also measure each preset's sweep of settings, on at most 500 test chunks, for rate-distortion curves.
        tolerances: at which the valid reconstruction rate is reported.
        replay: results of `actok.evaluation.replay.replay` (or the name of an environment to run it in now, on the
            first dataset whose space is the environment's), shown beside the errors.
        semantics: also what the codes say about task, phase, verb and words (docs/semantics.md).
        features: of `semantics`: folder of `actok features`, with a teacher's features of every dataset, for retrieval.
        max_chunks, max_fit_chunks: test and training chunks are thinned to these numbers.
        fresh: measure everything again.
        progress: show a progress bar on stderr.

    Returns:
        What results.json holds. Raises ConfigError for an unknown tokenizer, DataError for a source that cannot be
        used, both before anything is measured.
    """
    out = Path(out_dir)
    if not data or not tokenizers:
        raise ConfigError(f"{len(data)} datasets and {len(tokenizers)} tokenizers are given; give at least one of each")
    _check_replay(replay)
    if features is not None and not semantics:
        raise ConfigError(
            f"features {features} are given, but only the semantic figures read them; ask for semantics too"
        )
    candidates = [Candidate.of(given) for given in tokenizers]
    labels = [c.label for c in candidates]
    if repeated := {n for n in labels if labels.count(n) > 1}:
        raise ConfigError(
            f"tokenizers share the label {sorted(repeated)[0]!r}; give (label, name, settings) to tell apart"
        )
    # (Published FAST files may state no horizon: 0.)
    if horizon is None and len(known := {c.loaded.horizon for c in candidates if c.loaded and c.loaded.horizon}) == 1:
        horizon = known.pop()
    options = {"horizon": horizon, "seed": seed, "tolerances": tuple(tolerances)}
    prepared = prepare(data, spaces, **options, max_chunks=max_chunks, max_fit_chunks=max_fit_chunks)
    points = [p for c in candidates for p in _sweep_points(c)] if sweep else []
    small = prepare(data, spaces, **options, max_chunks=SWEEP_CHUNKS, max_fit_chunks=SWEEP_FIT_CHUNKS) if points else []
    labelled = [LabelledSource(p, features) for p in prepared] if semantics else []
    work = [(d, c) for d in prepared for c in candidates] + [(d, c) for d in small for c in points]
    store = UnitStore(out / "units", fresh=fresh)
    units = []
    with tqdm(work, unit="unit", disable=None if progress else True, delay=1) as bar:
        for dataset, candidate in bar:
            bar.set_description(f"{dataset.held_out.name}: {candidate.label}")
            source = next((s for s in labelled if s.prepared is dataset and not candidate.sweep), None)
            units.append(_unit(dataset, candidate, store, seed, source))
    results: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "provenance": provenance(seed),
            "settings": {
                "horizon": horizon,
                "max_chunks": max_chunks,
                "max_fit_chunks": max_fit_chunks,
                "sweep": sweep,
                "semantics": semantics,
            },
            "datasets": [d.facts for d in prepared],
            "semantics": [_labels(source, store, seed) for source in labelled],
            "results": units,
            "replay": _replay(replay, prepared, candidates, store, seed, progress) if replay is not None else None,
        }
    )
    write_results(results, out / "results.json")
    write_outputs(results, out)
    return results


def write_outputs(results: Mapping[str, Any], out_dir: str | Path) -> None:
    """Everything derived from results: table.txt, table.md, report.html, and pictures of semantic figures as SVG files.

    Without matplotlib there are no report and no pictures, and a warning says so.
    """
    out = Path(out_dir)
    write_bytes(out / "table.txt", text_table(results) + "\n")
    write_bytes(out / "table.md", text_table(results, markdown=True) + "\n")
    try:
        write_report(results, out / "report.html")
        write_pictures(results, out / "semantics")
    except MissingExtraError as error:
        warnings.warn(f"report.html was not written: {error}", stacklevel=3)


def _sweep_points(candidate: Candidate) -> list[Candidate]:
    """The preset's sweep, each point on top of the candidate's own settings."""
    if candidate.loaded is not None:
        return []
    return [
        Candidate(label=candidate.label, source=candidate.source, settings={**candidate.settings, **point}, sweep=True)
        for point in find_preset(candidate.source).sweep
    ]


def _unit(
    dataset: Prepared, candidate: Candidate, store: UnitStore, seed: int, source: LabelledSource | None
) -> dict[str, Any]:
    """One unit: kept from an earlier run, or fitted and measured now. Errors become part of the unit."""
    preset = None if candidate.loaded is not None else find_preset(candidate.source)
    weights = None if candidate.loaded is None else candidate.loaded.to_artifact()
    settings = dict(candidate.settings) if preset is None else {**preset.settings, **candidate.settings}
    facts = {
        "dataset": dataset.key,
        "target": None if preset is None else preset.target,
        "module": module_hash(preset.target.partition(":")[0] if preset else type(candidate.loaded).__module__),
        "weights": None if weights is None else [weights.weights_hash, weights.embodiments],
        "settings": settings,
        "full": not candidate.sweep,
        "seed": seed,
    }
    unit = {
        "dataset": dataset.held_out.name,
        "tokenizer": candidate.label,
        "source": candidate.source,
        "settings": settings,
        "sweep": candidate.sweep,
    }
    fitted = cache(lambda: _fitted(dataset, candidate))
    unit |= _kept_or_made(store, facts, lambda: _fit_and_measure(dataset, candidate, fitted, seed))
    if source is not None and unit["status"] == "ok":
        unit["semantics"] = _kept_or_made(
            store,
            {**facts, "semantics": source.key},
            lambda: source.measure(embodiment_for(fitted(), dataset.held_out), seed=seed),
        )
    return unit


def _kept_or_made(store: UnitStore, facts: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run kept under these facts, or the result of `work`, kept unless it failed."""
    key = store.key(**facts)
    if (kept := store.get(key)) is not None:
        return kept
    found: dict[str, Any] = plain(_attempt(work))
    if found["status"] == "ok":
        store.put(key, found)
    return found


def _labels(source: LabelledSource, store: UnitStore, seed: int) -> dict[str, Any]:
    """What tokenizers of a dataset are compared with: its labels, and probes on the chunks themselves."""
    head = {"dataset": source.prepared.held_out.name}
    return head | _kept_or_made(store, {"labels": source.key, "seed": seed}, lambda: source.facts(seed=seed))


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work` with what it warned of, or the error it ended with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            found = {"status": "ok", "error": None, **work()}
        except MemoryError as error:
            found = {"status": "error", "error": f"out of memory: {error}"}
        except ActokError as error:
            found = {"status": "error", "error": str(error)}
        except Exception as error:  # a third party's tokenizer may fail in any way; the others must still be measured
            if follows_interrupt(error):
                raise KeyboardInterrupt from error
            found = {"status": "error", "error": f"{type(error).__name__}: {error}"}
    return {**found, "warnings": sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})}


def _fit_and_measure(
    dataset: Prepared, candidate: Candidate, fitted: Callable[[], ActionTokenizer], seed: int
) -> dict[str, Any]:
    before = time.perf_counter()
    tokenizer = fitted()
    after = time.perf_counter()
    tokenizer, embodiment, adapted = embodiment_for(tokenizer, dataset.held_out)
    metrics = measure(tokenizer, dataset.held_out, embodiment, seed=seed, full=not candidate.sweep)
    artifact = tokenizer.to_artifact()
    if candidate.loaded is not None:
        _warn_of_leak(artifact.meta, dataset, seed)
    return {
        "kind": tokenizer.kind,
        "weights_hash": artifact.weights_hash,
        "fitted_here": candidate.loaded is None,
        "adapted": adapted,
        "fitted_on": None if candidate.loaded is None else artifact.meta.get("data"),
        "fit_seconds": None if candidate.loaded is not None else after - before,
        "measure_seconds": time.perf_counter() - after,
        "metrics": metrics,
    }


def _warn_of_leak(meta: Mapping[str, Any], dataset: Prepared, seed: int) -> None:
    """Warn where a saved tokenizer was fitted on this dataset under another split, so that it may know the answers."""
    for facts in meta.get("data", []):
        split = facts.get("split")
        if facts.get("name") == dataset.held_out.name and split != {"seed": seed, "fractions": list(FRACTIONS)}:
            warnings.warn(
                f"was fitted on {dataset.held_out.name} with the split {split or 'all episodes'} and is judged with seed"
                f" {seed}, so it may have seen test episodes; use the same seed",
                stacklevel=2,
            )


def _fitted(dataset: Prepared, candidate: Candidate) -> ActionTokenizer:
    if candidate.loaded is not None:
        return candidate.loaded
    tokenizer: ActionTokenizer = fit_parts(candidate.source, [dataset.held_out.train], **candidate.settings)
    return tokenizer


def _check_replay(given: Any) -> None:
    """Refuse what is no result of `actok replay` before anything is measured."""
    if given is None or isinstance(given, str):
        return
    needed = ("env", "horizon", "episodes", "tokenizers", "paired")
    missing = [k for k in needed if k not in given] if isinstance(given, Mapping) else list(needed)
    if missing:
        raise ConfigError(f"the replay results have no {missing[0]!r}; give the replay.json that `actok replay` writes")


def _replay(
    given: Mapping[str, Any] | str,
    prepared: Sequence[Prepared],
    candidates: Sequence[Candidate],
    store: UnitStore,
    seed: int,
    progress: bool,
) -> Mapping[str, Any]:
    """Replay results as given, or made now in the named environment with freshly fitted tokenizers."""
    if not isinstance(given, str):
        return given
    from actok.benchmark.replays import held_out_episodes
    from actok.envs import make_env
    from actok.evaluation.replay import replay

    env = make_env(given)
    dataset = next((p for p in prepared if not p.held_out.space.differences(env.space)), None)
    if dataset is None:
        found = "; ".join(f"{p.held_out.name}: {p.held_out.space.differences(env.space)[0]}" for p in prepared)
        raise ConfigError(f"no dataset is in the action space of {given!r} ({found}); give one that is")
    episodes = held_out_episodes(dataset.dataset, seed=seed, per_task=REPLAYS_PER_TASK)
    key = store.key(
        replay=given,
        dataset=dataset.key,
        episodes=episodes,
        tokenizers=[[c.label, c.source, c.settings, c.loaded.weights_hash if c.loaded else None] for c in candidates],
        seed=seed,
    )
    kept = store.get(key)
    if kept is not None:
        return kept
    fitted = {}
    for candidate in candidates:
        unit = _attempt(lambda c=candidate: {"tokenizer": embodiment_for(_fitted(dataset, c), dataset.held_out)[0]})  # type: ignore[misc]
        if unit["status"] == "ok":
            fitted[candidate.label] = unit["tokenizer"]
    result = replay(
        env,
        dataset.dataset,
        fitted,
        episodes=episodes,
        horizon=dataset.horizon,
        progress=progress,
    )
    store.put(key, result)
    return result
