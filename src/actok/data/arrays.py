"""Episodes from arrays: npz files, folders of npz files, and arrays in memory.

The keys, with N time steps and E episodes:

    action (or actions)        [N, D], or [E, T, D] where all episodes have one length
    episode_length(s)          [E] steps of each episode
    episode_index              [N] episode of each step, each episode in one piece
    proprio                    [N, P]
    phase, phase_names         [N] sub-task index, and what the sub-tasks are called
    image                      [N, H, W, 3] uint8
    instruction                one string, or one per episode
    task, episode_task         short task key of all episodes, or one per episode
    success                    [E] bool
    control_hz, robot          scalars

Every further array with one row per episode is part of the start state. Further arrays with one row per step (other
action representations, velocities) are left in the file.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import ActionSpace, DataError, SpaceMismatchError, to_numpy
from actok.data.episodes import Episode, EpisodeDataset, require_finite
from actok.data.resolve import common_rate, resolve_space

__all__ = ["ArrayDataset", "from_arrays", "open_npz"]

_KNOWN = frozenset(
    [
        "action",
        "episode_length",
        "episode_index",
        "proprio",
        "phase",
        "phase_names",
        "image",
        "instruction",
        "task",
        "episode_task",
        "success",
        "control_hz",
        "robot",
    ]
)
_ALIASES = {"actions": "action", "episode_lengths": "episode_length", "instructions": "instruction"}


class ArrayDataset(EpisodeDataset):
    """Episodes cut from one or more sets of concatenated arrays, see the module's table of keys."""

    def __init__(self, parts: Sequence[_Part], *, name: str, space: str | Path | ActionSpace | None = None) -> None:
        if not parts:
            raise DataError(f"dataset {name!r} is empty: no file was found; give at least one")
        self.name = name
        self._parts = list(parts)
        for part in parts[1:]:
            if part.dim != parts[0].dim:
                raise SpaceMismatchError(
                    f"dataset {name!r} mixes action spaces: {parts[0].title} has {parts[0].dim} dimensions,"
                    f" {part.title} has {part.dim}; open them as separate datasets"
                )
        rate = common_rate(((p.title, p.rate_hz) for p in parts), name)
        self.space, self.space_origin = self._resolve(space, list(dict.fromkeys(p.robot for p in parts)), rate)
        self.lengths = np.concatenate([p.lengths for p in parts])
        keys = [task for p in parts for task in p.tasks]
        self.tasks = keys if any(keys) else None
        self.source_files = [p.file for p in parts if p.file is not None]
        self._first = np.cumsum([0, *(len(p.lengths) for p in parts)])

    def _resolve(
        self, space: str | Path | ActionSpace | None, robots: list[str | None], rate: float | None
    ) -> tuple[ActionSpace, str]:
        """One space for all robots: refused where theirs differ, named after none of them where they agree."""
        found = [resolve_space(space, dim=self._parts[0].dim, dataset=self.name, robot=r, rate_hz=rate) for r in robots]
        for robot, (other, _) in zip(robots, found, strict=True):
            if differences := found[0][0].differences(other):
                raise SpaceMismatchError(
                    f"dataset {self.name!r} mixes the robots {robots[0]!r} and {robot!r}, whose action spaces differ in"
                    f" {'; '.join(differences)}; open them as separate datasets"
                )
        if len(robots) == 1:
            return found[0]
        shared = resolve_space(space, dim=self._parts[0].dim, dataset=self.name, rate_hz=rate)
        if shared[0].differences(found[0][0]):  # what the robots' names tell is more than the title does
            shared = found[0]
        return shared[0], f"{shared[1]}; {len(robots)} robots share it"

    def episode(self, index: int, *, images: bool = False) -> Episode:
        """See EpisodeDataset.episode."""
        part, local = self._locate(index)
        return part.episode(local, index, self.name, images=images)

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """See EpisodeDataset.all_actions."""
        frames = np.concatenate([p.action for p in self._parts])
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        require_finite(frames, offsets, self.name)
        return frames, offsets

    def _locate(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < len(self):
            raise DataError(f"dataset {self.name!r} has episodes 0..{len(self) - 1}, not {index}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._parts[number], int(index - self._first[number])


class _Part:
    """One set of concatenated arrays, checked."""

    def __init__(self, arrays: Mapping[str, Any], title: str, task: str = "") -> None:
        self.title = title
        self.file = arrays.path if isinstance(arrays, _Npz) else None
        self._arrays = arrays
        if "action" not in arrays:
            raise DataError(f"{title} has no array 'action' or 'actions', only {', '.join(arrays) or 'nothing'}")
        action = to_numpy(arrays["action"])
        if action.dtype.kind != "f":
            raise DataError(f"{title}: actions have dtype {action.dtype}; give floating point values")
        lengths = self._lengths(action)
        if action.ndim == 3:
            action = action.reshape(-1, action.shape[2])
        if not len(action):
            raise DataError(f"{title} is empty: actions have shape {action.shape}; give at least one step")
        if (lengths <= 0).any():
            raise DataError(f"{title}: episode {int(np.argmin(lengths))} has {lengths.min()} steps; drop it")
        if lengths.sum() != len(action):
            raise DataError(
                f"{title}: episode lengths add up to {lengths.sum()} steps, but there are {len(action)} actions;"
                " correct episode_length"
            )
        self.action = np.ascontiguousarray(action, np.float32)
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.dim = action.shape[1]
        self.robot = str(to_numpy(arrays["robot"])) if "robot" in arrays else None
        self.rate_hz = self._rate()
        self.proprio = self._per_step("proprio")
        if self.proprio is not None:
            self.proprio = np.ascontiguousarray(self.proprio.reshape(len(action), -1), np.float32)
        self.phase = self._per_step("phase")
        if self.phase is not None:
            if self.phase.ndim != 1 or self.phase.dtype.kind not in "iu":
                raise DataError(f"{title}: phase has {self.phase.dtype} {self.phase.shape}; give whole numbers [steps]")
            self.phase = self.phase.astype(np.int64)
        self.phase_names = self._phase_names()
        self.instructions = self._strings("instruction", "")
        tasks = self._strings("task", task)
        if "task" not in arrays and "episode_task" in arrays:
            tasks = ["-".join(filter(None, (task, str(t)))) for t in self._strings("episode_task", "")]
        self.tasks = tasks
        self.success = to_numpy(arrays["success"]) if "success" in arrays else None
        if self.success is not None and self.success.shape != lengths.shape:
            raise DataError(f"{title}: success has shape {self.success.shape}; give one value per episode")
        self.start_state = self._start_state()

    def _rate(self) -> float | None:
        if "control_hz" not in self._arrays:
            return None
        rate = to_numpy(self._arrays["control_hz"])
        if rate.ndim or rate.dtype.kind not in "iuf":
            raise DataError(f"{self.title}: control_hz has {rate.dtype} {rate.shape}; give one number")
        return float(rate)

    def _lengths(self, action: np.ndarray) -> np.ndarray:
        stated = self._arrays.get("episode_length")
        index = self._arrays.get("episode_index")
        if action.ndim == 3:
            if stated is None:
                return np.full(len(action), action.shape[1], np.int64)
            raise DataError(
                f"{self.title}: actions of shape {action.shape} are already cut into episodes, and episode_length is"
                " given too; concatenate the episodes along time"
            )
        if action.ndim != 2:
            raise DataError(f"{self.title}: actions have shape {action.shape}; give [steps, dimensions]")
        if stated is None and index is None:
            raise DataError(f"{self.title} has neither episode_length nor episode_index; store one of them")
        lengths: np.ndarray | None = None if stated is None else np.atleast_1d(to_numpy(stated))
        if lengths is not None and (lengths.dtype.kind not in "iu" or lengths.ndim != 1):
            raise DataError(f"{self.title}: episode_length has dtype {lengths.dtype}; give whole numbers [episodes]")
        if index is not None:
            index = to_numpy(index)
            if index.shape != action.shape[:1]:
                raise DataError(f"{self.title}: episode_index has shape {index.shape} for {len(action)} actions")
            starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1)) if len(index) else np.zeros(0, np.int64)
            if len(np.unique(index)) != len(starts):
                raise DataError(f"{self.title}: the steps of an episode are not in one piece; sort by episode_index")
            counted = np.diff(np.append(starts, len(index)))
            if lengths is not None and not np.array_equal(counted, lengths):
                raise DataError(f"{self.title}: episode_index and episode_length disagree; correct one of them")
            lengths = counted
        assert lengths is not None
        return lengths.astype(np.int64)

    def _per_step(self, key: str) -> np.ndarray | None:
        if key not in self._arrays:
            return None
        array = to_numpy(self._arrays[key])
        steps = int(self.lengths.sum())
        if array.ndim >= 2 and array.shape[:2] == (len(self.lengths), steps // len(self.lengths)):
            array = array.reshape(steps, *array.shape[2:])  # cut like actions [E, T, D]
        if not array.ndim or len(array) != steps:
            raise DataError(f"{self.title}: {key} of shape {array.shape} for {steps} actions; give one row per step")
        return array

    def _phase_names(self) -> tuple[str, ...]:
        if self.phase is None:
            return ()
        count = int(self.phase.max()) + 1
        if "phase_names" not in self._arrays:
            return tuple(str(i) for i in range(count))
        names = tuple(str(n) for n in np.atleast_1d(to_numpy(self._arrays["phase_names"])))
        if count > len(names):
            raise DataError(f"{self.title}: phase {count - 1} has no name; phase_names holds {len(names)}")
        return names

    def _strings(self, key: str, default: str) -> list[str]:
        value = to_numpy(self._arrays[key]) if key in self._arrays else np.asarray(default)
        if value.ndim == 0:
            return [str(value)] * len(self.lengths)
        if len(value) != len(self.lengths):
            raise DataError(f"{self.title}: {key} has {len(value)} entries for {len(self.lengths)} episodes")
        return [str(v) for v in value]

    def _start_state(self) -> dict[str, np.ndarray]:
        found = {}
        for key in self._arrays:
            if key in _KNOWN:
                continue
            if self._rows(key) == len(self.lengths) != len(self.action):
                found[key] = to_numpy(self._arrays[key])
        return found

    def _rows(self, key: str) -> int | None:
        """First dimension of an array, None for a scalar; from the header alone where it lies in a file."""
        shape = self._arrays.shape(key) if isinstance(self._arrays, _Npz) else np.shape(to_numpy(self._arrays[key]))
        return shape[0] if shape else None

    def episode(self, local: int, index: int, dataset: str, *, images: bool) -> Episode:
        rows = slice(self.offsets[local], self.offsets[local + 1])
        require_finite(self.action[rows], np.array([0, self.lengths[local]]), dataset, index)
        views = {}
        if images and "image" in self._arrays:
            views["image"] = self._images()[rows]
        return Episode(
            index=index,
            actions=self.action[rows],
            proprio=None if self.proprio is None else self.proprio[rows],
            instruction=self.instructions[local],
            task=self.tasks[local],
            subtask=None if self.phase is None else self.phase[rows],
            subtask_names=self.phase_names,
            success=None if self.success is None else bool(self.success[local]),
            start_state={key: np.asarray(value[local]) for key, value in self.start_state.items()},
            images=views,
        )

    def _images(self) -> np.ndarray:
        array = self._per_step("image")
        assert array is not None
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise DataError(f"{self.title}: image has {array.dtype} {array.shape}; give uint8 [steps, H, W, 3]")
        return array


class _Npz(Mapping[str, np.ndarray]):
    """The arrays of an npz file under their canonical names, read when asked for; the last one is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                stored = [n[:-4] for n in archive.namelist() if n.endswith(".npy")]
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read as npz ({error}); the file is damaged, write it again") from None
        self._stored = {_ALIASES.get(n, n): n for n in stored}
        self._last: tuple[str, np.ndarray] | None = None

    def _load(self, key: str) -> np.ndarray:
        try:
            with np.load(self.path) as stored:
                array: np.ndarray = stored[self._stored[key]]
                return array
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path}: array {key!r} cannot be read ({error}); write the file again") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape from the array's header, without reading the array."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self._stored[key]}.npy") as stream:
                if np.lib.format.read_magic(stream) == (1, 0):
                    shape: tuple[int, ...] = np.lib.format.read_array_header_1_0(stream)[0]
                    return shape
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path}: array {key!r} cannot be read ({error}); write the file again") from None
        return self[key].shape

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._stored:
            raise KeyError(key)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._load(key))
        return self._last[1]

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def open_npz(path: Path, *, space: str | Path | ActionSpace | None = None, name: str | None = None) -> ArrayDataset:
    """One npz file, or all npz files of a folder as one dataset, in the order of their names."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    parts = [_Part(_Npz(file), str(file), task=file.stem if len(files) > 1 else "") for file in files]
    return ArrayDataset(parts, name=name or path.stem, space=space)


def from_arrays(source: Any, *, space: str | Path | ActionSpace | None = None, name: str | None = None) -> ArrayDataset:
    """A dict of arrays (the module's keys), a list of episodes [T, D], or one array [E, T, D] or [T, D]."""
    title = "the arrays"
    if isinstance(source, Mapping):
        arrays: dict[str, Any] = {_ALIASES.get(str(key), str(key)): value for key, value in source.items()}
        return ArrayDataset([_Part(arrays, title)], name=name or "arrays", space=space)
    if isinstance(source, (list, tuple)):
        episodes = [to_numpy(episode) for episode in source]
        for index, episode in enumerate(episodes):
            if episode.ndim != 2 or episode.shape[1:] != episodes[0].shape[1:]:
                raise DataError(
                    f"episode {index} of the list has shape {episode.shape}, episode 0 {episodes[0].shape}; give"
                    " [steps, dimensions] each, with the same dimensions"
                )
        if not episodes:
            raise DataError("the list of episodes is empty; give at least one [steps, dimensions]")
        lengths = np.array([len(e) for e in episodes], np.int64)
        arrays = {"action": np.concatenate(episodes), "episode_length": lengths}
    else:
        array = to_numpy(source)
        arrays = {"action": array[None] if array.ndim == 2 else array}
    return ArrayDataset([_Part(arrays, title)], name=name or "arrays", space=space)
