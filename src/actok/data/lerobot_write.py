"""Write episodes as a LeRobot dataset, v2.1 or v3.0, that LeRobot itself opens; streaming and atomic."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from actok.core import ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.data import lerobot_meta as layout
from actok.data.episodes import Episode, require_finite
from actok.data.lerobot_stats import episode_stats, merge_stats, stats_columns, to_lists
from actok.data.lerobot_tables import EXTRAS_SCHEMA, Frames, Schema, extras_row, strings_table
from actok.data.video import VideoWriter

Version = Literal["v3.0", "v2.1"]
SubtaskLayout = Literal["column", "language_persistent"]
ImageStorage = Literal["video", "image"]

CHUNK_SIZE = 1000  # files (v3.0) or episodes (v2.1) of one folder
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
# Rows of meta/episodes written at a time.
METADATA_ROWS = 256

__all__ = ["ImageStorage", "SubtaskLayout", "Version", "write_lerobot"]


def write_lerobot(
    episodes: Iterable[Episode],
    folder: str | Path,
    *,
    space: ActionSpace,
    rate_hz: float | None = None,
    version: Version = "v3.0",
    robot_type: str | None = None,
    subtask_layout: SubtaskLayout | None = "column",
    images: ImageStorage | None = "video",
) -> Path:
    """Write episodes to a new folder that appears when it is complete; returns it.

    Episodes are consumed one at a time. LeRobot's `timestamp` column is frame / rate, which LeRobot insists on; an
    episode's measured time stamps, its task key, success and start state are kept, bit by bit, in meta/actok/, which
    LeRobot ignores and `open_dataset` reads back; so is the action space. The quantiles in LeRobot's statistics are
    means of the episodes' quantiles weighted by length, as LeRobot merges them; the other statistics are exact.

    Args:
        episodes: all with or all without proprioception, sub-tasks and the same image views, as the first one.
        folder: must not exist, or be empty.
        space: what the actions mean.
        rate_hz: frames per second; None: that of the space.
        version: the layout of the format. LeRobot up to 0.3 reads v2.1, from 0.4 on v3.0.
        robot_type: None: the space's embodiment.
        subtask_layout: "column" is LeRobot 0.4's `subtask_index`, "language_persistent" what LeRobot 0.6 reads (and
            older ones refuse); None leaves sub-tasks out.
        images: "video" (lossy, extra `video`), "image" (PNG in the data files), None leaves images out.

    Raises DataError where the target is not empty or episodes disagree with the first, SpaceMismatchError for actions
    of another width than the space, ConfigError for an unknown version, layout or rate. Nothing is left behind then.
    """
    for value, kind, what in (
        (version, Version, "version"),
        (subtask_layout, SubtaskLayout, "subtask_layout"),
        (images, ImageStorage, "images"),
    ):
        if value not in get_args(kind) and (value is not None or what == "version"):
            raise ConfigError(f"{what} {value!r} is unknown; use one of {', '.join(get_args(kind))}")
    rate = space.rate_hz if rate_hz is None else rate_hz
    if rate is None or not rate > 0:
        raise ConfigError(f"the rate is {rate}; give rate_hz, the frames per second")
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists and is not an empty folder; name a new one")
    stream = iter(episodes)
    first = next(stream, None)
    if first is None:
        raise DataError("no episode to write; give at least one")
    schema = Schema.of(first, space, float(rate), subtask_layout, images)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        writer = (_WriterV3 if version == "v3.0" else _WriterV2)(temporary, schema, robot_type or space.embodiment)
        try:
            label = f"writing {target.name}"
            for episode in tqdm(chain([first], stream), desc=label, unit="episode", delay=2, leave=False):
                writer.add(episode)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


class _Writer:
    """What both layouts share: checks, task tables, statistics, and the files of meta/actok."""

    version: Version

    def __init__(self, root: Path, schema: Schema, robot_type: str) -> None:
        self.root = root
        self.schema = schema
        self.robot_type = robot_type
        self.lengths: list[int] = []
        self.tasks: dict[str, int] = {}
        self.subtasks: dict[str, int] = {}
        self.stats: dict[str, dict[str, np.ndarray]] = {}
        self.frames = 0
        (root / "meta" / "actok").mkdir(parents=True)
        self.extras: list[dict[str, Any]] = []
        self.extras_file = pq.ParquetWriter(root / layout.EXTRAS, EXTRAS_SCHEMA)

    def add(self, episode: Episode) -> None:
        """Append one episode."""
        number = len(self.lengths)
        if episode.actions.ndim != 2 or episode.actions.shape[1] != self.schema.space.dim:
            raise SpaceMismatchError(
                f"episode {number} has actions of shape {episode.actions.shape}, action space"
                f" {self.schema.space.embodiment!r} has {self.schema.space.dim} dimensions; give the space of this data"
            )
        if not len(episode):
            raise DataError(f"episode {number} has no step; leave it out")
        require_finite(episode.actions, np.array([0, len(episode)]), "to write", number)
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        frames = self.schema.frames(episode, number, self.frames, task, self.subtasks)
        stats = episode_stats(frames, episode.images if self.schema.images else {})
        self.stats = merge_stats(self.stats, stats)
        self.write_episode(number, episode, frames, stats)
        self.extras.append(extras_row(number, episode))
        if len(self.extras) >= METADATA_ROWS:
            self._flush_extras()
        self.lengths.append(len(episode))
        self.frames += len(episode)

    def write_episode(
        self, number: int, episode: Episode, frames: Frames, stats: dict[str, dict[str, np.ndarray]]
    ) -> None:
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """What differs between the layouts in info.json."""
        raise NotImplementedError

    def close(self) -> None:
        """Complete the files that are open."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the dataset."""
        self.close()
        self._flush_extras()
        self.extras_file.close()
        rate = self.schema.rate_hz
        info = {
            "codebase_version": self.version,
            "robot_type": self.robot_type,
            "total_episodes": len(self.lengths),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_SIZE,
            "fps": int(rate) if rate == int(rate) else rate,
            "splits": {"train": f"0:{len(self.lengths)}"},
            **self.info(),
            "features": self.schema.features(),
        }
        _write_json(self.root / layout.INFO, info)
        _write_json(self.root / layout.SPACE, self.schema.space.to_dict())
        if self.subtasks:
            pq.write_table(strings_table(self.subtasks, "subtask"), self.root / layout.SUBTASKS_PARQUET)

    def abandon(self) -> None:
        """Release what is open; the folder is deleted next."""
        self.extras_file.close()

    def _flush_extras(self) -> None:
        if self.extras:
            self.extras_file.write_table(pa.Table.from_pylist(self.extras, EXTRAS_SCHEMA))
            self.extras.clear()


class _WriterV2(_Writer):
    """v2.1: one parquet and one video a view for each episode, metadata as lines of JSON."""

    version = "v2.1"

    def write_episode(
        self, number: int, episode: Episode, frames: Frames, stats: dict[str, dict[str, np.ndarray]]
    ) -> None:
        place = {"episode_chunk": number // CHUNK_SIZE, "episode_index": number}
        path = self.root / layout.DATA_PATH_V2.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(frames.table, path)
        for key, view in self.schema.videos(episode):
            video_path = self.root / layout.VIDEO_PATH_V2.format(video_key=key, **place)
            video = VideoWriter(video_path, self.schema.rate_hz, *view.shape[1:3])
            try:
                video.write(view)
                video.close()
            except BaseException:
                video.abandon()
                raise
        line = {"episode_index": number, "tasks": [episode.instruction], "length": len(episode)}
        _append_line(self.root / layout.EPISODES_JSONL, line)
        _append_line(
            self.root / layout.EPISODES_STATS_JSONL,
            {"episode_index": number, "stats": to_lists(stats, quantiles=False)},
        )

    def info(self) -> dict[str, Any]:
        views = len(self.schema.views) if self.schema.images == "video" else 0
        return {
            "total_videos": views * len(self.lengths),
            "total_chunks": -(-len(self.lengths) // CHUNK_SIZE),
            "data_path": layout.DATA_PATH_V2,
            "video_path": layout.VIDEO_PATH_V2 if views else None,
        }

    def close(self) -> None:
        for task, index in self.tasks.items():
            _append_line(self.root / layout.TASKS_JSONL, {"task_index": index, "task": task})


class _WriterV3(_Writer):
    """v3.0: files of many episodes, metadata as parquet."""

    version = "v3.0"

    def __init__(self, root: Path, schema: Schema, robot_type: str) -> None:
        super().__init__(root, schema, robot_type)
        self.data: pq.ParquetWriter | None = None
        self.data_file = _places()
        self.video_files = {key: _places() for key in schema.views}
        self.video: dict[str, VideoWriter] = {}
        self.place = (0, 0)
        self.video_place: dict[str, tuple[int, int]] = {}
        self.rows: list[dict[str, Any]] = []
        self.episodes: pq.ParquetWriter | None = None

    def write_episode(
        self, number: int, episode: Episode, frames: Frames, stats: dict[str, dict[str, np.ndarray]]
    ) -> None:
        # A row group per episode, so that reading one does not decode its neighbours.
        if self.data is None or Path(self.data.where).stat().st_size >= DATA_FILE_MB * 2**20:
            if self.data is not None:
                self.data.close()
            self.place = next(self.data_file)
            path = self._path(layout.DATA_PATH_V3, self.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.data = pq.ParquetWriter(path, frames.table.schema)
        self.data.write_table(frames.table, row_group_size=len(episode))
        row = {
            "episode_index": number,
            "tasks": [episode.instruction],
            "length": len(episode),
            "data/chunk_index": self.place[0],
            "data/file_index": self.place[1],
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + len(episode),
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, view in self.schema.videos(episode):
            video = self._video(key, view.shape[1:3])
            start = video.count / self.schema.rate_hz
            video.write(view)
            chunk, file = self.video_place[key]
            row |= {
                f"videos/{key}/chunk_index": chunk,
                f"videos/{key}/file_index": file,
                f"videos/{key}/from_timestamp": start,
                f"videos/{key}/to_timestamp": video.count / self.schema.rate_hz,
            }
        self.rows.append(row | stats_columns(stats))
        if len(self.rows) >= METADATA_ROWS:
            self._flush()

    def _video(self, key: str, size: tuple[int, int]) -> VideoWriter:
        current = self.video.get(key)
        if current is None or current.path.stat().st_size >= VIDEO_FILE_MB * 2**20:
            if current is not None:
                current.close()
            self.video_place[key] = next(self.video_files[key])
            path = self._path(layout.VIDEO_PATH_V3, self.video_place[key], video_key=key)
            self.video[key] = VideoWriter(path, self.schema.rate_hz, *size)
        return self.video[key]

    def _path(self, template: str, place: tuple[int, int], **more: str) -> Path:
        return self.root / template.format(chunk_index=place[0], file_index=place[1], **more)

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self.rows)
        if self.episodes is None:
            path = self._path(layout.EPISODES_PARQUET, (0, 0))
            path.parent.mkdir(parents=True, exist_ok=True)
            self.episodes = pq.ParquetWriter(path, table.schema)
        self.episodes.write_table(table.cast(self.episodes.schema))
        self.rows.clear()

    def info(self) -> dict[str, Any]:
        return {
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "data_path": layout.DATA_PATH_V3,
            "video_path": layout.VIDEO_PATH_V3 if self.video else None,
        }

    def close(self) -> None:
        if self.rows:
            self._flush()
        for writer in (self.data, self.episodes, *self.video.values()):
            assert writer is not None
            writer.close()
        pq.write_table(strings_table(self.tasks, "task"), self.root / layout.TASKS_PARQUET)
        _write_json(self.root / layout.STATS, to_lists(self.stats, quantiles=True))

    def abandon(self) -> None:
        super().abandon()
        for writer in (self.data, self.episodes):
            if writer is not None:
                writer.close()
        for video in self.video.values():
            video.abandon()


def _places() -> Iterator[tuple[int, int]]:
    """(chunk, file): 0, 0; 0, 1; ... with CHUNK_SIZE files a chunk."""
    number = 0
    while True:
        yield divmod(number, CHUNK_SIZE)
        number += 1


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _append_line(path: Path, value: Any) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(value, ensure_ascii=False) + "\n")
