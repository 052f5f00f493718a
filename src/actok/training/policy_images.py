"""Images of demonstrations by view, read once: held in memory, or in files of the cache folder that are mapped into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from actok.core import ConfigError, DataError
from actok.core.files import atomic_path
from actok.data.cache import CACHE_VARIABLE
from actok.data.episodes import Episode, EpisodeDataset

# All images of a run that are held in memory, together, in bytes.
MOST_BYTES = 4_000_000_000
# A file is one tensor as safetensors lays it out, so that other programs can read it too; its pixels begin on a page.
FORMAT, VERSION, PAGE = "actok-images", "1", 4096

__all__ = ["Images", "read_images"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Images of some frames of a dataset.

    Attributes:
        pixels: view -> uint8 [M, H, W, 3], in memory or mapped and read-only.
        rows: int64 [N], row of each of the dataset's frames in `pixels`, -1 where it was not read.
    """

    pixels: dict[str, np.ndarray]
    rows: Int[np.ndarray, "N"]

    def at(self, frames: Int[np.ndarray, "B"]) -> dict[str, np.ndarray]:
        """uint8 [B, H, W, 3] by view, of these frames of the dataset: copies, wherever the images are."""
        if not self.pixels:
            return {}
        rows = self.rows[frames]
        assert (rows >= 0).all(), "only frames of the episodes that were read are asked for"
        return {view: pixels[rows] for view, pixels in self.pixels.items()}


def read_images(
    datasets: Sequence[EpisodeDataset], episodes: Sequence[np.ndarray], views: Sequence[str], *, progress: bool = True
) -> list[Images]:
    """The images of these episodes of each dataset; nothing is read where no view is named.

    They are held in memory, unless the environment variable ACTOK_CACHE names a folder: those of data on disk are then
    written there, one file a dataset and view, and mapped. A later call for the same episodes returns what is there and
    reads one episode of each dataset, for the names and sizes of its views. A file knows its episodes, its view and the
    size and modification time of the files that the images come from; where any of them differs, another is written. One
    that was cut off, or is none of ours, is written anew. (What is not looked at: pixels changed inside a file of the
    cache, and pictures that lie beside a LeRobot dataset's tables as files of their own.) Of several processes that ask at
    the same time one reads, and the others wait for it.

    A view is called as in the first dataset, or by the last part of that name where only one view ends so: "corner2" is
    "observation.images.corner2". The images have the dataset's own names.

    Raises ConfigError for a view that is named twice. DataError for a view that is not there (naming those that are), for views whose size differs between episodes,
    where the images to be held in memory would take more than MOST_BYTES, and where those to be written do not fit on the
    disk.
    """
    if not views:
        return [Images(pixels={}, rows=np.zeros(0, np.int64)) for _ in datasets]
    first = [d.episode(int(e[0]), images=True) for d, e in zip(datasets, episodes, strict=True)]
    views = [_own_name(view, list(first[0].images)) for view in views]
    if len(set(views)) < len(views):
        raise ConfigError(f"views are {', '.join(views)}; name each once")
    sizes = [_sizes(episode, d, views) for d, episode in zip(datasets, first, strict=True)]
    for dataset, found in zip(datasets[1:], sizes[1:], strict=True):
        for view in views:
            if found[view] != sizes[0][view]:
                raise DataError(
                    f"view {view!r} is {_size(sizes[0][view])} in {datasets[0].name!r}, {_size(found[view])} in"
                    f" {dataset.name!r}; resize the images of one"
                )
    parts = [
        _Part(dataset=dataset, episodes=np.sort(chosen), shapes=sizes[0])
        for dataset, chosen in zip(datasets, episodes, strict=True)
    ]
    place = os.environ.get(CACHE_VARIABLE)
    mapped = [bool(place and dataset.source_files) for dataset in datasets]
    _require_memory([part for part, there in zip(parts, mapped, strict=True) if not there])
    return [
        Images(
            pixels=_in_files(part, Path(place).expanduser().absolute(), progress)
            if place and there
            else _in_memory(part, progress),
            rows=part.rows,
        )
        for part, there in zip(parts, mapped, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What is wanted of one dataset.

    Attributes:
        dataset: that is read.
        episodes: of it, in ascending order.
        shapes: view -> H, W, 3.
    """

    dataset: EpisodeDataset
    episodes: np.ndarray
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E] frames of all episodes of the dataset."""
        return np.asarray(self.dataset.lengths, np.int64)

    @property
    def frames(self) -> int:
        """How many are wanted."""
        return int(self.lengths[self.episodes].sum())

    @property
    def rows(self) -> np.ndarray:
        """See `Images.rows`."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        rows = np.full(int(offsets[-1]), -1)
        at = 0
        for e in self.episodes:
            steps = int(self.lengths[e])
            rows[offsets[e] : offsets[e] + steps] = np.arange(at, at + steps)
            at += steps
        return rows

    def size(self, view: str) -> int:
        """Of a view, in bytes."""
        return self.frames * int(np.prod(self.shapes[view]))

    def read(self, progress: bool) -> Iterator[Mapping[str, np.ndarray]]:
        """Images of one episode after the other."""
        title = f"reading images of {self.dataset.name}"
        for index in tqdm(self.episodes, desc=title, unit="episode", file=sys.stderr, delay=2, disable=not progress):
            episode = self.dataset.episode(int(index), images=True)
            if (found := _sizes(episode, self.dataset, list(self.shapes))) != self.shapes:
                view = next(v for v in found if found[v] != self.shapes[v])
                raise DataError(
                    f"view {view!r} of episode {index} of {self.dataset.name!r} is {_size(found[view])}, of others"
                    f" {_size(self.shapes[view])}; drop the episode or resize its images"
                )
            if len(episode) != self.lengths[index]:
                raise DataError(
                    f"episode {index} of {self.dataset.name!r} has {len(episode)} steps, {self.lengths[index]} are stated;"
                    " the files are truncated or edited, copy them again"
                )
            yield episode.images


# -- in memory --------------------------------------------------------------------------------------------------------


def _require_memory(parts: Sequence[_Part]) -> None:
    total = sum(part.size(view) for part in parts for view in part.shapes)
    if total <= MOST_BYTES:
        return
    told = ", ".join(f"{view} ({_size(shape)})" for view, shape in parts[0].shapes.items())
    arrays = [part.dataset.name for part in parts if not part.dataset.source_files]
    first = f"write {', '.join(arrays)} to files, of which a cache can be made, and " if arrays else ""
    raise DataError(
        f"{sum(part.frames for part in parts):,} frames of {told} take {total / 1e9:.1f} GB, more than the"
        f" {MOST_BYTES / 1e9:.0f} GB that images may take in memory; {first}let the environment variable {CACHE_VARIABLE} name"
        " a folder on a disk with room for them, from which they are mapped then, or name fewer views (--views), record"
        " smaller images, or train on fewer episodes"
    )


def _in_memory(part: _Part, progress: bool) -> dict[str, np.ndarray]:
    pixels = {view: np.empty((part.frames, *shape), np.uint8) for view, shape in part.shapes.items()}
    at = 0
    for images in part.read(progress):
        for view, array in pixels.items():
            array[at : at + len(images[view])] = images[view]
        at += len(images[view])
    return pixels


# -- in files ---------------------------------------------------------------------------------------------------------


def _in_files(part: _Part, folder: Path, progress: bool) -> dict[str, np.ndarray]:
    files = {view: _File.of(part, view, folder) for view in part.shapes}
    if any(not file.complete for file in files.values()):
        with _alone(folder / f".{_plain(part.dataset.name)}-images.lock", part.dataset.name, progress):
            missing = {view: file for view, file in files.items() if not file.complete}  # others may have been at it
            _require_space(part, missing, folder)
            if missing:
                _write(part, missing, progress)
    return {view: file.pixels() for view, file in files.items()}


@dataclass(frozen=True, kw_only=True)
class _File:
    """The file of one view.

    Attributes:
        path: where it is, or will be.
        header: bytes that it begins with; they name the format and everything that it was made from.
        shape: M, H, W, 3.
    """

    path: Path
    header: bytes
    shape: tuple[int, ...]

    @classmethod
    def of(cls, part: _Part, view: str, folder: Path) -> _File:
        shape = (part.frames, *part.shapes[view])
        key = _key(part, view)
        facts = {"format": FORMAT, "version": VERSION, "dataset": part.dataset.name, "view": view, "key": key}
        tensor = {"dtype": "U8", "shape": shape, "data_offsets": [0, part.size(view)]}
        body = json.dumps({"__metadata__": facts, "pixels": tensor}).encode()
        body += b" " * (-(len(body) + 8) % PAGE)
        name = f"{_plain(part.dataset.name)}-{_plain(view)}-{key[:16]}.safetensors"
        return cls(path=folder / name, header=struct.pack("<Q", len(body)) + body, shape=shape)

    @property
    def complete(self) -> bool:
        """Whether it is there, of this kind and these data, and whole."""
        try:
            with open(self.path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                return (
                    size == len(self.header) + int(np.prod(self.shape)) and stream.read(len(self.header)) == self.header
                )
        except OSError:
            return False

    def pixels(self) -> np.ndarray:
        """uint8 [M, H, W, 3], mapped. A plain array over the pages: indexing the memmap subclass costs more."""
        return np.asarray(np.memmap(self.path, np.uint8, mode="r", offset=len(self.header), shape=self.shape))


def _key(part: _Part, view: str) -> str:
    """sha256 of what the images of a view depend on."""
    dataset = part.dataset
    files = []
    for path in sorted({Path(p).absolute() for p in [*dataset.source_files, *dataset.video_files([view])]}):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path} of dataset {dataset.name!r} cannot be read ({error.strerror}); copy it again"
            ) from None
        files.append([str(path), status.st_size, status.st_mtime_ns])
    chosen = None if dataset.selection is None else [int(i) for i in dataset.selection]
    episodes = [part.lengths.tolist(), chosen, part.episodes.tolist()]
    body = [FORMAT, VERSION, dataset.name, view, part.shapes[view], episodes, files]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _require_space(part: _Part, files: Mapping[str, _File], folder: Path) -> None:
    need, free = sum(part.size(view) for view in files), shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{part.frames:,} frames of {', '.join(files)} of {part.dataset.name!r} take {need / 1e9:.1f} GB, {folder} has"
            f" {free / 1e9:.1f} GB free; let {CACHE_VARIABLE} name a folder on a larger disk, make room in this one, or name"
            " fewer views (--views), record smaller images, or train on fewer episodes"
        )


def _write(part: _Part, files: Mapping[str, _File], progress: bool) -> None:
    """Write the files of these views, each appearing whole under its name; the caller is the only one to write them."""
    if progress:
        size = sum(part.size(view) for view in files) / 1e6
        folder = next(iter(files.values())).path.parent
        tqdm.write(f"{part.dataset.name}: {size:,.0f} MB of images are written once to {folder}", sys.stderr)
    for file in files.values():
        for left in file.path.parent.glob(f".{file.path.name}-*"):  # by a process that was killed
            left.unlink()
    try:
        with ExitStack() as open_files:
            streams = {}
            for view, file in files.items():
                temporary = open_files.enter_context(atomic_path(file.path))
                streams[view] = open_files.enter_context(open(temporary, "wb"))
                streams[view].write(file.header)
            for images in part.read(progress):
                for view, stream in streams.items():
                    stream.write(np.ascontiguousarray(images[view]).data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the disk became full while images of {part.dataset.name!r} were written ({error.strerror}); make room, or let"
            f" {CACHE_VARIABLE} name a folder on a larger one, and start again"
        ) from None


@contextmanager
def _alone(path: Path, name: str, progress: bool) -> Iterator[None]:
    """Within this context no other process writes images of a dataset of this name; the end of a process ends it too."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"{name}: waiting for another process that writes its images", sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# -- views ------------------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """As a part of a file's name."""
    return re.sub(r"[^0-9A-Za-z._-]", "_", name)


def _own_name(view: str, names: Sequence[str]) -> str:
    """What the dataset calls a view; a name that it does not have, or that several views end in, stays as it is."""
    ending = [name for name in names if name.rpartition(".")[2] == view]
    return ending[0] if view not in names and len(ending) == 1 else view


def _sizes(episode: Episode, dataset: EpisodeDataset, views: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """H, W, 3 of the views of an episode."""
    there = episode.images
    for view in views:
        if view not in there:
            known = f"it has {', '.join(there)}" if there else "it has no images at all"
            raise DataError(f"episode {episode.index} of {dataset.name!r} has no view {view!r}; {known}")
        if there[view].dtype != np.uint8 or there[view].shape[0] != len(episode) or there[view].ndim != 4:
            raise DataError(
                f"view {view!r} of episode {episode.index} of {dataset.name!r} is {there[view].dtype}"
                f" {there[view].shape}; give uint8 [{len(episode)}, H, W, 3]"
            )
    return {view: tuple(there[view].shape[1:]) for view in views}


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
