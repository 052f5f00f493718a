"""Where training batches come from: datasets of any width, mixed sample by sample, cut and normalised ahead of time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from actok.alignment.features import FeatureBatch, join_features
from actok.core import ActokError, CodecBatch, FitPart
from actok.data.chunks import Chunks
from actok.data.mixtures import MixtureSampler

if TYPE_CHECKING:
    from actok.alignment.store import FeatureStore
    from actok.tokenizers.neural import NeuralTokenizer

# Batches made ahead, and how long a step waits for one before it gives up.
AHEAD = 4
PATIENCE_S = 600.0

__all__ = ["Batches", "Drawn", "Prefetcher", "Source", "TrainBatch", "TrainingError"]


class TrainingError(ActokError):
    """A training run cannot go on; the message says where it stopped, why, and what helps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Chunks of one dataset as they were cut.

    Attributes:
        actions: float32 [B, T, D], raw units.
        pad_mask: bool [B, T], or None where no step is padded.
        anchor: float32 [B, P] proprioception at their starts, or None.
        episode, start: int64 [B] where in the dataset they begin; None for chunks that came without episodes.
    """

    actions: np.ndarray
    pad_mask: np.ndarray | None
    anchor: np.ndarray | None = None
    episode: np.ndarray | None = None
    start: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One dataset to draw training chunks from.

    Attributes:
        name: of the dataset.
        embodiment: whose normaliser applies.
        size: how many chunks there are.
        cut: from indices [B] into 0..size-1 to the chunks.
        features: of a teacher, for the dataset's frames; None: trained without.
    """

    name: str
    embodiment: str
    size: int
    cut: Callable[[np.ndarray], Drawn]
    features: FeatureStore | None = None

    @classmethod
    def of_part(cls, part: FitPart) -> Self:
        """Chunks held in memory."""

        def cut(rows: np.ndarray) -> Drawn:
            return Drawn(
                actions=part.actions[rows],
                pad_mask=None if part.pad_mask is None else part.pad_mask[rows],
                anchor=None if part.anchor is None else part.anchor[rows],
            )

        name = part.space.embodiment
        return cls(name=name, embodiment=name, size=len(part.actions), cut=cut)

    @classmethod
    def of_chunks(
        cls,
        chunks: Chunks,
        embodiment: str,
        rows: np.ndarray | None = None,
        *,
        features: FeatureStore | None = None,
    ) -> Self:
        """Chunks cut from a frame cache when they are needed; only those of `rows` where given."""

        def cut(drawn: np.ndarray) -> Drawn:
            batch = chunks.batch(drawn if rows is None else rows[drawn])
            pad = batch.pad_mask if batch.pad_mask.any() else None
            return Drawn(
                actions=batch.actions, pad_mask=pad, anchor=batch.anchor, episode=batch.episode, start=batch.start
            )

        size = len(chunks) if rows is None else len(rows)
        return cls(name=chunks.cache.name, embodiment=embodiment, size=size, cut=cut, features=features)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """What one step trains on: chunks, and what a teacher saw meanwhile (None without one)."""

    chunks: CodecBatch
    features: FeatureBatch | None = None

    def to(self, device: Any) -> TrainBatch:
        """The same batch on another device."""
        return TrainBatch(
            chunks=self.chunks.to(device), features=None if self.features is None else self.features.to(device)
        )


class Batches:
    """The batch of each step for this process, a pure function of the sampler's seed and the step.

    Samples are grouped by dataset within a batch, since each is normalised for its own embodiment. All chunks of a batch
    have the same length, which the tokenizer chooses (`NeuralTokenizer.training_steps`).
    """

    def __init__(
        self,
        tokenizer: NeuralTokenizer,
        sources: Sequence[Source],
        sampler: MixtureSampler,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.tokenizer, self.sources, self.sampler = tokenizer, list(sources), sampler
        self.rank, self.ranks = rank, ranks

    def at(self, step: int, *, steps: int | None = None) -> TrainBatch:
        """Normalised chunks of step 0, 1, 2, ..., with features where all sources have them; cut to `steps` if given."""
        from actok.tokenizers.neural import join

        drawn = self.sampler.samples(step, rank=self.rank, ranks=self.ranks)
        if steps is None:
            steps = self.tokenizer.training_steps(int(np.random.PCG64([self.sampler.seed, step]).random_raw()) >> 32)
        aligned = all(s.features is not None for s in self.sources)
        found, features = [], []
        for d in np.unique(drawn.dataset):
            source = self.sources[d]
            chunks = source.cut(drawn.indices[drawn.dataset == d])
            real = None if chunks.pad_mask is None else ~chunks.pad_mask[:, :steps]
            values = self.tokenizer.embodiment(source.embodiment).normaliser(chunks.actions[:, :steps])
            found.append(self.tokenizer.batch(values, source.embodiment, real=real, anchor=chunks.anchor))
            if aligned and source.features is not None:
                spans = self.tokenizer.codec.slot_steps(steps)
                features.append(source.features.chunk(chunks.episode, chunks.start, steps, spans, real))
        return TrainBatch(chunks=join(found), features=join_features(features) if features else None)


class Prefetcher:
    """Makes the batches of steps first, first + 1, ..., last - 1 in a thread, a few ahead of the step that is running.

    Args:
        make: batch of a step.
        first, last: the steps.
        finish: applied in the thread to every batch, e.g. to pin its memory.

    `waited` is the time in seconds that `get` has spent waiting so far.
    """

    def __init__(
        self, make: Callable[[int], Any], first: int, last: int, finish: Callable[[Any], Any] | None = None
    ) -> None:
        self._make, self._finish = make, finish
        self._queue: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first, last), name="actok-batches", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(timeout=5.0)

    def get(self, step: int) -> Any:
        """The batch of the next step. Raises what making it raised, TrainingError where none comes."""
        before = time.perf_counter()
        while True:
            try:
                found, batch, error = self._queue.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise TrainingError(
                        f"the thread that makes batches ended before step {step + 1}; resume the run"
                    ) from None
                if time.perf_counter() - before > PATIENCE_S:
                    raise TrainingError(
                        f"no batch came for step {step + 1} in {PATIENCE_S:.0f} s; check the disk that holds the data (or"
                        " ACTOK_CACHE), then resume the run"
                    ) from None
        self.waited += time.perf_counter() - before
        if error is not None:
            raise error
        assert found == step, "steps are asked for in order"
        return batch

    def _fill(self, first: int, last: int) -> None:
        for step in range(first, last):
            item: tuple[int, Any, BaseException | None]
            try:
                batch = self._make(step)
                item = (step, batch if self._finish is None else self._finish(batch), None)
            except BaseException as error:
                item = (step, None, error)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or item[2] is not None:
                return
