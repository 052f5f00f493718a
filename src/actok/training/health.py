"""What a training run watches itself for: losses that are not finite or diverge, codebooks that collapse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from actok.training.sources import TrainingError

# A window's mean loss this many times the best one so far, in so many windows in a row, counts as diverging.
DIVERGING, DIVERGING_WINDOWS = 10.0, 5
# A level whose perplexity in a batch is below this share of what the batch could show, so many times in a row, counts as
# collapsed.
COLLAPSED, COLLAPSED_TIMES = 0.01, 5

__all__ = ["Health"]


class Health:
    """Judges the losses and code use of a run, window by window. Each warning is given once.

    Args:
        sizes: K of each level.
        warmup: first steps, in which neither the course of the loss nor the use of codes is judged.
    """

    def __init__(self, sizes: Sequence[int], warmup: int) -> None:
        self.sizes, self.warmup = tuple(sizes), warmup
        self.best = math.inf
        self.best_step = 0
        self.bad_windows = 0
        self.low = [0] * len(self.sizes)
        self.warned: list[str] = []

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        best = None if math.isinf(self.best) else self.best
        return {**vars(self), "best": best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.best = math.inf if state["best"] is None else state["best"]
        self.best_step, self.bad_windows = state["best_step"], state["bad_windows"]
        self.low, self.warned = list(state["low"]), list(state["warned"])

    def losses(self, first: int, window: Sequence[Mapping[str, float]]) -> None:
        """Look at the losses of steps first, first + 1, ... (counted from 1).

        Raises TrainingError where one is not finite.
        """
        for step, losses in enumerate(window, first):
            if bad := [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]:
                raise TrainingError(
                    f"training broke down in step {step}: {', '.join(bad)}; take a smaller learning_rate (--lr), more"
                    " warmup_steps or a smaller clip_norm, and look at the data's extremes with actok inspect. The last"
                    " checkpoint, where there is a run folder, is from before"
                )
        if first <= self.warmup:
            return
        mean = sum(sum(losses.values()) for losses in window) / len(window)
        last = first + len(window) - 1
        if mean < self.best:
            self.best, self.best_step = mean, last
        self.bad_windows = self.bad_windows + 1 if mean > DIVERGING * self.best else 0
        if self.bad_windows == DIVERGING_WINDOWS:
            self._warn(
                "diverging",
                f"the loss diverges: {mean:.4g} at step {last} is {mean / self.best:.0f} times its best, {self.best:.4g} at"
                f" step {self.best_step}; take a smaller learning_rate (--lr)",
            )

    def codes(self, step: int, share: Sequence[float], perplexity: Sequence[float], drawn: int) -> None:
        """Look at the code use of a batch from which each level drew `drawn` codes."""
        if step < self.warmup:
            return
        for level, (size, used, spread) in enumerate(zip(self.sizes, share, perplexity, strict=True)):
            self.low[level] = self.low[level] + 1 if spread < max(1.5, COLLAPSED * min(size, drawn)) else 0
            if self.low[level] == COLLAPSED_TIMES:
                self._warn(
                    f"collapsed {level}",
                    f"codebook level {level} has collapsed at step {step}: its batch uses {used * size:.0f} of {size} codes,"
                    f" perplexity {spread:.1f}; give fewer codes (--set quantizer.codes=...), a quantizer that revives dead"
                    " codes (quantizer.dead_below), or a smaller learning_rate",
                )

    def _warn(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.append(key)
            warnings.warn(message, stacklevel=2)
