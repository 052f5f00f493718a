"""From sources to held-out chunks: opened, split by episode, cut, and summarised for the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark.measure import HeldOut
from actok.core import ActionSpace, DataError, FitPart
from actok.data import Chunks, EpisodeDataset, FrameCache, open_dataset, split_dataset
from actok.signal.normalise import Normaliser
from actok.training.fitting import FRACTIONS

__all__ = ["Prepared", "prepare", "thin"]


class Prepared:
    """One dataset, ready: `held_out` to measure on, `facts` for results.json, `key` its identity, its frames and split.

    The split is the one of `actok.fit` at the same seed, so a tokenizer fitted there has not seen the test episodes.
    Chunks start at every step of an episode, as a policy meets them, and are thinned evenly where there are more than
    asked for.
    """

    def __init__(
        self,
        source: Any,
        *,
        space: str | Path | ActionSpace | None,
        horizon: int | None,
        seed: int,
        max_chunks: int,
        max_fit_chunks: int,
        tolerances: Sequence[float],
        name: str | None = None,
    ) -> None:
        self.dataset: EpisodeDataset = open_dataset(source, space=space, name=name)
        dataset = self.dataset
        self.cache = cache = FrameCache.build(dataset)
        self.split = split = split_dataset(dataset, fractions=FRACTIONS, seed=seed)
        if not len(split.test):
            raise DataError(f"{dataset.name} has {len(dataset)} episodes, too few to hold one out; give at least two")
        self.test_episodes: list[int] = split.test.tolist()
        steps = dataset.space.default_horizon if horizon is None else horizon
        statistics = cache.statistics(split.train)
        train_pool, test_pool = Chunks(cache, steps, split.train), Chunks(cache, steps, split.test)
        train, test = (
            pool.batch(thin(len(pool), most)) for pool, most in ((train_pool, max_fit_chunks), (test_pool, max_chunks))
        )
        self.held_out = HeldOut(
            name=dataset.name,
            space=dataset.space,
            train=FitPart(
                actions=train.actions,
                space=dataset.space,
                statistics=statistics,
                pad_mask=train.pad_mask if train.pad_mask.any() else None,
            ),
            test=test.actions,
            pad_mask=test.pad_mask,
            anchor=test.anchor,
            train_anchor=train.anchor,
            normaliser=Normaliser.make("quantile", statistics),
            tolerances=tolerances,
        )
        self.key = self._identity(seed)
        self.facts = self._facts(source, split, len(train_pool), len(test_pool))

    @property
    def horizon(self) -> int:
        """T."""
        return int(self.held_out.test.shape[1])

    def _identity(self, seed: int) -> str:
        """sha256 over everything that figures on this dataset can depend on."""
        data = self.held_out
        facts = [data.name, data.space.to_dict(), data.statistics.to_dict(), list(data.tolerances), seed]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for array in (data.train.actions, data.test, data.pad_mask, data.anchor, data.train_anchor):
            if array is not None:
                digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _facts(self, source: Any, split: Any, train_chunks: int, test_chunks: int) -> dict[str, Any]:
        data, space = self.held_out, self.held_out.space
        rows = data.example_rows()
        constant = data.normaliser.constant
        return {
            "name": data.name,
            "source": Path(source).name if isinstance(source, (str, Path)) else type(source).__name__,
            "identity": self.key,
            "space": space.to_dict(),
            "space_origin": self.dataset.space_origin,
            "horizon": self.horizon,
            "seconds": None if space.rate_hz is None else self.horizon / space.rate_hz,
            "frames": int(np.sum(self.dataset.lengths)),
            "episodes": {k: len(getattr(split, k)) for k in ("train", "validation", "test")},
            "train_chunks": {"used": len(data.train.actions), "of": train_chunks},
            "test_chunks": {"used": len(data.test), "of": test_chunks},
            "constant": [space.names[d] for d in np.flatnonzero(constant)],
            "normaliser": {
                "kind": data.normaliser.kind,
                "centre": data.normaliser.centre.tolist(),
                "half": data.normaliser.half.tolist(),
            },
            "tolerances": list(data.tolerances),
            "examples": {
                "rows": rows,
                "reference": data.test[rows].tolist(),
                "real_steps": (~data.pad_mask[rows]).sum(1).tolist(),
            },
        }


def prepare(sources: Sequence[Any], spaces: Any, **options: Any) -> list[Prepared]:
    """Open every source; `spaces` is one space for all or a list with one (or None) each. Names are made unique."""
    each = list(spaces) if isinstance(spaces, (list, tuple)) else [spaces] * len(sources)
    if len(each) != len(sources):
        raise DataError(
            f"{len(each)} action spaces are given for {len(sources)} datasets; give one each, or one for all"
        )
    found: list[Prepared] = []
    for source, space in zip(sources, each, strict=True):
        one = Prepared(source, space=space, **options)
        taken = {p.held_out.name for p in found}
        if (name := one.held_out.name) in taken:
            number = next(n for n in range(2, len(sources) + 2) if f"{name}-{n}" not in taken)
            one = Prepared(source, space=space, name=f"{name}-{number}", **options)
        found.append(one)
    return found


def thin(count: int, most: int) -> np.ndarray:
    """At most `most` indices of `count`, evenly spread."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))
