"""A teacher's features of every frame of a dataset: one row a distinct feature, one number a frame, memory-mapped.

A folder holds the features of any number of datasets, each in `<dataset name>-<short fingerprint>/`:

    rows.npy     float16 [U, F], the distinct features
    hashes.npy   int64 [U], of each row's content, so that equal features are known across datasets
    index.npy    int32 [N], the row of each frame, episode after episode
    meta.json    dataset, fingerprint, episode lengths, teacher, how it was asked, sizes and hashes of the arrays
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.alignment.features import FeatureBatch
from actok.alignment.pooling import columns, mixtures, pool
from actok.core import DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "actok-features"
VERSION = 1
META, ROWS, HASHES, INDEX = "meta.json", "rows.npy", "hashes.npy", "index.npy"

__all__ = ["FeatureStore", "short_hash", "store_name"]


def short_hash(value: Any) -> str:
    """16 hexadecimal digits that name a JSON value, e.g. a teacher's identity."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def store_name(dataset: str, fingerprint: str) -> str:
    """Name of a dataset's folder of features."""
    return f"{re.sub(r'[^0-9A-Za-z._-]', '_', dataset).lstrip('.')}-{short_hash(fingerprint)[:12]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStore:
    """Features of the N frames of one dataset.

    Attributes:
        folder: where they lie.
        meta: what meta.json says.
        rows: float16 [U, F], memory-mapped.
        hashes: int64 [U].
        frame_rows: int32 [N] row of each frame, memory-mapped.
        offsets: int64 [E + 1]; the frames of episode e are offsets[e]:offsets[e + 1].
    """

    folder: Path
    meta: Mapping[str, Any]
    rows: Float[np.ndarray, "U F"]
    hashes: Int[np.ndarray, "U"]
    frame_rows: Int[np.ndarray, "N"]
    offsets: Int[np.ndarray, "_"]

    @property
    def dim(self) -> int:
        """Width F of a feature."""
        return int(self.rows.shape[1])

    @property
    def teacher(self) -> Mapping[str, Any]:
        """Identity of the teacher, JSON values."""
        found: Mapping[str, Any] = self.meta["teacher"]
        return found

    @classmethod
    def open(
        cls,
        folder: str | Path,
        dataset: str,
        fingerprint: str,
        *,
        data: str | None = None,
        teacher: Mapping[str, Any] | None = None,
    ) -> Self:
        """The features in `folder` of the data with this fingerprint (`actok.data.fingerprint`).

        Args:
            folder: what `actok features --out` wrote.
            dataset: its name, for messages; features are found by fingerprint, so data may be moved and renamed.
            fingerprint: what the data are now.
            data: how the user names the data, for the command in a message; None: as when features were extracted.
            teacher: identity that the features must come from, e.g. that of a run to resume; None: any.

        Raises DataError naming the `actok features` command to run where the features are missing, stale, of another
        teacher or damaged.
        """
        folder = Path(folder)
        store = cls.find(folder, fingerprint)
        if store is None:
            raise DataError(_missing(folder, dataset, fingerprint, data))
        if teacher is not None and short_hash(teacher) != short_hash(store.teacher):
            raise DataError(
                f"{store.folder} holds features of the teacher {json.dumps(store.teacher)}, asked for are those of"
                f" {json.dumps(teacher)}; name a folder of these, or extract them: "
                + _command(folder.with_name(f"{folder.name}-new"), {"teacher": teacher}, data or dataset)
            )
        return store

    @classmethod
    def find(cls, folder: str | Path, fingerprint: str) -> Self | None:
        """As `open`, None where there are no features of data with this fingerprint."""
        stored = _all_meta(Path(folder)).items()
        return next((cls._load(place, meta) for place, meta in stored if meta["fingerprint"] == fingerprint), None)

    @classmethod
    def _load(cls, place: Path, meta: Mapping[str, Any]) -> Self:
        again = f"delete {place} and run: {_command(place.parent, meta, None)}"
        arrays = {}
        for name, shape, dtype in (
            (ROWS, (meta["rows"], meta["dim"]), np.float16),
            (HASHES, (meta["rows"],), np.int64),
            (INDEX, (meta["frames"],), np.int32),
        ):
            try:
                size = (place / name).stat().st_size
                array = np.load(place / name, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{place / name} cannot be read ({error}); {again}") from None
            if size != meta["files"][name]["bytes"] or array.shape != shape or array.dtype != dtype:
                raise DataError(
                    f"{place / name} holds {array.dtype} {array.shape} in {size} bytes, not {np.dtype(dtype)} {shape} in"
                    f" {meta['files'][name]['bytes']}; {again}"
                )
            arrays[name] = np.asarray(array)  # plain arrays over the mapped pages: indexing a memmap is slow
        offsets = np.concatenate([[0], np.cumsum(np.asarray(meta["lengths"], np.int64))])
        return cls(
            folder=place,
            meta=meta,
            rows=arrays[ROWS],
            hashes=np.array(arrays[HASHES]),
            frame_rows=arrays[INDEX],
            offsets=offsets,
        )

    def check_videos(self, now: str | None) -> None:
        """Raise DataError naming the command to run where the teacher was shown other videos than there are now.

        `now`: `actok.data.fingerprint.video_print` of the views in `meta`; None, as where videos are not at hand, tells
        nothing.
        """
        then = self.meta.get("videos")
        if None not in (then, now) and then != now:
            raise DataError(
                f"the features in {self.folder} are of other videos: the files of {', '.join(self.meta['views'])} were"
                f" changed since; delete this folder and run: {_command(self.folder.parent, self.meta, None)}"
            )

    def verify(self) -> None:
        """Read the arrays whole and compare their hashes. Raises DataError naming the one that was changed."""
        for name, stated in self.meta["files"].items():
            with open(self.folder / name, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != stated["sha256"]:
                raise DataError(
                    f"{self.folder / name} was changed after it was written (sha256 {found[:16]}, not"
                    f" {stated['sha256'][:16]}); delete {self.folder} and run:"
                    f" {_command(self.folder.parent, self.meta, None)}"
                )

    # -- chunks ---------------------------------------------------------------------------------------------------

    def chunk(
        self,
        episode: Int[np.ndarray, "B"],
        start: Int[np.ndarray, "B"],
        steps: int,
        spans: Int[np.ndarray, "S 2"] | None = None,
        real: Bool[np.ndarray, "B T"] | None = None,
    ) -> FeatureBatch:
        """What the teacher saw while chunks were executed, float32 on the CPU.

        A frame counts where it is real and within its episode and chunk. `next` is of the frame after the last that
        counts. The means weigh every frame alike; chunks of the same mixture of features have the same group and, bit by
        bit, the same `whole`.

        Args:
            episode: of each chunk.
            start: first frame of each chunk within its episode.
            steps: T.
            spans: first step and one past the last of each slot (`Codec.slot_steps`), or None.
            real: False for frames not to count; None: all count.

        Raises DataError for an episode or start that does not exist, or a chunk in which no frame counts.
        """
        import torch

        first, left, known = self._frames(episode, start, steps, real)
        last = steps - 1 - np.argmax(known[:, ::-1], axis=1)
        ids = self.frame_rows[first[:, None] + np.minimum(np.arange(steps), left[:, None] - 1)]
        one = np.take_along_axis(ids, np.argmax(known, axis=1)[:, None], axis=1)
        ids = np.where(known, ids, one)
        varies = (ids != one).any(axis=1)

        group = self.hashes[one[:, 0]]
        whole = self._table(one[:, 0])
        slots = slot_known = None
        if spans is not None:
            places, begins, counts = columns(np.asarray(spans), steps)
            weights = known[:, places] & counts
            slot_known = np.add.reduceat(weights, begins, axis=1, dtype=np.int64) > 0
            slots = whole[:, None] * torch.from_numpy(slot_known)[..., None]
        if varies.any():
            some = np.flatnonzero(varies)
            distinct, local = np.unique(ids[some], return_inverse=True)
            local = local.reshape(len(some), steps)
            table = self._table(distinct)
            means, group[some] = mixtures(local, known[some], table, self.hashes[distinct])
            whole[some] = means
            if slots is not None:
                slots[some] = pool(local[:, places], weights[some], begins, table)
        after = last + 1
        has_next = after < left
        following = self._table(self.frame_rows[np.where(has_next, first + after, first)])
        following[torch.from_numpy(~has_next)] = 0
        return FeatureBatch(
            whole=whole,
            slots=slots,
            slot_known=None if slot_known is None else torch.from_numpy(slot_known),
            varies=torch.from_numpy(varies),
            group=torch.from_numpy(group),
            next=following,
            has_next=torch.from_numpy(has_next),
        )

    def _frames(
        self, episode: np.ndarray, start: np.ndarray, steps: int, real: np.ndarray | None
    ) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"], Bool[np.ndarray, "B T"]]:
        """Row of each chunk's first frame, frames left in its episode from there, and which steps count."""
        episode, start = np.asarray(episode), np.asarray(start)
        count = len(self.offsets) - 1
        if len(episode) and (episode.min() < 0 or episode.max() >= count):
            bad = episode[(episode < 0) | (episode >= count)][0]
            raise DataError(f"episode {bad} does not exist; {self.folder} holds the features of 0..{count - 1}")
        first = self.offsets[episode] + start
        left = self.offsets[episode + 1] - first
        if (start < 0).any() or (left <= 0).any():
            bad = int(np.flatnonzero((start < 0) | (left <= 0))[0])
            raise DataError(
                f"a chunk starts at frame {start[bad]} of episode {episode[bad]}, which has"
                f" {self.meta['lengths'][episode[bad]]}; the chunks were cut from other data than {self.folder}"
            )
        known = np.arange(steps) < left[:, None]
        if real is not None:
            known &= real
        if not known.any(axis=1).all():
            raise DataError(f"chunk {int(np.argmin(known.any(axis=1)))} of the batch has no real frame; leave it out")
        return first, left, known

    def _table(self, ids: Int[np.ndarray, "n"]) -> Float[Tensor, "n F"]:
        import torch

        return torch.from_numpy(self.rows.take(ids, axis=0)).float()


# -- messages ---------------------------------------------------------------------------------------------------------


def _all_meta(folder: Path) -> dict[Path, dict[str, Any]]:
    """Of every dataset in a folder of features; what is still being written begins with a dot."""
    return {path.parent: _read_meta(path) for path in sorted(folder.glob(f"[!.]*/{META}"))}


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise DataError(
                f"{path.parent} holds {meta['format']} {meta['version']}, read is {FORMAT} {VERSION}; delete it and run"
                " `actok features` again"
            )
        for key in ("fingerprint", "dataset", "lengths", "teacher", "files", "rows", "frames", "dim"):
            meta[key]
        return meta
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete {path.parent} and run `actok features` again"
        ) from None


def _missing(folder: Path, dataset: str, fingerprint: str, data: str | None) -> str:
    """Why there are no features, and what to run."""
    stored = _all_meta(folder)
    same = next((m for m in stored.values() if m["dataset"] == dataset), None)
    if same is None:
        what = (
            f"holds features of {', '.join(sorted({m['dataset'] for m in stored.values()}))}"
            if stored
            else ("holds no features" if folder.is_dir() else "does not exist")
        )
        example = dict(next(iter(stored.values()), {}))
        own = {"data": None, "space": None, "rate": _rate(fingerprint)}  # the teacher is asked as for the others
        example["arguments"] = {**example.get("arguments", {}), **own}
        return (
            f"there are no features of dataset {dataset!r}: {folder} {what}; extract them once with:"
            f" {_command(folder, example, data or dataset)}"
        )
    then, now = (dict(part.partition("=")[::2] for part in f.split(";")) for f in (same["fingerprint"], fingerprint))
    differ = [key for key in now if then.get(key) != now[key]]
    told = [f"rate ({then.get('rate')}, now {now['rate']})" if key == "rate" else key for key in differ]
    same = {**same, "arguments": {**same.get("arguments", {}), "rate": _rate(fingerprint)}}
    return (
        f"the features of dataset {dataset!r} in {folder} are of other data: {' and '.join(told) or 'the format'} differ;"
        f" extract them again with: {_command(folder, same, data)}"
    )


def _rate(fingerprint: str) -> float | None:
    rate = fingerprint.rpartition("rate=")[2]
    return float(rate.rpartition("to")[2]) if "to" in rate else None


def _command(folder: Path, meta: Mapping[str, Any], data: str | None) -> str:
    """The `actok features` command that makes features as `meta` says; `data` wins over the data it names."""
    given = dict(meta.get("arguments", {}))
    words = ["actok", "features", "--data", data or given.get("data") or meta.get("dataset") or "DATA"]
    words += ["--teacher", str(given.get("teacher") or meta.get("teacher", {}).get("model") or "HUB_ID_OR_FOLDER")]
    for key in ("layer", "views", "stride", "rate", "space"):
        if given.get(key) is not None:
            words += [f"--{key}", f"{given[key]:g}" if isinstance(given[key], float) else str(given[key])]
    return shlex.join([*words, "--out", str(folder)])
