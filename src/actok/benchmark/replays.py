"""Decode-and-replay of a dataset's held-out episodes, as one step: fit or load, replay, write JSON, table."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actok.benchmark.results import provenance, write_results
from actok.benchmark.table import percent, render_columns, replay_columns
from actok.core import ActionTokenizer, ConfigError, SpaceMismatchError, split_settings, tokenizer_presets
from actok.data import EpisodeDataset, FrameCache, open_dataset, split_dataset
from actok.envs import make_env
from actok.evaluation.closed_loop import replay_closed_loop
from actok.evaluation.replay import EXACT, replay
from actok.training import fit, load
from actok.training.fitting import FRACTIONS

# What the result is called, open and closed loop.
FILE, CLOSED_LOOP_FILE = "replay.json", "closed_loop.json"

__all__ = ["CLOSED_LOOP_FILE", "FILE", "held_out_episodes", "replay_held_out", "replay_text"]


def replay_held_out(
    data: str | Path,
    tokenizers: Sequence[str],
    env_name: str,
    out_dir: str | Path,
    *,
    per_task: int = 5,
    horizon: int | None = None,
    seed: int = 0,
    workers: int = 2,
    closed_loop: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Replay test episodes of `data` through each tokenizer and write `out_dir`/replay.json or closed_loop.json.

    Presets are fitted on the training episodes of the same split; saved tokenizers are taken as they are, and a warning
    names one that was fitted on another split of these data. See `actok.evaluation.replay.replay`, and
    `actok.evaluation.closed_loop.replay_closed_loop`, for the result.

    Args:
        data: demonstrations with start states, in the environment's action space.
        tokenizers: preset names, with settings as in "fast:scale=20", or saved folders.
        env_name: e.g. "metaworld".
        out_dir: where the result goes.
        per_task: at most this many test episodes of each task.
        horizon: T to fit presets at; None: one second.
        seed: of the split.
        workers: processes.
        closed_loop: at each chunk the scripted expert's next actions from where the robot is, instead of the
            demonstration's.
        options: of the environment.
    """
    if not tokenizers:
        raise ConfigError("no tokenizer is named; give at least one preset or saved folder")
    env = make_env(env_name, **(options or {}))
    dataset = open_dataset(data)
    fitted: dict[str, ActionTokenizer] = {}
    for text in tokenizers:
        name, settings = split_settings(text)
        if name in tokenizer_presets():
            label, tokenizer = text, fit(name, str(data), horizon=horizon, seed=seed, **settings)
        else:
            label, tokenizer = Path(name).name, load(name)
            _warn_of_other_split(label, tokenizer, dataset, seed)
            tokenizer = _adapted(label, tokenizer, dataset, seed)
        if label in fitted:
            raise ConfigError(f"two tokenizers are called {label!r}; rename one of the folders")
        fitted[label] = tokenizer
    episodes = held_out_episodes(dataset, seed=seed, per_task=per_task)
    execute = replay_closed_loop if closed_loop else replay
    result = execute(env, dataset, fitted, episodes=episodes, workers=workers)
    result["provenance"] = provenance(seed)
    write_results(result, Path(out_dir) / (CLOSED_LOOP_FILE if closed_loop else FILE))
    return result


def held_out_episodes(dataset: EpisodeDataset, *, seed: int, per_task: int) -> list[int]:
    """The test split's episodes, at most `per_task` of each task."""
    taken: Counter[str] = Counter()
    chosen = []
    for index in split_dataset(dataset, fractions=FRACTIONS, seed=seed).test.tolist():
        task = dataset.tasks[index] if dataset.tasks is not None else ""
        if taken[task] < per_task:
            taken[task] += 1
            chosen.append(index)
    return chosen


def replay_text(result: Mapping[str, Any]) -> str:
    """Success rates, and each tokenizer against its baseline on the same episodes.

    The baseline is the exact demonstration, or, closed loop, the expert's chunks without a tokenizer.
    """
    mode = "Closed-loop replay" if result.get("mode") else "Replay"
    lines = [f"{mode} in {result['env']}, {len(result['episodes'])} demonstrations", ""]
    lines += [*render_columns(replay_columns(result)), ""]
    pairs = {(pair["a"], pair["b"]): pair for pair in result["paired"]}
    for name, row in result["tokenizers"].items():
        baseline = row.get("baseline", EXACT)
        if (pair := pairs.get((baseline, name))) is None:
            continue
        low, high = sorted(-bound for bound in pair["ci95"])
        lines.append(
            f"{name} against {baseline}: {percent(0.0 - pair['difference'])} ({percent(low)} to {percent(high)}),"
            f" p = {pair['p_value']:.2g}"
        )
    return "\n".join(lines)


def _adapted(label: str, tokenizer: ActionTokenizer, dataset: EpisodeDataset, seed: int) -> ActionTokenizer:
    """The tokenizer as it is, or with these data's normaliser added where it knows no robot of their action space."""
    try:
        tokenizer.embodiment_for(dataset.space)
    except SpaceMismatchError:
        train = split_dataset(dataset, fractions=FRACTIONS, seed=seed).train
        tokenizer = tokenizer.adapt(dataset.space, FrameCache.build(dataset).statistics(train))
        warnings.warn(
            f"{label} was not fitted on {dataset.space.embodiment}; it is adapted to it with the training episodes' range",
            stacklevel=3,
        )
    return tokenizer


def _warn_of_other_split(label: str, tokenizer: ActionTokenizer, dataset: EpisodeDataset, seed: int) -> None:
    for facts in tokenizer.meta.get("data", []):
        split = facts.get("split")
        if facts.get("name") == dataset.name and split != {"seed": seed, "fractions": list(FRACTIONS)}:
            warnings.warn(
                f"{label} was fitted on {dataset.name} with the split {split}, so it may have seen episodes replayed here;"
                " fit it with the same seed",
                stacklevel=3,
            )
