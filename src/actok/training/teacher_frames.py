"""What the small vision-language teacher is trained on: images of datasets, and which text was in force at each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from tqdm import tqdm

from actok.alignment.scene import resize
from actok.alignment.teacher import VIEWS
from actok.core import ConfigError, DataError
from actok.data import split_dataset
from actok.data.episodes import Episode, EpisodeDataset
from actok.data.instructions import frame_texts
from actok.training.fitting import FRACTIONS

# Images are held in memory at the teacher's size; where they would take more, every second, third, ... frame is taken.
MOST_BYTES = 1_250_000_000

__all__ = ["Frames", "read_frames"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """N moments: what the cameras saw, and which text was in force.

    Attributes:
        pixels: uint8 [M, H, H, 3], all images.
        image_of: int64 [N, V] rows of `pixels`, -1 where a view is absent.
        text: int64 [N] index into the texts.
        task: int64 [N] index into the instructions.
        held_out: bool [N], of an episode that is not trained on.
    """

    pixels: UInt8[np.ndarray, "M H H 3"]
    image_of: Int[np.ndarray, "N V"]
    text: Int[np.ndarray, "N"]
    task: Int[np.ndarray, "N"]
    held_out: Bool[np.ndarray, "N"]

    def views(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 [B, V, H, H, 3] of these moments and which of them are present, bool [B, V]."""
        wanted = self.image_of[rows]
        return torch.from_numpy(self.pixels[wanted]), torch.from_numpy(wanted >= 0)


def read_frames(
    datasets: Sequence[EpisodeDataset], size: int, seed: int, views: Sequence[str] | None, progress: bool
) -> tuple[Frames, list[str], dict[str, Any]]:
    """All frames (or every K-th), their texts, and facts about them as JSON values."""
    if views is not None and not 1 <= len(views) <= VIEWS:
        raise ConfigError(f"{len(views)} views are named; name one to {VIEWS}")
    names = [_views(dataset.episode(0, images=True), dataset, views) for dataset in datasets]
    splits = [split_dataset(dataset, fractions=FRACTIONS, seed=seed) for dataset in datasets]
    every = sum(int(d.lengths.sum()) * len(n) for d, n in zip(datasets, names, strict=True))
    stride = -(-every * 3 * size * size // MOST_BYTES)
    count = sum(int((-(-d.lengths // stride)).sum()) * len(n) for d, n in zip(datasets, names, strict=True))
    pixels = np.empty((count, size, size, 3), np.uint8)
    image_of, text_of, task_of, held_out = [], [], [], []
    texts: dict[str, int] = {}
    tasks: dict[str, int] = {}
    images = 0
    total = sum(len(d) for d in datasets)
    with tqdm(
        total=total, desc="reading images", unit="episode", file=sys.stderr, delay=2, disable=not progress
    ) as bar:
        for dataset, chosen, split in zip(datasets, names, splits, strict=True):
            train = set(split.train.tolist())
            for index in range(len(dataset)):
                episode = dataset.episode(index, images=True)
                found = _views(episode, dataset, views)
                if found != chosen:
                    raise DataError(
                        f"episode {index} of {dataset.name!r} has the views {', '.join(found)}, episode 0 {', '.join(chosen)};"
                        " name those that all have (--views)"
                    )
                at = np.arange(0, len(episode), stride)
                rows = np.full((len(at), VIEWS), -1)
                for v, name in enumerate(chosen):
                    rows[:, v] = images + np.arange(len(at))
                    pixels[rows[:, v]] = resize(episode.images[name][at], size)
                    images += len(at)
                said, active = frame_texts(episode)
                if not all(said):
                    raise DataError(
                        f"episode {index} of {dataset.name!r} has frames without instruction, task or sub-task; give data that"
                        " say in words what is done"
                    )
                image_of.append(rows)
                text_of.append(np.array([texts.setdefault(said[i], len(texts)) for i in active[at]], np.int64))
                task_of.append(np.full(len(at), tasks.setdefault(_task(episode), len(tasks)), np.int64))
                held_out.append(np.full(len(at), index not in train))
                bar.update()
    frames = Frames(
        pixels=pixels,
        image_of=np.concatenate(image_of)[:, : max(len(n) for n in names)],
        text=np.concatenate(text_of),
        task=np.concatenate(task_of),
        held_out=np.concatenate(held_out),
    )
    if len(learnt := np.unique(frames.text[~frames.held_out])) < 2:
        raise DataError(
            f"all training frames have the text {list(texts)[learnt[0]]!r}; give data of several tasks, or with sub-tasks"
        )
    facts = {
        "data": [
            {"name": d.name, "episodes": len(d), "frames": int(d.lengths.sum()), "views": list(n)}
            for d, n in zip(datasets, names, strict=True)
        ],
        "episodes": sum(len(split.train) for split in splits),
        "frames": int((~frames.held_out).sum()),
        "stride": stride,
    }
    return frames, list(texts), facts


def _task(episode: Episode) -> str:
    return episode.instruction.strip() or episode.task.strip()


def _views(episode: Episode, dataset: EpisodeDataset, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the views to use."""
    there = list(episode.images)
    if not there:
        raise DataError(
            f"dataset {dataset.name!r} has no images; give one with images, such as `actok collect --images 64` records"
        )
    for name in wanted or ():
        if name not in there:
            raise DataError(f"dataset {dataset.name!r} has no view {name!r}; it has {', '.join(there)}")
    return tuple(wanted or there[:VIEWS])
