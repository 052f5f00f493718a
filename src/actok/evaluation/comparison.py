"""Held-out chunks beside what a tokenizer made of them: the one input of every error metric."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from actok.core import ActionSpace, DataError
from actok.signal.normalise import Normaliser

__all__ = ["Comparison"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Original and reconstructed chunks of one space, and the ruler they are measured with.

    Every tokenizer of a comparison is given the same `normaliser` (made from the training split), never its own, so
    that errors in normalised units mean the same for all.

    Attributes:
        reference: [B, T, D] raw units, finite.
        reconstruction: [B, T, D] raw units; NaN throughout a chunk that did not decode.
        space: what the dimensions mean.
        normaliser: raw units -> normalised units.
        pad_mask: [B, T] bool, True where the step is padding, or None.
        dof_mask: [B, D] bool, True where the dimension is present, or None.

    Raises DataError where shapes disagree, the reference is not finite, a reconstruction is non-finite in parts of a
    chunk only, or no step is left to judge.
    """

    reference: np.ndarray
    reconstruction: np.ndarray
    space: ActionSpace
    normaliser: Normaliser
    pad_mask: np.ndarray | None = None
    dof_mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("reference", "reconstruction"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        shape = self.reference.shape
        if len(shape) != 3 or self.reconstruction.shape != shape:
            raise DataError(
                f"chunks {shape} and their reconstruction {self.reconstruction.shape} disagree; give both as [B, T, D]"
            )
        if shape[2] != self.space.dim or shape[2] != self.normaliser.dim:
            raise DataError(
                f"chunks have {shape[2]} dimensions, the space {self.space.dim} and the normaliser"
                f" {self.normaliser.dim}; give those of one dataset"
            )
        for name, expected in (("pad_mask", shape[:2]), ("dof_mask", (shape[0], shape[2]))):
            mask = getattr(self, name)
            if mask is not None and (np.asarray(mask).shape != expected or np.asarray(mask).dtype != bool):
                raise DataError(
                    f"{name} has dtype {np.asarray(mask).dtype} and shape {np.asarray(mask).shape}; give bool {expected}"
                )
        if not np.isfinite(self.reference).all():
            raise DataError("the chunks to judge hold non-finite values; drop or repair these steps")
        finite = np.isfinite(self.reconstruction)
        if (finite.any((1, 2)) != finite.all((1, 2))).any():
            b = int(np.argmax(finite.any((1, 2)) != finite.all((1, 2))))
            raise DataError(f"reconstruction of chunk {b} is non-finite in places; an undecodable chunk is all NaN")
        if not self.steps.any():
            raise DataError("every step is padding, so nothing is left to judge; give at least one real step")

    @cached_property
    def steps(self) -> Bool[np.ndarray, "B T"]:
        """bool [B, T]: the real steps."""
        if self.pad_mask is None:
            return np.ones(self.reference.shape[:2], bool)
        return ~np.asarray(self.pad_mask)

    @cached_property
    def present(self) -> Bool[np.ndarray, "B D"]:
        """bool [B, D]: the present dimensions."""
        if self.dof_mask is None:
            return np.ones((self.reference.shape[0], self.reference.shape[2]), bool)
        return np.asarray(self.dof_mask)

    @cached_property
    def decoded(self) -> Bool[np.ndarray, "B"]:
        """bool [B]: the chunks that decoded."""
        return np.isfinite(self.reconstruction).all((1, 2))

    @cached_property
    def scored(self) -> Bool[np.ndarray, "B D"]:
        """bool [B, D]: present dimensions with a normalised unit.

        A dimension that never changed in the training split has none (its range is a point); it is judged in physical
        units only.
        """
        return self.present & ~self.normaliser.constant

    @cached_property
    def executed(self) -> tuple[np.ndarray, np.ndarray]:
        """Reference and reconstruction [B, T, D] as the robot executes them: inside the limits that the space states.

        A controller that clips at 1 does the same on 3.75 as on 1, so between them there is no physical error.
        """
        low = -np.inf if self.space.low is None else np.asarray(self.space.low)
        high = np.inf if self.space.high is None else np.asarray(self.space.high)
        return np.clip(self.reference, low, high), np.clip(self.reconstruction, low, high)

    @cached_property
    def difference(self) -> Float[np.ndarray, "B T D"]:
        """[B, T, D] reconstruction - reference in normalised units; NaN where a chunk did not decode."""
        return (self.reconstruction - self.reference) / self.normaliser.half
