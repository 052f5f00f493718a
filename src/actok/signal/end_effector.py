"""Actions of joint-space arms as poses of their end effectors, and back, by kinematic models.

A group of joints for which a chain is given becomes two groups in its place: `<group>_position` (3, m) and
`<group>_rotation`, absolute, of the chain's tip in its base. All other groups stay as they are. The way there is forward
kinematics; the way back is inverse kinematics along the chunk, from the joints at its start to the first pose and from
each step to the next, so that the arm stays on its branch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from actok.core.errors import ConfigError, DataError
from actok.core.spaces import ROTATION_SIZE, ActionGroup, ActionSpace, Rotation
from actok.signal.conversions import checked_actions, convert
from actok.signal.kinematics import KinematicChain
from actok.signal.rotations import from_matrix, to_matrix

Unreachable = Literal["nan", "closest"]

__all__ = ["EndEffectorMap", "JointActions", "Unreachable"]


@dataclass(frozen=True, kw_only=True, eq=False)
class JointActions:
    """Joint-space actions of poses.

    Attributes:
        actions: float64 [B, T, D], raw units. From the first step of a chunk at which an arm does not reach its pose, the
            joints of all arms are NaN, so that they cannot be executed by mistake, unless "closest" was asked for.
        reached: bool [B, T], whether every arm reaches its pose to 1e-6 m and 1e-6 rad.
        position_error: m [B, T], of the arm that misses its pose most.
        rotation_error: rad [B, T], likewise.
    """

    actions: Float[np.ndarray, "B T D"]
    reached: Bool[np.ndarray, "B T"]
    position_error: Float[np.ndarray, "B T"]
    rotation_error: Float[np.ndarray, "B T"]


class EndEffectorMap:
    """A robot's joint-space actions as end-effector poses, and back.

    Attributes:
        space: the robot's own.
        target: with poses; the embodiment has "_ee" appended. Limits of the interface are dropped, since they bound the
            values as they were.
        chains: by name of the joint group.
    """

    def __init__(
        self, space: ActionSpace, chains: Mapping[str, KinematicChain], *, rotation: Rotation = "rot6d"
    ) -> None:
        """`chains` by joint group: its name ("left_arm"), or a word of it that no other joint group has ("left").

        A group's dimensions are the chain's joints, in its order from the base on, times the group's scale rad (prismatic:
        m) at the chain's zero. Raises ConfigError naming a group that is not there, is given twice, has another number of
        joints than its chain, no known scale, or is a velocity; and an unknown rotation format.
        """
        if rotation not in ROTATION_SIZE:
            raise ConfigError(f"rotation format {rotation!r} is unknown; use one of {', '.join(ROTATION_SIZE)}")
        self.space, self.rotation = space, rotation
        self.chains: dict[str, KinematicChain] = {}
        for key, chain in chains.items():
            group = _joint_group(space, key)
            if group.name in self.chains:
                raise ConfigError(f"joint group {group.name!r} is given two chains; give it one")
            _check(group, chain, space)
            self.chains[group.name] = chain
        if not self.chains:
            raise ConfigError("no kinematic chain is given; give one by joint group: {'left_arm': chain}")
        self.target, self._places = self._converted()

    def _converted(self) -> tuple[ActionSpace, dict[str, list[int]]]:
        """The space with poses, and the dimensions there of each group here."""
        size = 3 + ROTATION_SIZE[self.rotation]
        owner = {d: g for g in self.space.groups for d in g.dims}
        own: dict[str, list[int]] = {g.name: [] for g in self.space.groups}
        names: list[str] = []
        turn = [f"{self.rotation}.{i}" for i in range(size - 3)]
        for d in range(self.space.dim):
            group = owner[d]
            if group.name not in self.chains:
                own[group.name].append(len(names))
                names.append(self.space.names[d])
            elif d == min(group.dims):
                own[group.name] = list(range(len(names), len(names) + size))
                names += [f"{group.name}.{label}" for label in ("x", "y", "z", *turn)]
        groups: list[ActionGroup] = []
        for group in self.space.groups:
            dims = own[group.name]
            if group.name not in self.chains:
                order = np.argsort(np.argsort(group.dims))  # `own` is ascending, a group's dimensions need not be
                own[group.name] = dims = [dims[i] for i in order]
                groups.append(replace(group, dims=tuple(dims)))
                continue
            position = ActionGroup(
                name=f"{group.name}_position", kind="position", dims=tuple(dims[:3]), unit="m", scale=1.0
            )
            turned = replace(
                position,
                name=f"{group.name}_rotation",
                kind="rotation",
                dims=tuple(dims[3:]),
                unit="rad",
                rotation=self.rotation,
            )
            groups += [position, turned]
        used = ", ".join(f"{name} from {c.base} to {c.tip}" for name, c in self.chains.items())
        target = ActionSpace(
            embodiment=f"{self.space.embodiment}_ee",
            dim=len(names),
            groups=tuple(groups),
            rate_hz=self.space.rate_hz,
            names=tuple(names),
            note=f"{self.space.note} Poses by forward kinematics: {used}.".strip(),
        )
        return target, own

    @property
    def needs_anchor(self) -> bool:
        """Whether the way there reads the joints at the chunk's start: some arm is commanded relative to them."""
        return any(self.space.group(name).mode != "absolute" for name in self.chains)

    def states(self, values: Any) -> Float[np.ndarray, "*batch E"]:
        """States [..., D] in the action's layout, joints absolute whatever the actions' mode, as states [..., E]."""
        array = np.asarray(values)
        if array.dtype.kind != "f" or array.ndim < 1 or array.shape[-1] != self.space.dim:
            raise DataError(
                f"states have dtype {array.dtype} and shape {array.shape}; give floats [..., {self.space.dim}] in the"
                f" action's layout ({', '.join(self.space.names)})"
            )
        result = np.empty((*array.shape[:-1], self.target.dim))
        for group in self.space.groups:
            part = array[..., list(group.dims)].astype(np.float64)
            result[..., self._places[group.name]] = self._pose(group, part) if group.name in self.chains else part
        return result

    def there(self, actions: Any, anchor: Any = None) -> Float[np.ndarray, "*batch T E"]:
        """Actions [..., T, D] of `space` as actions [..., T, E] of `target`, float64.

        `anchor`: [..., D] the state at the chunk's start in the action's layout; needed where an arm is commanded relative
        to it or step by step. Raises DataError where it is missing, and SpaceMismatchError for another D.
        """
        return self.states(self._framed(checked_actions(actions, self.space).astype(np.float64), anchor, "absolute"))

    def back(self, poses: Any, anchor: Any, *, unreachable: Unreachable = "nan") -> JointActions:
        """Actions [B, T, E] of `target` as actions of `space`.

        Args:
            anchor: [B, D] state at the chunks' starts, in the layout of `space`: where the search for joints begins.
            unreachable: what the joints are at a pose that an arm does not reach and after it: "nan", or "closest", the
                best that were found (`position_error` and `rotation_error` say how far from the pose).

        Raises DataError for a missing or wrong anchor and values that are not finite, SpaceMismatchError for another E.
        """
        if unreachable not in get_args(Unreachable):
            raise ConfigError(f"unreachable is {unreachable!r}; use one of {', '.join(get_args(Unreachable))}")
        values = checked_actions(poses, self.target).astype(np.float64)
        start = np.asarray(anchor) if anchor is not None else np.zeros(0)
        if values.ndim != 3 or start.dtype.kind != "f" or start.shape != (len(values), self.space.dim):
            raise DataError(
                f"poses {values.shape} need the joints at their start: give anchor as floats [B, {self.space.dim}], the"
                f" proprioception in the layout of {self.space.embodiment!r} (it is"
                f" {'missing' if anchor is None else start.shape})"
            )
        actions = np.empty((*values.shape[:2], self.space.dim))
        reached = np.ones(values.shape[:2], bool)
        worst = np.zeros((2, *values.shape[:2]))
        for group in self.space.groups:
            part, dims = values[..., self._places[group.name]], list(group.dims)
            if group.name not in self.chains:
                actions[..., dims] = part
                continue
            chain, scale = self.chains[group.name], group.scale or 1.0
            rotation = to_matrix(part[..., 3:], self.rotation)
            joints = start[:, dims].astype(np.float64) * scale
            for t in range(values.shape[1]):
                found = chain.inverse(part[:, t, :3], rotation[:, t], joints)
                joints = found.joints
                actions[:, t, dims] = joints / scale
                reached[:, t] &= found.converged
                worst[:, :, t] = np.maximum(worst[:, :, t], (found.position_error, found.rotation_error))
        actions = self._framed(actions, start, None)
        if unreachable == "nan":
            lost = np.logical_or.accumulate(~reached, axis=1)
            for name in self.chains:
                dims = list(self.space.group(name).dims)
                actions[..., dims] = np.where(lost[..., None], np.nan, actions[..., dims])
        return JointActions(actions=actions, reached=reached, position_error=worst[0], rotation_error=worst[1])

    def _framed(self, actions: Any, anchor: Any, to: Literal["absolute"] | None) -> Float[np.ndarray, "*batch T D"]:
        """Arms as absolute joints, or (None) absolute joints in the mode that `space` has them in."""
        if not self.needs_anchor:
            return actions
        result = actions.copy()
        for name in self.chains:
            group = self.space.group(name)
            if group.mode == "absolute":
                continue
            if anchor is None or np.shape(anchor)[-1:] != (self.space.dim,):
                raise DataError(
                    f"joint group {name!r} is {group.mode}, so its poses depend on the joints at the chunk's start; give"
                    f" anchor [..., {self.space.dim}], the proprioception in the action's layout"
                )
            dims = list(group.dims)
            alone = replace(group, dims=tuple(range(len(dims))), mode=group.mode if to else "absolute")
            space = ActionSpace(embodiment=self.space.embodiment, dim=len(dims), groups=(alone,))
            frame: Any = to or group.mode
            first = np.asarray(anchor)[..., dims]
            result[..., dims] = convert(result[..., dims], space, frame, anchor=first)[0]
        return result

    def _pose(self, group: ActionGroup, joints: Float[np.ndarray, "*batch J"]) -> Float[np.ndarray, "*batch _"]:
        position, rotation = self.chains[group.name].forward(joints * (group.scale or 1.0))
        return np.concatenate([position, from_matrix(rotation, self.rotation)], axis=-1)


def _joint_group(space: ActionSpace, key: str) -> ActionGroup:
    joints = [g for g in space.groups if g.kind == "joint"]
    found = [g for g in joints if g.name == key] or [
        g for g in joints if key.lower() in re.findall(r"[a-z]+", g.name.lower())
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{key!r} names {'no' if not found else 'more than one'} joint group of {space.embodiment!r}; name one of"
            f" {', '.join(g.name for g in joints) or 'none: it has no joints'}"
        )
    return found[0]


def _check(group: ActionGroup, chain: KinematicChain, space: ActionSpace) -> None:
    where = f"joint group {group.name!r} of {space.embodiment!r}"
    if len(group.dims) != len(chain):
        raise ConfigError(
            f"{where} has {len(group.dims)} joints, its chain from {chain.base!r} to {chain.tip!r} has {len(chain)}"
            f" ({', '.join(chain.names)}); choose the links of this arm"
        )
    if group.scale is None:
        raise ConfigError(f"{where} has no scale, so its joints are unknown; state the rad per raw unit in its space")
    if group.mode == "velocity":
        raise ConfigError(f"{where} is commanded by velocities, which have no pose; integrate them to joints first")
