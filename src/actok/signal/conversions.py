"""Exact conversions of actions over their action space: frames of reference, rotation formats, paths.

Each conversion returns the actions and the space they are now in, so that nothing downstream has to remember. All maths
runs in float64; a float32 argument gives a float32 result. Leading axes are free: [T, D] and [B, T, D] both work, and a
batch is the stack of its singles.

Rotations come back in the canonical range of their format (angle <= pi, w >= 0, |pitch| <= pi / 2): the same rotation,
not always the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from actok.core.errors import ConfigError, DataError, SpaceMismatchError
from actok.core.spaces import ROTATION_SIZE, ActionGroup, ActionSpace, Rotation, Side
from actok.signal.rotations import compose, from_matrix, to_matrix

Frame = Literal["absolute", "relative", "delta"]

# Kinds that have a difference. A gripper opening, a hand posture, a base command and raw numbers stay as they are.
CONVERTIBLE = ("position", "joint", "rotation")
# Formats whose numbers are angles, so that a scale (rad per raw unit) applies to them.
ANGLES = ("axis_angle", "euler_xyz", "euler_zyx")

_LABELS: Mapping[str, tuple[str, ...]] = {
    "axis_angle": ("rx", "ry", "rz"),
    "quaternion_xyzw": ("qx", "qy", "qz", "qw"),
    "quaternion_wxyz": ("qw", "qx", "qy", "qz"),
    "rot6d": ("r00", "r10", "r20", "r01", "r11", "r21"),
    "euler_xyz": ("roll", "pitch", "yaw"),
    "euler_zyx": ("yaw", "pitch", "roll"),
}

__all__ = [
    "ANGLES",
    "CONVERTIBLE",
    "Frame",
    "accumulate",
    "checked_actions",
    "convert",
    "convert_rotations",
    "path_space",
    "with_frame",
    "with_rotation",
]


# -- absolute, relative to the chunk's start, step by step -------------------------------------------------------------


def with_frame(space: ActionSpace, to: Frame, *, side: Side | None = None) -> ActionSpace:
    """The space that `convert` leads to: positions, joints and rotations in mode `to`, everything else unchanged.

    Limits of the interface are dropped where any group changes, since they bound the values as they were. Raises
    ConfigError for an unknown `to` or a `side` that contradicts the one the space states.
    """
    if to not in get_args(Frame):
        raise ConfigError(f"cannot convert actions to {to!r}; use one of {', '.join(get_args(Frame))}")
    if side is not None and side not in get_args(Side):
        raise ConfigError(f"side is {side!r}; use one of {', '.join(get_args(Side))}")
    sides = {g.name: _side(g, side) for g in space.groups if g.kind == "rotation"}
    groups = tuple(
        replace(g, mode=to, side=None if to == "absolute" else sides.get(g.name)) if _moves(g, to) else g
        for g in space.groups
    )
    if groups == space.groups:
        return space
    return replace(space, groups=groups, low=None, high=None)


def convert(
    actions: Any,
    space: ActionSpace,
    to: Frame,
    *,
    anchor: Any = None,
    side: Side | None = None,
    pad_mask: Any = None,
) -> tuple[Float[np.ndarray, "*batch T D"], ActionSpace]:
    """Actions [..., T, D] as absolute values, relative to the anchor, or as steps; exact inverses of each other.

    Positions and joints: relative_t = a_t - anchor, delta_t = a_t - a_{t-1} with a_{-1} the anchor. Rotations, with R0
    the anchor's: relative_t = R0^T R_t and delta_t = R_{t-1}^T R_t for side "body" (the default, and the layout of
    X-Tokenizer, arXiv 2606.14752), R_t R0^T and R_t R_{t-1}^T for side "world". Grippers, hands, bases, velocities and
    raw groups are left alone.

    Args:
        anchor: [..., D] proprioception at the chunk's start, written in the action's layout and raw units; NOT the
            first action. Needed from and to "absolute"; only the dimensions that move are read.
        side: which axes rotations turn about; None takes what the space states, else "body".
        pad_mask: [..., T] bool, True where padded. These steps get the padding of the new space: 0 in delta and
            velocity dimensions, the last real value elsewhere.

    Raises ConfigError for an unknown frame, a contradictory side or a rotation whose scale is unknown; DataError for
    wrong dtypes, non-finite values or a missing anchor; SpaceMismatchError for a wrong D.
    """
    values = checked_actions(actions, space)
    target = with_frame(space, to, side=side)
    moved = [(g, n) for g, n in zip(space.groups, target.groups, strict=True) if g is not n]
    start = None
    if any("absolute" in (g.mode, n.mode) for g, n in moved):
        start = _anchor(anchor, values, space, [d for g, _ in moved for d in g.dims])
    result = values.astype(np.float64)
    for old, _ in moved:
        dims = list(old.dims)
        part, origin = result[..., dims], None if start is None else start[..., None, dims]
        if old.kind == "rotation":
            first = None if origin is None else _matrices(origin, old)
            part = _turn(_matrices(part, old), old.mode, to, first, _side(old, side))
            result[..., dims] = _rotations(part, old)
        else:
            result[..., dims] = _shift(part, old.mode, to, origin)
    if pad_mask is not None:
        result = _pad(result, pad_mask, target)
    return result.astype(values.dtype, copy=False), target


def _moves(group: ActionGroup, to: str) -> bool:
    return group.kind in CONVERTIBLE and group.mode != "velocity" and group.mode != to


def _side(group: ActionGroup, asked: Side | None) -> Side:
    stated = None if group.mode == "absolute" else group.side
    if stated is not None and asked is not None and stated != asked:
        raise ConfigError(
            f"rotation group {group.name!r} turns about {stated} axes; leave side out, or go through absolute to change"
        )
    return asked or stated or "body"


def _shift(
    x: Float[np.ndarray, "*batch T D"], source: str, to: str, origin: Float[np.ndarray, "*batch 1 D"] | None
) -> Float[np.ndarray, "*batch T D"]:
    if source == "delta":
        x = np.cumsum(x, axis=-2)
    elif source == "absolute":
        x = x - origin
    if to == "delta":
        return np.diff(x, axis=-2, prepend=0.0)
    return x + origin if to == "absolute" else x


def _turn(
    m: Float[np.ndarray, "*batch T 3 3"],
    source: str,
    to: str,
    origin: Float[np.ndarray, "*batch 1 3 3"] | None,
    side: str,
) -> Float[np.ndarray, "*batch T 3 3"]:
    body = side == "body"
    if source == "delta":
        m = compose(m, side)
    elif source == "absolute":
        assert origin is not None
        m = _transpose(origin) @ m if body else m @ _transpose(origin)
    if to == "delta":
        before = np.concatenate([np.broadcast_to(np.eye(3), m[..., :1, :, :].shape), m[..., :-1, :, :]], axis=-3)
        return _transpose(before) @ m if body else m @ _transpose(before)
    if to == "absolute":
        assert origin is not None
        return origin @ m if body else m @ origin
    return m


def _transpose(m: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 3 3"]:
    return np.swapaxes(m, -1, -2)


def _pad(values: Float[np.ndarray, "*batch T D"], pad_mask: Any, space: ActionSpace) -> Float[np.ndarray, "*batch T D"]:
    mask = np.asarray(pad_mask)
    if mask.dtype != bool or mask.shape != values.shape[:-1]:
        raise DataError(f"pad_mask has dtype {mask.dtype} and shape {mask.shape}; give bool {values.shape[:-1]}")
    real = (~mask).sum(-1)
    if (real == 0).any() or (mask != (np.arange(mask.shape[-1]) >= real[..., None])).any():
        raise DataError("pad_mask must leave a real first step, and padding must stand at the end of a chunk")
    last = np.take_along_axis(values, (real - 1)[..., None, None], axis=-2)
    return np.where(mask[..., None], np.where(np.array(space.incremental), 0.0, last), values)


# -- rotation formats ---------------------------------------------------------------------------------------------------


def with_rotation(space: ActionSpace, rotation: Rotation, *, scale: float = 1.0) -> ActionSpace:
    """The space with every rotation group in another format; D, indices and names follow.

    `scale` is rad per raw unit of the new numbers, for the angle formats. Where the space has limits, a rotation group
    gets the mathematical range of its format (+-1, or +-pi / scale), the others keep theirs. Raises ConfigError.
    """
    if rotation not in ROTATION_SIZE:
        raise ConfigError(f"rotation format {rotation!r} is unknown; use one of {', '.join(ROTATION_SIZE)}")
    if rotation not in ANGLES and scale != 1.0:
        raise ConfigError(f"{rotation} has no angles to scale by {scale}; leave scale out")
    bound = np.pi / scale if rotation in ANGLES else 1.0
    owner = {d: g for g in space.groups if g.kind == "rotation" for d in g.dims}
    place: dict[int, int] = {}
    names: list[str] = []
    low: list[float] = []
    high: list[float] = []
    for d in range(space.dim):
        group = owner.get(d)
        if group is None:
            place[d] = len(names)
            names.append(space.names[d])
            low.append(space.low[d] if space.low else -np.inf)
            high.append(space.high[d] if space.high else np.inf)
        elif d == min(group.dims):
            place[d] = len(names)
            names += [f"{group.name}.{label}" for label in _LABELS[rotation]]
            low += [-bound] * ROTATION_SIZE[rotation]
            high += [bound] * ROTATION_SIZE[rotation]
    groups = tuple(
        replace(g, dims=tuple(place[d] for d in g.dims))
        if g.kind != "rotation"
        else replace(
            g,
            dims=tuple(range(place[min(g.dims)], place[min(g.dims)] + ROTATION_SIZE[rotation])),
            rotation=rotation,
            unit="rad",
            scale=float(scale),
        )
        for g in space.groups
    )
    return replace(
        space,
        dim=len(names),
        groups=groups,
        names=tuple(names),
        low=tuple(low) if space.low else None,
        high=tuple(high) if space.high else None,
    )


def convert_rotations(
    actions: Any, space: ActionSpace, rotation: Rotation, *, scale: float = 1.0
) -> tuple[Float[np.ndarray, "*batch T D"], ActionSpace]:
    """Actions [..., T, D] with every rotation group in another format, and their space (see `with_rotation`).

    To invert, convert to the former format with the former scale. Raises ConfigError where an angle's scale is unknown
    or the group is a rate (mode "velocity").
    """
    values = checked_actions(actions, space)
    target = with_rotation(space, rotation, scale=scale)
    result = np.empty((*values.shape[:-1], target.dim))
    for old, new in zip(space.groups, target.groups, strict=True):
        part = values[..., list(old.dims)].astype(np.float64)
        if old.kind == "rotation":
            if old.mode == "velocity":
                raise ConfigError(f"rotation group {old.name!r} is a velocity, not a rotation; integrate it first")
            part = _rotations(_matrices(part, old), new)
        result[..., list(new.dims)] = part
    return result.astype(values.dtype, copy=False), target


def _matrices(values: Float[np.ndarray, "*batch _"], group: ActionGroup) -> Float[np.ndarray, "*batch 3 3"]:
    assert group.rotation is not None
    if group.rotation not in ANGLES:
        return to_matrix(values, group.rotation)
    if group.scale is None:
        raise ConfigError(
            f"rotation group {group.name!r} has no scale, so its angles are unknown; state the rad per raw unit"
        )
    return to_matrix(values * group.scale, group.rotation)


def _rotations(matrices: Float[np.ndarray, "*batch 3 3"], group: ActionGroup) -> Float[np.ndarray, "*batch _"]:
    assert group.rotation is not None
    values = from_matrix(matrices, group.rotation)
    return values / group.scale if group.rotation in ANGLES and group.scale is not None else values


# -- paths in physical units --------------------------------------------------------------------------------------------


def path_space(space: ActionSpace) -> ActionSpace:
    """The space of what `accumulate` returns: delta and velocity groups turned relative, scales 1 where known."""
    groups = []
    for g in space.groups:
        known = _path_factor(g, space.rate_hz) is not None
        unit = {"m/s": "m", "rad/s": "rad"}.get(g.unit, g.unit) if g.mode == "velocity" else g.unit
        groups.append(
            replace(
                g,
                mode="relative" if g.incremental else g.mode,
                unit=unit if known else "raw",
                scale=1.0 if known else None,
            )
        )
    return replace(space, groups=tuple(groups), low=None, high=None)


def accumulate(actions: Any, space: ActionSpace) -> Float[np.ndarray, "*batch T D"]:
    """Where a chunk leads: [..., T, D] in physical units, in the space `path_space(space)`.

    Delta groups are summed times their scale, velocities times scale / rate, rotations composed on the side the space
    states ("body" where it states none) and kept in their format, in rad. Absolute and relative groups are scaled only.
    A group whose scale (or, for a velocity, the control rate) is unknown is accumulated in raw units. The path starts
    at the chunk's start, which is itself not part of it.

    Raises ConfigError for a velocity in a format that is not an angle; DataError and SpaceMismatchError as `convert`.
    """
    values = checked_actions(actions, space)
    result = values.astype(np.float64)
    for g in space.groups:
        dims = list(g.dims)
        factor = _path_factor(g, space.rate_hz)
        part = result[..., dims]
        if g.kind == "rotation" and g.incremental and factor is not None:
            assert g.rotation is not None
            if g.mode == "velocity" and g.rotation not in ANGLES:
                raise ConfigError(f"rotation group {g.name!r} is a velocity in {g.rotation}; use an angle format")
            steps = to_matrix(part * factor if g.rotation in ANGLES else part, g.rotation)
            part = from_matrix(compose(steps, g.side or "body"), g.rotation)
        else:
            part = np.cumsum(part, axis=-2) if g.incremental else part
            part = part * (1.0 if factor is None or g.rotation not in (None, *ANGLES) else factor)
        result[..., dims] = part
    return result.astype(values.dtype, copy=False)


def _path_factor(group: ActionGroup, rate_hz: float | None) -> float | None:
    """Physical units per raw unit and step, None where unknown. A format without angles needs no scale."""
    if group.rotation is not None and group.rotation not in ANGLES:
        return 1.0
    if group.mode == "velocity":
        return None if group.scale is None or rate_hz is None else group.scale / rate_hz
    return group.scale


# -- checks -------------------------------------------------------------------------------------------------------------


def checked_actions(actions: Any, space: ActionSpace, name: str = "actions") -> Float[np.ndarray, "*batch T D"]:
    """`actions` as a finite float array [..., T, D] of `space`. Raises DataError or SpaceMismatchError."""
    values = np.asarray(actions)
    if values.dtype.kind != "f":
        raise DataError(f"{name} have dtype {values.dtype}; give floating point values")
    if values.ndim < 2 or 0 in values.shape:
        raise DataError(f"{name} have shape {values.shape}; give [..., time, dimensions] with at least one step")
    if values.shape[-1] != space.dim:
        raise SpaceMismatchError(
            f"{name} have {values.shape[-1]} dimensions, action space {space.embodiment!r} has {space.dim}"
            f" ({', '.join(space.names)}); give the space of these actions"
        )
    if not np.isfinite(values).all():
        raise DataError(
            f"{name} hold {int((~np.isfinite(values)).sum())} non-finite values; drop or repair these steps"
        )
    return values


def _anchor(
    anchor: Any, values: Float[np.ndarray, "*batch T D"], space: ActionSpace, dims: list[int]
) -> Float[np.ndarray, "*batch D"]:
    if anchor is None:
        raise DataError(
            "no anchor was given; absolute and relative actions differ by the state at the chunk's start: give anchor"
            f" [..., {space.dim}], the proprioception in the action's layout"
        )
    start = np.asarray(anchor)
    if start.dtype.kind != "f" or start.shape != (*values.shape[:-2], space.dim):
        raise DataError(
            f"anchor has dtype {start.dtype} and shape {start.shape}; give floats"
            f" {(*values.shape[:-2], space.dim)}, the proprioception in the action's layout"
        )
    if not np.isfinite(start[..., dims]).all():
        raise DataError("anchor holds non-finite values; give the proprioception at the chunk's start")
    return start.astype(np.float64)
