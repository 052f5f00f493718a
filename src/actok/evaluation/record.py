"""Recording demonstrations of scripted experts, in any environment.

An episode ends SETTLE_STEPS steps after its first success, or unsuccessful at the step limit. It counts as a success
where the environment reported success after any step, as Meta-World itself counts: some of its experts let go of what
they have moved. Only successful episodes are kept; the others are counted in the report, task by task, and made up for
by further attempts. Each attempt is a pure function of (seed, task, attempt number), so the result does not depend on
the number of processes.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from actok.core.errors import ConfigError
from actok.core.files import write_bytes
from actok.data import Episode
from actok.envs import Env, Observation
from actok.evaluation.workers import Workers

# Steps recorded after the first success: time for a dropped object to come to rest.
SETTLE_STEPS = 10
# Attempts at a task end, short of the asked number, at this many times as many (and at least at LEAST_ATTEMPTS).
MOST_ATTEMPTS_PER_EPISODE = 3
LEAST_ATTEMPTS = 10
# What a recorded folder was collected with, and how that went.
COLLECTION = "meta/actok/collection.json"

__all__ = ["COLLECTION", "CollectReport", "Collection", "TaskReport", "collect", "demonstrate", "record_lerobot"]


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One job: everything that an episode depends on."""

    task: str
    number: int
    seed: int
    noise: float
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """How a task went: episodes kept, attempts made, failed attempts (dropped), steps kept."""

    kept: int
    attempted: int
    failed: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class CollectReport:
    """What a collection gave.

    Attributes:
        env, options, seed, noise: what it was collected with; options as JSON values.
        asked: episodes asked for of each task.
        tasks: by task.
        seconds: wall-clock time, the consumer's included.
    """

    env: str
    options: dict[str, Any]
    seed: int
    noise: float
    asked: int
    tasks: dict[str, TaskReport] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        """Episodes in all."""
        return sum(report.kept for report in self.tasks.values())

    @property
    def failed(self) -> int:
        """Failed attempts in all."""
        return sum(report.failed for report in self.tasks.values())

    @property
    def short(self) -> dict[str, int]:
        """Tasks of which fewer episodes were kept than asked, and how many are missing."""
        return {task: self.asked - report.kept for task, report in self.tasks.items() if report.kept < self.asked}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "kept": self.kept, "failed": self.failed, "short": self.short}


def demonstrate(env: Env, task: str, *, seed: int, attempt: int, noise: float = 0.0, max_steps: int) -> Episode:
    """One attempt of the scripted expert, a pure function of the arguments. Its `index` is the attempt.

    Gaussian noise of standard deviation `noise`, in raw units, is added to each action, which is then limited to the
    action space and executed; what is recorded is what was executed.
    """
    sequence = np.random.SeedSequence([seed, zlib.crc32(task.encode()), attempt])
    start, disturbance = sequence.spawn(2)
    generator = np.random.default_rng(disturbance)
    expert = env.expert(task)
    space = env.space
    low = np.array(-np.inf if space.low is None else space.low, np.float32)
    high = np.array(np.inf if space.high is None else space.high, np.float32)
    observation = env.reset(task, seed=int(start.generate_state(1)[0]))
    start_state = env.start_state()
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    subtasks: list[int] = []
    first_success: int | None = None
    while len(actions) < max_steps and (first_success is None or len(actions) < first_success + SETTLE_STEPS):
        choice = expert(observation)
        action = choice.action
        if noise:
            action = np.clip(action + noise * generator.standard_normal(len(action), np.float32), low, high)
        observations.append(observation)
        actions.append(action.astype(np.float32))
        subtasks.append(choice.subtask)
        observation = env.step(actions[-1])
        if first_success is None and env.success:
            first_success = len(actions)
    return Episode(
        index=attempt,
        actions=np.stack(actions),
        proprio=np.stack([o.proprio for o in observations]),
        instruction=env.instruction(task),
        task=task,
        subtask=np.array(subtasks, np.int64),
        subtask_names=expert.subtask_names,
        timestamps=np.arange(len(actions)) / env.rate_hz,
        success=first_success is not None,
        start_state=start_state,
        images={view: np.stack([o.images[view] for o in observations]) for view in observations[0].images},
    )


def _attempt(env: Env, job: _Attempt) -> Episode:
    episode = demonstrate(env, job.task, seed=job.seed, attempt=job.number, noise=job.noise, max_steps=job.max_steps)
    # The frames of a failure are of no use to anyone; they need not travel between processes.
    return episode if episode.success else replace(episode, images={})


class Collection:
    """Successful episodes, made while they are iterated over (once); `report` says how it went, so far.

    Episodes come task by task, those of further attempts at the end; `index` counts them.
    """

    def __init__(
        self, env: Env, tasks: Sequence[str], asked: int, *, seed: int, noise: float, max_steps: int, workers: int
    ) -> None:
        self.report = CollectReport(
            env=env.name,
            options=env.options_as_json(),
            seed=seed,
            noise=noise,
            asked=asked,
            tasks={task: TaskReport(kept=0, attempted=0, failed=0, steps=0) for task in tasks},
        )
        self._env, self._max_steps, self._workers = env, max_steps, workers
        self._begun = False
        self._quiet = False

    def __iter__(self) -> Iterator[Episode]:
        if self._begun:
            raise ConfigError("this collection was iterated over before; call collect again, or keep its list")
        self._begun = True
        from tqdm import tqdm

        begin = time.perf_counter()
        total = self.report.asked * len(self.report.tasks)
        bar = tqdm(total=total, unit="episode", desc="collect", file=sys.stderr, delay=2, disable=self._quiet)
        with Workers(self._env, self._workers) as workers, bar:
            while wave := self._next_wave():
                for episode in workers.map(_attempt, wave):
                    self._count(episode, time.perf_counter() - begin)
                    if episode.success:
                        bar.update()
                        yield replace(episode, index=self.report.kept - 1)

    def _next_wave(self) -> list[_Attempt]:
        """As many attempts of each task as episodes are missing, within the limit of attempts."""
        r = self.report
        limit = max(LEAST_ATTEMPTS, MOST_ATTEMPTS_PER_EPISODE * r.asked)
        return [
            _Attempt(task=task, number=number, seed=r.seed, noise=r.noise, max_steps=self._max_steps)
            for task, t in r.tasks.items()
            for number in range(t.attempted, min(limit, t.attempted + r.asked - t.kept))
        ]

    def _count(self, episode: Episode, seconds: float) -> None:
        before = self.report.tasks[episode.task]
        kept = int(bool(episode.success))
        after = TaskReport(
            kept=before.kept + kept,
            attempted=before.attempted + 1,
            failed=before.failed + 1 - kept,
            steps=before.steps + kept * len(episode),
        )
        self.report = replace(self.report, tasks={**self.report.tasks, episode.task: after}, seconds=seconds)


def collect(
    env: Env,
    tasks: Sequence[str] | None,
    episodes_per_task: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    max_steps: int | None = None,
    workers: int = 1,
) -> Collection:
    """Demonstrations of the environment's scripted experts, as an iterable of Episode with a `report`.

    `tasks` None means all. Images are recorded where the environment was made with views. Two runs with the same seed
    give the same episodes, bit for bit, whatever `workers` is. Raises ConfigError for an unknown task, a number of
    episodes or steps below 1, or a task without an expert.
    """
    chosen = list(env.tasks) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    limit = env.max_steps if max_steps is None else max_steps
    for task in chosen:
        env.expert(task)
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ConfigError(f"tasks are {chosen}; name at least one, each once")
    for name, value in (("episodes_per_task", episodes_per_task), ("max_steps", limit)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; give a whole number, at least 1")
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; give a whole number, at least 0")
    if not 0 <= noise < np.inf:
        raise ConfigError(f"noise is {noise!r}; give a standard deviation in raw units, at least 0")
    return Collection(env, chosen, episodes_per_task, seed=seed, noise=noise, max_steps=limit, workers=workers)


def record_lerobot(collection: Collection, env: Env, folder: str | Path) -> CollectReport:
    """Write a collection as a LeRobot v3.0 dataset with instructions, sub-tasks, proprioception and start states.

    The report, without its seconds, is in COLLECTION beside them.
    """
    from actok.data import write_lerobot

    collection._quiet = True  # the writer shows the progress
    write_lerobot(collection, Path(folder), space=env.space, rate_hz=env.rate_hz, version="v3.0")
    told = {key: value for key, value in collection.report.to_dict().items() if key != "seconds"}
    write_bytes(Path(folder) / COLLECTION, json.dumps(told, indent=1) + "\n")
    return collection.report
