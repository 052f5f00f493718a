"""What a policy is trained on: every step of every training episode, with what was seen, said and done there."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm

from actok.core import ActionSpace, ActionTokenizer, ChunkContext, ConfigError, DataError, SpaceMismatchError, to_numpy
from actok.data import Chunks, FrameCache, open_dataset, split_dataset
from actok.data.episodes import EpisodeDataset
from actok.data.instructions import chunk_labels
from actok.data.resample import states_at
from actok.policies.base import PolicyBatch, PolicyObservation
from actok.signal.sketch import StatisticsAccumulator
from actok.signal.statistics import Statistics
from actok.training.fitting import FRACTIONS
from actok.training.policy_images import Images, read_images

# Chunks encoded at a time: bounds the memory of a neural tokenizer.
CHUNKS_AT_A_TIME = 4096
TEXTS = ("none", "subtask")

__all__ = ["PolicyData", "PolicySamples", "open_sources"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """The samples of one dataset, one a chunk start.

    Attributes:
        chunks: cut on demand.
        sources: int64 [F], the dataset's frame that each frame of the chunks' cache shows (resampled data: at or before it).
        codes: int32, of all chunks one after the other.
        offsets: int64 [M + 1] of the chunks in `codes`.
        instructions: int32 [M] index into `names`.
        texts: int32 [M] index into `said`, -1: nothing; None: no text is trained.
        after: the same of the text behind the codes.
        names, said: texts.
        images: of the dataset, by view.
    """

    chunks: Chunks
    sources: np.ndarray
    codes: np.ndarray
    offsets: np.ndarray
    instructions: np.ndarray
    names: tuple[str, ...]
    texts: np.ndarray | None
    after: np.ndarray | None
    said: tuple[str, ...]
    images: Images

    def __len__(self) -> int:
        return len(self.chunks)


class PolicySamples:
    """Samples of one split, dataset after dataset.

    Args:
        tokenizer: whose normaliser and codes the samples have.
        embodiment: of it.
        parts: of the datasets.
    """

    def __init__(self, tokenizer: ActionTokenizer, embodiment: str, parts: Sequence[_Part]) -> None:
        self._context = ChunkContext(embodiment=embodiment)
        self._tokenizer, self._parts = tokenizer, list(parts)
        self._first = np.cumsum([0, *(len(p) for p in parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def token_lengths(self) -> Int[np.ndarray, "_"]:
        """int64 [M] tokens of each chunk."""
        return np.concatenate([np.diff(p.offsets) for p in self._parts])

    @property
    def image_sizes(self) -> dict[str, list[int]]:
        """View -> height and width in pixels."""
        return {view: list(pixels.shape[1:3]) for view, pixels in self._parts[0].images.pixels.items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> PolicyBatch:
        """The samples of these indices [B] into 0..len-1, in this order. Raises DataError for one outside."""
        index = np.asarray(indices)
        if index.ndim != 1 or not len(index) or index.dtype.kind not in "iu":
            raise DataError(f"sample indices have dtype {index.dtype}, shape {index.shape}; give integers [B], B >= 1")
        if index.min() < 0 or index.max() >= len(self):
            bad = index[(index < 0) | (index >= len(self))][0]
            raise DataError(f"sample {bad} does not exist; there are 0..{len(self) - 1}")
        owner = np.searchsorted(self._first, index, side="right") - 1
        length = max(self._longest(owner, index), 1)
        pieces: list[tuple[np.ndarray, dict[str, Any]]] = []
        for p in np.unique(owner):
            mine = np.flatnonzero(owner == p)
            pieces.append((mine, self._piece(self._parts[p], index[mine] - self._first[p], length)))
        order = np.argsort(np.concatenate([mine for mine, _ in pieces]), kind="stable")

        def joined(key: str) -> Any:
            found = [piece[key] for _, piece in pieces]
            if isinstance(found[0], list):
                flat = [text for texts in found for text in texts]
                return [flat[i] for i in order]
            return None if found[0] is None else np.concatenate(found)[order]

        views = pieces[0][1]["images"]
        images = {view: np.concatenate([piece["images"][view] for _, piece in pieces])[order] for view in views}
        observation = PolicyObservation(instruction=joined("instruction"), proprio=joined("proprio"), images=images)
        return PolicyBatch(
            observation=observation,
            actions=torch.from_numpy(joined("actions")),
            real=torch.from_numpy(joined("real")),
            codes=torch.from_numpy(joined("codes")),
            text=joined("text"),
            after=joined("after"),
        )

    def _longest(self, owner: np.ndarray, index: np.ndarray) -> int:
        lengths = [
            int(np.diff(part.offsets)[index[owner == p] - self._first[p]].max())
            for p, part in enumerate(self._parts)
            if (owner == p).any()
        ]
        return max(lengths)

    def _piece(self, part: _Part, rows: np.ndarray, length: int) -> dict[str, Any]:
        """Samples of one dataset; codes are padded to `length`."""
        batch = part.chunks.batch(rows)
        columns = part.offsets[rows][:, None] + np.arange(length)
        inside = columns < part.offsets[rows + 1][:, None]
        codes = np.where(inside, part.codes[np.where(inside, columns, 0)], -1).astype(np.int64)
        frames = part.sources[part.chunks.cache.offsets[batch.episode] + batch.start]

        def said(ids: np.ndarray | None) -> list[str] | None:
            return None if ids is None else ["" if i < 0 else part.said[i] for i in ids[rows]]

        return {
            "actions": np.asarray(self._tokenizer.normalise(batch.actions, self._context), np.float32),
            "real": ~batch.pad_mask,
            "codes": codes,
            "proprio": batch.anchor,
            "instruction": [part.names[i] for i in part.instructions[rows]],
            "text": said(part.texts),
            "after": said(part.after),
            "images": part.images.at(frames),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyData:
    """Demonstrations as a policy reads them, split by episode.

    Attributes:
        tokenizer: frozen.
        space: action space of the data, at the rate that they are read at.
        embodiment: of the tokenizer, that the data are of.
        horizon: T of the chunks.
        views: names of the cameras, in order.
        train: a sample for every step of the training episodes.
        validation: those of the validation episodes; None where there are none.
        proprio_statistics: of the training episodes, each [P]; None where the data have no state.
        task_steps: task -> mean length of its training demonstrations in steps.
        instructions: all distinct ones of the training episodes, in the order of their first frames.
        said: all distinct sub-task texts, likewise; empty without `text` and `after`.
        origin: JSON values for the policy's meta, one a dataset.
    """

    tokenizer: ActionTokenizer
    space: ActionSpace
    embodiment: str
    horizon: int
    views: tuple[str, ...]
    train: PolicySamples
    validation: PolicySamples | None
    proprio_statistics: Statistics | None
    task_steps: Mapping[str, float]
    instructions: tuple[str, ...]
    said: tuple[str, ...]
    origin: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        """Training samples."""
        return len(self.train)

    @property
    def proprio(self) -> int:
        """P, 0 where the data have no state."""
        return 0 if self.proprio_statistics is None else self.proprio_statistics.dim

    @property
    def image_sizes(self) -> dict[str, list[int]]:
        """View -> height and width in pixels."""
        return self.train.image_sizes

    def batch(self, indices: Sequence[int] | np.ndarray) -> PolicyBatch:
        """Training samples, see `PolicySamples.batch`."""
        return self.train.batch(indices)

    @classmethod
    def build(
        cls,
        data: Any,
        tokenizer: ActionTokenizer,
        *,
        horizon: int | None = None,
        views: Sequence[str] = (),
        seed: int = 0,
        space: str | Path | ActionSpace | None = None,
        rate_hz: float | None = None,
        text: Literal["none", "subtask"] = "none",
        after: Literal["none", "subtask"] = "none",
        anchored: bool = True,
        progress: bool = True,
    ) -> Self:
        """Open, split as `fit` does with the same seed, encode every chunk of training and validation episodes once.

        A tokenizer without any action space (published FAST files) is adapted to the data's, by the statistics of the
        training episodes. Images are read once, at the size they have (`read_images`).

        Args:
            data: what `open_dataset` takes, or a list of such, all of one robot.
            tokenizer: fitted.
            horizon: T; None: the tokenizer's.
            views: cameras to look through, as the data name them or by the last part of the name ("corner2" of
                "observation.images.corner2"); (): none, and no image is read.
            seed: of the split.
            space: action space, where the data do not tell.
            rate_hz: resample every dataset to this rate first; states, images and texts are then the last ones at or
                before each new step. None: each at its own.
            text: "subtask": samples carry the sub-task in force, for a policy that says it before it acts.
            after: "subtask": and that in force when the chunk is over, for one that says it behind the codes.
            anchored: the tokenizer is given the state at each chunk's start; False: it is not, for a policy that reads
                no state and so has none to decode with.
            progress: tell on stderr.

        Raises:
            SpaceMismatchError: the data's action space or rate is not the tokenizer's. DataError: neither state nor
            views, a view that is not there, images larger than the room for them, frames without any text.
            ConfigError: the tokenizer has no layout at that horizon, or an option that does not exist.
        """
        for name, value in (("text", text), ("after", after)):
            if value not in TEXTS:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(TEXTS)}")
        datasets = open_sources(data, space)
        caches = [FrameCache.build(dataset, rate_hz=rate_hz) for dataset in datasets]
        splits = [split_dataset(dataset, fractions=FRACTIONS, seed=seed) for dataset in datasets]
        if not tokenizer.spaces:
            tokenizer = tokenizer.adapt(caches[0].space, caches[0].statistics(splits[0].train))
        embodiment = _embodiment(tokenizer, caches)
        steps = tokenizer.horizon if horizon is None else horizon
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"horizon is {steps!r}; give a whole number of steps, at least 1")
        tokenizer.layout_for(steps, embodiment)
        statistics = _proprio_statistics(caches, [s.train for s in splits], blind=not views)
        images = read_images(
            datasets, [np.concatenate([s.train, s.validation]) for s in splits], views, progress=progress
        )
        views = tuple(images[0].pixels)

        parts: dict[str, list[_Part]] = {"train": [], "validation": []}
        lengths: dict[str, list[int]] = {}
        instructions: dict[str, None] = {}
        said: dict[str, None] = {}
        origin = []
        encoder = _Encoder(tokenizer, embodiment, anchored, progress)
        for dataset, cache, split, pictures in zip(datasets, caches, splits, images, strict=True):
            labels = chunk_labels(dataset, rate_hz)
            sources = _sources(dataset, rate_hz)
            if (mute := np.flatnonzero(labels.instruction.ids < 0)).size:
                episode = int(np.searchsorted(labels.offsets, mute[0], side="right")) - 1
                raise DataError(
                    f"episode {episode} of {dataset.name!r} has neither instruction nor task, so a policy would not know"
                    " what is wanted; name the task in the data"
                )
            if "subtask" in (text, after) and (labels.subtask.ids < 0).all():
                raise DataError(
                    f"dataset {dataset.name!r} names no sub-tasks, so there is nothing to say; leave it out"
                )
            counts = {}
            for which, episodes in (("train", split.train), ("validation", split.validation)):
                if not len(episodes):
                    continue
                chunks = Chunks(cache, steps, episodes)
                codes, offsets, counts[which] = encoder.encode(chunks, f"{dataset.name} ({which})")
                starts = np.concatenate([np.arange(cache.offsets[e], cache.offsets[e + 1]) for e in episodes])
                over = np.minimum(starts + steps, np.repeat(cache.offsets[episodes + 1] - 1, cache.lengths[episodes]))
                parts[which].append(
                    _Part(
                        chunks=chunks,
                        sources=sources,
                        codes=codes,
                        offsets=offsets,
                        instructions=labels.instruction.ids[starts],
                        names=labels.instruction.names,
                        texts=labels.subtask.ids[starts] if text == "subtask" else None,
                        after=labels.subtask.ids[over] if after == "subtask" else None,
                        said=labels.subtask.names,
                        images=pictures,
                    )
                )
            for e in split.train:
                first = cache.offsets[e]
                task = labels.task.names[labels.task.ids[first]]
                lengths.setdefault(task, []).append(int(cache.lengths[e]))
            rows = parts["train"][-1]
            instructions |= dict.fromkeys(rows.names[i] for i in _in_order(rows.instructions))
            for ids in (rows.texts, rows.after):
                said |= dict.fromkeys(rows.said[i] for i in (() if ids is None else _in_order(ids)) if i >= 0)
            origin.append(
                {
                    "name": dataset.name,
                    "episodes": len(dataset),
                    "train_episodes": len(split.train),
                    "frames": int(cache.lengths[split.train].sum()),
                    "space_origin": dataset.space_origin,
                    **({} if rate_hz is None else {"resampled": {"from_hz": dataset.space.rate_hz, "to_hz": rate_hz}}),
                    "split": {"seed": seed, "fractions": list(FRACTIONS)},
                    "encoded": counts,
                }
            )
        held_out = parts["validation"]
        return cls(
            tokenizer=tokenizer,
            space=caches[0].space,
            embodiment=embodiment,
            horizon=steps,
            views=views,
            train=PolicySamples(tokenizer, embodiment, parts["train"]),
            validation=PolicySamples(tokenizer, embodiment, held_out) if held_out else None,
            proprio_statistics=statistics,
            task_steps={task: float(np.mean(found)) for task, found in lengths.items()},
            instructions=tuple(instructions),
            said=tuple(said),
            origin=origin,
        )


def open_sources(data: Any, space: str | Path | ActionSpace | None = None) -> list[EpisodeDataset]:
    """One dataset, or each of a list of them. A list of arrays [T, D] is one dataset, its episodes."""
    several = isinstance(data, (list, tuple)) and data and not hasattr(data[0], "ndim")
    return [open_dataset(source, space=space) for source in (data if several else [data])]


class _Encoder:
    """Encodes chunks with a tokenizer, for one embodiment."""

    def __init__(self, tokenizer: ActionTokenizer, embodiment: str, anchored: bool, progress: bool) -> None:
        self.tokenizer, self.embodiment, self.anchored, self.progress = tokenizer, embodiment, anchored, progress

    def encode(self, chunks: Chunks, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Codes int32 of all chunks, their offsets int64 [M + 1], and how many values were out of range or saturated."""
        flat, lengths = [], []
        counts = {"values": 0, "out_of_range": 0, "saturated": 0}
        starts = range(0, len(chunks), CHUNKS_AT_A_TIME)
        title = f"encoding {name}"
        for first in tqdm(starts, desc=title, unit="batch", file=sys.stderr, delay=2, disable=not self.progress):
            batch = chunks.batch(np.arange(first, min(first + CHUNKS_AT_A_TIME, len(chunks))))
            context = ChunkContext(
                horizon=chunks.horizon,
                embodiment=self.embodiment,
                anchor=batch.anchor if self.anchored else None,
                pad_mask=batch.pad_mask,
            )
            tokens = self.tokenizer.encode(batch.actions, context)
            flat.append(to_numpy(tokens.flat).astype(np.int32))
            lengths.append(np.asarray(tokens.lengths))
            counts["values"] += int((~batch.pad_mask).sum()) * batch.actions.shape[2]
            counts["out_of_range"] += int(np.sum(tokens.out_of_range))
            counts["saturated"] += int(np.sum(tokens.saturated))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        return np.concatenate(flat), offsets, counts


def _sources(dataset: EpisodeDataset, rate_hz: float | None) -> np.ndarray:
    """The dataset's frame that each frame of its cache at that rate shows."""
    lengths = [int(n) for n in dataset.lengths]
    if rate_hz is None:
        return np.arange(sum(lengths))
    offsets = np.cumsum([0, *lengths])
    return np.concatenate(
        [start + states_at(n, dataset.space.rate_hz, rate_hz) for start, n in zip(offsets, lengths, strict=False)]
    )


def _embodiment(tokenizer: ActionTokenizer, caches: Sequence[FrameCache]) -> str:
    """The tokenizer's embodiment that all datasets are of, at its rate."""
    found = [tokenizer.embodiment_for(cache.space) for cache in caches]
    if len(set(found)) > 1:
        told = ", ".join(f"{robot} ({cache.name})" for robot, cache in zip(found, caches, strict=True))
        raise SpaceMismatchError(
            f"the datasets are of several robots: {told}; a policy drives one, so train one for each"
        )
    embodiment = found[0]
    rate = tokenizer.spaces[embodiment].rate_hz
    for cache in caches:
        other = cache.space.rate_hz
        if rate is not None and other is not None and other != rate:
            raise SpaceMismatchError(
                f"dataset {cache.name!r} has {other:g} actions a second, the tokenizer was fitted at {rate:g}; resample the"
                f" data (--rate {rate:g}), or fit the tokenizer on them at their own rate"
            )
    return embodiment


def _proprio_statistics(
    caches: Sequence[FrameCache], episodes: Sequence[np.ndarray], *, blind: bool
) -> Statistics | None:
    """Of the states of these episodes; None where there are no states, which is refused where no camera looks either."""
    widths = [0 if c.proprio is None else c.proprio.shape[1] for c in caches]
    if len(set(widths)) > 1:
        told = ", ".join(f"{width} ({cache.name})" for width, cache in zip(widths, caches, strict=True))
        raise DataError(f"the datasets' states have different sizes: {told}; train on those of one size")
    if not (width := widths[0]):
        if blind:
            raise DataError(
                f"dataset {caches[0].name!r} has no state and no views are named, so the policy would see nothing; name"
                " views (--views), or give data with proprioception"
            )
        return None
    accumulator = StatisticsAccumulator(width)
    for cache, chosen in zip(caches, episodes, strict=True):
        assert cache.proprio is not None
        for e in chosen:
            accumulator.update(cache.proprio[cache.offsets[e] : cache.offsets[e + 1]])
    return accumulator.result()


def _in_order(ids: np.ndarray) -> list[int]:
    """Distinct ids in the order of their first occurrence."""
    found, first = np.unique(ids, return_index=True)
    return [int(i) for i in found[np.argsort(first)]]
