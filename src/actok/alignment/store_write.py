"""Writing features: parts that processes write on their own, merged into one folder that appears when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt

from actok.alignment.store import FORMAT, HASHES, INDEX, META, ROWS, VERSION
from actok.core import DataError
from actok.core.files import atomic_path

__all__ = ["as_stored", "merge_parts", "write_part"]


def as_stored(values: Float[np.ndarray, "n F"], teacher: str, where: Callable[[int], str]) -> Float[np.ndarray, "n F"]:
    """Features as float16; -0 becomes 0, so that equal features are equal bytes.

    Raises DataError naming the teacher and `where(i)` for a feature that is not finite or beyond float16.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(values).astype(np.float16) + np.float16(0)
    bad = ~np.isfinite(stored)
    if bad.any():
        row, place = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"teacher {teacher} gives {values[row, place]} as entry {place} of the feature of {where(row)}; features are"
            f" finite and at most {np.finfo(np.float16).max:g} in size: name another layer or teacher"
        )
    return stored


def write_part(path: Path, features: Float[np.ndarray, "n F"], items: Int[np.ndarray, "m"] | None = None) -> None:
    """Write float16 features of consecutive items, each distinct one once; `items` says which feature each has (None:
    every item its own)."""
    hashes = np.array([hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in features], "V16")
    digests = hashes.view(np.uint64).reshape(-1, 2)
    kept, local = _in_order(digests)
    index = local if items is None else local[items]
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, rows=features[kept], digests=digests[kept], index=index.astype(np.int32))


def merge_parts(
    parts: Sequence[Path], target: Path, meta: Mapping[str, Any], frames: Callable[[np.ndarray], np.ndarray] | None
) -> dict[str, Any]:
    """Make the folder `target` of all parts, in their order; returns its meta.

    Args:
        parts: files of `write_part`.
        target: appears by one rename; where another process was first, its folder is kept.
        meta: what meta.json says beside what is counted here.
        frames: from the row of every item, int32, to that of every frame; None: items are frames.

    Raises DataError naming a part that is damaged, or where the frames are not as many as the dataset's.
    """
    digests: list[np.ndarray] = []
    index: list[np.ndarray] = []
    sizes: list[int] = []
    for path in parts:
        part = _load(path, "digests", "index")
        digests.append(part["digests"])
        index.append(part["index"].astype(np.int64) + sum(sizes))
        sizes.append(len(part["digests"]))
    if sum(sizes) > np.iinfo(np.int32).max:
        raise DataError(
            f"{sum(sizes)} distinct features are more than one dataset can have; split it or raise --stride"
        )
    everything = np.concatenate(digests)
    kept, place = _in_order(everything)
    rows_of_items = place[np.concatenate(index)].astype(np.int32)
    rows_of_frames = rows_of_items if frames is None else frames(rows_of_items)
    if len(rows_of_frames) != sum(meta["lengths"]):
        raise DataError(
            f"the parts in {parts[0].parent} hold {len(rows_of_frames)} frames, the dataset {sum(meta['lengths'])}; delete that"
            " folder and extract again"
        )

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        width = _load(parts[0], "rows")["rows"].shape[1]
        rows = np.lib.format.open_memmap(temporary / ROWS, mode="w+", dtype=np.float16, shape=(len(kept), width))
        begin = done = 0
        for path, size in zip(parts, sizes, strict=True):
            mine = kept[np.searchsorted(kept, begin) : np.searchsorted(kept, begin + size)] - begin
            rows[done : done + len(mine)] = _load(path, "rows")["rows"][mine]
            begin, done = begin + size, done + len(mine)
        rows.flush()
        np.save(temporary / HASHES, np.ascontiguousarray(everything[kept, 0]).view(np.int64))
        np.save(temporary / INDEX, rows_of_frames.astype(np.int32, copy=False))
        complete = {
            "format": FORMAT,
            "version": VERSION,
            **meta,
            "frames": len(rows_of_frames),
            "rows": len(kept),
            "dim": int(width),
            "files": {name: _facts(temporary / name) for name in (ROWS, HASHES, INDEX)},
        }
        with open(temporary / META, "w", encoding="utf-8") as stream:
            json.dump(complete, stream)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            temporary.rename(target)
        except OSError:
            if not (target / META).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return complete


def _in_order(digests: UInt[np.ndarray, "n 2"]) -> tuple[Int[np.ndarray, "u"], Int[np.ndarray, "n"]]:
    """Where each distinct digest comes first, in that order, and which of them each digest is."""
    keys = np.ascontiguousarray(digests).view([("high", np.uint64), ("low", np.uint64)]).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def _load(path: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}
