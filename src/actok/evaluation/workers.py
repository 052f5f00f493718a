"""Simulation in several processes: the same results, in the same order, whatever their number."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Self, TypeVar

from actok.core.errors import ActokError, ConfigError
from actok.envs import Env

Job = TypeVar("Job")
Result = TypeVar("Result")

# How many jobs wait for each process: enough to keep it busy, few enough that images of waiting results fit in memory.
WAITING = 2

__all__ = ["Workers"]

_env: Env | None = None


def _start(env: Env) -> None:
    global _env
    _env = env


def _run(function: Callable[[Env, Any], Any], job: Any) -> Any:
    assert _env is not None, "the initializer ran"
    return function(_env, job)


class Workers:
    """A context in which a function runs on jobs, in `count` processes with one environment each (1: in this one).

    Processes are spawned, never forked, so that threads and OpenGL contexts of the caller do no harm. The environment
    travels pickled. Leaving the context ends them, jobs that wait included.
    """

    def __init__(self, env: Env, count: int) -> None:
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"workers is {count!r}; give a whole number of processes, at least 1")
        self._env = env
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def map(self, function: Callable[[Env, Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`function(env, job)` for each job, in order. `function` must be importable (no lambda).

        Raises what the function raises, and ActokError where a process dies.
        """
        if self._count == 1:
            for job in jobs:
                yield function(self._env, job)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(self._env,)
            )
        remaining = iter(jobs)
        waiting: deque[Future[Result]] = deque()
        try:
            for job in islice(remaining, WAITING * self._count):
                waiting.append(self._pool.submit(_run, function, job))
            while waiting:
                result = waiting.popleft().result()
                for job in islice(remaining, 1):
                    waiting.append(self._pool.submit(_run, function, job))
                yield result
        except BrokenProcessPool as error:
            raise ActokError(
                "a simulation process died; in a script, call this under `if __name__ == '__main__':`, or use workers=1"
                " to see its error"
            ) from error
