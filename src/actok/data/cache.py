"""All frames of a dataset in one float32 array, in memory or memory-mapped, so that chunks are cut at memory speed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from actok.core import ActionSpace, ActokError, DataError, SpaceMismatchError
from actok.data.episodes import Episode, EpisodeDataset
from actok.data.resample import resample, resampled_length, resampled_space, states_at
from actok.signal.sketch import StatisticsAccumulator
from actok.signal.statistics import Statistics

FORMAT = "actok-frames"
VERSION = 1
CACHE_VARIABLE = "ACTOK_CACHE"
META, ACTIONS, PROPRIO = "meta.json", "actions.npy", "proprio.npy"
# Frames handed to the statistics at a time: large enough to amortise sorting, small enough to stay in cache.
BLOCK = 65536

__all__ = ["FrameCache"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameCache:
    """The frames of all episodes, one after the other.

    Attributes:
        name: of the dataset.
        space: action space of the frames, at their rate.
        actions: float32 [N, D], raw units; memory-mapped and read-only where the cache has a folder.
        proprio: float32 [N, P], or None where the dataset has none.
        offsets: int64 [E + 1]; episode e is actions[offsets[e]:offsets[e + 1]].
        tasks: task key of each episode (E of them; "" where there is none).
    """

    name: str
    space: ActionSpace
    actions: Float[np.ndarray, "N D"]
    proprio: Float[np.ndarray, "N P"] | None
    offsets: Int[np.ndarray, "_"]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        """Number of frames N."""
        return len(self.actions)

    @property
    def lengths(self) -> Int[np.ndarray, "_"]:
        """int64 [E] frames of each episode."""
        return np.diff(self.offsets)

    @classmethod
    def build(
        cls, dataset: EpisodeDataset, folder: str | Path | None = None, *, rate_hz: float | None = None
    ) -> FrameCache:
        """Read every episode once, resampled to `rate_hz` where one is given (see `actok.data.resample`).

        With a folder the arrays are written there and memory-mapped; a later call with the same data returns what is
        there without reading an episode. The folder knows its data by action space, rate, episode lengths, tasks, the
        selection of episodes and the size and modification time of the source files (by the values themselves where
        there are no files); where any of them differs, it is rebuilt. It appears by one rename, so a half-written cache
        never exists under its name. Without a folder the frames are held in memory, unless the environment variable
        ACTOK_CACHE names a folder: data on disk then get a cache of their own in it, for data larger than memory.

        Raises:
            DataError: no frame at all; a value that is not finite; an episode that has another length than the dataset
                states, or proprioception of another width; a folder that holds something else; no known rate to
                resample from.
            SpaceMismatchError: actions whose width is not that of the dataset's space.
        """
        space = dataset.space if rate_hz is None else resampled_space(dataset.space, rate_hz)
        lengths = np.asarray(dataset.lengths, np.int64)
        if rate_hz is not None:
            lengths = np.array([resampled_length(int(n), dataset.space.rate_hz, rate_hz) for n in lengths], np.int64)
        if not lengths.sum():
            raise DataError(f"dataset {dataset.name!r} has no frame in {len(lengths)} episodes; give at least one step")
        fingerprint = None
        if folder is None and os.environ.get(CACHE_VARIABLE) and dataset.source_files:
            fingerprint = _fingerprint(dataset, space, rate_hz)
            folder = (
                Path(os.environ[CACHE_VARIABLE]) / f"{re.sub(r'[^0-9A-Za-z._-]', '_', dataset.name)}-{fingerprint[:16]}"
            )
        if folder is None:
            return _fill(cls, dataset, space, lengths, rate_hz, None)

        folder = Path(folder).expanduser().absolute()
        if folder.exists() and not (folder / META).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} exists and is no frame cache; name a new or empty folder")
        fingerprint = fingerprint or _fingerprint(dataset, space, rate_hz)
        if (found := _open_if(cls, folder, fingerprint)) is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            built = _fill(cls, dataset, space, lengths, rate_hz, temporary)
            meta = {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": fingerprint,
                "name": built.name,
                "space": built.space.to_dict(),
                "has_proprio": built.proprio is not None,
                "offsets": built.offsets.tolist(),
                "tasks": list(built.tasks),
            }
            with open(temporary / META, "w", encoding="utf-8") as stream:
                json.dump(meta, stream)
                stream.flush()
                os.fsync(stream.fileno())
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if (built_now := _open_if(cls, folder, fingerprint)) is None:
            raise DataError(f"{folder} was rebuilt from other data at the same time; give each dataset its own folder")
        return built_now

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Memory-map a folder that `build` wrote, without its dataset. Raises DataError where it is not complete."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT or meta["version"] != VERSION:
                raise DataError(f"{folder} is a cache of format {meta['format']} {meta['version']}; build it again")
            offsets = np.asarray(meta["offsets"], np.int64)
            actions = np.load(folder / ACTIONS, mmap_mode="r")
            proprio = np.load(folder / PROPRIO, mmap_mode="r") if meta["has_proprio"] else None
            space = ActionSpace.from_dict(meta["space"])
            tasks = tuple(meta["tasks"])
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a complete frame cache ({error}); build it again") from None
        expected = (int(offsets[-1]), space.dim)
        if (
            actions.shape != expected
            or actions.dtype != np.float32
            or (proprio is not None and len(proprio) != len(actions))
        ):
            raise DataError(
                f"{folder / ACTIONS} holds {actions.dtype} {actions.shape}, not float32 {expected}; build it again"
            )
        # Plain arrays over the mapped pages: indexing the memmap subclass costs more than the gather itself.
        return cls(
            name=meta["name"],
            space=space,
            actions=np.asarray(actions),
            proprio=None if proprio is None else np.asarray(proprio),
            offsets=offsets,
            tasks=tasks,
        )

    def statistics(self, episodes: Sequence[int] | np.ndarray | None = None) -> Statistics:
        """Statistics over the frames of `episodes` (all by default), in one pass of bounded memory.

        Raises DataError where these episodes have no frame, or an index is out of range.
        """
        return self.accumulate(episodes).result()

    def accumulate(self, episodes: Sequence[int] | np.ndarray | None = None) -> StatisticsAccumulator:
        """What `statistics` is made from, to be merged with that of other datasets of the same space."""
        accumulator = StatisticsAccumulator(self.space.dim)
        for block in self._blocks(self.check_episodes(episodes)):
            accumulator.update(block)
        return accumulator

    def check_episodes(self, episodes: Sequence[int] | np.ndarray | None) -> Int[np.ndarray, "_"]:
        """Episode indices as int64, all where None. Raises DataError naming the first that does not exist."""
        count = len(self.offsets) - 1
        if episodes is None:
            return np.arange(count)
        chosen = np.asarray(episodes)
        if chosen.size == 0:
            return np.zeros(0, np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise DataError(f"episodes have dtype {chosen.dtype} and shape {chosen.shape}; give a list of indices")
        outside = (chosen < 0) | (chosen >= count)
        if outside.any():
            raise DataError(f"episode {chosen[outside][0]} does not exist; {self.name!r} has 0..{count - 1}")
        return chosen.astype(np.int64)

    def _blocks(self, episodes: Int[np.ndarray, "_"]) -> Iterator[Float[np.ndarray, "_ D"]]:
        """The episodes' frames in blocks [<= BLOCK, D]; neighbours are read together, in the order of the file."""
        pending: list[np.ndarray] = []
        held = 0
        ordered = np.sort(episodes)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
            if not len(run):
                continue
            start, stop = int(self.offsets[run[0]]), int(self.offsets[run[-1] + 1])
            while start < stop:
                end = min(stop, start + BLOCK - held)
                pending.append(self.actions[start:end])
                held += end - start
                start = end
                if held == BLOCK:
                    yield np.concatenate(pending)
                    pending, held = [], 0
        if held:
            yield np.concatenate(pending)


def _fill(
    cls: type[FrameCache],
    dataset: EpisodeDataset,
    space: ActionSpace,
    lengths: Int[np.ndarray, "_"],
    rate_hz: float | None,
    folder: Path | None,
) -> FrameCache:
    """Read all episodes into arrays, in memory or in files of `folder`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])

    def allocate(name: str, width: int) -> Float[np.ndarray, "_ {width}"]:
        shape = (int(offsets[-1]), width)
        if folder is None:
            return np.empty(shape, np.float32)
        return np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float32, shape=shape)

    actions = allocate(ACTIONS, space.dim)
    proprio: np.ndarray | None = None
    tasks = []
    for e in tqdm(range(len(lengths)), desc=f"reading {dataset.name}", unit="episode", delay=2, disable=None):
        episode = dataset.episode(e)
        _check(episode, dataset, e)
        tasks.append(episode.task)
        if e == 0 and episode.proprio is not None:
            proprio = allocate(PROPRIO, episode.proprio.shape[1])
        width = None if proprio is None else proprio.shape[1]
        found = None if episode.proprio is None else episode.proprio.shape[1]
        if width != found:
            raise DataError(
                f"dataset {dataset.name!r}: proprioception of episode {e} has {found or 'no'} values, of episode 0"
                f" {width or 'none'}; give all episodes the same"
            )
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        frames, state = episode.actions, episode.proprio
        if rate_hz is not None and len(frames):
            frames = resample(frames, dataset.space, dataset.space.rate_hz, rate_hz)
            if state is not None:
                state = state[states_at(len(state), dataset.space.rate_hz, rate_hz)]
        actions[rows] = frames
        if proprio is not None:
            proprio[rows] = state
    for array in (actions, proprio):
        if isinstance(array, np.memmap):
            array.flush()
    return cls(name=dataset.name, space=space, actions=actions, proprio=proprio, offsets=offsets, tasks=tuple(tasks))


def _check(episode: Episode, dataset: EpisodeDataset, index: int) -> None:
    where = f"dataset {dataset.name!r}, episode {index}"
    shape = np.shape(episode.actions)
    if len(shape) != 2 or shape[1] != dataset.space.dim:
        raise SpaceMismatchError(
            f"{where}: actions have shape {shape}, action space {dataset.space.embodiment!r} has {dataset.space.dim}"
            " dimensions; give the space of this data"
        )
    if shape[0] != dataset.lengths[index]:
        raise DataError(
            f"{where}: {shape[0]} steps are stored, {dataset.lengths[index]} are stated; the files are truncated or"
            " edited, copy them again"
        )
    for name, array in (("actions", episode.actions), ("proprioception", episode.proprio)):
        if array is None:
            continue
        if array.ndim != 2 or len(array) != shape[0]:
            raise DataError(f"{where}: {name} of shape {array.shape} for {shape[0]} steps; give one row per step")
        if not np.isfinite(array).all():
            step, dim = (int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise DataError(
                f"{where}: {name} hold {array[step, dim]} at step {step}, dimension {dim}; drop or repair the episode"
            )


def _fingerprint(dataset: EpisodeDataset, space: ActionSpace, rate_hz: float | None) -> str:
    """sha256 of what a cache depends on: space, rate, lengths, tasks, and files (by size and time) or values."""
    files: list[Any] = []
    for path in sorted(Path(p).absolute() for p in dataset.source_files):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path} of dataset {dataset.name!r} cannot be read ({error.strerror}); copy it again"
            ) from None
        files.append([str(path), status.st_size, status.st_mtime_ns])
    chosen = None if dataset.selection is None else [int(i) for i in dataset.selection]
    episodes = [np.asarray(dataset.lengths).tolist(), list(dataset.tasks or ()), chosen]
    body = [FORMAT, VERSION, dataset.name, space.to_dict(), rate_hz, episodes, files]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    if not files:
        for episode in dataset:
            for array in (episode.actions, episode.proprio):
                digest.update(b"-" if array is None else np.ascontiguousarray(array, dtype=np.float32).tobytes())
            digest.update(episode.task.encode())
    return digest.hexdigest()


def _open_if(cls: type[FrameCache], folder: Path, fingerprint: str) -> FrameCache | None:
    """The cache in `folder` where it is complete and of this data, else None."""
    try:
        if json.loads((folder / META).read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
            return None
        return cls.open(folder)
    except (OSError, ValueError, AttributeError, ActokError):
        return None


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a finished cache to its name; an older one makes room. Readers of the old files keep their mapping."""
    retired = temporary.with_name(temporary.name + "-old")
    if folder.exists():
        folder.rename(retired)
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / META).is_file():  # else another process was first; what it wrote is checked by the caller
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)
