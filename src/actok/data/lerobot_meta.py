"""The metadata of LeRobot datasets (v2.0, v2.1 and v3.0), read without LeRobot.

Besides what LeRobot defines, `meta/actok/` may hold what it has no place for and ignores: the action space, and per
episode the task key, success, measured time stamps and the simulator's start state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actok.core import ActionSpace, ActokError, DataError

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO = "meta/info.json"
STATS = "meta/stats.json"
EPISODES_JSONL = "meta/episodes.jsonl"
EPISODES_STATS_JSONL = "meta/episodes_stats.jsonl"
TASKS_JSONL = "meta/tasks.jsonl"
TASKS_PARQUET = "meta/tasks.parquet"
SUBTASKS_PARQUET = "meta/subtasks.parquet"
EPISODES_PARQUET = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
SPACE = "meta/actok/space.json"
EXTRAS = "meta/actok/episodes.parquet"

DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
DATA_PATH_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

# In the order of preference. LeRobot's own keys, then those of datasets converted for openpi.
ACTION_KEYS = ("action", "actions")
STATE_KEYS = ("observation.state", "state")

__all__ = [
    "Clip",
    "LeRobotMeta",
    "read_parquet",
    "read_rows",
    "to_matrix",
]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Where the frames of one view of one episode lie: a video file, and the seconds at which they start in it."""

    path: Path
    start: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LeRobotMeta:
    """What `meta/` says.

    Attributes:
        root: the dataset's folder.
        version: one of VERSIONS.
        fps: frames per second, the control rate.
        robot: robot type, None where not stated.
        features: `features` of info.json.
        action_key, state_key: which columns hold the action and the proprioception (None: there is none).
        action_names: one name per dimension, or None.
        indices: int64 [E] LeRobot's episode_index of each episode.
        lengths: int64 [E].
        files: the data file of each episode.
        tasks: task string by task_index.
        episode_tasks: the task strings of each episode.
        subtasks: sub-task string by subtask_index; empty where the dataset has no such table.
        videos: by video key, the Clip of each episode.
        space: the stored action space, None where there is none.
        extras: by LeRobot's episode_index, a row of EXTRAS.
    """

    root: Path
    version: str
    fps: float
    robot: str | None
    features: dict[str, dict[str, Any]]
    action_key: str
    state_key: str | None
    action_names: tuple[str, ...] | None
    indices: np.ndarray
    lengths: np.ndarray
    files: list[Path]
    tasks: dict[int, str]
    episode_tasks: list[list[str]]
    subtasks: tuple[str, ...]
    videos: dict[str, list[Clip]]
    space: ActionSpace | None
    extras: dict[int, dict[str, Any]]

    @classmethod
    def load(cls, root: Path) -> Self:
        """Raises DataError naming the file that is missing, damaged or contradictory."""
        try:
            return cls._load(root)
        except ActokError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the metadata under {root / 'meta'} are not as LeRobot writes them ({type(error).__name__}: {error});"
                " download the dataset's meta folder again"
            ) from None

    @classmethod
    def _load(cls, root: Path) -> Self:
        path = root / INFO
        info = _read_json(path)
        version = str(info.get("codebase_version"))
        if version not in VERSIONS:
            raise DataError(
                f"{path} states version {version!r}; {', '.join(VERSIONS)} can be read, convert older ones with LeRobot"
            )
        features = info.get("features")
        if not isinstance(features, dict):
            raise DataError(f"{path} has no 'features'; write or download the dataset again")
        try:
            fps = float(info["fps"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path} states fps {info.get('fps')!r}; give the frames per second") from None
        if not fps > 0:
            raise DataError(f"{path} states fps {fps}; give a rate above 0")
        read = _episodes_v3 if version == "v3.0" else _episodes_v2
        try:
            parts = read(root, info)
        except KeyError as error:
            raise DataError(f"the metadata under {root / 'meta'} lack {error}; download the dataset again") from None
        if not len(parts["lengths"]):
            raise DataError(f"dataset {root} is empty: its metadata list no episode; record at least one")
        if (parts["lengths"] <= 0).any():
            worst = int(parts["indices"][np.argmin(parts["lengths"])])
            raise DataError(f"dataset {root}: episode {worst} has {parts['lengths'].min()} steps; remove it")
        action_key = _action_key(features, path)
        space = root / SPACE
        return cls(
            root=root,
            version=version,
            fps=fps,
            robot=str(info.get("robot_type") or "") or None,
            features=features,
            action_key=action_key,
            state_key=next((key for key in STATE_KEYS if key in features), None),
            action_names=_names(features[action_key]),
            subtasks=_table_strings(root / SUBTASKS_PARQUET, "subtask"),
            space=ActionSpace.from_dict(_read_json(space)) if space.is_file() else None,
            extras=_extras(root / EXTRAS),
            **parts,
        )

    @property
    def image_keys(self) -> list[str]:
        """Features stored as images in the data files."""
        return [key for key, feature in self.features.items() if feature.get("dtype") == "image"]

    def image_size(self, key: str) -> tuple[int, int]:
        """Height and width in pixels of a view, as stated: [H, W, 3] or, in some data, [3, H, W].

        Raises DataError where no such shape is stated.
        """
        shape = self.features[key].get("shape")
        if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) for n in shape):
            raise DataError(
                f"{self.root / INFO} states shape {shape!r} for {key!r}; give [height, width, channels] of the images"
            )
        first = shape[0] in (1, 3) and shape[2] not in (1, 3)
        return (shape[1], shape[2]) if first else (shape[0], shape[1])


def _action_key(features: dict[str, Any], path: Path) -> str:
    for key in ACTION_KEYS:
        if key in features:
            return key
    vectors = [k for k, f in features.items() if str(f.get("dtype")).startswith("float")]
    named = [k for k in vectors if "action" in k]
    raise DataError(
        f"{path} has no feature 'action' or 'actions'; candidates are {', '.join(named or vectors) or 'none'}: rename"
        " or concatenate them to 'action'"
    )


def _names(feature: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the dimensions, from a list, a nested list or a dict of lists; None where they do not fit the shape."""
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            # Either {"motors": [names]} or {name: index}.
            if all(isinstance(v, int) for v in value.values()):
                found.extend(sorted(value, key=lambda k: value[k]))
            else:
                for inner in value.values():
                    collect(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                collect(inner)

    collect(feature.get("names"))
    size = int(np.prod(feature.get("shape") or [0]))
    return tuple(found) if len(found) == size else None


def _episodes_v2(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    rows = sorted(_read_jsonl(root / EPISODES_JSONL), key=lambda row: row["episode_index"])
    tasks = {int(row["task_index"]): str(row["task"]) for row in _read_jsonl(root / TASKS_JSONL)}
    size = int(info.get("chunks_size", 1000))
    data_path = info.get("data_path") or DATA_PATH_V2
    video_path = info.get("video_path") or VIDEO_PATH_V2
    keys = [key for key, feature in info["features"].items() if feature.get("dtype") == "video"]

    def place(row: dict[str, Any], template: str, **more: str) -> Path:
        index = int(row["episode_index"])
        return root / template.format(episode_chunk=index // size, episode_index=index, **more)

    return {
        "indices": np.array([row["episode_index"] for row in rows], np.int64),
        "lengths": np.array([row["length"] for row in rows], np.int64),
        "files": [place(row, data_path) for row in rows],
        "tasks": tasks,
        "episode_tasks": [list(row.get("tasks") or []) for row in rows],
        "videos": {k: [Clip(path=place(row, video_path, video_key=k), start=0.0) for row in rows] for k in keys},
    }


def _episodes_v3(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError(f"{root / 'meta' / 'episodes'} holds no parquet file; download the dataset's meta folder again")
    data_path = info.get("data_path") or DATA_PATH_V3
    video_path = info.get("video_path") or VIDEO_PATH_V3
    keys = [key for key, feature in info["features"].items() if feature.get("dtype") == "video"]
    optional = ["tasks", "data/chunk_index", "data/file_index"]
    for key in keys:
        optional += [f"videos/{key}/{field}" for field in ("chunk_index", "file_index", "from_timestamp")]
    rows: list[dict[str, Any]] = []
    for file in files:
        rows += read_parquet(file, ["episode_index", "length"], optional).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])

    def clip(row: dict[str, Any], key: str) -> Clip:
        place = {f: row[f"videos/{key}/{f}"] for f in ("chunk_index", "file_index")}
        start = float(row[f"videos/{key}/from_timestamp"])
        return Clip(path=root / video_path.format(video_key=key, **place), start=start)

    return {
        "indices": np.array([row["episode_index"] for row in rows], np.int64),
        "lengths": np.array([row["length"] for row in rows], np.int64),
        "files": [
            root / data_path.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            for row in rows
        ],
        "tasks": dict(enumerate(_table_strings(root / TASKS_PARQUET, "task"))),
        "episode_tasks": [list(row.get("tasks") or []) for row in rows],
        # Videos that were never recorded for an episode leave nulls; such a view is unavailable as a whole.
        "videos": {
            key: [clip(row, key) for row in rows]
            for key in keys
            if all(row.get(f"videos/{key}/from_timestamp") is not None for row in rows)
        },
    }


def _table_strings(path: Path, kind: str) -> tuple[str, ...]:
    """Strings of tasks.parquet or subtasks.parquet, in the order of their index.

    The string is a pandas index: its column is called `__index_level_0__` or by its kind, depending on the LeRobot
    that wrote it.
    """
    if not path.is_file():
        if kind == "task":
            raise DataError(f"{path} is missing; download the dataset's meta folder again")
        return ()
    table = read_parquet(path, None)
    strings = next((n for n in table.column_names if pa.types.is_string(table.schema.field(n).type)), None)
    strings = strings or next(
        (n for n in table.column_names if pa.types.is_large_string(table.schema.field(n).type)), None
    )
    index = f"{kind}_index"
    if strings is None or index not in table.column_names:
        raise DataError(f"{path} has columns {table.column_names}; it needs {index} and one of strings")
    pairs = sorted(zip(table[index].to_pylist(), table[strings].to_pylist(), strict=True))
    if [i for i, _ in pairs] != list(range(len(pairs))):
        raise DataError(f"{path}: {index} is not 0..{len(pairs) - 1}; write the table again")
    return tuple(text for _, text in pairs)


def _extras(path: Path) -> dict[int, dict[str, Any]]:
    return {row["episode_index"]: row for row in read_parquet(path, None).to_pylist()} if path.is_file() else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a LeRobot dataset needs it, download its meta folder again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); download or write it again") from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a LeRobot dataset needs it, download its meta folder again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); download or write it again") from None


def _present(file: pq.ParquetFile, columns: Sequence[str], path: Path) -> list[str]:
    names = file.schema_arrow.names
    if missing := [c for c in columns if c not in names]:
        raise DataError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(names)}")
    return list(columns)


def read_parquet(path: Path, columns: Sequence[str] | None, optional: Sequence[str] = ()) -> pa.Table:
    """Some columns of a parquet file (None: all), and those of `optional` that it has.

    Raises DataError where the file is missing or damaged, or lacks one of `columns`.
    """
    try:
        file = pq.ParquetFile(path, memory_map=True)
        if columns is not None:
            columns = [*_present(file, columns, path), *(c for c in optional if c in file.schema_arrow.names)]
        # One thread: the columns are few, and callers run one reader per process.
        return file.read(columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def read_rows(path: Path, columns: Sequence[str], rows: slice) -> pa.Table:
    """A range of rows, decoding only the row groups that hold it. Raises DataError as `read_parquet` does."""
    try:
        file = pq.ParquetFile(path, memory_map=True)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        edges = np.concatenate([[0], np.cumsum(sizes)])
        first = int(np.searchsorted(edges, rows.start, side="right")) - 1
        last = int(np.searchsorted(edges, rows.stop, side="left"))
        table = file.read_row_groups(list(range(first, last)), _present(file, columns, path), use_threads=False)
        return table.slice(rows.start - edges[first], rows.stop - rows.start)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} is missing, though the metadata name it; download the dataset's data folder again")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path} cannot be read as parquet ({reason}); the file is damaged, download or write it again")


def to_matrix(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """[N, D] from a column of lists, fixed-size lists, nested lists or scalars.

    Raises DataError for missing values, and for rows of different lengths.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # older pyarrow keeps the wrapper where there is no or one chunk
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    rows = len(array)
    while pa.types.is_nested(array.type):
        kind = array.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise DataError(f"{where} has values of type {kind}; it needs numbers")
        if array.null_count:
            raise DataError(f"{where} has {array.null_count} missing rows; fill or drop them")
        if not pa.types.is_fixed_size_list(kind):
            sizes = np.diff(array.offsets.to_numpy())
            if len(sizes) and (sizes != sizes[0]).any():
                raise DataError(f"{where} has rows of {sizes.min()} to {sizes.max()} values; all need the same number")
        array = array.flatten()
    if array.null_count:
        raise DataError(f"{where} has {array.null_count} missing values; fill or drop them")
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        raise DataError(f"{where} has values of type {array.type}; it needs numbers")
    values = array.to_numpy(zero_copy_only=False)
    return values.reshape(rows, -1) if rows else values.reshape(0, 1)
