"""Decode-and-replay: do decoded actions still solve the task?

Each demonstration is cut into consecutive chunks of the tokenizer's horizon (the last one padded as the action space
asks for), encoded, decoded, and executed open loop from the demonstration's own start state. No policy is trained, so
what a tokenizer loses is measured where it matters, in a few seconds.

An episode is a success where the environment reports success after any of the demonstration's steps, which is how
demonstrations are judged; no step is added. An episode with a chunk that does not decode is a failure and is not
executed at all. The name "exact" is the demonstration itself, which open-loop execution need not always solve.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actok.core import ActionSpace, ActionTokenizer, ChunkContext, ConfigError, DataError, SpaceMismatchError
from actok.data import Episode, EpisodeDataset
from actok.envs import Env
from actok.evaluation.intervals import compare_all, success_rates
from actok.evaluation.workers import Workers
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics

EXACT = "exact"
# Chunks encoded at a time: bounds the memory of a neural tokenizer.
CHUNKS_AT_A_TIME = 1024

__all__ = [
    "EXACT",
    "DecodedEpisodes",
    "check_dataset",
    "check_tokenizer",
    "choose_episodes",
    "decode_episodes",
    "replay",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One job: some episodes of one task, each under several names."""

    task: str
    start_states: list[Mapping[str, np.ndarray]]
    actions: list[dict[str, np.ndarray]]  # per episode: name -> [T, D]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """What a job gave, per episode: name -> success; and seconds by name."""

    success: list[dict[str, bool]]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedEpisodes:
    """Demonstrations after encoding and decoding.

    Attributes:
        actions: float32 [T, D] of each episode, None where one of its chunks did not decode.
        horizon: T of the chunks.
        seconds: for encoding and decoding all of them.
    """

    actions: list[np.ndarray | None]
    horizon: int
    seconds: float


def replay(
    env: Env,
    dataset: EpisodeDataset | Sequence[Episode],
    tokenizers: Mapping[str, ActionTokenizer],
    *,
    episodes: Iterable[int] | None = None,
    horizon: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Success rates of tokenizers, by name, on demonstrations of this environment.

    `episodes` are positions in the dataset (None: all). `horizon` None cuts each tokenizer's chunks at its own. The
    result is the same, bit for bit, whatever `workers` is; in a script, more than one needs the guard
    `if __name__ == "__main__":`.

    Returns JSON values (docs/replay.md): "env", "env_options" (what it was made with), "horizon" (None where the tokenizers' differ), "episodes" [{task,
    index}], "tokenizers" by name, "exact" first: {success: [bool], rate, ci95 (Wilson), per_task: {task: {n, success,
    rate, ci95}}, invalid: episodes with a chunk that did not decode, normalised_l1: mean absolute error of the decoded
    steps in units of half the 1 % to 99 % range of the replayed actions (None where nothing decoded), horizon,
    seconds: encoding, decoding and simulating, summed over processes}; and "paired", every two names on the same
    episodes: {a, b, both, only_a, only_b, neither, difference: rate a - rate b, ci95 (Newcombe), p_value (exact
    McNemar, not corrected for the number of comparisons)}.

    Raises SpaceMismatchError for demonstrations or a tokenizer of another action space or rate, DataError for those
    without a start state or of an unknown task.
    """
    if EXACT in tokenizers:
        raise ConfigError(f"a tokenizer is called {EXACT!r}, the name of the demonstration itself; rename it")
    embodiment = check_dataset(env, dataset)
    chosen = choose_episodes(env, dataset, episodes)
    decoded = {
        name: decode_episodes(name, tokenizer, chosen, env.space, embodiment, horizon)
        for name, tokenizer in tokenizers.items()
    }
    variants: dict[str, list[np.ndarray | None]] = {EXACT: [e.actions for e in chosen]}
    variants |= {name: d.actions for name, d in decoded.items()}
    success, simulated = _execute(env, chosen, variants, workers, progress)

    scale = Normaliser.make("quantile", Statistics.from_array(np.concatenate([e.actions for e in chosen]))).half
    horizons = {name: d.horizon for name, d in decoded.items()}
    rows = {
        name: {
            **success_rates(success[name], [e.task for e in chosen]),
            "invalid": sum(actions is None for actions in variants[name]),
            "normalised_l1": _error(chosen, variants[name], scale),
            "horizon": horizons.get(name),
            "seconds": simulated[name] + (decoded[name].seconds if name in decoded else 0.0),
        }
        for name in variants
    }
    common = set(horizons.values())
    return {
        "env": env.name,
        "env_options": env.options_as_json(),
        "horizon": common.pop() if len(common) == 1 else horizon,
        "episodes": [{"task": e.task, "index": e.index} for e in chosen],
        "tokenizers": rows,
        "paired": compare_all(success),
    }


# -- what may be replayed ---------------------------------------------------------------------------------------------


def check_dataset(env: Env, dataset: EpisodeDataset | Sequence[Episode]) -> str:
    """The embodiment's name. Raises SpaceMismatchError where the dataset's actions are not the environment's."""
    if not isinstance(dataset, EpisodeDataset):
        return env.space.embodiment
    space = dataset.space
    if found := env.space.differences(space):
        raise SpaceMismatchError(
            f"dataset {dataset.name!r} does not hold actions of environment {env.name!r}: {'; '.join(found)}; name the"
            f" space {env.space.embodiment!r} when opening it, or record demonstrations with `actok collect`"
        )
    if space.rate_hz is not None and space.rate_hz != env.rate_hz:
        raise SpaceMismatchError(
            f"dataset {dataset.name!r} has {space.rate_hz:g} actions a second, environment {env.name!r} takes"
            f" {env.rate_hz:g}; open it at its own rate"
        )
    return space.embodiment


def choose_episodes(
    env: Env, dataset: EpisodeDataset | Sequence[Episode], indices: Iterable[int] | None
) -> list[Episode]:
    """The episodes to replay, each checked."""
    total = len(dataset)
    wanted = list(range(total)) if indices is None else [int(i) for i in indices]
    if not wanted:
        raise DataError("no episode to replay; give at least one")
    chosen = []
    for index in wanted:
        if not 0 <= index < total:
            raise DataError(f"episode {index} is not one of the dataset's {total}; give 0..{total - 1}")
        episode = dataset.episode(index) if isinstance(dataset, EpisodeDataset) else dataset[index]
        if not episode.start_state:
            raise DataError(
                f"episode {index} has no start state, so it cannot be replayed; record demonstrations with"
                " `actok collect`, which stores it"
            )
        if episode.task not in env.tasks:
            raise DataError(
                f"episode {index} is of task {episode.task!r}, which environment {env.name!r} does not have; replay it"
                " in the one it was recorded in"
            )
        if episode.actions.ndim != 2 or episode.actions.shape[1] != env.space.dim or not len(episode):
            raise SpaceMismatchError(
                f"episode {index} has actions of shape {episode.actions.shape}; environment {env.name!r} takes"
                f" [steps, {env.space.dim}]"
            )
        chosen.append(episode)
    return chosen


# -- through the tokenizer --------------------------------------------------------------------------------------------


def check_tokenizer(
    name: str, tokenizer: ActionTokenizer, space: ActionSpace, embodiment: str, horizon: int | None = None
) -> int:
    """Steps of its chunks: `horizon`, or the tokenizer's own. Raises SpaceMismatchError for one of another space."""
    known = tokenizer.spaces.get(embodiment)
    if known is None:
        raise SpaceMismatchError(
            f"tokenizer {name!r} knows the embodiments {', '.join(tokenizer.spaces)}, not {embodiment!r}; fit it on"
            " this data or add the embodiment with adapt(space, statistics)"
        )
    if found := known.differences(space):
        raise SpaceMismatchError(
            f"tokenizer {name!r} was fitted on another action space: {'; '.join(found)}; fit it on this data"
        )
    steps = tokenizer.horizon if horizon is None else horizon
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"horizon is {steps!r}; give a whole number of steps, at least 1")
    return steps


def decode_episodes(
    name: str,
    tokenizer: ActionTokenizer,
    episodes: Sequence[Episode],
    space: ActionSpace,
    embodiment: str,
    horizon: int | None = None,
) -> DecodedEpisodes:
    """Each episode's actions, encoded and decoded in consecutive chunks of the horizon (None: the tokenizer's)."""
    steps = check_tokenizer(name, tokenizer, space, embodiment, horizon)
    counts = [-(-len(e) // steps) for e in episodes]
    # Padding as the space asks for it: standing still is 0 where dimensions are increments, else the last value.
    chunks = np.concatenate([_cut(e.actions, steps, np.array(space.incremental)) for e in episodes])
    pad = np.concatenate(
        [(np.arange(c * steps) >= len(e)).reshape(c, steps) for c, e in zip(counts, episodes, strict=True)]
    )
    anchors = None
    if all(e.proprio is not None for e in episodes):
        anchors = np.concatenate([e.proprio[::steps] for e in episodes if e.proprio is not None])
    begin = time.perf_counter()
    actions, valid = np.empty_like(chunks), np.empty(len(chunks), bool)
    for part in (slice(i, i + CHUNKS_AT_A_TIME) for i in range(0, len(chunks), CHUNKS_AT_A_TIME)):
        context = ChunkContext(
            horizon=steps,
            embodiment=embodiment,
            anchor=None if anchors is None else anchors[part],
            pad_mask=pad[part],
        )
        result = tokenizer.decode(tokenizer.encode(chunks[part], context), context)
        actions[part], valid[part] = result.actions, result.valid
    seconds = time.perf_counter() - begin
    bounds = np.cumsum([0, *counts])
    return DecodedEpisodes(
        actions=[
            actions[a:b].reshape(-1, space.dim)[: len(e)] if valid[a:b].all() else None
            for a, b, e in zip(bounds[:-1], bounds[1:], episodes, strict=True)
        ],
        horizon=steps,
        seconds=seconds,
    )


def _cut(actions: np.ndarray, horizon: int, incremental: np.ndarray) -> np.ndarray:
    """[T, D] -> [ceil(T / horizon), horizon, D], padded at the end."""
    actions = np.asarray(actions, np.float32)
    missing = -len(actions) % horizon
    tail = np.where(incremental, np.float32(0), actions[-1])
    return np.concatenate([actions, np.repeat(tail[None], missing, 0)]).reshape(-1, horizon, actions.shape[1])


# -- in the simulator -------------------------------------------------------------------------------------------------


def _execute(
    env: Env,
    episodes: Sequence[Episode],
    variants: Mapping[str, Sequence[np.ndarray | None]],
    workers: int,
    progress: bool,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Success bool [E] and seconds of simulation, by name."""
    from tqdm import tqdm

    success = {name: np.zeros(len(episodes), bool) for name in variants}
    seconds = dict.fromkeys(variants, 0.0)
    groups = list(_groups(episodes, workers))
    bar = tqdm(total=len(episodes), unit="episode", desc="replay", file=sys.stderr, delay=2, disable=not progress)
    with Workers(env, min(workers, len(groups))) as pool, bar:
        for group, outcome in zip(groups, pool.map(_simulate, _jobs(episodes, variants, groups)), strict=True):
            for index, solved in zip(group, outcome.success, strict=True):
                for name, value in solved.items():
                    success[name][index] = value
            for name, spent in outcome.seconds.items():
                seconds[name] += spent
            bar.update(len(group))
    return success, seconds


def _groups(episodes: Sequence[Episode], workers: int) -> Iterator[list[int]]:
    """Positions of episodes, one task a group, in groups small enough to keep all processes busy."""
    size = max(1, len(episodes) // (4 * workers))
    by_task: dict[str, list[int]] = {}
    for position, episode in enumerate(episodes):
        by_task.setdefault(episode.task, []).append(position)
    for positions in by_task.values():
        for begin in range(0, len(positions), size):
            yield positions[begin : begin + size]


def _jobs(
    episodes: Sequence[Episode], variants: Mapping[str, Sequence[np.ndarray | None]], groups: Iterable[list[int]]
) -> Iterator[_Run]:
    for group in groups:
        runs: list[dict[str, np.ndarray]] = []
        for position in group:
            decoded = ((name, actions[position]) for name, actions in variants.items())
            runs.append({name: actions for name, actions in decoded if actions is not None})
        yield _Run(
            task=episodes[group[0]].task,
            start_states=[dict(episodes[position].start_state) for position in group],
            actions=runs,
        )


def _simulate(env: Env, job: _Run) -> _Outcome:
    """Execute each variant of each episode until its first success or its end."""
    outcomes: list[dict[str, bool]] = []
    seconds: dict[str, float] = {}
    env.restore(job.task, job.start_states[0])  # builds the task's simulator, which is no variant's time
    for start_state, variants in zip(job.start_states, job.actions, strict=True):
        outcomes.append({})
        for name, actions in variants.items():
            begin = time.perf_counter()
            env.restore(job.task, start_state)
            solved = False
            for action in actions:
                env.advance(action)
                if env.success:
                    solved = True
                    break
            outcomes[-1][name] = solved
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
    return _Outcome(success=outcomes, seconds=seconds)


# -- what came of it --------------------------------------------------------------------------------------------------


def _error(episodes: Sequence[Episode], decoded: Sequence[np.ndarray | None], scale: np.ndarray) -> float | None:
    total, values = 0.0, 0
    for episode, actions in zip(episodes, decoded, strict=True):
        if actions is not None:
            total += float((np.abs(actions.astype(np.float64) - episode.actions) / scale).sum())
            values += actions.size
    return total / values if values else None
