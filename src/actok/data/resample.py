"""Actions at another control rate.

Step k of an action sequence is the command over the time [k, k + 1) / rate. T steps at `from_hz` become
ceil(T * to_hz / from_hz) steps at `to_hz`, which cover the same time; where the last new step reaches beyond the data,
the data hold still there.

    absolute, relative   position, joint, hand, base: linear between commands, the last one held
                         rotation: spherical linear interpolation between commands
                         gripper: the command in force at the time (zero-order hold), never a value in between
    delta                summed up to a path, the path interpolated (rotations composed, spherically), differences
                         taken; so the path is the same at all common times, and the total displacement always
    velocity             linear between commands
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.signal.rotations import compose, from_matrix, to_matrix

# Two times closer than this fraction of a step are the same: 3 / 30 s and 1 / 10 s.
SAME_TIME = 1e-9

__all__ = ["resample", "resampled_length", "resampled_space", "states_at"]


def resampled_length(steps: int, from_hz: float | None, to_hz: float) -> int:
    """Steps at `to_hz` that cover `steps` steps at `from_hz`. Raises ConfigError for a rate that is unknown or <= 0."""
    if from_hz is None:
        raise ConfigError("the control rate of the data is unknown; state rate_hz in their action space to resample")
    for name, rate in (("from_hz", from_hz), ("to_hz", to_hz)):
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"{name} is {rate}; give a rate above 0")
    return math.ceil(steps * to_hz / from_hz - SAME_TIME)


def resampled_space(space: ActionSpace, to_hz: float) -> ActionSpace:
    """The space of resampled data: another rate, and limits of a delta's step as much larger as the step is longer."""
    resampled_length(1, space.rate_hz, to_hz)
    factor = np.ones(space.dim)
    for group in space.groups:
        if group.mode == "delta":
            factor[list(group.dims)] = (space.rate_hz or to_hz) / to_hz
    low, high = (None if b is None else tuple((np.asarray(b) * factor).tolist()) for b in (space.low, space.high))
    return replace(space, rate_hz=float(to_hz), low=low, high=high)


def states_at(count: int, from_hz: float | None, to_hz: float) -> Int[np.ndarray, "_"]:
    """Index of the last state recorded at or before each new step.

    A state may hold anything (quaternions, angles that wrap, contact flags), so it is never interpolated.
    """
    steps = np.arange(resampled_length(count, from_hz, to_hz))
    return np.minimum(np.floor(steps * (from_hz or to_hz) / to_hz + 1e-9).astype(np.int64), count - 1)


def resample(actions: Any, space: ActionSpace, from_hz: float | None, to_hz: float) -> Float[np.ndarray, "_ D"]:
    """Actions float32 [T, D] at `from_hz` as float32 [ceil(T to_hz / from_hz), D] at `to_hz`; see the module.

    By an integer factor up and down again is the identity (rotations: the same rotation in its canonical range; a sign
    of a quaternion or 2 pi of an angle may differ). Delta rotations are composed about the axes that the group's `side`
    names ("body" where it names none); each, old and new, must be shorter than half a turn.

    Raises:
        DataError: not [T, D] of at least one step, or a rotation in axis-angle or Euler angles whose scale is unknown,
            since only rad can be composed.
        SpaceMismatchError: D is not the space's.
        ConfigError: a rate that is unknown or not above 0.
    """
    array = np.asarray(actions)
    if array.ndim != 2 or not len(array) or array.dtype.kind != "f":
        raise DataError(f"actions have dtype {array.dtype} and shape {array.shape}; give floating point [T, D], T >= 1")
    if array.shape[1] != space.dim:
        raise SpaceMismatchError(
            f"actions have {array.shape[1]} dimensions, action space {space.embodiment!r} has {space.dim}; give the"
            " space of this data"
        )
    count = resampled_length(len(array), from_hz, to_hz)
    if from_hz == to_hz:
        return array.astype(np.float32)
    # Edges of the new steps, in steps of the data. Those that fall on an edge of the data are made to fall exactly.
    edges = np.arange(count + 1) * (float(from_hz or 0) / to_hz)
    edges = np.where(np.abs(edges - np.round(edges)) < SAME_TIME * np.maximum(1, edges), np.round(edges), edges)
    out = np.empty((count, space.dim), np.float32)
    for group in space.groups:
        dims = list(group.dims)
        out[:, dims] = _resample_group(array[:, dims].astype(np.float64), group, edges)
    return out


def _resample_group(
    values: Float[np.ndarray, "T D"], group: ActionGroup, edges: Float[np.ndarray, "edges"]
) -> Float[np.ndarray, "edges-1 D"]:
    """[T, d] -> [count, d], float64."""
    if group.kind == "rotation" and group.mode != "velocity":
        scale = 1.0
        if group.rotation == "axis_angle" or str(group.rotation).startswith("euler"):
            if group.scale is None:
                raise DataError(
                    f"rotation group {group.name!r} has no scale, so its {group.rotation} cannot be turned into rad;"
                    " state scale in the action space (1.0 where the data are in rad)"
                )
            scale = group.scale
        matrices = to_matrix(values * scale, str(group.rotation))
        if group.mode == "delta":
            side = group.side or "body"
            points = _slerp(np.concatenate([np.eye(3)[None], compose(matrices, side)]), edges)
            undone = np.swapaxes(points[:-1], -1, -2)
            new = undone @ points[1:] if side == "body" else points[1:] @ undone
        else:
            new = _slerp(matrices, edges[:-1])
        return from_matrix(new, str(group.rotation)) / scale
    if group.mode == "delta":
        path = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
        return np.diff(_linear(path, edges), axis=0)
    if group.kind == "gripper":
        return values[np.minimum(np.floor(edges[:-1]).astype(np.int64), len(values) - 1)]
    return _linear(values, edges[:-1])


def _linear(points: Float[np.ndarray, "_ D"], times: Float[np.ndarray, "times"]) -> Float[np.ndarray, "times D"]:
    """Points [n, d] at times in 0..n-1, held beyond the last."""
    before, fraction = _locate(len(points), times)
    after = np.minimum(before + 1, len(points) - 1)
    return points[before] + fraction[:, None] * (points[after] - points[before])


def _slerp(matrices: Float[np.ndarray, "_ 3 3"], times: Float[np.ndarray, "times"]) -> Float[np.ndarray, "times 3 3"]:
    """Rotations [n, 3, 3] at times in 0..n-1 on the shortest arcs between neighbours, held beyond the last."""
    before, fraction = _locate(len(matrices), times)
    after = np.minimum(before + 1, len(matrices) - 1)
    arc = from_matrix(np.swapaxes(matrices[before], -1, -2) @ matrices[after], "axis_angle")
    return matrices[before] @ to_matrix(fraction[:, None] * arc, "axis_angle")


def _locate(
    count: int, times: Float[np.ndarray, "times"]
) -> tuple[Int[np.ndarray, "times"], Float[np.ndarray, "times"]]:
    before = np.minimum(np.floor(times).astype(np.int64), count - 1)
    return before, np.where(before < count - 1, times - before, 0.0)
