"""Many live environments of one kind, stepped together, in one process or several.

Slot s is an environment of its own, in process s mod W. Whoever steps gives each slot all actions that it is to execute
before its next decision, so that processes meet once a chunk instead of once a step, and what lies between two decisions
is neither rendered nor sent. Physics is a pure function of start state and actions, so results depend neither on the
number of processes nor on which other slots there are.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from actok.core.errors import ActokError, ConfigError
from actok.envs import Env, Observation

__all__ = ["Moved", "Start", "VectorEnv"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Where an episode begins: of a task, from the start state of a seed or from a stored one."""

    task: str
    seed: int | None = None
    state: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if (self.seed is None) == (self.state is None):
            raise ConfigError(f"a start of {self.task!r} has seed {self.seed}; give a seed or a stored state, not both")


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved:
    """What some actions gave.

    Attributes:
        steps: how many of them were executed: all, or those up to the first success.
        success: whether the task was solved after the last of them.
        observation: after the last of them; None where the task is solved and nobody need look.
    """

    steps: int
    success: bool
    observation: Observation | None


class VectorEnv:
    """A context with `slots` live environments in at most `workers` processes (1: in this one).

    Processes are spawned, never forked, so that threads and OpenGL contexts of the caller do no harm; in a script, more
    than one needs the guard `if __name__ == "__main__":`. The environment given is only copied. Observations come
    without the experts' `state`. All methods take and return values by slot and raise what the environment raises.
    """

    def __init__(self, env: Env, slots: int, workers: int = 1) -> None:
        for name, value in (("slots", slots), ("workers", workers)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number, at least 1")
        self.slots = slots
        self._blueprint = pickle.dumps(env)
        self._count = min(workers, slots)
        self._group: _Group | None = None
        self._pools: list[ProcessPoolExecutor] = []

    def __enter__(self) -> Self:
        if self._count == 1:
            self._group = _Group(self._blueprint)
        else:
            spawn = multiprocessing.get_context("spawn")
            # One process each, because a slot's simulator lives where it began.
            self._pools = [
                ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(self._blueprint,))
                for _ in range(self._count)
            ]
        return self

    def __exit__(self, *error: object) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.shutdown()
        self._pools = []

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Observation]:
        """Begin episodes; the first observations."""
        return self._each("reset", starts)

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Moved]:
        """Execute actions [k, D], k >= 1, of each slot in turn, until the first success."""
        return self._each("step", actions)

    def foresee(self, steps: Mapping[int, int]) -> dict[int, np.ndarray]:
        """What the scripted expert would do from here: float32 [steps, D]. The environments stay where they are.

        Raises ConfigError where there is no expert or no way back (`Env.snapshot`).
        """
        return self._each("foresee", steps)

    def _each(self, method: str, values: Mapping[int, Any]) -> dict[int, Any]:
        for slot in values:
            if not 0 <= slot < self.slots:
                raise ConfigError(f"slot {slot} is not one of the {self.slots}")
        if self._group is not None:
            found: dict[int, Any] = getattr(self._group, method)(values)
            return found
        if not self._pools:
            raise ConfigError("the environments are not running; use them inside `with VectorEnv(...) as vector:`")
        shares = [{s: v for s, v in values.items() if s % self._count == w} for w in range(self._count)]
        try:
            futures = [
                pool.submit(_call, method, share) for pool, share in zip(self._pools, shares, strict=True) if share
            ]
            found = {}
            for future in futures:
                found |= future.result()
        except BrokenProcessPool as error:
            raise ActokError(
                "a simulation process died; in a script, call this under `if __name__ == '__main__':`, or use workers=1"
                " to see its error"
            ) from error
        return {slot: found[slot] for slot in values}


class _Group:
    """The environments of one process."""

    def __init__(self, blueprint: bytes) -> None:
        self._blueprint = blueprint
        self._envs: dict[int, tuple[Env, str]] = {}
        self._seen: dict[int, Observation] = {}

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Observation]:
        found = {}
        for slot, start in starts.items():
            env = self._envs[slot][0] if slot in self._envs else pickle.loads(self._blueprint)
            self._envs[slot] = env, start.task
            if start.state is not None:
                observation = env.restore(start.task, start.state)
            else:
                assert start.seed is not None, "Start has checked it"
                observation = env.reset(start.task, seed=start.seed)
            found[slot] = self._shown(slot, observation)
        return found

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Moved]:
        found = {}
        for slot, chunk in actions.items():
            env, _ = self._running(slot)
            if len(chunk) < 1:
                raise ConfigError(f"slot {slot} is given no action; give at least one")
            observation = None
            for done, action in enumerate(chunk, start=1):
                if done < len(chunk):
                    env.advance(action)
                else:
                    observation = env.step(action)
                if env.success:
                    break
            if env.success or observation is None:
                found[slot] = Moved(steps=done, success=True, observation=None)
            else:
                found[slot] = Moved(steps=done, success=False, observation=self._shown(slot, observation))
        return found

    def foresee(self, steps: Mapping[int, int]) -> dict[int, np.ndarray]:
        found = {}
        for slot, count in steps.items():
            env, task = self._running(slot)
            expert, observation, moment = env.expert(task), self._seen[slot], env.snapshot()
            actions = []
            for step in range(count):
                actions.append(expert(observation).action)
                if step + 1 < count:
                    observation = env.step(actions[-1])
            env.rollback(moment)
            found[slot] = np.stack(actions).astype(np.float32)
        return found

    def close(self) -> None:
        for env, _ in self._envs.values():
            env.close()
        self._envs = {}

    def _shown(self, slot: int, observation: Observation) -> Observation:
        self._seen[slot] = observation
        return replace(observation, state=None)

    def _running(self, slot: int) -> tuple[Env, str]:
        if slot not in self._envs:
            raise ConfigError(f"no episode has begun in slot {slot}; call reset first")
        return self._envs[slot]


_group: _Group | None = None


def _begin(blueprint: bytes) -> None:
    global _group
    _group = _Group(blueprint)


def _call(method: str, values: Mapping[int, Any]) -> dict[int, Any]:
    assert _group is not None, "the initializer ran"
    found: dict[int, Any] = getattr(_group, method)(values)
    return found
