"""LeRobot datasets v2.0, v2.1 and v3.0, read with pyarrow alone: only the columns that are needed, each file once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from actok.core import ActionSpace, DataError
from actok.data.episodes import Episode, EpisodeDataset, require_finite
from actok.data.lerobot_meta import EXTRAS, INFO, LeRobotMeta, read_parquet, read_rows, to_matrix
from actok.data.resolve import resolve_space

# Files whose columns are kept: one is enough to read in order, two serve a reader that goes back and forth at a border.
KEPT_FILES = 2

__all__ = ["LeRobotFolder"]


@dataclass(frozen=True, eq=False)
class _DataFile:
    """The columns of one data file that episodes are made of."""

    table: pa.Table
    actions: np.ndarray  # float32 [N, D]
    state: np.ndarray | None  # float32 [N, P]
    rows: dict[int, slice]  # by LeRobot's episode_index


class LeRobotFolder(EpisodeDataset):
    """A LeRobot dataset on disk.

    The action is the feature `action`, else `actions`; proprioception is `observation.state`, else `state`. Sub-tasks
    come from a `subtask_index` column with meta/subtasks.parquet, else from the rows of style `subtask` in
    `language_persistent`: active is the last one whose time stamp is not after the frame's.

    Attributes:
        meta: the dataset's metadata.
    """

    def __init__(
        self,
        root: Path,
        *,
        space: str | Path | ActionSpace | None = None,
        name: str | None = None,
        episodes: Sequence[int] | None = None,
    ) -> None:
        """`episodes`: LeRobot's indices of the episodes to take, in that order; None: all."""
        self.meta = meta = LeRobotMeta.load(Path(root))
        self.name = name or Path(root).resolve().name
        self._chosen = self._choose(episodes)
        self.lengths = meta.lengths[self._chosen]
        self.selection = None if episodes is None else self._chosen.tolist()
        shape = meta.features[meta.action_key].get("shape") or [1]
        self.space, self.space_origin = resolve_space(
            space,
            dim=int(np.prod(shape)),
            dataset=self.name,
            names=meta.action_names,
            robot=meta.robot,
            rate_hz=meta.fps,
            stored=meta.space,
        )
        keys = [self._task_key(int(place)) for place in self._chosen]
        self.tasks = keys if any(keys) else None
        self.source_files = [meta.root / INFO, *dict.fromkeys(meta.files[i] for i in self._chosen)]
        self._kept: OrderedDict[Path, _DataFile] = OrderedDict()

    def video_files(self, views: Sequence[str]) -> list[Path]:
        """The files that these views of the chosen episodes are decoded from, at hand or not; none for images in tables."""
        clips = [self.meta.videos[view][i].path for view in views if view in self.meta.videos for i in self._chosen]
        return list(dict.fromkeys(clips))

    def _choose(self, episodes: Sequence[int] | None) -> np.ndarray:
        if episodes is None:
            return np.arange(len(self.meta.lengths))
        place = {int(index): i for i, index in enumerate(self.meta.indices)}
        unknown = [int(e) for e in episodes if int(e) not in place]
        if unknown:
            raise DataError(f"dataset {self.name!r} has no episode {unknown[0]}; it has {len(place)}")
        if not len(episodes):
            raise DataError(f"dataset {self.name!r} is empty: the selection of episodes is; choose at least one")
        return np.array([place[int(e)] for e in episodes], np.int64)

    def _task_key(self, place: int) -> str:
        """The task key kept beside LeRobot's data, else the first task in words."""
        kept = self.meta.extras.get(int(self.meta.indices[place]), {}).get("task")
        return kept or next(iter(self.meta.episode_tasks[place]), "")

    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """See EpisodeDataset.view_sizes; the metadata state them, so no image or video is read."""
        return {view: self.meta.image_size(view) for view in [*self.meta.image_keys, *self.meta.videos]}

    # -- reading --------------------------------------------------------------------------------------------------

    def episode(self, index: int, *, images: bool = False) -> Episode:
        """See EpisodeDataset.episode. Images need the extra `video`."""
        if not 0 <= index < len(self):
            raise DataError(f"dataset {self.name!r} has episodes 0..{len(self) - 1}, not {index}")
        place = int(self._chosen[index])
        number = int(self.meta.indices[place])
        file = self._file(self.meta.files[place])
        rows = self._rows(file, place)
        actions = file.actions[rows]
        require_finite(actions, np.array([0, len(actions)]), self.name, index)
        seconds = _vector(file.table, "timestamp", rows)
        extra = self.meta.extras.get(number, {})
        subtask, names = self._subtasks(file.table, rows, seconds)
        measured = extra.get("timestamps")
        return Episode(
            index=index,
            actions=actions,
            proprio=None if file.state is None else file.state[rows],
            instruction=self._instruction(file.table, rows, place),
            task=extra.get("task") or "",
            subtask=subtask,
            subtask_names=names,
            timestamps=seconds if measured is None else np.array(measured, np.float64),
            success=extra.get("success"),
            start_state={s["name"]: _array(s) for s in extra.get("start_state") or []},
            images=self._images(place, rows) if images else {},
        )

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """See EpisodeDataset.all_actions. Reads the action column alone."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        frames = np.empty((offsets[-1], self.space.dim), np.float32)
        by_file: dict[Path, list[int]] = {}
        for index, place in enumerate(self._chosen):
            by_file.setdefault(self.meta.files[place], []).append(index)
        for path, members in tqdm(by_file.items(), desc=self.name, unit="file", delay=2, leave=False):
            file = self._kept.get(path) or self._read(path)
            for index in members:
                frames[offsets[index] : offsets[index + 1]] = file.actions[self._rows(file, int(self._chosen[index]))]
        require_finite(frames, offsets, self.name)
        return frames, offsets

    def _file(self, path: Path) -> _DataFile:
        if path in self._kept:
            self._kept.move_to_end(path)
        else:
            self._kept[path] = self._read(path, ("timestamp", "task_index", "subtask_index", "language_persistent"))
            if len(self._kept) > KEPT_FILES:
                self._kept.popitem(last=False)
        return self._kept[path]

    def _read(self, path: Path, optional: Sequence[str] = ()) -> _DataFile:
        """The actions of a file; with `optional` columns, also the state and those of them that the file has."""
        key, state_key = self.meta.action_key, self.meta.state_key if optional else None
        table = read_parquet(path, [key, "episode_index", *filter(None, [state_key])], optional)
        actions = to_matrix(table[key], f"{path}, column {key!r}")
        if actions.dtype.kind != "f":
            raise DataError(f"{path}: column {key!r} has dtype {actions.dtype}; actions are floating point values")
        if len(actions) and actions.shape[1] != self.space.dim:
            raise DataError(
                f"{path}: actions have {actions.shape[1]} dimensions, {self.meta.root / INFO} states {self.space.dim};"
                " write the dataset again"
            )
        state = None
        if state_key is not None:
            state = to_matrix(table[state_key], f"{path}, column {state_key!r}").astype(np.float32)
        column = table["episode_index"]
        if not pa.types.is_integer(column.type) or column.null_count:
            raise DataError(f"{path}: episode_index must be whole numbers without gaps; write the dataset again")
        index = column.to_numpy()
        starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1)) if len(index) else np.zeros(0, np.int64)
        ends = np.append(starts[1:], len(index))[: len(starts)]
        rows = {int(index[a]): slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True)}
        if len(rows) != len(starts):
            raise DataError(f"{path}: the rows of an episode are not in one piece; sort the file by its index column")
        return _DataFile(table, actions.astype(np.float32, copy=False), state, rows)

    def _rows(self, file: _DataFile, place: int) -> slice:
        number, stated = int(self.meta.indices[place]), int(self.meta.lengths[place])
        rows = file.rows.get(number, slice(0, 0))
        if rows.stop - rows.start != stated:
            raise DataError(
                f"{self.meta.files[place]} holds {rows.stop - rows.start} rows of episode {number}, the metadata state"
                f" {stated}; download or write the dataset again"
            )
        return rows

    # -- what an episode is about ---------------------------------------------------------------------------------

    def _instruction(self, table: pa.Table, rows: slice, place: int) -> str:
        """The task of the episode's first frame; where frames name none, the first that the metadata list."""
        if "task_index" in table.column_names:
            index = table["task_index"][rows.start].as_py()
            if index not in self.meta.tasks:
                raise DataError(
                    f"{self.meta.files[place]} names task {index}, but {self.meta.root / 'meta'} lists"
                    f" {len(self.meta.tasks)} tasks; download the meta folder again"
                )
            return self.meta.tasks[index]
        return next(iter(self.meta.episode_tasks[place]), "")

    def _subtasks(
        self, table: pa.Table, rows: slice, seconds: np.ndarray | None
    ) -> tuple[np.ndarray | None, tuple[str, ...]]:
        if "subtask_index" in table.column_names and self.meta.subtasks:
            index = _vector(table, "subtask_index", rows)
            assert index is not None
            if (index >= len(self.meta.subtasks)).any():
                raise DataError(
                    f"dataset {self.name!r} names sub-task {int(index.max())}, but meta/subtasks.parquet lists"
                    f" {len(self.meta.subtasks)}; download the meta folder again"
                )
            # An empty string says that no sub-task is active.
            empty = [i for i, text in enumerate(self.meta.subtasks) if not text]
            subtask = np.where(np.isin(index, empty) | (index < 0), -1, index).astype(np.int64)
            return subtask, self.meta.subtasks
        if "language_persistent" in table.column_names and seconds is not None:
            # Every frame of an episode carries the same list.
            spoken = table["language_persistent"][rows.start].as_py() or []
            spoken = sorted((s for s in spoken if s.get("style") == "subtask"), key=lambda s: s["timestamp"])
            if spoken:
                names = tuple(dict.fromkeys(s["content"] for s in spoken if s["content"]))
                active = np.searchsorted([s["timestamp"] for s in spoken], seconds, side="right") - 1
                ids = np.array([names.index(s["content"]) if s["content"] else -1 for s in spoken], np.int64)
                return np.where(active < 0, -1, ids[active]), names
        return None, ()

    def _images(self, place: int, rows: slice) -> dict[str, np.ndarray]:
        from actok.data.video import decode_image, decode_video

        views = {}
        if self.meta.image_keys:
            table = read_rows(self.meta.files[place], self.meta.image_keys, rows)
            for key in self.meta.image_keys:
                where = f"{self.meta.files[place]}, column {key!r}"
                views[key] = np.stack([decode_image(_bytes(v, self.meta.root, where), where) for v in table[key]])
        for key, clips in self.meta.videos.items():
            views[key] = decode_video(clips[place].path, clips[place].start, rows.stop - rows.start, self.meta.fps)
        return views


def _vector(table: pa.Table, key: str, rows: slice) -> np.ndarray | None:
    if key not in table.column_names:
        return None
    values = to_matrix(table[key].slice(rows.start, rows.stop - rows.start), f"column {key!r}")[:, 0]
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _bytes(value: pa.Scalar, root: Path, where: str) -> bytes:
    image = value.as_py()
    if image is None or (image["bytes"] is None and not image["path"]):
        raise DataError(f"{where} lacks an image; drop the episode or read it without images")
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    path = root / image["path"]
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where} points to {path}, which cannot be read ({error.strerror})") from None


def _array(stored: dict[str, Any]) -> np.ndarray:
    """An array of meta/actok/episodes.parquet, bit by bit."""
    try:
        dtype = np.dtype(stored["dtype"])
        return np.frombuffer(stored["data"], dtype).reshape(stored["shape"]).copy()
    except (TypeError, ValueError) as error:
        raise DataError(f"start state {stored['name']!r} in {EXTRAS} is damaged ({error}); write it again") from None
