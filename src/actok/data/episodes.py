"""What every reader gives: episodes of one embodiment, one action space, one rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actok.core import ActionSpace, DataError

__all__ = ["Episode", "EpisodeDataset", "require_finite"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One demonstration of T steps.

    Attributes:
        index: position in its dataset.
        actions: float32 [T, D], raw units, exactly as stored.
        proprio: float32 [T, P], or None.
        instruction: the task in words ("" where the dataset has none).
        task: short task key, e.g. "reach-v3" ("" where there is none); replay reports per task.
        subtask: int [T] index into `subtask_names` of the sub-task active at each step (-1: none is), or None.
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
        tasks: [E] task key of each episode (else its instruction), so that a split can keep every task; None where the
            dataset names none, or could only by reading every episode.
        source_files: every file that the actions and states come from, so that a cache knows when it is stale; empty
            where the data live in memory (a cache then hashes the values).
        selection: which episodes of these files they are, so that a cache tells two selections apart; None: all.
    """

    name: str
    space: ActionSpace
    space_origin: str
    lengths: np.ndarray
    tasks: Sequence[str] | None = None
    source_files: Sequence[Path] = ()
    selection: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def episode(self, index: int, *, images: bool = False) -> Episode:
        """Read one episode. Raises DataError naming the file where it is corrupt."""

    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """View -> height and width in pixels; empty where there are no images.

        This default reads the first episode; readers override it where less will do. Raises as `episode` does.
        """
        images = self.episode(0, images=True).images
        return {view: (int(pixels.shape[1]), int(pixels.shape[2])) for view, pixels in images.items()}

    def video_files(self, views: Sequence[str]) -> list[Path]:
        """The files, other than `source_files`, that these views are decoded from, at hand or not; this default has none."""
        return []

    def __iter__(self) -> Iterator[Episode]:
        for index in range(len(self)):
            yield self.episode(index)

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """All actions in one go: float32 [N, D], and int64 offsets [E + 1] of the episodes in them.

        What statistics and caches stream over; readers override it where they can read whole files. Raises DataError
        as `episode` does.
        """
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        frames = np.empty((offsets[-1], self.space.dim), np.float32)
        for index in range(len(self)):
            frames[offsets[index] : offsets[index + 1]] = self.episode(index).actions
        return frames, offsets


def require_finite(actions: np.ndarray, offsets: np.ndarray, dataset: str, first: int = 0) -> None:
    """Refuse NaN and infinity in actions [N, D] of consecutive episodes cut at `offsets`, `first` being the first's index.

    Raises DataError naming dataset, episode, step and dimension.
    """
    # A sum is non-finite if any member is (or overflows, hence the second look), and costs one pass.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(actions.sum(dtype=np.float64)):
            return
    bad = np.argwhere(~np.isfinite(actions))
    if len(bad):
        row, dim = (int(i) for i in bad[0])
        episode = int(np.searchsorted(offsets, row, side="right")) - 1
        raise DataError(
            f"dataset {dataset!r} holds {actions[row, dim]} in episode {first + episode}, step {row - offsets[episode]},"
            f" dimension {dim} ({len(bad)} non-finite values in all); drop or repair these steps first"
        )
