"""Closed-loop replay: does a task survive a tokenizer when whoever acts can see what came of it?

At each chunk the scripted expert, run ahead from the current state of the simulator and put back, says what it would do
next; these actions go through the tokenizer, and what comes out is executed. So errors do not add up over an episode as
they do in open-loop replay (`actok.evaluation.replay`): the next chunk starts from where the robot is. It is what a
policy that predicts perfectly would achieve through these tokens.

The row "expert" executes the expert's chunks as they are: what acting in chunks alone costs, with perfect foresight.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actok.core import ActionTokenizer, ChunkContext, ConfigError
from actok.data import Episode, EpisodeDataset
from actok.envs import Env, Observation
from actok.evaluation.intervals import compare_all, success_rates
from actok.evaluation.replay import check_dataset, check_tokenizer, choose_episodes
from actok.evaluation.trials import Decider, Trial, run_trials
from actok.evaluation.vector import Start, VectorEnv
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics

EXPERT = "expert"

__all__ = ["EXPERT", "replay_closed_loop"]


def replay_closed_loop(
    env: Env,
    dataset: EpisodeDataset | Sequence[Episode],
    tokenizers: Mapping[str, ActionTokenizer],
    *,
    episodes: Iterable[int] | None = None,
    horizon: int | None = None,
    limit: float = 1.5,
    batch: int = 16,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Success rates of tokenizers, by name, from the start states of these demonstrations.

    `episodes` are positions in the dataset (None: all); `horizon` None cuts each tokenizer's chunks at its own. An
    episode is a failure after `limit` times the length of its demonstration (at most env.max_steps), and where a chunk
    does not decode: that chunk is not executed. `batch` episodes are live at a time. The result does not depend on
    `workers`; in a script, more than one needs the guard `if __name__ == "__main__":`.

    Returns JSON values as `actok.evaluation.replay.replay` does, with "mode": "closed loop", "limit", and in each row
    also "chunks": how many were executed, and "baseline": the row of the expert at the same horizon ("expert", or
    "expert T=16" and so on where horizons differ; its own is None). Rows of the expert come first.

    Raises SpaceMismatchError for demonstrations or a tokenizer of another action space or rate, DataError for those
    without a start state, ConfigError for an environment without an expert or without a way back (`Env.snapshot`).
    """
    if not 0 < limit < math.inf:
        raise ConfigError(f"limit is {limit!r}; give a factor above 0")
    if not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch is {batch!r}; give a whole number of at least 1")
    embodiment = check_dataset(env, dataset)
    chosen = choose_episodes(env, dataset, episodes)
    for task in dict.fromkeys(e.task for e in chosen):
        env.expert(task)
    steps = {name: check_tokenizer(name, t, env.space, embodiment, horizon) for name, t in tokenizers.items()}
    rows = _rows(tokenizers, steps, embodiment)
    scale = Normaliser.make("quantile", Statistics.from_array(np.concatenate([e.actions for e in chosen]))).half

    success: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {}
    slots = min(batch, len(chosen))
    with VectorEnv(env, slots, workers) as vector, _bar(len(rows) * len(chosen), progress) as bar:
        for row in rows:
            begin = time.perf_counter()
            trials = [_trial(env, episode, limit) for episode in chosen]
            decider = _Foreseen(vector, row, scale)
            run_trials(vector, trials, decider, lambda _: bar.update())
            success[row.name] = np.array([trial.success for trial in trials])
            result[row.name] = {
                **success_rates(success[row.name], [e.task for e in chosen]),
                "invalid": sum(trial.invalid is not None for trial in trials),
                "chunks": sum(len(trial.executed) for trial in trials),
                "normalised_l1": decider.error,
                "horizon": row.horizon,
                "baseline": row.baseline,
                "seconds": time.perf_counter() - begin,
            }
    common = {row.horizon for row in rows}
    return {
        "mode": "closed loop",
        "env": env.name,
        "env_options": env.options_as_json(),
        "horizon": common.pop() if len(common) == 1 else None,
        "limit": limit,
        "episodes": [{"task": e.task, "index": e.index} for e in chosen],
        "tokenizers": result,
        "paired": compare_all(success),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """Whose chunks are executed: the expert's, through a tokenizer or as they are (None)."""

    name: str
    horizon: int
    embodiment: str
    tokenizer: ActionTokenizer | None = None
    baseline: str | None = None


def _rows(tokenizers: Mapping[str, ActionTokenizer], steps: Mapping[str, int], embodiment: str) -> list[_Row]:
    horizons = sorted(set(steps.values()))
    if not horizons:
        raise ConfigError("no tokenizer is named; give at least one")
    experts = {h: EXPERT if len(horizons) == 1 else f"{EXPERT} T={h}" for h in horizons}
    if taken := [name for name in tokenizers if name in experts.values()]:
        raise ConfigError(f"a tokenizer is called {taken[0]!r}, the name of the expert's own row; rename it")
    return [_Row(name=name, horizon=h, embodiment=embodiment) for h, name in experts.items()] + [
        _Row(name=n, horizon=steps[n], embodiment=embodiment, tokenizer=t, baseline=experts[steps[n]])
        for n, t in tokenizers.items()
    ]


def _trial(env: Env, episode: Episode, limit: float) -> Trial:
    return Trial(
        start=Start(task=episode.task, state=dict(episode.start_state)),
        number=episode.index,
        limit=max(1, min(env.max_steps, math.ceil(limit * len(episode)))),
        instruction=episode.instruction,
    )


class _Foreseen(Decider):
    """The expert's next actions from where each robot is, through a tokenizer.

    `error` is the mean absolute difference that the tokenizer made, in units of `scale` [D]; None where there is none.
    """

    def __init__(self, vector: VectorEnv, row: _Row, scale: np.ndarray) -> None:
        self._vector, self._row, self._scale = vector, row, scale
        self._total, self._values = 0.0, 0

    @property
    def error(self) -> float | None:
        return self._total / self._values if self._values else None

    def decide(self, live: Mapping[int, Trial], seen: Mapping[int, Observation]) -> dict[int, np.ndarray | str]:
        """See Decider.decide."""
        row = self._row
        ahead = self._vector.foresee(dict.fromkeys(live, row.horizon))
        if row.tokenizer is None:
            return {slot: ahead[slot] for slot in live}
        chunks = np.stack([ahead[slot] for slot in live])
        context = ChunkContext(
            horizon=row.horizon,
            embodiment=row.embodiment,
            anchor=np.stack([seen[slot].proprio for slot in live]),
        )
        decoded = row.tokenizer.decode(row.tokenizer.encode(chunks, context), context)
        actions = np.asarray(decoded.actions, np.float32)
        wrong = np.abs(actions[decoded.valid].astype(np.float64) - chunks[decoded.valid]) / self._scale
        self._total += float(wrong.sum())
        self._values += wrong.size
        return {
            slot: actions[b] if decoded.valid[b] else (decoded.reasons[b] or "did not decode")
            for b, slot in enumerate(live)
        }


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="episode", desc="closed loop", file=sys.stderr, delay=2, disable=not progress)
