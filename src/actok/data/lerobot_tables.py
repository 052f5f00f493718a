"""The tables of a LeRobot dataset as Arrow: frames with Hugging Face metadata, task strings, and actok's own extras."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from actok.core import ActionSpace, DataError
from actok.data.episodes import Episode
from actok.data.video import encode_png

# Rows of LeRobot 0.6's `language_persistent`; its `tool_calls` are JSON values, stored as strings.
SPOKEN = pa.list_(
    pa.struct(
        [
            pa.field("role", pa.string(), nullable=False),
            pa.field("content", pa.string()),
            pa.field("style", pa.string()),
            pa.field("timestamp", pa.float32(), nullable=False),
            pa.field("camera", pa.string()),
            pa.field("tool_calls", pa.list_(pa.string())),
        ]
    )
)
_SPOKEN_FEATURE = {
    "feature": {
        name: {"dtype": kind, "_type": "Value"}
        for name, kind in (
            ("role", "string"),
            ("content", "string"),
            ("style", "string"),
            ("timestamp", "float32"),
            ("camera", "string"),
        )
    }
    | {"tool_calls": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}},
    "_type": "List",
}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_STATE = pa.list_(
    pa.struct([("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.binary())])
)
EXTRAS_SCHEMA = pa.schema(
    [
        ("episode_index", pa.int64()),
        ("task", pa.string()),
        ("success", pa.bool_()),
        ("timestamps", pa.list_(pa.float64())),
        ("start_state", _STATE),
    ]
)
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")

__all__ = ["EXTRAS_SCHEMA", "Frames", "Schema", "extras_row", "strings_table"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """One episode as a table, and what statistics are made of.

    Attributes:
        table: the columns of the data file.
        vectors: numeric feature -> [T] or [T, D].
        views: image view -> feature key.
    """

    table: pa.Table
    vectors: dict[str, np.ndarray]
    views: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Schema:
    """What every episode of the dataset has, taken from the first one.

    Attributes:
        space: of the actions.
        rate_hz: frames per second.
        proprio: P, None where episodes have no proprioception.
        subtask_layout: how the caller wants sub-tasks stored, None to leave them out.
        has_subtasks: whether there are any.
        image_storage: "video", "image", or None to leave images out.
        views: feature key -> (view of the episode, H, W); empty where there are none or they are left out.
    """

    space: ActionSpace
    rate_hz: float
    proprio: int | None
    subtask_layout: str | None
    has_subtasks: bool
    image_storage: str | None
    views: dict[str, tuple[str, int, int]]

    @classmethod
    def of(
        cls, episode: Episode, space: ActionSpace, rate_hz: float, subtask_layout: str | None, image_storage: str | None
    ) -> Self:
        """From the first episode and the caller's choices."""
        views = {}
        for view, frames in episode.images.items() if image_storage else ():
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
                raise DataError(f"view {view!r} is {frames.dtype} {frames.shape}; give uint8 [steps, height, width, 3]")
            key = view if view.startswith("observation.image") else f"observation.images.{view}"
            views[key.replace("/", "_")] = (view, *frames.shape[1:3])
        return cls(
            space=space,
            rate_hz=rate_hz,
            proprio=None if episode.proprio is None else episode.proprio.shape[1],
            subtask_layout=subtask_layout,
            has_subtasks=episode.subtask is not None,
            image_storage=image_storage,
            views=views,
        )

    @property
    def subtasks(self) -> str | None:
        """How sub-tasks are stored, None where none are."""
        return self.subtask_layout if self.has_subtasks else None

    @property
    def images(self) -> str | None:
        """How images are stored, None where none are."""
        return self.image_storage if self.views else None

    def features(self) -> dict[str, dict[str, Any]]:
        """`features` of info.json."""
        found: dict[str, dict[str, Any]] = {
            "action": {"dtype": "float32", "shape": [self.space.dim], "names": list(self.space.names)}
        }
        if self.proprio is not None:
            names = [f"state_{i}" for i in range(self.proprio)]
            found["observation.state"] = {"dtype": "float32", "shape": [self.proprio], "names": names}
        for key, (_, height, width) in self.views.items():
            assert self.images is not None
            found[key] = {"dtype": self.images, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            if self.images == "video":
                found[key]["info"] = {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": round(self.rate_hz),
                    "video.channels": 3,
                    "has_audio": False,
                }
        found["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        counters = (*_COUNTERS, "subtask_index") if self.subtasks == "column" else _COUNTERS
        found |= {key: {"dtype": "int64", "shape": [1], "names": None} for key in counters}
        if self.subtasks == "language_persistent":
            found["language_persistent"] = {"dtype": "language", "shape": [1], "names": None}
        return found

    def videos(self, episode: Episode) -> Iterator[tuple[str, np.ndarray]]:
        """Feature key and frames [T, H, W, 3] of each view that is stored as video."""
        if self.images == "video":
            for key, (view, _, _) in self.views.items():
                yield key, episode.images[view]

    def frames(self, episode: Episode, number: int, start: int, task: int, subtasks: dict[str, int]) -> Frames:
        """The episode as a table; `subtasks` gains the sub-task strings it meets first.

        Raises DataError where the episode has more or less than the first one.
        """
        self._check(episode, number)
        steps = np.arange(len(episode))
        vectors: dict[str, np.ndarray] = {"action": np.ascontiguousarray(episode.actions, np.float32)}
        if self.proprio is not None:
            vectors["observation.state"] = np.ascontiguousarray(episode.proprio, np.float32)
        vectors["timestamp"] = (steps / self.rate_hz).astype(np.float32)
        vectors["frame_index"] = steps
        vectors["episode_index"] = np.full(len(steps), number)
        vectors["index"] = start + steps
        vectors["task_index"] = np.full(len(steps), task)
        spoken = self._names(episode)
        if self.subtasks == "column":
            ids = [subtasks.setdefault(text, len(subtasks)) for text in spoken]
            vectors["subtask_index"] = np.array(ids, np.int64)
        columns: dict[str, pa.Array] = {key: _column(values) for key, values in vectors.items()}
        if self.subtasks == "language_persistent":
            rows = [_spoken(spoken[t], float(vectors["timestamp"][t])) for t in _changes(spoken)]
            columns["language_persistent"] = pa.array([rows] * len(steps), SPOKEN)
        if self.images == "image":
            for key, (view, _, _) in self.views.items():
                pictures = [{"bytes": encode_png(image), "path": None} for image in episode.images[view]]
                columns[key] = pa.array(pictures, _IMAGE)
        table = pa.table(columns)
        hugging = {"info": {"features": {key: _hf_feature(table.schema.field(key).type) for key in columns}}}
        return Frames(
            table=table.replace_schema_metadata({"huggingface": json.dumps(hugging)}),
            vectors=vectors,
            views={view: key for key, (view, _, _) in self.views.items()},
        )

    def _check(self, episode: Episode, number: int) -> None:
        found = None if episode.proprio is None else episode.proprio.shape[1]
        if found != self.proprio or (episode.proprio is not None and len(episode.proprio) != len(episode)):
            raise DataError(
                f"episode {number} has {'no' if found is None else found} proprioception values a step, episode 0 has"
                f" {'none' if self.proprio is None else self.proprio}; give all episodes the same"
            )
        if self.subtask_layout is not None and (episode.subtask is not None) != self.has_subtasks:
            raise DataError(
                f"episode {number} has {'no ' if self.has_subtasks else ''}sub-tasks, other than episode 0; give all"
                " episodes some, or leave them out with subtask_layout=None"
            )
        for name, values in (("subtask", episode.subtask), ("timestamps", episode.timestamps)):
            if values is not None and len(values) != len(episode):
                raise DataError(f"episode {number}: {name} has {len(values)} values for {len(episode)} steps")
        if self.image_storage is None:
            return
        views = {view: (height, width) for view, height, width in self.views.values()}
        if episode.images.keys() != views.keys():
            raise DataError(
                f"episode {number} has the views {sorted(episode.images)}, episode 0 {sorted(views)}; give all the same,"
                " or leave them out with images=None"
            )
        for view, size in views.items():
            frames = episode.images[view]
            if frames.dtype != np.uint8 or frames.shape != (len(episode), *size, 3):
                raise DataError(
                    f"episode {number}: view {view!r} is {frames.dtype} {frames.shape}, expected uint8"
                    f" {(len(episode), *size, 3)}"
                )

    def _names(self, episode: Episode) -> list[str]:
        if self.subtasks is None or episode.subtask is None:
            return []
        if int(episode.subtask.max()) >= len(episode.subtask_names):
            raise DataError(
                f"sub-task {int(episode.subtask.max())} of episode {episode.index} has no name; subtask_names holds"
                f" {len(episode.subtask_names)}"
            )
        return [episode.subtask_names[i] if i >= 0 else "" for i in episode.subtask]


def _changes(texts: list[str]) -> list[int]:
    """Steps at which another sub-task becomes active; a start without any is not a change."""
    before = ["", *texts[:-1]]
    return [t for t, (old, new) in enumerate(zip(before, texts, strict=True)) if old != new]


def _spoken(text: str, seconds: float) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": text,
        "style": "subtask",
        "timestamp": seconds,
        "camera": None,
        "tool_calls": None,
    }


def _column(values: np.ndarray) -> pa.Array:
    # LeRobot stores features of shape [1] as scalars.
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 1 or values.shape[1] == 1:
        return flat
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _hf_feature(kind: pa.DataType) -> dict[str, Any]:
    """A column in the Hugging Face metadata of the file, in words that old and new `datasets` both know."""
    if kind == SPOKEN:
        return _SPOKEN_FEATURE
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        value = {"dtype": "float32", "_type": "Value"}
        return {"feature": value, "length": kind.list_size, "_type": "Sequence"}
    return {"dtype": "int64" if pa.types.is_integer(kind) else "float32", "_type": "Value"}


def strings_table(strings: Mapping[str, int], kind: str) -> pa.Table:
    """tasks.parquet or subtasks.parquet: the strings are a pandas index named by `kind`."""
    table = pa.table({f"{kind}_index": pa.array(list(strings.values()), pa.int64()), kind: pa.array(list(strings))})

    def column(name: str, kind_: str, dtype: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind_, "numpy_type": dtype, "metadata": None}

    described = {
        "index_columns": [kind],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [column(f"{kind}_index", "int64", "int64"), column(kind, "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(described)})


def extras_row(number: int, episode: Episode) -> dict[str, Any]:
    """One row of meta/actok/episodes.parquet."""
    arrays = {name: np.asarray(value) for name, value in episode.start_state.items()}
    if refused := [name for name, value in arrays.items() if value.dtype.hasobject]:
        raise DataError(f"start state {refused[0]!r} of episode {number} holds objects; give numbers or fixed strings")
    return {
        "episode_index": number,
        "task": episode.task,
        "success": None if episode.success is None else bool(episode.success),
        "timestamps": None if episode.timestamps is None else episode.timestamps.astype(np.float64),
        "start_state": [
            {"name": name, "dtype": value.dtype.str, "shape": value.shape, "data": value.tobytes()}
            for name, value in arrays.items()
        ],
    }
