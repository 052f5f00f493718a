"""Errors in millimetres and degrees, group by group of the action space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from actok.core import ActionGroup
from actok.evaluation.comparison import Comparison
from actok.signal.conversions import ANGLES, accumulate, path_space
from actok.signal.rotations import rotation_distance

# Unit of a group -> unit and factor in reports. Anything else is reported as it is.
REPORTED: dict[str, tuple[str, float]] = {
    "m": ("mm", 1e3),
    "m/s": ("mm/s", 1e3),
    "rad": ("deg", 180 / np.pi),
    "rad/s": ("deg/s", 180 / np.pi),
}

__all__ = [
    "GroupError",
    "GroupValues",
    "Spread",
    "angular_error",
    "group_errors",
    "group_values",
    "position_error",
    "reported_unit",
]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, 95th percentile and maximum of an error."""

    mean: float
    p95: float
    maximum: float

    @classmethod
    def of(cls, values: Float[np.ndarray, "_"]) -> Spread | None:
        """Of an array of errors; None where it is empty."""
        if not values.size:
            return None
        return cls(mean=float(values.mean()), p95=float(np.quantile(values, 0.95)), maximum=float(values.max()))


@dataclass(frozen=True, kw_only=True)
class GroupError:
    """Error of one group of dimensions.

    Attributes:
        group, kind: as in the action space.
        measure: "euclidean" (one figure a step), "geodesic" (angle between rotations, one a step) or "absolute"
            (one figure a step and dimension).
        unit: "mm", "deg", "mm/s", "deg/s", "fraction", ... of `step`; "raw" where the scale is not known.
        step: over real steps of decoded chunks; None where there is none.
        path: for delta and velocity groups, the error of the accumulated path at every step; None for others, and
            for a velocity at an unknown rate.
        path_end: mean error of the path at the last real step of a chunk.
        path_unit: unit of `path` and `path_end`.
    """

    group: str
    kind: str
    measure: str
    unit: str
    step: Spread | None
    path: Spread | None
    path_end: float | None
    path_unit: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupValues:
    """The errors behind a GroupError, one number each: real steps of decoded chunks, in reported units.

    Attributes:
        group: of the action space.
        measure, unit, path_unit: as in GroupError.
        step: [n] errors of single steps.
        path: [n] errors of the accumulated path, or None.
        path_end: [chunks] errors of the path at each chunk's last real step, or None.
    """

    group: ActionGroup
    measure: str
    unit: str
    step: Float[np.ndarray, "_"]
    path: Float[np.ndarray, "_"] | None
    path_end: Float[np.ndarray, "_"] | None
    path_unit: str | None


def group_errors(comparison: Comparison) -> tuple[GroupError, ...]:
    """One GroupError for each group of the space, in its order: `group_values` summarised."""
    return tuple(
        GroupError(
            group=v.group.name,
            kind=v.group.kind,
            measure=v.measure,
            unit=v.unit,
            step=Spread.of(v.step),
            path=None if v.path is None else Spread.of(v.path),
            path_end=None if v.path_end is None or not v.path_end.size else float(v.path_end.mean()),
            path_unit=v.path_unit,
        )
        for v in group_values(comparison)
    )


def group_values(comparison: Comparison) -> tuple[GroupValues, ...]:
    """Errors of each group of the space, in its order.

    Positions (and other groups in metres) are judged by Euclidean distance, rotations by the geodesic angle in their
    format, angular velocities by the Euclidean distance of their vectors, everything else dimension by dimension. The
    path of a delta or velocity group is `signal.conversions.accumulate` from the chunk's start. A chunk counts for a
    group where all of its dimensions are present. Commands are compared as they are executed (`Comparison.executed`).
    """
    c = comparison
    reference, reconstruction = c.executed
    walked = path_space(c.space)
    paths: tuple[np.ndarray, np.ndarray] | None = None
    if any(c.space.incremental):
        # Chunks that did not decode count nowhere below; their place is filled so that the path stays finite.
        safe = np.where(c.decoded[:, None, None], reconstruction, reference)
        paths = accumulate(reference, c.space), accumulate(safe, c.space)
    found = []
    for group, path_group in zip(c.space.groups, walked.groups, strict=True):
        rows = c.decoded & c.present[:, list(group.dims)].all(1)
        steps = c.steps[rows]
        unit, path_unit = reported_unit(group)[0], reported_unit(path_group)[0]
        path = path_end = None
        if paths is not None and group.incremental and (path_unit != "raw" or unit == "raw"):
            error = _distance(paths[0][rows], paths[1][rows], path_group)
            last = c.steps.shape[1] - 1 - steps[:, ::-1].argmax(1)
            path, path_end = error[steps], error[np.arange(len(error)), last][steps.any(1)]
        found.append(
            GroupValues(
                group=group,
                measure=_measure(group),
                unit=unit,
                step=_distance(reference[rows], reconstruction[rows], group)[steps].reshape(-1),
                path=None if path is None else path.reshape(-1),
                path_end=None if path_end is None else path_end.reshape(-1),
                path_unit=None if path is None else path_unit,
            )
        )
    return tuple(found)


def position_error(comparison: Comparison) -> Float[np.ndarray, "B T"] | None:
    """[B, T] largest Euclidean error in metres of the position groups; None where the space has none in metres.

    -inf where none of the groups is present in a chunk, NaN where the chunk did not decode.
    """
    return _worst(comparison, [g for g in comparison.space.groups if g.kind == "position" and g.unit == "m"], "mm")


def angular_error(comparison: Comparison) -> Float[np.ndarray, "B T"] | None:
    """[B, T] largest angular error in radians over rotation groups (geodesic) and joints in radians (each by itself).

    None where the space has neither; -inf and NaN as in `position_error`.
    """
    return _worst(comparison, [g for g in comparison.space.groups if g.kind in ("rotation", "joint", "hand")], "deg")


def reported_unit(group: ActionGroup) -> tuple[str, float]:
    """The unit a group is reported in and the factor from raw units to it: ("mm", 50.0); ("raw", 1.0) if unknown."""
    if group.kind == "rotation" and group.rotation not in ANGLES:
        return "deg", 180 / np.pi  # a quaternion or 6-D rotation has no scale
    if group.scale is None or group.unit == "raw":
        return "raw", 1.0
    unit, factor = REPORTED.get(group.unit, (group.unit, 1.0))
    return unit, factor * group.scale


def _measure(group: ActionGroup) -> str:
    unit = reported_unit(group)[0]
    if group.kind == "rotation" and unit == "deg" and group.mode != "velocity":
        return "geodesic"
    vector = group.kind == "position" or unit in ("mm", "mm/s") or (group.kind == "rotation" and unit != "raw")
    return "euclidean" if vector else "absolute"


def _distance(
    a: Float[np.ndarray, "B T D"], b: Float[np.ndarray, "B T D"], group: ActionGroup
) -> Float[np.ndarray, "B T *dims"]:
    """Error in reported units: [B, T], or dimension by dimension [B, T, G]."""
    dims = list(group.dims)
    first, second = a[:, :, dims], b[:, :, dims]
    if _measure(group) == "geodesic":
        assert group.rotation is not None
        scale = group.scale if group.rotation in ANGLES and group.scale is not None else 1.0
        return np.degrees(rotation_distance(first * scale, second * scale, group.rotation))
    difference = np.abs(first - second) * reported_unit(group)[1]
    return np.sqrt((difference**2).sum(2)) if _measure(group) == "euclidean" else difference


def _worst(c: Comparison, groups: Sequence[ActionGroup], unit: str) -> Float[np.ndarray, "B T"] | None:
    """[B, T] in SI units: the largest error over the groups that are reported in `unit`."""
    groups = [g for g in groups if reported_unit(g)[0] == unit]
    if not groups:
        return None
    factor = {"mm": 1e3, "deg": 180 / np.pi}[unit]
    worst = np.full(c.steps.shape, -np.inf)
    reference, reconstruction = c.executed
    safe = np.where(c.decoded[:, None, None], reconstruction, reference)
    for group in groups:
        error = _distance(reference, safe, group) / factor
        error = error.max(2) if error.ndim == 3 else error
        present = c.present[:, list(group.dims)].all(1, keepdims=True)
        worst = np.where(present, np.maximum(worst, error), worst)
    unknown = ~c.decoded[:, None] & ~np.isneginf(worst)
    return np.where(unknown, np.nan, worst)
