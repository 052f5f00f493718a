"""Chunks of one dataset with what was going on in each, for training and test: what semantic figures are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core import ActionSpace, ChunkContext, DataError
from actok.signal.normalise import Normaliser

__all__ = ["LabelledChunks", "LabelledData"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledChunks:
    """Chunks of one dataset in raw units, with what was going on in each.

    Attributes:
        actions: float32 [B, T, D].
        pad_mask: bool [B, T], True where padded.
        episode: int64 [B] index in the dataset.
        labels: label name -> int64 [B] number, -1 where unknown.
        anchor: [B, P] proprioception at the starts, or None.
        features: float32 [B, F], the teacher's features averaged over the chunk's frames, or None.
    """

    actions: Float[np.ndarray, "B T D"]
    pad_mask: Bool[np.ndarray, "B T"]
    episode: Int[np.ndarray, "B"]
    labels: Mapping[str, Int[np.ndarray, "B"]]
    anchor: np.ndarray | None = None
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def take(self, rows: Int[np.ndarray, "_"]) -> LabelledChunks:
        """These chunks, in this order."""
        return LabelledChunks(
            actions=self.actions[rows],
            pad_mask=self.pad_mask[rows],
            episode=self.episode[rows],
            labels={k: v[rows] for k, v in self.labels.items()},
            anchor=None if self.anchor is None else self.anchor[rows],
            features=None if self.features is None else self.features[rows],
        )

    def context(self, embodiment: str | None) -> ChunkContext:
        """What a tokenizer may know of them."""
        return ChunkContext(
            horizon=self.actions.shape[1], embodiment=embodiment, anchor=self.anchor, pad_mask=self.pad_mask
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledData:
    """Training and test chunks of disjoint episodes, and how to read them.

    Attributes:
        train, test: chunks with the same labels.
        names: label name -> what its numbers are called.
        space: action space.
        normaliser: the ruler, made from the training split.
    """

    train: LabelledChunks
    test: LabelledChunks
    names: Mapping[str, tuple[str, ...]]
    space: ActionSpace
    normaliser: Normaliser

    def __post_init__(self) -> None:
        if shared := set(self.train.episode.tolist()) & set(self.test.episode.tolist()):
            raise DataError(
                f"episode {min(shared)} is in the training and in the test chunks; split by episode, as"
                " actok.data.split_dataset does"
            )
        for name in self.names:
            if name not in self.train.labels or name not in self.test.labels:
                raise DataError(f"label {name!r} has names but no numbers; give it for training and test chunks")
