"""Throughput and latency of encoding and decoding, warmed up, on one thread, within a stated time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from actok.core import ActionTokenizer, ChunkContext, DataError, to_numpy

__all__ = ["Latency", "Timing", "measure_latency", "one_torch_thread"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One direction.

    Attributes:
        chunks_per_second: in batches of `Latency.batch`, the median run.
        p50_ms, p99_ms: time of a single chunk.
        runs: how many single chunks were timed.
    """

    chunks_per_second: float
    p50_ms: float
    p99_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Both directions; `batch` chunks a call for the throughput."""

    batch: int
    encode: Timing
    decode: Timing


def measure_latency(
    tokenizer: ActionTokenizer, actions: np.ndarray, context: ChunkContext, *, budget_s: float = 1.6, batch: int = 256
) -> Latency:
    """Time `encode` and `decode` on real chunks [B, T, D] (padding is not passed on: every chunk costs the same).

    The budget is split evenly over batch and single, encoding and decoding; each is called at least three times after
    one warm-up call. torch, where loaded, is held to one thread; NumPy's threads are as the process set them
    (OMP_NUM_THREADS), which the benchmark's provenance records.
    """
    if not len(actions):
        raise DataError("no chunk to time; give at least one")
    actions = np.ascontiguousarray(actions[:batch], np.float32)
    plain = replace(context, pad_mask=None, dof_mask=None, horizon=actions.shape[1])

    def at(rows: slice) -> ChunkContext:
        anchor = None if context.anchor is None else np.asarray(context.anchor)[: len(actions)][rows]
        return replace(plain, anchor=anchor)

    whole = at(slice(None))
    tokens = tokenizer.encode(actions, whole)
    flat = to_numpy(tokens.flat)
    rows = [flat[i:j] for i, j in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    singles = [at(slice(i, i + 1)) for i in range(len(actions))]

    def timing(many: Callable[[], object], one: Callable[[int], object]) -> Timing:
        runs = _repeat(lambda _: many(), budget_s / 4)
        single = _repeat(lambda i: one(i % len(actions)), budget_s / 4)
        return Timing(
            chunks_per_second=float(len(actions) / np.median(runs)),
            p50_ms=float(np.quantile(single, 0.5) * 1e3),
            p99_ms=float(np.quantile(single, 0.99) * 1e3),
            runs=len(single),
        )

    with one_torch_thread():
        return Latency(
            batch=len(actions),
            encode=timing(
                lambda: tokenizer.encode(actions, whole), lambda i: tokenizer.encode(actions[i : i + 1], singles[i])
            ),
            decode=timing(lambda: tokenizer.decode(rows, whole), lambda i: tokenizer.decode([rows[i]], singles[i])),
        )


def _repeat(call: Callable[[int], object], budget_s: float, at_most: int = 2000) -> list[float]:
    """Seconds of each call after one warm-up, until the budget is spent; at least three."""
    call(0)
    times: list[float] = []
    end = perf_counter() + budget_s
    while len(times) < 3 or (perf_counter() < end and len(times) < at_most):
        before = perf_counter()
        call(len(times))
        times.append(perf_counter() - before)
    return times


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch, where loaded, on one thread inside."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
