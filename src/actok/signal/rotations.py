"""Rotations in the formats that robot data use, converted exactly and in bulk.

Formats, by their names in `actok.core.spaces.Rotation`:

    axis_angle        rotation vector (axis times angle), rad. Comes back with angle <= pi.
    quaternion_xyzw   scalar last (SciPy, ROS, robosuite). Normalised on reading; comes back with w >= 0.
    quaternion_wxyz   scalar first (MuJoCo).
    rot6d             first column of the matrix, then the second: (R00, R10, R20, R01, R11, R21). Zhou et al.,
                      "On the Continuity of Rotation Representations in Neural Networks", 2019, section 4.2. Made
                      orthonormal by Gram-Schmidt on reading.
    euler_xyz         (roll, pitch, yaw), rad, extrinsic x then y then z: R = Rz(yaw) Ry(pitch) Rx(roll). The "rpy" of
                      Bridge, Open X-Embodiment and URDF; SciPy's "xyz".
    euler_zyx         (yaw, pitch, roll), rad, intrinsic z, y', x'': the same three rotations as euler_xyz, written in
                      the other order. SciPy's "ZYX".

A matrix R maps body coordinates to world coordinates (columns are the body's axes). All maths runs in float64; a float32
argument gives a float32 result. Values that determine no rotation (zero quaternion, zero or parallel 6-D columns) become
a proper rotation, the identity for all zeros, and `degenerate` flags them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from actok.core.errors import ConfigError, DataError
from actok.core.spaces import ROTATION_SIZE

# Below this length (quaternions and 6-D columns have length 1) a direction is rounding noise, not information.
DEGENERATE_LENGTH = 1e-6

__all__ = [
    "DEGENERATE_LENGTH",
    "canonical_quaternion",
    "compose",
    "convert_rotation",
    "degenerate",
    "from_matrix",
    "geodesic_distance",
    "nearest_angles",
    "proper",
    "rotation_distance",
    "to_matrix",
]


def to_matrix(values: Any, rotation: str) -> Float[np.ndarray, "... 3 3"]:
    """Matrices [..., 3, 3] of rotations [..., n] in the format `rotation`.

    Raises ConfigError for an unknown format, DataError for a wrong last axis or dtype.
    """
    array = _checked(values, rotation)
    v = array.astype(np.float64, copy=False)
    if rotation == "axis_angle":
        matrix = _quaternion_to_matrix(_axis_angle_to_quaternion(v))
    elif rotation == "quaternion_xyzw":
        matrix = _quaternion_to_matrix(v)
    elif rotation == "quaternion_wxyz":
        matrix = _quaternion_to_matrix(np.roll(v, -1, axis=-1))
    elif rotation == "rot6d":
        matrix = _gram_schmidt(v)
    elif rotation == "euler_xyz":
        matrix = _euler_to_matrix(v[..., 0], v[..., 1], v[..., 2])
    else:
        matrix = _euler_to_matrix(v[..., 2], v[..., 1], v[..., 0])
    return matrix.astype(array.dtype, copy=False)


def from_matrix(matrix: Any, rotation: str) -> Float[np.ndarray, "... _"]:
    """Rotations [..., n] in the format `rotation` of proper orthonormal matrices [..., 3, 3].

    At gimbal lock (pitch of +-pi/2) the two outer Euler angles are not unique; the pair returned is one whose matrix is
    the given one to float64 accuracy. Raises ConfigError for an unknown format, DataError for a wrong shape or dtype.
    """
    _known(rotation)
    array = _matrix(matrix)
    m = array.astype(np.float64, copy=False)
    if rotation == "rot6d":
        values = np.concatenate([m[..., 0], m[..., 1]], axis=-1)
    elif rotation.startswith("euler"):
        values = _matrix_to_euler(m)
        if rotation == "euler_zyx":
            values = values[..., ::-1]
    else:
        values = canonical_quaternion(_matrix_to_quaternion(m))
        if rotation == "axis_angle":
            values = _quaternion_to_axis_angle(values)
        elif rotation == "quaternion_wxyz":
            values = np.roll(values, 1, axis=-1)
    return np.ascontiguousarray(values, dtype=array.dtype)


def convert_rotation(values: Any, source: str, target: str) -> Float[np.ndarray, "... _"]:
    """Rotations [..., m] of format `target` from rotations [..., n] of format `source`, in the canonical range."""
    array = _checked(values, source)
    return from_matrix(to_matrix(array.astype(np.float64, copy=False), source), target).astype(array.dtype, copy=False)


def compose(steps: Any, side: str = "body") -> Float[np.ndarray, "... T 3 3"]:
    """Running products [..., T, 3, 3] of T successive rotations [..., T, 3, 3].

    With side "body" each step turns about the axes that the steps before have moved (R_t = R_{t-1} S_t); with "world"
    about the fixed axes (R_t = S_t R_{t-1}).
    """
    array = _matrix(steps)
    path = array.astype(np.float64)
    for t in range(1, path.shape[-3]):
        before, step = path[..., t - 1, :, :], path[..., t, :, :]
        path[..., t, :, :] = before @ step if side == "body" else step @ before
    return path.astype(array.dtype, copy=False)


def geodesic_distance(a: Any, b: Any) -> Float[np.ndarray | np.floating, "..."]:
    """Angle in rad, 0 to pi, of the rotation between matrices [..., 3, 3] and [..., 3, 3].

    atan2 of sine and cosine of the angle, so it is accurate to rounding near 0 (where arccos of the trace is not) and
    near pi (where arcsin of the chord is not).
    """
    first, second = _matrix(a), _matrix(b)
    m = np.swapaxes(first.astype(np.float64), -1, -2) @ second.astype(np.float64)
    sine = np.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], axis=-1)
    angle = np.arctan2(np.linalg.norm(sine, axis=-1), np.trace(m, axis1=-2, axis2=-1) - 1.0)
    return angle.astype(np.result_type(first, second), copy=False)


def rotation_distance(a: Any, b: Any, rotation: str) -> Float[np.ndarray | np.floating, "..."]:
    """Angle in rad [...] between rotations [..., n] of one format."""
    first, second = _checked(a, rotation), _checked(b, rotation)
    angle = geodesic_distance(
        to_matrix(first.astype(np.float64), rotation), to_matrix(second.astype(np.float64), rotation)
    )
    return angle.astype(np.result_type(first, second), copy=False)


def canonical_quaternion(values: Any, rotation: str = "quaternion_xyzw") -> Float[np.ndarray, "... 4"]:
    """Of the two quaternions [..., 4] of a rotation the one with w > 0; for half turns, its first non-zero part > 0."""
    if rotation not in ("quaternion_xyzw", "quaternion_wxyz"):
        raise ConfigError(f"{rotation!r} is not a quaternion format; use quaternion_xyzw or quaternion_wxyz")
    array = _checked(values, rotation)
    scalar_first = array if rotation == "quaternion_wxyz" else np.roll(array, 1, axis=-1)
    leading = np.take_along_axis(scalar_first, (scalar_first != 0).argmax(-1)[..., None], axis=-1)
    return np.where(leading < 0, -array, array)


def degenerate(values: Any, rotation: str) -> Bool[np.ndarray | np.bool_, "..."]:
    """bool [...]: True where values [..., n] determine no rotation (see the module's docstring)."""
    v = _checked(values, rotation).astype(np.float64, copy=False)
    if rotation.startswith("quaternion"):
        return np.linalg.norm(v, axis=-1) < DEGENERATE_LENGTH
    if rotation != "rot6d":
        return np.zeros(v.shape[:-1], bool)
    first, second = v[..., :3], v[..., 3:]
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    # |a x b| = |a| |b| sin: both a vanishing column and a vanishing angle between the columns count.
    area = np.linalg.norm(np.cross(first, second), axis=-1)
    short = np.minimum(np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-1)) < DEGENERATE_LENGTH
    return short | (area < DEGENERATE_LENGTH * lengths)


def proper(values: Any, rotation: str) -> Float[np.ndarray, "... n"]:
    """Rotations [..., n] as numbers that are one: 6-D columns orthonormal, quaternions of length 1 with their sign kept.

    Angles are returned as they are, and so are values that determine no rotation (`degenerate`: an absent arm's zeros).
    """
    array = _checked(values, rotation)
    if rotation != "rot6d" and not rotation.startswith("quaternion"):
        return array
    v = array.astype(np.float64, copy=False)
    lost = np.asarray(degenerate(v, rotation))[..., None]
    if rotation == "rot6d":
        result = from_matrix(to_matrix(v, rotation), rotation)
    else:
        result = v / np.where(lost, 1.0, np.linalg.norm(v, axis=-1, keepdims=True))
    return np.where(lost, v, result).astype(array.dtype, copy=False)


def nearest_angles(
    values: Float[np.ndarray, "*batch 3"], rotation: str, centre: Float[np.ndarray, "3"], turn: float = 2 * np.pi
) -> Float[np.ndarray, "*batch 3"]:
    """The same rotations [..., 3] of an angle format, with whole turns added so that they lie near `centre`.

    Each Euler angle by itself; a rotation vector along its axis. What is nearest already comes back bit by bit. `turn`: a
    whole turn in the values' unit. Raises ConfigError for a format without angles.
    """
    if rotation.startswith("euler"):
        return values + turn * np.round((centre - values) / turn)
    if rotation != "axis_angle":
        raise ConfigError(f"{rotation!r} has no angles to add whole turns to; use axis_angle, euler_xyz or euler_zyx")
    angle = np.linalg.norm(values, axis=-1, keepdims=True)
    axis = np.divide(values, angle, out=np.zeros_like(values), where=angle > 0)
    return values + axis * (turn * np.round(((axis * centre).sum(-1, keepdims=True) - angle) / turn))


# -- the maths, float64 -----------------------------------------------------------------------------------------------


def _axis_angle_to_quaternion(v: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 4"]:
    half = np.linalg.norm(v, axis=-1, keepdims=True) / 2
    # sin(angle / 2) / angle; NumPy's sinc(x) is sin(pi x) / (pi x) and is 1 at 0.
    return np.concatenate([v * (np.sinc(half / np.pi) / 2), np.cos(half)], axis=-1)


def _quaternion_to_axis_angle(q: Float[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch 3"]:
    length = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(length, q[..., 3:])
    # Where sin underflows, angle / sin(angle / 2) has reached its limit 2.
    return q[..., :3] * np.divide(angle, length, out=np.full_like(length, 2.0), where=length > 0)


def _quaternion_to_matrix(q: Float[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch 3 3"]:
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    unit = np.divide(
        q, length, out=np.zeros_like(q) + np.array([0.0, 0.0, 0.0, 1.0]), where=length >= DEGENERATE_LENGTH
    )
    x, y, z, w = np.moveaxis(unit, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _matrix_to_quaternion(m: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 4"]:
    """Shepperd 1978: divide by the largest of the four parts, so that no part is lost to cancellation."""
    (a, b, c), (d, e, f), (g, h, i) = (np.moveaxis(m[..., r, :], -1, 0) for r in range(3))
    # Row k holds 4 q_k (x, y, z, w); its diagonal entry is 4 q_k squared.
    products = (
        (1 + a - e - i, b + d, c + g, h - f),
        (b + d, 1 - a + e - i, f + h, c - g),
        (c + g, f + h, 1 - a - e + i, d - b),
        (h - f, c - g, d - b, 1 + a + e + i),
    )
    table = np.stack([np.stack(row, axis=-1) for row in products], axis=-2)
    best = np.diagonal(table, axis1=-2, axis2=-1).argmax(-1)
    q = np.take_along_axis(table, best[..., None, None], axis=-2)[..., 0, :]
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def _euler_to_matrix(
    roll: Float[np.ndarray, "*batch"], pitch: Float[np.ndarray, "*batch"], yaw: Float[np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch 3 3"]:
    cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _matrix_to_euler(m: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 3"]:
    yaw = np.arctan2(m[..., 1, 0], m[..., 0, 0])
    pitch = np.arctan2(-m[..., 2, 0], np.hypot(m[..., 0, 0], m[..., 1, 0]))
    # Roll is read after undoing the yaw just chosen, so near gimbal lock, where yaw alone is noise, the two still make
    # up the given matrix; no threshold is needed.
    c, s = np.cos(yaw), np.sin(yaw)
    roll = np.arctan2(s * m[..., 0, 2] - c * m[..., 1, 2], c * m[..., 1, 1] - s * m[..., 0, 1])
    return np.stack([roll, pitch, yaw], axis=-1)


def _gram_schmidt(v: Float[np.ndarray, "*batch 6"]) -> Float[np.ndarray, "*batch 3 3"]:
    first = _direction(v[..., :3], np.array([1.0, 0.0, 0.0]))
    second = v[..., 3:]
    length = np.linalg.norm(second, axis=-1, keepdims=True)
    rest = second - (first * second).sum(-1, keepdims=True) * first
    # A second column that adds no direction is replaced by the coordinate axis farthest from the first, y where x is.
    order = np.abs(first)[..., [1, 2, 0]].argmin(-1)
    axis = np.eye(3)[[1, 2, 0]][order]
    axis = axis - (first * axis).sum(-1, keepdims=True) * first
    lost = np.linalg.norm(rest, axis=-1, keepdims=True) < DEGENERATE_LENGTH * np.maximum(length, 1.0)
    rest = np.where(lost, axis, rest)
    second = rest / np.linalg.norm(rest, axis=-1, keepdims=True)
    # Once more: the first pass loses digits where the columns are nearly parallel.
    second = second - (first * second).sum(-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _direction(v: Float[np.ndarray, "*batch 3"], fallback: Float[np.ndarray, "3"]) -> Float[np.ndarray, "*batch 3"]:
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.divide(v, length, out=np.zeros_like(v) + fallback, where=length >= DEGENERATE_LENGTH)


# -- checks -----------------------------------------------------------------------------------------------------------


def _known(rotation: str) -> None:
    if rotation not in ROTATION_SIZE:
        raise ConfigError(f"rotation format {rotation!r} is unknown; use one of {', '.join(ROTATION_SIZE)}")


def _checked(values: Any, rotation: str) -> Float[np.ndarray, "... _"]:
    _known(rotation)
    array = np.asarray(values)
    size = ROTATION_SIZE[rotation]
    if array.dtype.kind != "f":
        raise DataError(f"rotations have dtype {array.dtype}; give floating point values")
    if array.ndim < 1 or array.shape[-1] != size:
        raise DataError(f"rotations have shape {array.shape}; {rotation} takes [..., {size}]")
    return array


def _matrix(matrix: Any) -> Float[np.ndarray, "... 3 3"]:
    array = np.asarray(matrix)
    if array.dtype.kind != "f" or array.ndim < 2 or array.shape[-2:] != (3, 3):
        raise DataError(f"rotation matrices have dtype {array.dtype} and shape {array.shape}; give floats [..., 3, 3]")
    return array
