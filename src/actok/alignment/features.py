"""A teacher's features of a batch of chunks. Fields are torch tensors; this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FeatureBatch", "join_features"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureBatch:
    """What a frozen foundation model saw while the chunks of a batch were executed. F is the teacher's width.

    Attributes:
        whole: float32 [B, F], mean over the chunk's real frames.
        slots: float32 [B, S, F], mean over the real frames of each slot (0 where it has none), or None where the codec's
            slots are no spans of time (`Codec.slot_steps`).
        slot_known: bool [B, S], False where a slot has no real frame; None as `slots` is.
        varies: bool [B], True where the features change within the chunk.
        group: int64 [B], equal for chunks whose features are identical.
        next: float32 [B, F], of the frame right after the chunk; 0 where the episode ends before.
        has_next: bool [B].
    """

    whole: Any
    slots: Any
    slot_known: Any
    varies: Any
    group: Any
    next: Any
    has_next: Any

    def __len__(self) -> int:
        return len(self.whole)

    def to(self, device: Any) -> FeatureBatch:
        """The same batch on another device."""
        return FeatureBatch(
            **{k: None if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()}
        )


def join_features(batches: Sequence[FeatureBatch]) -> FeatureBatch:
    """One batch of several, e.g. of different datasets, in this order."""
    if len(batches) == 1:
        return batches[0]
    import torch

    values = {}
    for name in vars(batches[0]):
        parts = [getattr(b, name) for b in batches]
        values[name] = None if parts[0] is None else torch.cat(parts)
    return FeatureBatch(**values)
