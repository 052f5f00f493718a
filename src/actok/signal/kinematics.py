"""Forward and inverse kinematics of a serial chain of revolute and prismatic joints, float64, vectorised over batches.

The inverse is the Levenberg-Marquardt method on the pose error (Nakamura and Hanafusa 1986 for the damped step; damping in
proportion to the squared error, Yamashita and Fukushima 2001, converges quadratically), started from a configuration that
the caller names and kept within the joint limits. It finds the solution on the start's branch, not any solution: an arm of
six joints comes back to the elbow-up or elbow-down posture that it was in. A chain of more than six joints has a family of
solutions; of these the one nearest to the start is taken, |q - start| being minimal among its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float

from actok.core.errors import ConfigError, DataError
from actok.signal.rotations import from_matrix, geodesic_distance
from actok.signal.urdf import UrdfJoint, joints_between

# A pose is reached where it is met to this; the search goes on to TARGET, so that joints come back to float64 accuracy.
POSITION_TOLERANCE, ROTATION_TOLERANCE = 1e-6, 1e-6  # m, rad
TARGET = 1e-13
ITERATIONS = 200
# Damping of a step: a factor times the squared pose error. Its least value; the factor's first and largest.
FLOOR, FIRST, LARGEST = 1e-15, 1.0, 1e12
# Steps towards the nearest solution of a redundant chain, and when they are short enough to stop (rad).
NEARER, NEAR_ENOUGH = 100, 1e-9

__all__ = ["POSITION_TOLERANCE", "ROTATION_TOLERANCE", "InverseKinematics", "KinematicChain"]


@dataclass(frozen=True, kw_only=True, eq=False)
class InverseKinematics:
    """Joints for poses.

    Attributes:
        joints: float64 [..., J], the best that was found.
        converged: bool [...], whether they reach the pose to 1e-6 m and 1e-6 rad.
        position_error: m [...], between the pose and what the joints reach.
        rotation_error: rad [...].
    """

    joints: Float[np.ndarray, "*batch J"]
    converged: Bool[np.ndarray, "*batch"]
    position_error: Float[np.ndarray, "*batch"]
    rotation_error: Float[np.ndarray, "*batch"]


class KinematicChain:
    """J joints in a row between a base and a tip.

    Attributes:
        names: of the moving joints, from the base on; the order of every [..., J] here.
        low, high: float64 [J], limits in rad (prismatic: m); infinite where there is none.
        base, tip: names of the links.
    """

    def __init__(self, joints: list[UrdfJoint], base: str = "base", tip: str = "tip") -> None:
        """From joints as a URDF has them, fixed ones included. Raises ConfigError where none of them moves."""
        self.base, self.tip = base, tip
        moving = [j for j in joints if j.kind != "fixed"]
        if not moving:
            raise ConfigError(f"no joint between {base!r} and {tip!r} moves; choose links with an arm between them")
        self.names = tuple(j.name for j in moving)
        self.low, self.high = np.array([j.low for j in moving]), np.array([j.high for j in moving])
        self._axes = np.stack([j.axis for j in moving])
        self._turns = np.array([j.kind != "prismatic" for j in moving])
        # Fixed joints are folded into the origin of the next moving one, the last ones into the tip.
        origins, before = [], np.eye(4)
        for joint in joints:
            before = before @ joint.origin
            if joint.kind != "fixed":
                origins.append(before)
                before = np.eye(4)
        self._origins, self._end = np.stack(origins), before

    @classmethod
    def from_urdf(cls, source: str | Path, base: str, tip: str) -> Self:
        """The chain from the link `base` to the link `tip` of a URDF (path, or text).

        Poses are those of the tip link's frame in the base link's. Raises ConfigError naming the link or joint that cannot
        be part of a chain; see `actok.signal.urdf.joints_between`.
        """
        return cls(joints_between(source, base, tip), base, tip)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"KinematicChain({self.base} -> {self.tip}: {', '.join(self.names)})"

    def forward(self, joints: Any) -> tuple[Float[np.ndarray, "*batch 3"], Float[np.ndarray, "*batch 3 3"]]:
        """Position in m and rotation matrix of the tip in the base, of joints [..., J] in rad (prismatic: m).

        Limits are not enforced: a recorded command beyond them has a pose too. Raises DataError for a wrong shape, dtype or
        values that are not finite.
        """
        q = self._checked(joints, "joints")
        position, rotation, _, _ = self._walk(q.reshape(-1, len(self)))
        return position.reshape(*q.shape[:-1], 3), rotation.reshape(*q.shape[:-1], 3, 3)

    def jacobian(self, joints: Any) -> Float[np.ndarray, "*batch 6 J"]:
        """Velocity of the tip, m/s and then rad/s about the base's axes, by velocity of each joint [..., J]."""
        q = self._checked(joints, "joints")
        position, _, points, axes = self._walk(q.reshape(-1, len(self)))
        return self._jacobian(position, points, axes).reshape(*q.shape[:-1], 6, len(self))

    def inverse(self, position: Any, rotation: Any, start: Any) -> InverseKinematics:
        """Joints whose tip is at positions [..., 3] in m and rotation matrices [..., 3, 3], near `start` [..., J].

        Leading axes are those of the broadcast arguments. A start beyond a limit is moved to it. A pose that is out of
        reach, or that another branch alone reaches, is not `converged` and has the best joints that were found. In a
        singular configuration, where joints are not determined by the pose, they stay as near to the start as the steps
        lead. Raises DataError for a wrong shape or dtype, values that are not finite, matrices that are no rotations.
        """
        p, r, q = np.asarray(position), np.asarray(rotation), self._checked(start, "start")
        for name, value, tail in (("position", p, (3,)), ("rotation", r, (3, 3))):
            if value.dtype.kind != "f" or value.shape[-len(tail) :] != tail or not np.isfinite(value).all():
                raise DataError(
                    f"{name} has dtype {value.dtype}, shape {value.shape}; give finite floats [..., {tail}]"
                )
        try:
            lead = np.broadcast_shapes(p.shape[:-1], r.shape[:-2], q.shape[:-1])
        except ValueError:
            raise DataError(
                f"position {p.shape}, rotation {r.shape} and start {q.shape} have leading axes that do not go together"
            ) from None
        p = np.broadcast_to(p, (*lead, 3)).reshape(-1, 3).astype(np.float64)
        r = np.broadcast_to(r, (*lead, 3, 3)).reshape(-1, 3, 3).astype(np.float64)
        q = np.broadcast_to(q, (*lead, len(self))).reshape(-1, len(self))
        off = np.abs(r @ np.swapaxes(r, -1, -2) - np.eye(3)).max(initial=0.0)
        if off > 1e-5 or (np.linalg.det(r) < 0).any():
            raise DataError(f"rotation holds matrices that are no rotations (off by {off:.2g}); make them orthonormal")
        start_from = np.clip(q, self.low, self.high)
        found, error = self._reach(p, r, start_from)
        if len(self) > 6:
            found = self._nearest(p, r, found, error, start_from)
        at, turned, _, _ = self._walk(found)
        distance, angle = np.linalg.norm(at - p, axis=-1), geodesic_distance(turned, r)
        return InverseKinematics(
            joints=found.reshape(*lead, len(self)),
            converged=((distance <= POSITION_TOLERANCE) & (angle <= ROTATION_TOLERANCE)).reshape(lead),
            position_error=distance.reshape(lead),
            rotation_error=np.asarray(angle).reshape(lead),
        )

    # -- the maths ----------------------------------------------------------------------------------------------------

    def _walk(
        self, q: Float[np.ndarray, "B J"]
    ) -> tuple[
        Float[np.ndarray, "B 3"], Float[np.ndarray, "B 3 3"], Float[np.ndarray, "B J 3"], Float[np.ndarray, "B J 3"]
    ]:
        """Position and rotation of the tip; the points and axes of all joints, in the base."""
        p, r = np.zeros((len(q), 3)), np.broadcast_to(np.eye(3), (len(q), 3, 3))
        points, axes = [], []
        for j, (origin, axis, turns) in enumerate(zip(self._origins, self._axes, self._turns, strict=True)):
            p, r = p + r @ origin[:3, 3], r @ origin[:3, :3]
            points.append(p)
            axes.append(r @ axis)
            if turns:
                r = r @ _about(axis, q[:, j])
            else:
                p = p + axes[-1] * q[:, j, None]
        return p + r @ self._end[:3, 3], r @ self._end[:3, :3], np.stack(points, 1), np.stack(axes, 1)

    def _jacobian(
        self, tip: Float[np.ndarray, "B 3"], points: Float[np.ndarray, "B J 3"], axes: Float[np.ndarray, "B J 3"]
    ) -> Float[np.ndarray, "B 6 J"]:
        turns = self._turns[:, None]
        moved = np.where(turns, np.cross(axes, tip[:, None] - points), axes)
        turned = np.where(turns, axes, 0.0)
        return np.swapaxes(np.concatenate([moved, turned], axis=-1), -1, -2)

    def _error(
        self, p: Float[np.ndarray, "B 3"], r: Float[np.ndarray, "B 3 3"], q: Float[np.ndarray, "B J"]
    ) -> tuple[Float[np.ndarray, "B 6"], Float[np.ndarray, "B 6 J"]]:
        """What is missing to the pose, m and rad about the base's axes, and the Jacobian."""
        at, turned, points, axes = self._walk(q)
        missing = from_matrix(r @ np.swapaxes(turned, -1, -2), "axis_angle")
        return np.concatenate([p - at, missing], axis=-1), self._jacobian(at, points, axes)

    def _reach(
        self, p: Float[np.ndarray, "B 3"], r: Float[np.ndarray, "B 3 3"], q: Float[np.ndarray, "B J"]
    ) -> tuple[Float[np.ndarray, "B J"], Float[np.ndarray, "B"]]:
        """Levenberg-Marquardt from q [B, J]: joints, and the length of what is missing."""
        q = q.copy()
        e, jac = self._error(p, r, q)
        size = np.linalg.norm(e, axis=-1)
        factor = np.full(len(q), FIRST)
        busy = np.flatnonzero(size > TARGET)
        for _ in range(ITERATIONS):
            if not len(busy):
                break
            free = self._free(q[busy], (np.swapaxes(jac[busy], -1, -2) @ e[busy, :, None])[..., 0])
            damping = np.maximum(factor[busy] * size[busy] ** 2, FLOOR)
            step = _damped(jac[busy] * free[:, None, :], e[busy], damping)
            tried = np.clip(q[busy] + step, self.low, self.high)
            new_e, new_jac = self._error(p[busy], r[busy], tried)
            new_size = np.linalg.norm(new_e, axis=-1)
            better = new_size < size[busy]
            took = busy[better]
            q[took], e[took], jac[took], size[took] = tried[better], new_e[better], new_jac[better], new_size[better]
            factor[busy] = np.where(better, np.maximum(factor[busy] * 0.2, 1e-3), factor[busy] * 10)
            # Rounding: a Newton step that no longer helps. Far from the pose: no damping helps any more.
            stuck = ~better & ((size[busy] < 1e-11) | (factor[busy] > LARGEST))
            busy = busy[~stuck & (size[busy] > TARGET)]
        return q, size

    def _free(self, q: Float[np.ndarray, "B J"], push: Float[np.ndarray, "B J"]) -> Bool[np.ndarray, "B J"]:
        """Joints that are not held by a limit against the direction they are pushed in."""
        return ~(((q <= self.low) & (push < 0)) | ((q >= self.high) & (push > 0)))

    def _nearest(
        self,
        p: Float[np.ndarray, "B 3"],
        r: Float[np.ndarray, "B 3 3"],
        q: Float[np.ndarray, "B J"],
        size: Float[np.ndarray, "B"],
        start: Float[np.ndarray, "B J"],
    ) -> Float[np.ndarray, "B J"]:
        """Along the solutions of a redundant chain to the one nearest to `start`: projected gradient steps, halved where
        they do not come nearer, each brought back to the pose."""
        q = q.copy()
        length = np.ones(len(q))
        busy = np.flatnonzero(size <= POSITION_TOLERANCE)
        for _ in range(NEARER):
            if not len(busy):
                break
            _, jac = self._error(p[busy], r[busy], q[busy])
            wish = start[busy] - q[busy]
            jac = jac * self._free(q[busy], wish)[:, None, :]
            wish = wish * self._free(q[busy], wish)
            along = wish - _damped(jac, (jac @ wish[..., None])[..., 0], np.full(len(busy), FLOOR))
            tried, missing = self._reach(
                p[busy], r[busy], np.clip(q[busy] + length[busy, None] * along, self.low, self.high)
            )
            before, after = (np.linalg.norm(start[busy] - x, axis=-1) for x in (q[busy], tried))
            better = (after < before) & (missing <= np.maximum(size[busy], TARGET * 10))
            q[busy[better]] = tried[better]
            length[busy] = np.where(better, np.minimum(length[busy] * 2, 1.0), length[busy] / 2)
            short = np.linalg.norm(along, axis=-1) * length[busy] < NEAR_ENOUGH
            busy = busy[~short]
        return q

    def _checked(self, joints: Any, name: str) -> Float[np.ndarray, "*batch J"]:
        array = np.asarray(joints)
        if array.dtype.kind != "f" or array.ndim < 1 or array.shape[-1] != len(self):
            raise DataError(
                f"{name} has dtype {array.dtype} and shape {array.shape}; give floats [..., {len(self)}]:"
                f" {', '.join(self.names)}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite; repair them")
        return array.astype(np.float64)


def _about(axis: Float[np.ndarray, "3"], angle: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B 3 3"]:
    """Rodrigues' formula about an axis of length 1."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    sine, versine = np.sin(angle)[:, None, None], (1 - np.cos(angle))[:, None, None]
    return np.eye(3) + sine * cross + versine * (cross @ cross)


def _damped(
    jac: Float[np.ndarray, "B 6 J"], e: Float[np.ndarray, "B 6"], damping: Float[np.ndarray, "B"]
) -> Float[np.ndarray, "B J"]:
    """The step that least squares of the error left and of the damped step ask for.

    In the smaller of the two equal forms, (J^T J + d)^-1 J^T e and J^T (J J^T + d)^-1 e: the larger is singular but for d.
    """
    turned = np.swapaxes(jac, -1, -2)
    if jac.shape[-1] <= 6:
        lhs = turned @ jac + damping[:, None, None] * np.eye(jac.shape[-1])
        return np.linalg.solve(lhs, turned @ e[..., None])[..., 0]
    lhs = jac @ turned + damping[:, None, None] * np.eye(6)
    return (turned @ np.linalg.solve(lhs, e[..., None]))[..., 0]
