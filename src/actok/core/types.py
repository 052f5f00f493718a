"""What goes into a tokenizer and what comes out.

Shape letters, used in every signature and docstring: B batch, T time steps of a chunk (horizon), D action dimensions,
S token slots, Q quantiser levels, K codes per codebook, C latent channels, V vocabulary size, N tokens of a sequence,
P numbers of proprioception.

Signatures state them through jaxtyping, `Float[np.ndarray, "B T D"]`; tests check them on every call, nothing else does.
There, `_` is a length of no consequence, `...` or `*batch` any number of leading axes, `{steps}` the value of an argument,
and `ends` the B + 1 entries of offsets (so that B is `ends-1`). A parameter that a function checks by itself, to refuse
it with an ActokError, stays an `np.ndarray`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actok.core.spaces import ActionSpace

__all__ = ["ChunkContext", "Decoded", "FitPart", "Tokens"]


@dataclass(frozen=True, kw_only=True)
class ChunkContext:
    """What a tokenizer may know about a batch besides the numbers.

    Attributes:
        horizon: T to decode to; None means the fitted horizon.
        embodiment: whose normaliser and layout apply; None means the tokenizer's default.
        anchor: [B, P] proprioception at the start of each chunk, in the action's raw units where P = D.
        dof_mask: [B, D] bool, True where the dimension is present. Absent dimensions decode to 0.
        pad_mask: [B, T] bool, True where the step is padding beyond the episode's end.
    """

    horizon: int | None = None
    embodiment: str | None = None
    anchor: Any = None
    dof_mask: Any = None
    pad_mask: Any = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Encoded chunks.

    Attributes:
        flat: all ids in one array (NumPy int64, or a torch tensor where the input was one).
        offsets: [B + 1]; sequence b is flat[offsets[b]:offsets[b + 1]].
        horizon: T of the encoded chunks.
        fixed_length: N where every sequence has the same length by construction, else None.
        context: as given to `encode`.
        out_of_range: [B] how many values lay outside the normaliser's range.
        saturated: [B] how many values the codec itself had to clamp (0 where it represents them as they are).
    """

    flat: Any
    offsets: np.ndarray
    horizon: int
    fixed_length: int | None
    out_of_range: np.ndarray
    saturated: np.ndarray
    context: ChunkContext | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[Any]:
        for b in range(len(self)):
            yield self.flat[self.offsets[b] : self.offsets[b + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def ids(self) -> Any:
        """[B, N] where the length is fixed, else a list of one-dimensional arrays."""
        if self.fixed_length is not None:
            return self.flat.reshape(len(self), self.fixed_length)
        return list(self)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Decoded chunks.

    Attributes:
        actions: [B, T, D] in raw units; where `valid` is False and nothing was repaired, NaN, so that it cannot be
            executed by mistake.
        valid: [B] bool; True where the sequence decodes to a chunk of the asked horizon within stated bounds.
        slots_used: [B] how many ids were consumed.
        clipped: [B] how many decoded values were moved back inside the limits of the action space.
        repaired: [B] bool; True where an explicitly asked repair mode made up for an invalid sequence.
        reasons: one entry per chunk; None where valid, else what was wrong in words.
    """

    actions: Any
    valid: np.ndarray
    slots_used: np.ndarray
    clipped: np.ndarray
    repaired: np.ndarray
    reasons: list[str | None] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FitPart:
    """Chunks of one embodiment to fit on. `statistics` (actok.signal.statistics.Statistics) is of the whole training data.

    Attributes:
        actions: float32 [B, T, D], finite, raw units, padding already filled as the space asks for.
        space: their action space.
        statistics: per-dimension statistics that the normaliser is made from; None: computed from `actions`.
        pad_mask: [B, T] bool, True where padded, or None.
        anchor: float32 [B, P] proprioception at the chunks' starts, or None.
    """

    actions: np.ndarray
    space: ActionSpace
    statistics: Any = None
    pad_mask: np.ndarray | None = None
    anchor: np.ndarray | None = None
