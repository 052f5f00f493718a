"""How many shuffled chunks a second one core cuts from a memory-mapped frame cache.

    python benchmarks/chunk_speed.py
    python benchmarks/chunk_speed.py --dataset path/to/dataset --horizon 50

Prints JSON: the figures with hardware, versions and command. Without `--dataset` the frames are random numbers in
episodes of random length; their values do not matter for speed, their number does (the pages must fit into memory for
this figure to be one of the library and not of the disk). Where lerobot is installed and the dataset is a LeRobot folder,
its own dataset class is timed on the same chunks, one item at a time as its loader does (without images).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import actok
from actok.core import ActionSpace
from actok.data import Chunks, Episode, EpisodeDataset, FrameCache, open_dataset


class RandomFrames(EpisodeDataset):
    """Episodes of 100 to 500 random steps."""

    def __init__(self, frames: int, dim: int) -> None:
        self.name, self.space, self.space_origin = "random", ActionSpace.raw(dim), "nothing known"
        lengths = np.random.default_rng(0).integers(100, 501, size=frames // 300 + 1)
        self.lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), frames)))]

    def episode(self, index: int, *, images: bool = False) -> Episode:
        rng = np.random.default_rng([1, index])
        return Episode(index=index, actions=rng.standard_normal((self.lengths[index], self.space.dim), np.float32))


def cpu_name() -> str:
    """The processor as the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def chunks_per_second(chunks: Chunks, batch_size: int, seconds: float) -> float:
    """Best of five rounds over batches of random chunks; the best is what the code can do undisturbed."""
    rng = np.random.default_rng(2)
    batches = [rng.integers(0, len(chunks), batch_size) for _ in range(64)]
    best = 0.0
    for _ in range(5):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 5:
            chunks.batch(batches[done % len(batches)])
            done += 1
        best = max(best, done * batch_size / (time.perf_counter() - start))
    return best


def lerobot_items_per_second(folder: Path, dataset: EpisodeDataset, horizon: int, seconds: float) -> float | str:
    """The same chunks through LeRobotDataset, or why not."""
    if not (folder / "meta" / "info.json").is_file():
        return "skipped: the dataset is not a LeRobot folder"
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        return f"skipped: lerobot cannot be imported ({error})"
    period = 1 / float(dataset.space.rate_hz or 1)
    loader = LeRobotDataset(
        folder.name,
        root=folder,
        delta_timestamps={"action": [t * period for t in range(horizon)]},
        download_videos=False,
    )
    rng = np.random.default_rng(2)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        loader[int(rng.integers(0, len(loader)))]
        done += 1
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="anything `open_dataset` reads; random frames where not given")
    parser.add_argument("--frames", type=int, default=2_000_000, help="random frames (default 2,000,000)")
    parser.add_argument("--dim", type=int, default=7, help="dimensions of random frames (default 7)")
    parser.add_argument("--horizon", type=int, default=16, help="steps of a chunk (default 16)")
    parser.add_argument("--batch-size", type=int, default=1024, help="chunks of a batch (default 1024)")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement (default 5)")
    options = parser.parse_args()

    dataset = open_dataset(options.dataset) if options.dataset else RandomFrames(options.frames, options.dim)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = FrameCache.build(dataset, Path(folder) / "cache")
        built = time.perf_counter() - start
        start = time.perf_counter()
        cache.statistics()
        streamed = time.perf_counter() - start
        chunks = Chunks(cache, options.horizon)
        speed = chunks_per_second(chunks, options.batch_size, options.seconds)
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
            "versions": {"actok": actok.__version__, "numpy": np.__version__, "python": platform.python_version()},
            "data": {
                "name": cache.name,
                "frames": len(cache),
                "episodes": len(cache.lengths),
                "dimensions": cache.space.dim,
            },
            "horizon": options.horizon,
            "batch_size": options.batch_size,
            "chunks_per_second": round(speed),
            "megabytes_per_second": round(speed * options.horizon * cache.space.dim * 4 / 1e6),
            "build_frames_per_second": round(len(cache) / built),
            "statistics_frames_per_second": round(len(cache) / streamed),
        }
    if options.dataset:
        items = lerobot_items_per_second(options.dataset.resolve(), dataset, options.horizon, options.seconds)
        result["lerobot_items_per_second"] = items if isinstance(items, str) else round(items)
        if not isinstance(items, str):
            result["times_lerobot"] = round(speed / items)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
