"""The network inside a learned tokenizer: chunks to latents, latents to codes, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ActionSpace, CodecBatch, CodecOutput
from actok.quantizers import Quantizer

__all__ = ["Codec", "CodecShape", "dct_matrix", "masked_mean", "weights"]


@dataclass(frozen=True, kw_only=True)
class CodecShape:
    """Facts about the training data that a codec's size depends on.

    Attributes:
        horizon: T of its window.
        channels: D, the largest of the training embodiments.
        embodiments: those it is trained on, in order; the i-th has index i + 1 in `CodecBatch.embodiment`.
        extra: whatever `Codec.measure` found.
    """

    horizon: int
    channels: int
    embodiments: tuple[str, ...]
    extra: Mapping[str, int] = field(default_factory=dict)


class Codec(nn.Module, ABC):
    """A trainable codec. A subclass sets `self.quantizer` and defines `encode` and `decode`.

    Args of every subclass: config (its tokenizer's), shape (CodecShape).

    Class attributes:
        order: which comes first in a token sequence. "level": all slots of level 0, then of level 1, ... (index
            q * S + s: FASTerVQ's codebook, then horizon, then part); "slot": all levels of slot 0, then of slot 1, ...
            (index s * Q + q: X-Tokenizer's raster).
        reads_state: whether `CodecBatch.state` is filled for it.
    """

    order: ClassVar[Literal["level", "slot"]] = "level"
    reads_state: ClassVar[bool] = False
    quantizer: Quantizer

    # -- what a paper defines -------------------------------------------------------------------------------------

    @classmethod
    def measure(cls, config: Any, spaces: Sequence[ActionSpace]) -> dict[str, int]:
        """Sizes that follow from the action spaces trained on, for `CodecShape.extra`."""
        return {}

    @classmethod
    def structure(cls, config: Any, space: ActionSpace, shape: CodecShape) -> dict[str, np.ndarray]:
        """Tables about an embodiment that `encode` and `decode` read from `CodecBatch.structure`.

        Raises SpaceMismatchError where this codec cannot serve the space.
        """
        return {}

    def slot_steps(self, steps: int) -> Int[np.ndarray, "S 2"] | None:
        """First step and one past the last that each slot of a chunk of `steps` stands for.

        None where slots are no spans of time; what aligns slots with frames is then left out (`actok.alignment`).
        """
        return None

    @abstractmethod
    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """Latents before quantisation."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """Normalised actions from (quantised) latents. Of `batch`, `real` and the values of `actions` are not read."""

    def reconstruction_losses(self, batch: CodecBatch, reconstruction: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Weighted losses by name; mean absolute error over real steps and present channels unless overridden."""
        return {"l1": masked_mean((reconstruction - batch.actions).abs(), weights(batch))}

    # -- what all share -------------------------------------------------------------------------------------------

    def forward(self, batch: CodecBatch) -> CodecOutput:
        """Everything training needs of a batch."""
        latents = self.encode(batch)
        found = self.quantizer(latents)
        reconstruction = self.decode(found.quantised, batch) * batch.present[:, None]
        return CodecOutput(
            latents=latents,
            quantised=found.quantised,
            level_vectors=found.level_vectors,
            codes=found.codes,
            reconstruction=reconstruction,
            losses={**self.reconstruction_losses(batch, reconstruction), **found.losses},
            usage=found.usage,
        )

    def tokenize(self, batch: CodecBatch) -> Int[Tensor, "B N"]:
        """Codes in the order of the token sequence."""
        codes = self.quantizer.encode(self.encode(batch))
        return (codes.transpose(1, 2) if self.order == "level" else codes).flatten(1)

    def detokenize(self, ids: Int[Tensor, "B N"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """Normalised actions from a sequence of codes, 0 where a channel is absent."""
        levels, slots = self.quantizer.levels, ids.shape[1] // self.quantizer.levels
        if self.order == "level":
            codes = ids.unflatten(1, (levels, slots)).transpose(1, 2)
        else:
            codes = ids.unflatten(1, (slots, levels))
        return self.decode(self.quantizer.lookup(codes), batch) * batch.present[:, None]


def weights(batch: CodecBatch) -> Bool[Tensor, "B T D"]:
    """True where a value counts: real step, present channel."""
    return batch.real[:, :, None] & batch.present[:, None, :]


def masked_mean(values: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T D"]) -> Float[Tensor, ""]:
    """Mean over the entries where `mask` is True; 0 where there is none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def dct_matrix(steps: int, device: Any = None) -> Float[Tensor, "{steps} {steps}"]:
    """Orthonormal DCT-II of `steps` samples as a matrix: coefficients = matrix @ signal."""
    k = torch.arange(steps, dtype=torch.float64, device=device)
    matrix = torch.cos(torch.pi / steps * (k[None] + 0.5) * k[:, None]) * (2 / steps) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix.float()
