"""The prompt of a policy: the task in words, and the robot's state as whole numbers.

Source: FASTer (arXiv 2512.04952, section 3.2): proprioception is discretised into integers and written as text; the form
and the 256 bins are those of pi0-FAST.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from actok.core import ConfigError, DataError

STATE_FORMS = ("text", "vector", "none")

__all__ = ["STATE_FORMS", "StateRange", "prompts"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StateRange:
    """The range of proprioception that a policy was trained on: low and high of each of P numbers, raw units.

    A number that never varies has no range of its own and reads 0 in the middle.
    """

    low: Float[np.ndarray, "P"]
    high: Float[np.ndarray, "P"]

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.low.shape != self.high.shape or self.low.ndim != 1 or not (self.low <= self.high).all():
            raise ConfigError(f"the state's range is {self.low} to {self.high}; give [P] lows, none above its high")

    def __len__(self) -> int:
        return len(self.low)

    def unit(self, proprio: Float[np.ndarray, "B P"]) -> Float[np.ndarray, "B P"]:
        """-1 at low, 1 at high, further where it lies beyond; float32."""
        half = (self.high - self.low) / 2
        middle = (self.high + self.low) / 2
        return ((np.asarray(proprio, np.float64) - middle) / np.where(half > 0, half, 1)).astype(np.float32)

    def bins(self, proprio: Float[np.ndarray, "B P"], count: int) -> np.ndarray:
        """int64 [B, P] in 0..count - 1; what lies beyond the range is in the first or last bin."""
        return np.clip(np.floor((self.unit(proprio) + 1) / 2 * count), 0, count - 1).astype(np.int64)

    def beyond(self, proprio: Float[np.ndarray, "B P"]) -> np.ndarray:
        """int64 [B], how many numbers lie outside."""
        given = np.asarray(proprio, np.float64)
        found: np.ndarray = ((given < self.low) | (given > self.high)).sum(1)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"low": self.low.tolist(), "high": self.high.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(low=np.asarray(values["low"]), high=np.asarray(values["high"]))


def prompts(
    instructions: Sequence[str], proprio: Float[np.ndarray, "B P"] | None, state: StateRange | None, bins: int
) -> list[str]:
    """`Task: open the drawer, State: 17 203 128;` for each of B; without `state` the task alone.

    Raises DataError where an instruction is empty.
    """
    for b, text in enumerate(instructions):
        if not text.strip():
            raise DataError(f"observation {b} has no instruction; say in words what is to be done")
    tasks = [" ".join(text.split()) for text in instructions]
    if state is None:
        return [f"Task: {task};" for task in tasks]
    assert proprio is not None, "checked by the policy"
    numbers = state.bins(proprio, bins)
    return [
        f"Task: {task}, State: {' '.join(map(str, row))};" for task, row in zip(tasks, numbers.tolist(), strict=True)
    ]
