"""What goes through a learned codec, batch by batch. Fields are torch tensors; this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CodecBatch", "CodecOutput"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodecBatch:
    """Chunks as a learned codec sees them: normalised, in the channels of the codec, possibly of several embodiments.

    D is the codec's number of channels, the largest of its training embodiments; narrower actions are filled up with
    zeros, which `present` tells apart.

    Attributes:
        actions: float32 [B, T, D], normalised; 0 where absent; padded steps hold the canonical padding.
        present: bool [B, D], False where the embodiment has no such channel.
        real: bool [B, T], False on padded steps, which count in no loss.
        embodiment: int64 [B]: 0 where unknown to the codec, i where it is the i-th of those it was trained on.
        structure: tables that the codec asked for (`Codec.structure`), each [B, ...].
        state: float32 [B, P], normalised proprioception at the chunk's start, 0 where absent; None for codecs that read
            none (`Codec.reads_state`).
        has_state: bool [B], False where the state of a chunk is unknown; None as `state` is.
    """

    actions: Any
    present: Any
    real: Any
    embodiment: Any
    structure: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None
    has_state: Any = None

    def __len__(self) -> int:
        return len(self.actions)

    def to(self, device: Any) -> CodecBatch:
        """The same batch on another device."""
        return CodecBatch(
            actions=self.actions.to(device, non_blocking=True),
            present=self.present.to(device, non_blocking=True),
            real=self.real.to(device, non_blocking=True),
            embodiment=self.embodiment.to(device, non_blocking=True),
            structure={k: v.to(device, non_blocking=True) for k, v in self.structure.items()},
            state=None if self.state is None else self.state.to(device, non_blocking=True),
            has_state=None if self.has_state is None else self.has_state.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CodecOutput:
    """What a forward pass in training gives; alignment objectives read it.

    Attributes:
        latents: [B, S, C] before quantisation.
        quantised: [B, S, C], gradients passing straight through.
        level_vectors: [B, S, Q, C], what each level adds.
        codes: int64 [B, S, Q].
        reconstruction: [B, T, D], normalised, 0 where a channel is absent.
        losses: scalars by name, weighted; their sum is the training loss.
        usage: `actok.quantizers.Usage` of the batch, or None where the codec has no codebook.
    """

    latents: Any
    quantised: Any
    level_vectors: Any
    codes: Any
    reconstruction: Any
    losses: Mapping[str, Any]
    usage: Any = None
