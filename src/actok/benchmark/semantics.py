"""Labelled chunks of a prepared dataset, and the semantic figures of a tokenizer on them."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from actok.benchmark.measure import HeldOut
from actok.benchmark.prepare import Prepared, thin
from actok.core import ActionTokenizer
from actok.data import Chunks
from actok.data.instructions import FrameLabels, chunk_labels
from actok.evaluation.labelled import LabelledChunks, LabelledData
from actok.evaluation.semantics import measure_semantics, raw_probes, raw_retrieval

# Chunks that probes and maps from words are fitted on, and that they are judged on.
TRAIN_CHUNKS, TEST_CHUNKS = 3000, 2000
LABELS = ("task", "instruction", "phase", "verb")

__all__ = ["LabelledSource", "label_chunks"]


class LabelledSource:
    """One prepared dataset with labels, and with a teacher's features where a folder of them is given.

    Labels are read, and features opened, at once, so that missing ones are an error before anything is measured; chunks
    are cut when the first tokenizer is measured.
    """

    def __init__(self, prepared: Prepared, features: str | Path | None) -> None:
        self.prepared = prepared
        self.labels = chunk_labels(prepared.dataset)
        self.store: Any = None
        if features is not None:
            from actok.training.semantic import open_features

            self.store = open_features(features, prepared.dataset, None)

    @cached_property
    def key(self) -> str:
        """sha256 over the labels and the identity of the features, beside the dataset's own key."""
        digest = hashlib.sha256(f"{self.prepared.key} {TRAIN_CHUNKS} {TEST_CHUNKS}".encode())
        for name in LABELS:
            labels = getattr(self.labels, name)
            digest.update(repr((name, labels.names)).encode() + np.ascontiguousarray(labels.ids).tobytes())
        if self.store is not None:
            digest.update(np.ascontiguousarray(self.store.hashes).tobytes())
            digest.update(np.ascontiguousarray(self.store.frame_rows).tobytes())
        return digest.hexdigest()

    @cached_property
    def data(self) -> LabelledData:
        """Chunks of training and test episodes, evenly thinned."""
        held_out: HeldOut = self.prepared.held_out
        split, horizon = self.prepared.split, self.prepared.horizon
        train, test = (
            label_chunks(Chunks(self.prepared.cache, horizon, episodes), self.labels, most, self.store)
            for episodes, most in ((split.train, TRAIN_CHUNKS), (split.test, TEST_CHUNKS))
        )
        names = {n: getattr(self.labels, n).names for n in LABELS if getattr(self.labels, n).names}
        return LabelledData(train=train, test=test, names=names, space=held_out.space, normaliser=held_out.normaliser)

    def measure(self, serving: tuple[ActionTokenizer, str, bool], *, seed: int) -> dict[str, Any]:
        """The figures of a tokenizer; `serving` is what `embodiment_for` gives."""
        tokenizer, embodiment, _ = serving
        return {"figures": measure_semantics(tokenizer, self.data, embodiment, seed=seed)}

    def facts(self, *, seed: int) -> dict[str, Any]:
        """What every tokenizer of this dataset is compared with."""
        data = self.data
        found = raw_retrieval(data, seed=seed)
        return {
            "names": data.names,
            "train_chunks": len(data.train),
            "test_chunks": len(data.test),
            "teacher": None if self.store is None else self.store.teacher,
            "raw": raw_probes(data, seed=seed),
            "raw_retrieval": None if isinstance(found, str) else found,
        }


def label_chunks(pool: Chunks, labels: FrameLabels, most: int, features: Any = None) -> LabelledChunks:
    """At most `most` chunks, evenly spread over the pool, each with the label that most of its real frames have.

    A frame without a label has no say; where two labels have as many frames the earlier one counts. `features` is the
    `FeatureStore` of the same dataset, or None.
    """
    batch = pool.batch(thin(len(pool), most))
    first = labels.offsets[batch.episode] + batch.start
    last = labels.offsets[batch.episode + 1] - 1
    frames = np.minimum(first[:, None] + np.arange(pool.horizon), last[:, None])
    found = {}
    for name in LABELS:
        ids = np.where(batch.pad_mask, -1, getattr(labels, name).ids[frames]).astype(np.int64)
        votes = ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]).sum(2)
        found[name] = np.take_along_axis(ids, votes.argmax(1)[:, None], 1)[:, 0]
    whole = None
    if features is not None:
        whole = features.chunk(batch.episode, batch.start, pool.horizon, None, ~batch.pad_mask).whole.numpy()
    return LabelledChunks(
        actions=batch.actions,
        pad_mask=batch.pad_mask,
        episode=batch.episode,
        labels=found,
        anchor=batch.anchor,
        features=whole,
    )
