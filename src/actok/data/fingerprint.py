"""What data are, in one line: equal wherever they lie, different where they change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import DataError
from actok.data.episodes import EpisodeDataset
from actok.data.resample import resampled_space

# Of a larger file these are read: its end, where npz and parquet keep checksums and statistics of everything in them,
# and blocks spread evenly over it.
TAIL, BLOCK, BLOCKS = 65536, 4096, 16

__all__ = ["fingerprint", "video_print"]


def fingerprint(dataset: EpisodeDataset, rate_hz: float | None = None) -> str:
    """`files=...;episodes=...;texts=...;rate=...` of a dataset, read at `rate_hz` (None: its own rate).

    Each entry but the rate is a hash: `files` of the source files' names relative to the folder that holds them all, sizes
    and samples of their content (whole where small), or of the values where the data live in memory; `episodes` of the
    episodes' lengths and of which of them were selected; `texts` of tasks and sub-tasks in words as far as the dataset
    lists them. So data that are moved, copied or downloaded again keep their fingerprint, whether or not their videos were
    downloaded too. An edit that keeps the size of a large HDF5 or tfrecord file can go unnoticed.

    Raises DataError for a file that cannot be read, ConfigError where the data's own rate is unknown.
    """
    chosen = None if dataset.selection is None else [int(i) for i in dataset.selection]
    rate = "own"
    if rate_hz is not None and resampled_space(dataset.space, rate_hz).rate_hz != dataset.space.rate_hz:
        rate = f"{dataset.space.rate_hz:g}to{rate_hz:g}"
    entries = {
        "files": _files(dataset) if dataset.source_files else _values(dataset),
        "episodes": _short([np.asarray(dataset.lengths).tolist(), chosen]),
        "texts": _short([list(dataset.tasks or ()), _tables(dataset)]),
        "rate": rate,
    }
    return ";".join(f"{key}={value}" for key, value in entries.items())


def video_print(dataset: EpisodeDataset, views: Sequence[str]) -> str | None:
    """A hash of the video files that hold these views: names relative to the dataset's folder, sizes, both ends.

    None where there are none, or not all of them are at hand. It is no part of `fingerprint`, so that a dataset without
    its videos is still the same; images in tables and arrays are.
    """
    from actok.data.lerobot_read import LeRobotFolder

    files = dataset.video_files(views) if isinstance(dataset, LeRobotFolder) else []
    if not isinstance(dataset, LeRobotFolder) or not files or not all(path.is_file() for path in files):
        return None
    found = []
    for path in sorted(files):
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(stream.read(BLOCK))
            stream.seek(max(0, size - BLOCK))
            digest.update(stream.read())
        found.append([Path(os.path.relpath(path, dataset.meta.root)).as_posix(), size, digest.hexdigest()])
    return _short(found)


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _tables(dataset: EpisodeDataset) -> Any:
    """The texts that a LeRobot dataset keeps in files of its `meta` folder."""
    from actok.data.lerobot_read import LeRobotFolder

    if not isinstance(dataset, LeRobotFolder):
        return None
    meta = dataset.meta
    return [sorted(meta.tasks.items()), list(meta.subtasks)]


def _files(dataset: EpisodeDataset) -> str:
    paths = sorted(os.path.abspath(path) for path in dataset.source_files)
    root = os.path.commonpath(paths)
    return _short([[Path(os.path.relpath(path, root)).as_posix(), *_sample(path, dataset.name)] for path in paths])


def _sample(path: str, dataset: str) -> tuple[int, str]:
    """Size, and a hash of the content or of samples of it."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= TAIL + BLOCK * BLOCKS:
                digest.update(stream.read())
            else:
                for i in range(BLOCKS):
                    stream.seek((size - TAIL - BLOCK) * i // (BLOCKS - 1))
                    digest.update(stream.read(BLOCK))
                stream.seek(size - TAIL)
                digest.update(stream.read())
    except OSError as error:
        raise DataError(f"{path} of dataset {dataset!r} cannot be read ({error.strerror}); copy it again") from None
    return size, digest.hexdigest()


def _values(dataset: EpisodeDataset) -> str:
    digest = hashlib.sha256()
    for episode in dataset:
        for array in (episode.actions, episode.proprio, episode.subtask):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        digest.update(json.dumps([episode.instruction, episode.task, list(episode.subtask_names)]).encode())
    return digest.hexdigest()[:16]
