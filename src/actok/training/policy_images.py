"""Images of demonstrations, read once and held in memory by view."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from actok.core import ConfigError, DataError
from actok.data.episodes import Episode, EpisodeDataset

# All images of a run together, in bytes.
MOST_BYTES = 4_000_000_000

__all__ = ["Images", "read_images"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Images of some frames of a dataset.

    Attributes:
        pixels: view -> uint8 [M, H, W, 3].
        rows: int64 [N], row of each of the dataset's frames in `pixels`, -1 where it was not read.
    """

    pixels: dict[str, np.ndarray]
    rows: Int[np.ndarray, "N"]

    def at(self, frames: Int[np.ndarray, "B"]) -> dict[str, np.ndarray]:
        """uint8 [B, H, W, 3] by view, of these frames of the dataset."""
        if not self.pixels:
            return {}
        rows = self.rows[frames]
        assert (rows >= 0).all(), "only frames of the episodes that were read are asked for"
        return {view: pixels[rows] for view, pixels in self.pixels.items()}


def read_images(
    datasets: Sequence[EpisodeDataset], episodes: Sequence[np.ndarray], views: Sequence[str], *, progress: bool = True
) -> list[Images]:
    """The images of these episodes of each dataset; nothing is read where no view is named.

    A view is called as in the first dataset, or by the last part of that name where only one view ends so: "corner2" is
    "observation.images.corner2". The images have the dataset's own names.

    Raises ConfigError for a view that is named twice. DataError for a view that is not there (naming those that are), for views whose size differs between episodes,
    and where all images together would take more than MOST_BYTES.
    """
    if not views:
        return [Images(pixels={}, rows=np.zeros(0, np.int64)) for _ in datasets]
    first = [d.episode(int(e[0]), images=True) for d, e in zip(datasets, episodes, strict=True)]
    views = [_own_name(view, list(first[0].images)) for view in views]
    if len(set(views)) < len(views):
        raise ConfigError(f"views are {', '.join(views)}; name each once")
    sizes = [_sizes(episode, d, views) for d, episode in zip(datasets, first, strict=True)]
    for dataset, found in zip(datasets[1:], sizes[1:], strict=True):
        for view in views:
            if found[view] != sizes[0][view]:
                raise DataError(
                    f"view {view!r} is {_size(sizes[0][view])} in {datasets[0].name!r}, {_size(found[view])} in"
                    f" {dataset.name!r}; resize the images of one"
                )
    frames = [int(np.asarray(d.lengths)[e].sum()) for d, e in zip(datasets, episodes, strict=True)]
    total = sum(frames) * sum(int(np.prod(shape)) for shape in sizes[0].values())
    if total > MOST_BYTES:
        raise DataError(
            f"{sum(frames):,} frames of {', '.join(f'{v} ({_size(sizes[0][v])})' for v in views)} take"
            f" {total / 1e9:.1f} GB, more than the {MOST_BYTES / 1e9:.0f} GB that images may take in memory; name fewer views"
            " (--views), record smaller images, or train on fewer episodes"
        )
    count = sum(len(e) for e in episodes)
    with tqdm(
        total=count, desc="reading images", unit="episode", file=sys.stderr, delay=2, disable=not progress
    ) as bar:
        return [
            _read(dataset, chosen, views, shapes, bar)
            for dataset, chosen, shapes in zip(datasets, episodes, sizes, strict=True)
        ]


def _read(
    dataset: EpisodeDataset,
    episodes: np.ndarray,
    views: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    bar: Any,
) -> Images:
    lengths = np.asarray(dataset.lengths, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    count = int(lengths[episodes].sum())
    pixels = {view: np.empty((count, *shapes[view]), np.uint8) for view in views}
    rows = np.full(int(offsets[-1]), -1)
    at = 0
    for index in np.sort(episodes):
        episode = dataset.episode(int(index), images=True)
        if (found := _sizes(episode, dataset, views)) != shapes:
            view = next(v for v in views if found[v] != shapes[v])
            raise DataError(
                f"view {view!r} of episode {index} of {dataset.name!r} is {_size(found[view])}, of others"
                f" {_size(shapes[view])}; drop the episode or resize its images"
            )
        steps = int(lengths[index])
        rows[offsets[index] : offsets[index] + steps] = np.arange(at, at + steps)
        for view in views:
            pixels[view][at : at + steps] = episode.images[view]
        at += steps
        bar.update()
    return Images(pixels=pixels, rows=rows)


def _own_name(view: str, names: Sequence[str]) -> str:
    """What the dataset calls a view; a name that it does not have, or that several views end in, stays as it is."""
    ending = [name for name in names if name.rpartition(".")[2] == view]
    return ending[0] if view not in names and len(ending) == 1 else view


def _sizes(episode: Episode, dataset: EpisodeDataset, views: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """H, W, 3 of the views of an episode."""
    there = episode.images
    for view in views:
        if view not in there:
            known = f"it has {', '.join(there)}" if there else "it has no images at all"
            raise DataError(f"episode {episode.index} of {dataset.name!r} has no view {view!r}; {known}")
        if there[view].dtype != np.uint8 or there[view].shape[0] != len(episode) or there[view].ndim != 4:
            raise DataError(
                f"view {view!r} of episode {episode.index} of {dataset.name!r} is {there[view].dtype}"
                f" {there[view].shape}; give uint8 [{len(episode)}, H, W, 3]"
            )
    return {view: tuple(there[view].shape[1:]) for view in views}


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
