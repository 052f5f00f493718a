"""Ends that are no failure of the code: an interruption that lets the step finish, memory that does not suffice."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from actok.training.sources import TrainingError

__all__ = ["StopSignals", "TrainingStopped", "explain"]

# What memory allocators say in a RuntimeError that is no torch.OutOfMemoryError.
MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
# What the back ends of torch.distributed say when another process is gone.
RANK_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo",
    "NCCL",
    "Timed out waiting",
    "store->get",
)


class TrainingStopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended a training run after a whole step; the message says where it stands."""


class StopSignals:
    """Within this context the first SIGTERM or SIGINT only sets `requested`; a second SIGINT interrupts at once.

    In a thread that may not handle signals it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def explain(error: Exception, step: int, batch_size: int, processes: int, smaller: str) -> TrainingError | None:
    """What an error in step `step` (from 1) means for a user, `smaller` being how less of a batch is taken at a time.

    None where the error says so itself.
    """
    words = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in name or any(w in words for w in MEMORY_WORDS):
        return TrainingError(
            f"out of memory in step {step} with batches of {batch_size} chunks; {smaller}, or make"
            f" eval_chunks or the model (--set) smaller, or take precision=bf16 ({words[:120]})"
        )
    if processes > 1 and (name.startswith("Dist") or any(w in words for w in RANK_WORDS)):
        return TrainingError(
            f"another of the {processes} processes of this run ended or hung in step {step} ({words[:120]}); its own"
            " message says why; start all again with --resume"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return TrainingError(f"torch.compile failed in step {step} ({words[:160]}); train with compile=false")
    return None
