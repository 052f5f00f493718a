"""Chunks of any horizon, cut from a frame cache on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core import ConfigError, DataError
from actok.data.cache import FrameCache

__all__ = ["ChunkBatch", "Chunks", "FrameCache"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkBatch:
    """Chunks in raw units.

    Attributes:
        actions: float32 [B, T, D]; steps beyond the episode's end are 0 in delta and velocity dimensions and hold the
            last action in the others.
        pad_mask: bool [B, T], True on those steps.
        anchor: float32 [B, P] proprioception at the first step, or None.
        episode: int64 [B] index in the dataset.
        start: int64 [B] first step within the episode.
    """

    actions: Float[np.ndarray, "B T D"]
    pad_mask: Bool[np.ndarray, "B T"]
    anchor: Float[np.ndarray, "B P"] | None
    episode: Int[np.ndarray, "B"]
    start: Int[np.ndarray, "B"]

    def __len__(self) -> int:
        return len(self.actions)


class Chunks:
    """Every window of `horizon` steps that starts at steps 0, stride, 2 stride, ... of the chosen episodes.

    The last windows of an episode reach beyond its end and are padded, so with stride = horizon each frame is in exactly
    one chunk. Nothing is stored per chunk: index i is found by bisection over episodes.

    Args:
        cache: the frames.
        horizon: T.
        episodes: which episodes, in this order; all by default.
        stride: steps between the starts of neighbouring chunks.

    Raises:
        ConfigError: horizon or stride below 1.
        DataError: an episode that does not exist; no frame in any of the chosen episodes.
    """

    def __init__(
        self,
        cache: FrameCache,
        horizon: int,
        episodes: Sequence[int] | np.ndarray | None = None,
        stride: int = 1,
    ) -> None:
        for name, value in (("horizon", horizon), ("stride", stride)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number of steps, at least 1")
        self.cache = cache
        self.horizon = int(horizon)
        self.stride = int(stride)
        self.episodes = cache.check_episodes(episodes)
        # Index of each chosen episode's first chunk, and after them the number of all chunks.
        self._first = np.zeros(len(self.episodes) + 1, np.int64)
        np.cumsum(-(-cache.lengths[self.episodes] // self.stride), out=self._first[1:])
        if not len(self):
            raise DataError(
                f"no chunk remains of {len(self.episodes)} episodes of {cache.name!r}; give one with a step"
            )
        self._incremental = np.array(cache.space.incremental)

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(self, indices: Sequence[int] | np.ndarray) -> ChunkBatch:
        """The chunks of these indices [B] into 0..len-1, in any order. Raises DataError for one outside."""
        index = np.asarray(indices)
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            raise DataError(
                f"chunk indices have dtype {index.dtype} and shape {index.shape}; give integers [B], B >= 1"
            )
        if index.min() < 0 or index.max() >= len(self):
            bad = index[(index < 0) | (index >= len(self))][0]
            raise DataError(f"chunk {bad} does not exist; there are 0..{len(self) - 1}")
        cache = self.cache
        slot = np.searchsorted(self._first, index, side="right") - 1
        episode = self.episodes[slot]
        start = (index - self._first[slot]) * self.stride
        row = cache.offsets[episode] + start
        left = cache.offsets[episode + 1] - row  # real steps from here to the end of the episode
        steps = np.arange(self.horizon)
        pad_mask = steps >= left[:, None]
        actions = cache.actions.take(row[:, None] + np.minimum(steps, (left - 1)[:, None]), axis=0)
        if self._incremental.any():
            short = np.flatnonzero(left < self.horizon)
            actions[short] = np.where(pad_mask[short, :, None] & self._incremental, np.float32(0), actions[short])
        anchor = None if cache.proprio is None else cache.proprio.take(row, axis=0)
        return ChunkBatch(actions=actions, pad_mask=pad_mask, anchor=anchor, episode=episode, start=start)

    def all(self) -> ChunkBatch:
        """Every chunk, in order. Takes len x T x D x 4 bytes."""
        return self.batch(np.arange(len(self)))
