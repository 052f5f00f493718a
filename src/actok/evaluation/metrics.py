"""Codec metrics in normalised units, valid reconstruction rate, smoothness and range. Formulas: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from actok.core import Decoded, Tokens
from actok.evaluation.comparison import Comparison
from actok.evaluation.physical import angular_error, position_error

__all__ = [
    "TOLERANCES",
    "Jerk",
    "NormalisedError",
    "RangeUse",
    "ValidReconstruction",
    "jerk",
    "normalised_error",
    "range_use",
    "valid_reconstruction",
]

# From a tenth of the finest tolerance that FASTer reports (1e-3) to 1, four to a decade; 1e-3, 1e-2 and 1e-1 are in it.
TOLERANCES: tuple[float, ...] = tuple(float(f"{v:.6g}") for v in np.logspace(-4, 0, 17))


@dataclass(frozen=True, kw_only=True)
class NormalisedError:
    """Errors in normalised units over real steps, present dimensions that vary, and chunks that decoded.

    Attributes:
        l1: mean |error|; None where no chunk decoded.
        mse: mean squared error.
        maximum: largest |error|.
        l1_by_dim: [D] mean |error| of each dimension, None for one that is absent or constant.
        undecodable: share of chunks that did not decode. They are in no other figure here.
    """

    l1: float | None
    mse: float | None
    maximum: float | None
    l1_by_dim: tuple[float | None, ...]
    undecodable: float


def normalised_error(comparison: Comparison) -> NormalisedError:
    """Mean absolute, mean squared and largest error. One normalised unit is half the range of the normaliser."""
    c = comparison
    mask = c.steps[:, :, None] & c.scored[:, None, :] & c.decoded[:, None, None]
    error = np.abs(np.where(mask, c.difference, 0.0))
    count = mask.sum((0, 1))
    total = int(count.sum())
    by_dim = error.sum((0, 1)) / np.maximum(count, 1)
    return NormalisedError(
        l1=float(error.sum() / total) if total else None,
        mse=float((error**2).sum() / total) if total else None,
        maximum=float(error.max()) if total else None,
        l1_by_dim=tuple(float(v) if n else None for v, n in zip(by_dim, count, strict=True)),
        undecodable=float(1 - c.decoded.mean()),
    )


@dataclass(frozen=True, kw_only=True)
class ValidReconstruction:
    """Share of time steps reconstructed within a tolerance, for each tolerance.

    Attributes:
        tolerances: sigma, as given.
        literal: eq. (4) as printed: l1 norm over the present dimensions in normalised units.
        position: Euclidean error in metres, for spaces with position groups of known scale, else None.
        angle: angular error in radians, for spaces with rotation or joint groups of known scale, else None.
    """

    tolerances: tuple[float, ...]
    literal: tuple[float, ...]
    position: tuple[float, ...] | None
    angle: tuple[float, ...] | None


def valid_reconstruction(comparison: Comparison, tolerances: Sequence[float] = TOLERANCES) -> ValidReconstruction:
    """Valid Reconstruction Rate, FASTer (arXiv 2512.04952) eq. (4): N_valid / N_total, strictly below sigma.

    An "action" of the paper is one real time step. Its text gives sigma two readings and both are here: the formula's
    l1 norm over the action vector (`literal`), and metres or radians of the end effector or joints (`position`,
    `angle`). With several groups (two arms) a step is valid when each of them is within sigma; with joints, when each
    joint is. A step of a chunk that did not decode is never valid.
    """
    c = comparison
    summed = np.where(c.scored[:, None, :], np.abs(c.difference), 0.0).sum(2)

    def rate(error: Float[np.ndarray, "B T"] | None) -> tuple[float, ...] | None:
        if error is None:
            return None
        judged = c.steps & ~np.isneginf(error)  # -inf: no such group is present in that chunk
        if not judged.any():
            return None
        values = np.sort(np.where(c.decoded[:, None], error, np.inf)[judged])
        return tuple(float(v) for v in np.searchsorted(values, np.asarray(tolerances), side="left") / len(values))

    literal = rate(summed)
    assert literal is not None  # a Comparison has at least one real step
    return ValidReconstruction(
        tolerances=tuple(float(t) for t in tolerances),
        literal=literal,
        position=rate(position_error(c)),
        angle=rate(angular_error(c)),
    )


@dataclass(frozen=True, kw_only=True)
class Jerk:
    """Mean absolute third difference of the path in normalised units per step^3, and their ratio.

    `ratio` above 1 means rougher than the demonstration. All None where no chunk has enough real steps, `ratio` also
    where the demonstration has no jerk at all.
    """

    reference: float | None
    reconstruction: float | None
    ratio: float | None


def jerk(comparison: Comparison) -> Jerk:
    """Smoothness of the reconstruction against the original's.

    An absolute or relative dimension is differenced three times along time; a delta or velocity dimension, which is
    already a first difference of the path, twice. Windows that touch padding or an undecodable chunk are left out of
    both figures. Rotations are differenced coordinate by coordinate.
    """
    c = comparison
    sums, count = np.zeros(2), 0
    for incremental, order in ((False, 3), (True, 2)):
        dims = np.flatnonzero(np.array(c.space.incremental) == incremental)
        if not len(dims) or c.reference.shape[1] <= order:
            continue
        window = c.steps[:, order:].copy()
        for shift in range(order):
            window &= c.steps[:, shift : shift - order]
        mask = window[:, :, None] & c.scored[:, None, dims] & c.decoded[:, None, None]
        for i, chunks in enumerate((c.reference, c.reconstruction)):
            third = np.diff(chunks[:, :, dims] / c.normaliser.half[dims], n=order, axis=1)
            sums[i] += np.abs(third[mask]).sum()
        count += int(mask.sum())
    if not count:
        return Jerk(reference=None, reconstruction=None, ratio=None)
    before, after = (float(v) for v in sums / count)
    return Jerk(reference=before, reconstruction=after, ratio=after / before if before > 0 else None)


@dataclass(frozen=True, kw_only=True)
class RangeUse:
    """How often values left the range, as fractions.

    Attributes:
        out_of_range: of the real values given to `encode`, outside the tokenizer's own normaliser's range.
        saturated: values the codec clamped, per value of a chunk (T x D).
        clipped: decoded values moved back inside the space's limits, per value of a decoded chunk.
    """

    out_of_range: float
    saturated: float
    clipped: float


def range_use(tokens: Tokens, decoded: Decoded, comparison: Comparison) -> RangeUse:
    """Fractions from the counts that `encode` and `decode` return."""
    c = comparison
    _, steps, dims = c.reference.shape
    real = int((c.steps[:, :, None] & c.present[:, None, :]).sum())
    values = len(c.reference) * steps * dims
    usable = max(1, int(c.decoded.sum())) * steps * dims
    return RangeUse(
        out_of_range=float(np.sum(tokens.out_of_range) / real),
        saturated=float(np.sum(tokens.saturated) / values),
        clipped=float(np.sum(decoded.clipped) / usable),
    )
