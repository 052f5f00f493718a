"""A teacher's features of every frame of datasets, extracted once: resumable, in any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from actok.core import ActionSpace, ActokError, ConfigError
from actok.data import EpisodeDataset, Mixture, open_dataset
from actok.data.fingerprint import fingerprint
from actok.training.feature_jobs import FeatureJob, make_job

if TYPE_CHECKING:
    from actok.alignment.teacher import Teacher

__all__ = ["Extracted", "Extraction", "extract_features", "fingerprint"]


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What there is of one dataset.

    Attributes:
        dataset: its name.
        folder: the finished folder, or None where parts are missing.
        episodes, frames: of the dataset, at the asked rate.
        rows: distinct features (0 where parts are missing).
        dim: F.
        size: bytes on disk.
        parts, missing: how many there are, and how many are still to be made.
    """

    dataset: str
    folder: Path | None
    episodes: int
    frames: int
    rows: int
    dim: int
    size: int
    parts: int
    missing: int


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a call of `extract_features` did.

    Attributes:
        datasets: one entry each, in the order given.
        frames: whose features were made by this call; 0 where everything was there.
        seconds: that it took, without opening data and teacher.
    """

    datasets: tuple[Extracted, ...]
    frames: int
    seconds: float

    @property
    def frames_per_s(self) -> float:
        """0 where nothing had to be made."""
        return self.frames / self.seconds if self.frames else 0.0


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Everything a process needs to take part."""

    sources: tuple[dict[str, Any], ...]  # arguments of open_dataset
    teacher: Any
    out: Path
    options: Mapping[str, Any]
    job: Mapping[str, Any]

    def open(self, process: int = 1, processes: int = 1) -> list[FeatureJob]:
        datasets = [open_dataset(**source) for source in self.sources]
        teacher = self.teacher
        if isinstance(teacher, (str, Path)):
            teacher = _load_teacher(teacher, self.options, process)
        if processes > 1 and (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        return [make_job(dataset, teacher, self.out, **self.job) for dataset in datasets]


def extract_features(
    data: Any,
    teacher: str | Path | Teacher,
    out: str | Path,
    *,
    views: Sequence[str] | None = None,
    stride: int = 1,
    batch_size: int = 32,
    rate_hz: float | None = None,
    space: str | Path | ActionSpace | None = None,
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Extraction:
    """Encode every frame of one or more datasets once, into a folder of `actok.alignment.store.FeatureStore`.

    The teacher is given the task instruction with the current sub-task (`actok.data.instructions.frame_texts`), and the
    frame's images where the dataset has them and it reads them. Work is done in parts, each written atomically: the same
    call goes on where an earlier one was stopped, with the same result bit by bit. What is complete already is left as it
    is.

    Args:
        data: whatever `open_dataset` takes, a list of datasets, folders, files and Hub ids, or a `Mixture`.
        teacher: Hub id or folder for `load_teacher`, or a Teacher.
        out: folder; each dataset gets one of its own in it.
        views: names of the views to show; None: the first three of the dataset, as many as the teacher reads; empty: texts
            alone.
        stride: every `stride`-th frame is encoded, and every frame at which the text changes; the frames between have
            the feature of the last one encoded.
        batch_size: frames or texts encoded at a time.
        rate_hz: features of the frames that the data have when resampled to this rate; None: their own.
        space: action space of the data, where they do not tell.
        shard: (i, n), the i-th of n processes (from 1) that share the parts; the one that finishes last puts them together.
        workers: processes to share the parts among here, each with a teacher of its own.
        options: further arguments of `load_teacher`: layer, device (default: "cuda" where there is one).
        progress: show a bar on stderr.

    Raises:
        ConfigError: an unusable argument. DataError: no text to encode, a feature that is not finite or too large for
        float16 (naming teacher and frame), a folder that holds features made another way. ActokError: a worker died.
    """
    for name, number in (("stride", stride), ("batch_size", batch_size), ("workers", workers)):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} is {number!r}; give a whole number, at least 1")
    index, count = shard
    if not 1 <= index <= count:
        raise ConfigError(f"shard {index}/{count} does not exist; number the shards from 1 to {max(count, 1)}")
    if count > 1 and workers > 1:
        raise ConfigError(
            f"shard {index}/{count} and {workers} workers are given; share the parts among one or the other"
        )
    task = _Task(
        sources=_sources(data, space),
        teacher=teacher,
        out=Path(out).expanduser(),
        options=dict(options or {}),
        job={
            "views": None if views is None else tuple(views),
            "stride": stride,
            "batch_size": batch_size,
            "rate_hz": rate_hz,
        },
    )
    jobs = task.open()
    todo = {job: [p for p in job.missing if p % count == index - 1] for job in jobs}
    frames = sum(job.weight(part) for job, parts in todo.items() for part in parts)
    total = sum(job.frames for job in jobs)
    started = time.perf_counter()
    with tqdm(
        total=total if count == 1 else frames,
        initial=total - frames if count == 1 else 0,
        desc="features",
        unit="frame",
        unit_scale=True,
        disable=None if progress else True,
        smoothing=0.05,
    ) as bar:
        if workers > 1 and frames:
            for job in jobs:
                job.release()  # the processes have their own teachers
            _share(task, workers, todo, bar.update)
        else:
            for job, parts in todo.items():
                for part in parts:
                    job.make(part, bar.update)
    for source, job in zip(task.sources, jobs, strict=True):
        if not job.finished and not job.missing:
            job.merge(_arguments(task, source))
    return Extraction(
        datasets=tuple(_report(job) for job in jobs), frames=frames, seconds=time.perf_counter() - started
    )


def _sources(data: Any, space: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(data, Mixture):
        return tuple({"source": e.source, "space": e.space, "name": e.name} for e in data.entries)
    several = isinstance(data, (list, tuple)) and len(data) and isinstance(data[0], (str, Path, EpisodeDataset))
    return tuple({"source": source, "space": space} for source in (data if several else [data]))


def _arguments(task: _Task, source: Mapping[str, Any]) -> dict[str, Any]:
    """How to ask for the same again on the command line; None where it cannot be said there."""
    views, (data, space) = task.job["views"], (source["source"], source["space"])
    return {
        "data": str(data) if isinstance(data, (str, Path)) else None,
        "teacher": str(task.teacher) if isinstance(task.teacher, (str, Path)) else None,
        "layer": task.options.get("layer"),
        "views": None if views is None else ",".join(views) or "none",
        "stride": task.job["stride"] if task.job["stride"] > 1 else None,
        "rate": task.job["rate_hz"],
        "space": str(space) if isinstance(space, (str, Path)) else None,
    }


def _report(job: FeatureJob) -> Extracted:
    facts: dict[str, Any] = {
        "dataset": job.dataset.name,
        "episodes": len(job.lengths),
        "frames": job.frames,
        "dim": job.dim,
        "parts": job.parts,
    }
    if (store := job.store()) is None:
        return Extracted(**facts, folder=None, rows=0, size=0, missing=len(job.missing))
    size = sum(file["bytes"] for file in store.meta["files"].values())
    return Extracted(**facts, folder=store.folder, rows=len(store.rows), size=size, missing=0)


# -- processes --------------------------------------------------------------------------------------------------------


def _load_teacher(spec: str | Path, options: Mapping[str, Any], process: int) -> Teacher:
    from actok.alignment.teacher import load_teacher

    given = dict(options)
    if given.get("device") is None:
        import torch

        gpus = torch.cuda.device_count()
        given["device"] = f"cuda:{(process - 1) % gpus}" if gpus else "cpu"
    return load_teacher(spec, **given)


def _share(task: _Task, workers: int, todo: Mapping[FeatureJob, Sequence[int]], tick: Callable[[int], object]) -> None:
    """Make the parts in `workers` processes, and tell of those that are finished."""
    try:
        pickle.dumps(task)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(
            f"data or teacher cannot be sent to {workers} workers ({error}); name their folders"
        ) from None
    parts = [(number, part) for number, job in enumerate(todo) for part in todo[job]]
    weights = {(number, part): job.weight(part) for number, job in enumerate(todo) for part in todo[job]}
    workers = min(workers, len(parts))
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(task, spawn.Value("i", 0), workers))
    try:
        running = {pool.submit(_make, *place): place for place in parts}
        for future in as_completed(running):
            future.result()
            tick(weights[running[future]])
    except BrokenProcessPool as error:
        raise ActokError(
            "a process that extracts features died (out of memory?); the same command goes on, with fewer --workers or a"
            " smaller --batch-size; in a script, call this under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # parts that others are in the middle of are finished


_jobs: list[FeatureJob] = []


def _start(task: _Task, started: Any, processes: int) -> None:
    with started.get_lock():
        started.value += 1
        process = started.value
    _jobs.extend(task.open(process, processes))


def _make(number: int, part: int) -> None:
    _jobs[number].make(part, lambda frames: None)
