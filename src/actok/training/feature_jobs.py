"""What has to be encoded of one dataset, cut into parts that any process can do at any time."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actok.alignment.store import FeatureStore, short_hash, store_name
from actok.alignment.store_write import as_stored, merge_parts, write_part
from actok.core import ConfigError, DataError
from actok.core.provenance import circumstances
from actok.data import Episode, EpisodeDataset
from actok.data.fingerprint import fingerprint, video_print
from actok.data.instructions import PROMPT, frame_texts
from actok.data.resample import resampled_length, states_at

if TYPE_CHECKING:
    from actok.alignment.teacher import Teacher

# Frames or texts of a part, at least: what is lost where a process is killed. So many parts of a dataset at most.
PART_ITEMS = 1024
MAX_PARTS = 10_000
# Views of a frame that a teacher sees unless the caller names some.
DEFAULT_VIEWS = 3

__all__ = ["FeatureJob", "FrameJob", "TextJob", "make_job"]


def make_job(
    dataset: EpisodeDataset,
    teacher: Teacher,
    out: Path,
    *,
    views: tuple[str, ...] | None,
    stride: int,
    batch_size: int,
    rate_hz: float | None,
) -> FeatureJob:
    """Texts alone, each distinct one once, or every frame's images too, where the dataset has images and the teacher
    reads them.

    Raises ConfigError for views that the dataset has not or the teacher cannot read.
    """
    shared: dict[str, Any] = {"batch_size": batch_size, "rate_hz": rate_hz}
    chosen = _views(dataset, teacher, views)
    if not chosen and getattr(teacher, "needs_images", False):
        raise ConfigError(
            f"the teacher {_name(teacher)} needs images, and dataset {dataset.name!r} shows none; take another teacher"
        )
    if not chosen:
        return TextJob(dataset, teacher, out, **shared)
    return FrameJob(dataset, teacher, out, views=chosen, stride=stride, **shared)


def _views(dataset: EpisodeDataset, teacher: Teacher, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    if not teacher.reads_images:
        if asked:
            raise ConfigError(f"the teacher {_name(teacher)} reads no images; leave out views {', '.join(asked)}")
        return ()
    if asked == ():
        return ()
    found = tuple(dataset.episode(0, images=True).images)
    if asked is None:
        return found[: min(DEFAULT_VIEWS, teacher.views)]
    if unknown := [view for view in asked if view not in found]:
        raise ConfigError(
            f"dataset {dataset.name!r} has no view {unknown[0]!r}; it has {', '.join(found) or 'no images at all'}"
        )
    if len(asked) > teacher.views:
        raise ConfigError(
            f"the teacher {_name(teacher)} reads {teacher.views} views of a frame; name fewer than {asked}"
        )
    return asked


def _name(teacher: Teacher) -> str:
    return str(teacher.identity.get("model") or type(teacher).__name__)


class FeatureJob(ABC):
    """The features of one dataset by one teacher.

    Attributes:
        target: the finished folder.
        frames: how many the dataset has at the asked rate.
        parts: how many parts there are.
        dim, name: of the teacher.
    """

    views: tuple[str, ...] = ()
    stride: int = 1
    parts: int
    _frames_of: Callable[[np.ndarray], np.ndarray] | None

    def __init__(
        self, dataset: EpisodeDataset, teacher: Teacher, out: Path, *, batch_size: int, rate_hz: float | None
    ) -> None:
        self.dataset, self.batch_size, self.rate_hz = dataset, batch_size, rate_hz
        self._teacher: Teacher | None = teacher
        self._identity = json.loads(json.dumps(dict(teacher.identity)))
        self.dim, self.name = teacher.dim, _name(teacher)
        self.fingerprint = fingerprint(dataset, rate_hz)
        own = dataset.space.rate_hz
        self.lengths = [int(n) if rate_hz is None else resampled_length(int(n), own, rate_hz) for n in dataset.lengths]
        self.frames = sum(self.lengths)
        self.target = out / store_name(dataset.name, self.fingerprint)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the features depend on besides the data, as JSON values."""
        return {
            "teacher": self._identity,
            "stride": self.stride,
            "views": list(self.views),
            "prompt": PROMPT,
        }

    @property
    def work(self) -> Path:
        """Folder of the parts; another teacher or another question has another one."""
        return self.target.with_name(f".{self.target.name}-{short_hash(self.identity)[:8]}")

    def path(self, part: int) -> Path:
        """File of a part."""
        return self.work / f"part-{part:05}.npz"

    @property
    def missing(self) -> list[int]:
        """Parts that are still to be made; none where the features are complete."""
        if self.finished:
            return []
        return [part for part in range(self.parts) if not self.path(part).is_file()]

    @property
    def finished(self) -> bool:
        """Whether the folder is there. Raises DataError where it holds features that were made another way."""
        store = self.store()
        if store is None:
            return False
        for key, value in self.identity.items():
            if store.meta[key] != value:
                raise DataError(
                    f"{store.folder} holds features with {key} {json.dumps(store.meta[key])}, not {json.dumps(value)}; name"
                    " another --out, or delete this folder"
                )
        store.check_videos(video_print(self.dataset, self.views))
        return True

    def store(self) -> FeatureStore | None:
        """The features, where they are complete."""
        return FeatureStore.find(self.target.parent, self.fingerprint)

    def release(self) -> None:
        """Give the teacher's memory back; parts can then be merged, and no longer made."""
        self._teacher = None

    def make(self, part: int, tick: Callable[[int], object]) -> None:
        """Encode a part and write it; `tick` is told how many frames were done."""
        features, items = self._encoded(part, tick)
        write_part(self.path(part), features, items)

    def merge(self, arguments: Mapping[str, Any]) -> None:
        """Make the folder of all parts and delete them."""
        try:
            merge_parts(
                [self.path(part) for part in range(self.parts)],
                self.target,
                {
                    "dataset": self.dataset.name,
                    "fingerprint": self.fingerprint,
                    "lengths": self.lengths,
                    "rate_hz": self.dataset.space.rate_hz if self.rate_hz is None else self.rate_hz,
                    **self.identity,
                    "videos": video_print(self.dataset, self.views),
                    "arguments": dict(arguments),
                    "provenance": circumstances(("numpy", "torch", "transformers")),
                },
                self._frames_of,
            )
        except DataError:
            if not self.finished:  # else another process was first and has deleted the parts
                raise
        shutil.rmtree(self.work, ignore_errors=True)

    @abstractmethod
    def weight(self, part: int) -> int:
        """Frames that a part stands for."""

    @abstractmethod
    def _encoded(self, part: int, tick: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray | None]:
        """float16 features of a part, and the feature of each of its items (None: one each)."""

    def _require_text(self, episode: Episode, texts: list[str]) -> None:
        if "" in texts:
            raise DataError(
                f"episode {episode.index} of dataset {self.dataset.name!r} has neither an instruction nor a task key, and a"
                " teacher is told in words what is being done; store an instruction with the episode, or drop it"
            )

    def _features(self, texts: list[str], images: list[np.ndarray] | None, where: Callable[[int], str]) -> np.ndarray:
        """float16 [n, F] of one batch."""
        assert self._teacher is not None, "a job that released its teacher makes no parts"
        found = np.asarray(self._teacher.encode(texts, images))
        if found.shape != (len(texts), self.dim):
            raise DataError(
                f"teacher {self.name} gives features of shape {found.shape} for {len(texts)} inputs; its dim is {self.dim}"
            )
        return as_stored(found, self.name, where)


class TextJob(FeatureJob):
    """Features of texts alone: the parts are blocks of the dataset's distinct texts, in the order of their first frames."""

    def __init__(self, dataset: EpisodeDataset, teacher: Teacher, out: Path, **options: Any) -> None:
        super().__init__(dataset, teacher, out, **options)
        table: dict[str, int] = {}
        ids = []
        for episode in dataset:
            texts, local = frame_texts(episode, dataset.space.rate_hz, self.rate_hz)
            self._require_text(episode, texts)
            ids.append(np.array([table.setdefault(text, len(table)) for text in texts], np.int32)[local])
        self.texts = list(table)
        self._ids = np.concatenate(ids)
        self._counts = np.bincount(self._ids, minlength=len(table))
        self._size = max(PART_ITEMS, -(-len(table) // MAX_PARTS))
        self.parts = -(-len(table) // self._size)

    def weight(self, part: int) -> int:
        """See FeatureJob.weight."""
        return int(self._counts[part * self._size : (part + 1) * self._size].sum())

    def _encoded(self, part: int, tick: Callable[[int], object]) -> tuple[np.ndarray, None]:
        end = min(len(self.texts), (part + 1) * self._size)
        found = []
        for first in range(part * self._size, end, self.batch_size):
            last = min(end, first + self.batch_size)
            texts = self.texts[first:last]

            def where(i: int, texts: list[str] = texts) -> str:
                return f"the text {texts[i]!r}"

            found.append(self._features(texts, None, where))
            tick(int(self._counts[first:last].sum()))
        return np.concatenate(found), None

    def _frames_of(self, rows: np.ndarray) -> np.ndarray:
        taken: np.ndarray = rows[self._ids]
        return taken


@dataclass(kw_only=True)
class _Batch:
    """Frames to encode together: texts, views of each, (episode, frame), and the lengths of the episodes that end in it."""

    dataset: str
    texts: list[str] = field(default_factory=list)
    images: list[list[np.ndarray]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    frames: int = 0

    def other_size(self, images: list[np.ndarray]) -> bool:
        """Whether images are of other sizes than those that are there."""
        return bool(self.images) and [i.shape for i in images] != [i.shape for i in self.images[-1]]

    def where(self, i: int) -> str:
        """The i-th frame in words."""
        return f"dataset {self.dataset!r}, episode {self.places[i][0]}, frame {self.places[i][1]}"


class FrameJob(FeatureJob):
    """Features of frames with their images: the parts are blocks of consecutive episodes.

    Every `stride`-th frame of an episode is encoded, and every frame at which the text changes; the frames between have
    the feature of the last one encoded.
    """

    _frames_of = None

    def __init__(
        self,
        dataset: EpisodeDataset,
        teacher: Teacher,
        out: Path,
        *,
        views: tuple[str, ...],
        stride: int,
        **options: Any,
    ) -> None:
        super().__init__(dataset, teacher, out, **options)
        self.views, self.stride = views, stride
        begins = np.concatenate([[0], np.cumsum(self.lengths)])
        size = max(PART_ITEMS * stride, -(-self.frames // MAX_PARTS))
        # An episode belongs to the part in which its first frame lies; parts without one are left out.
        _, first = np.unique(begins[:-1] // size, return_index=True)
        self._blocks = [range(int(a), int(b)) for a, b in zip(first, [*first[1:], len(self.lengths)], strict=True)]
        self.parts = len(self._blocks)

    def weight(self, part: int) -> int:
        """See FeatureJob.weight."""
        block = self._blocks[part]
        return sum(self.lengths[block.start : block.stop])

    def _encoded(self, part: int, tick: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray]:
        found: list[np.ndarray] = []
        items: list[np.ndarray] = []
        for batch in self._batches(part, items):
            views = [np.stack(view) for view in zip(*batch.images, strict=True)]
            found.append(self._features(batch.texts, views, batch.where))
            tick(batch.frames)
        return np.concatenate(found), np.concatenate(items)

    def _batches(self, part: int, items: list[np.ndarray]) -> Iterator[_Batch]:
        """Frames to encode; `items` gets the feature of every frame of each episode. A batch ends where sizes change."""
        batch = _Batch(dataset=self.dataset.name)
        encoded = 0
        for e in self._blocks[part]:
            episode = self.dataset.episode(e, images=True)
            words, ids = frame_texts(episode, self.dataset.space.rate_hz, self.rate_hz)
            self._require_text(episode, words)
            steps = np.arange(len(ids))
            chosen = steps % self.stride == 0
            chosen[1:] |= ids[1:] != ids[:-1]
            items.append(encoded + np.cumsum(chosen) - 1)
            encoded += int(chosen.sum())
            if self.rate_hz is not None:
                steps = states_at(len(episode), self.dataset.space.rate_hz, self.rate_hz)
            views = self._images(episode)
            for t in np.flatnonzero(chosen):
                images = [view[steps[t]] for view in views]
                if len(batch.texts) == self.batch_size or batch.other_size(images):
                    yield batch
                    batch = _Batch(dataset=self.dataset.name)
                batch.texts.append(words[ids[t]])
                batch.images.append(images)
                batch.places.append((e, int(t)))
            batch.frames += len(ids)
        yield batch

    def _images(self, episode: Episode) -> list[np.ndarray]:
        for view in self.views:
            if view not in episode.images or len(episode.images[view]) != len(episode):
                raise DataError(
                    f"episode {episode.index} of dataset {self.dataset.name!r} has no image of view {view!r} for every frame;"
                    f" it has {', '.join(episode.images) or 'none'}: leave the view out with --views, or drop the episode"
                )
        return [episode.images[view] for view in self.views]
