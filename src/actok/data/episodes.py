"""What every reader gives: episodes of one embodiment, one action space, one rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from actok.core import ActionSpace

__all__ = ["Episode", "EpisodeDataset"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One demonstration of T steps.

    Attributes:
        index: position in its dataset.
        actions: float32 [T, D], raw units, exactly as stored.
        proprio: float32 [T, P], or None.
        instruction: the task in words ("" where the dataset has none).
        task: short task key, e.g. "reach-v3" ("" where there is none); replay reports per task.
        subtask: int [T] index into `subtask_names` of the sub-task active at each step, or None.
        subtask_names: what the sub-tasks are called.
        timestamps: float64 [T] seconds from the episode's start, or None (then frame / rate).
        success: whether the demonstration succeeded, None where unknown.
        start_state: arrays that restore the simulator's state at the first step, for exact replay.
        images: view name -> uint8 [T, H, W, 3]; filled only where asked for.
    """

    index: int
    actions: np.ndarray
    proprio: np.ndarray | None = None
    instruction: str = ""
    task: str = ""
    subtask: np.ndarray | None = None
    subtask_names: tuple[str, ...] = ()
    timestamps: np.ndarray | None = None
    success: bool | None = None
    start_state: Mapping[str, np.ndarray] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)


class EpisodeDataset(ABC):
    """Episodes on disk or in memory, read one at a time.

    Attributes:
        name: for tables and messages.
        space: what the actions mean.
        space_origin: how the space was found, in words, for the user ("preset bridge_widowx, named by the caller",
            "inferred from names in meta/info.json", "nothing known").
        lengths: int64 [E] steps of each episode.
    """

    name: str
    space: ActionSpace
    space_origin: str
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def episode(self, index: int, *, images: bool = False) -> Episode:
        """Read one episode. Raises DataError naming the file where it is corrupt."""

    def __iter__(self) -> Iterator[Episode]:
        for index in range(len(self)):
            yield self.episode(index)
