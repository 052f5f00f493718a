"""The shared channels of X-Tokenizer (arXiv 2606.14752): which of them a robot's groups fill, and the exact way there and back.

A layout is a preset of `configs/spaces`: `xtokenizer_26`, the paper's, or `xtokenizer_wide`, which adds joints and hands. A
group finds its place by kind and by the words of its name:

    3-D position        left_position or right_position; one arm alone, or a name without a side, counts as right
    rotation            left_rotation or right_rotation, as 6-D
    gripper             left_gripper or right_gripper
    base, velocity      base_velocity
    position "lift"     lift
    joints "head", "neck"      head
    joints "torso", "waist"    torso (wide)
    other joints, 1-D and 2-D positions     left_arm or right_arm, one group behind the other (wide)
    hand                left_hand or right_hand, one group behind the other (wide)

Poses, lift and head are taken relative to the chunk's start: an absolute value by its difference to the anchor (for a
rotation R0^T R_t), a step by accumulation (sums; rotations composed on the side that the space states). All else stays as it
is. In the wide layout, a group without a place there (nothing known of it, an angle whose unit is unknown, the velocity of a
pose, a second group for a place that is full) goes to `other` as it is; in the 26 channels it is refused. The joints of an
arm take the places of a pose where a kinematic model makes one of them first: `actok.data.with_kinematics`.

Deviation: the paper composes rotations as R0^T R_t. A robot commanded by steps about world axes is accumulated about
world axes, R_t R0^T, since the other needs R0, which such an action does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, Self

import numpy as np
from jaxtyping import Bool, Float

from actok.core import ActionGroup, ActionSpace, DataError, SpaceMismatchError
from actok.core.registry import CONFIGS, read_toml
from actok.signal.conversions import ANGLES, Frame, convert, convert_rotations, with_frame, with_rotation
from actok.signal.rotations import nearest_angles

LayoutName = Literal["26", "wide"]
FrameName = Literal["relative", "step"]

# Places whose values are relative to the chunk's start; each takes one group that fills it.
MOVED = ("left_position", "right_position", "left_rotation", "right_rotation", "lift", "head")

__all__ = ["MOVED", "FrameName", "LayoutName", "Placement", "UnionMap", "layout_space"]


@cache
def layout_space(layout: LayoutName) -> ActionSpace:
    """The channels of a layout as an action space."""
    return ActionSpace.from_dict(read_toml(CONFIGS / "spaces" / f"xtokenizer_{layout}.toml"))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One group of a robot and its channels.

    Attributes:
        place: the layout's group.
        own: dimensions of the action vector.
        channels: of the layout; 6 of a rotation, else one a dimension.
        source: the group as an action space by itself.
        frame: what it is converted to; None: its values stay as they are.
    """

    place: str
    own: tuple[int, ...]
    channels: tuple[int, ...]
    source: ActionSpace
    frame: Frame | None

    @property
    def group(self) -> ActionGroup:
        """The group, with dimensions 0, 1, ..."""
        return self.source.groups[0]

    @property
    def needs_anchor(self) -> bool:
        """Whether the conversion reads the state at the chunk's start."""
        return self.frame == "relative" and self.group.mode == "absolute"

    @property
    def changes(self) -> bool:
        """Whether the channels hold other numbers than the actions."""
        return self.frame is not None and (self.frame != self.group.mode or self.group.rotation is not None)

    def there(
        self, values: Float[np.ndarray, "B T D"], anchor: Float[np.ndarray, "B D"] | None
    ) -> Float[np.ndarray, "B T n"]:
        """Raw values of the group as values of its channels."""
        if self.frame is None:
            return values
        found, space = convert(values, self.source, self.frame, anchor=anchor)
        return convert_rotations(found, space, "rot6d")[0] if self.group.rotation else found

    def back(
        self, values: Float[np.ndarray, "B T n"], anchor: Float[np.ndarray, "B D"] | None
    ) -> Float[np.ndarray, "B T D"]:
        """Inverse of `there`. A 6-D value that is no rotation becomes one by Gram-Schmidt."""
        if self.frame is None:
            return values
        space, group = with_frame(self.source, self.frame), self.group
        if group.rotation:
            scale = 1.0 if group.scale is None or group.rotation not in ANGLES else group.scale
            values, space = convert_rotations(values, with_rotation(space, "rot6d"), group.rotation, scale=scale)
        to: Frame = group.mode  # type: ignore[assignment]  # velocities are never moved
        side = space.groups[0].side if to != "absolute" else None
        return convert(values, space, to, anchor=anchor, side=side)[0]


class UnionMap:
    """A robot's actions in the channels of a layout, and back: exact inverses, in float64.

    Attributes:
        space: the robot's.
        placements: one a group.
        dim: U, channels of the layout.
        channels: int [n], those that the robot fills, ascending.
        needs_anchor: whether absolute poses need the state at the chunk's start.
    """

    def __init__(self, space: ActionSpace, dim: int, placements: Sequence[Placement]) -> None:
        self.space, self.dim, self.placements = space, dim, tuple(placements)
        self.channels = np.array(sorted(c for p in self.placements for c in p.channels))
        self.needs_anchor = any(p.needs_anchor for p in self.placements)

    @classmethod
    def infer(cls, space: ActionSpace, layout: LayoutName, frame: FrameName = "relative") -> Self:
        """By kinds and names. Raises SpaceMismatchError naming a group that has no place.

        Args:
            frame: "relative", or "step": groups commanded step by step stay steps.
        """
        return cls.from_places(space, layout, frame, _places(space, layout))

    @classmethod
    def from_places(
        cls, space: ActionSpace, layout: LayoutName, frame: FrameName, places: Mapping[str, tuple[str, Sequence[int]]]
    ) -> Self:
        """From {group: (place, channels)}, as `places` gives them."""
        placements = []
        for group in space.groups:
            place, channels = places[group.name]
            target: Frame | None = None
            if place in MOVED and group.mode != "velocity":
                target = "delta" if frame == "step" and group.mode == "delta" else "relative"
            alone = replace(group, dims=tuple(range(len(group.dims))))
            source = ActionSpace(embodiment=space.embodiment, dim=len(group.dims), groups=(alone,))
            placements.append(
                Placement(place=place, own=group.dims, channels=tuple(channels), source=source, frame=target)
            )
        return cls(space, layout_space(layout).dim, placements)

    @property
    def places(self) -> dict[str, tuple[str, list[int]]]:
        """Place and channels by group: JSON values."""
        return {p.group.name: (p.place, list(p.channels)) for p in self.placements}

    def there(
        self, actions: Float[np.ndarray, "B T D"], anchor: Float[np.ndarray, "B P"] | None = None
    ) -> Float[np.ndarray, "B T U"]:
        """Raw actions in the layout's channels, float64, 0 where the robot has none.

        `anchor`: proprioception at the chunks' starts, in the action's layout where the robot commands absolute poses.
        Raises DataError where it is missing there or has another layout.
        """
        start = self._start(anchor)
        result = np.zeros((*actions.shape[:2], self.dim))
        for p in self.placements:
            own = list(p.own)
            first = start[:, own] if start is not None and p.needs_anchor else None
            result[:, :, list(p.channels)] = p.there(actions[:, :, own].astype(np.float64), first)
        return result

    def back(
        self,
        union: Float[np.ndarray, "B T U"],
        anchor: Float[np.ndarray, "B P"] | None = None,
        centre: Float[np.ndarray, "D"] | None = None,
    ) -> Float[np.ndarray, "B T D"]:
        """Inverse of `there` with the same anchor.

        Angles of rotations come back as the equivalent ones nearest to `centre`, raw; None: in their canonical range. A
        robot whose roll is recorded as 3.0 to 3.3 is not to be sent -3.1, which its limits would then cut.
        """
        start = self._start(anchor)
        result = np.zeros((*union.shape[:2], self.space.dim))
        for p in self.placements:
            own = list(p.own)
            first = start[:, own] if start is not None and p.needs_anchor else None
            values = p.back(union[:, :, list(p.channels)].astype(np.float64), first)
            if centre is not None and p.frame is not None and p.group.rotation in ANGLES:
                values = nearest_angles(values, p.group.rotation, centre[own], 2 * np.pi / (p.group.scale or 1.0))
            result[:, :, own] = values
        return result

    def present(self, dof_mask: Bool[np.ndarray, "B D"] | None, count: int) -> Bool[np.ndarray, "B U"]:
        """Which channels are present where these dimensions are (None: all).

        Raises DataError where a rotation is present in part.
        """
        result = np.zeros((count, self.dim), bool)
        if dof_mask is None:
            result[:, self.channels] = True
            return result
        for p in self.placements:
            mask = dof_mask[:, list(p.own)]
            if p.frame is not None and p.group.rotation:
                if (mask.any(1) != mask.all(1)).any():
                    raise DataError(
                        f"dof_mask leaves out part of the rotation {p.group.name!r}, which is converted as a whole; mask"
                        " all of its dimensions or none"
                    )
                mask = np.repeat(mask[:, :1], len(p.channels), 1)
            result[:, list(p.channels)] = mask
        return result

    def _start(self, anchor: Float[np.ndarray, "B P"] | None) -> Float[np.ndarray, "B D"] | None:
        if not self.needs_anchor:
            return None
        names = ", ".join(p.group.name for p in self.placements if p.needs_anchor)
        where = f"embodiment {self.space.embodiment!r} commands absolute {names}, taken relative to the chunk's start"
        otherwise = "; or convert the data first (actok.signal.conversions.convert) to steps or to relative poses"
        if anchor is None:
            raise DataError(
                f"{where}; give the proprioception there in the action's layout as anchor [B, {self.space.dim}]{otherwise}"
            )
        if anchor.shape[1] != self.space.dim:
            raise DataError(
                f"{where}; anchor has {anchor.shape[1]} numbers, give the {self.space.dim} of the action's layout"
                f" ({', '.join(self.space.names)}){otherwise}"
            )
        return anchor.astype(np.float64)


# -- which group goes where ---------------------------------------------------------------------------------------------


def _places(space: ActionSpace, layout: LayoutName) -> dict[str, tuple[str, list[int]]]:
    union = layout_space(layout)
    room = {g.name: list(g.dims) for g in union.groups}
    whole = {g.name: len(g.dims) for g in union.groups}
    found = {}
    for group in space.groups:
        wish, why = _wish(group)
        size = 6 if wish.endswith("_rotation") else len(group.dims)
        if wish not in room:
            place, why = "other", why or f"has no {wish}"
        elif (wish in MOVED and size != len(room[wish])) or size > len(room[wish]):
            place, why = (
                "other",
                f"has {whole[wish]} channels in {wish}, of which {len(room[wish])} are left for its {size}",
            )
        else:
            place = wish
        size = len(group.dims) if place == "other" else size
        if size > len(room.get(place, ())):
            raise SpaceMismatchError(
                f"group {group.name!r} ({group.kind}, {len(group.dims)} dimensions) of {space.embodiment!r} has no place in"
                f" {union.embodiment}: it {why}; "
                + (
                    "turn its joints into poses by a kinematic model (actok.data.with_kinematics), or use layout 'wide'"
                    if layout == "26" and group.kind == "joint"
                    else "name the group after its side and part (left_position, right_arm), or use layout 'wide'"
                    if layout == "26"
                    else "name the group after its side and part (left_position, right_arm), or split the robot's actions"
                )
            )
        found[group.name] = (place, room[place][:size])
        room[place] = room[place][size:]
    return found


def _wish(group: ActionGroup) -> tuple[str, str]:
    """The place that kind and name ask for, and where it is "other", why."""
    words = set(re.findall(r"[a-z]+", group.name.lower()))
    side = "left" if "left" in words else "right"
    pose = group.kind in ("position", "rotation") and (group.kind == "rotation" or len(group.dims) == 3)
    if pose and group.mode == "velocity":
        return "other", f"takes no velocity of a {group.kind}"
    if group.kind == "rotation":
        if group.scale is None and group.rotation in ANGLES:
            return "other", "takes no rotation whose rad per raw unit are unknown"
        return f"{side}_rotation", ""
    if pose:
        return f"{side}_position", ""
    if group.kind == "position" and "lift" in words:
        return "lift", ""
    if group.kind == "joint" and words & {"head", "neck"}:
        return "head", ""
    if group.kind == "joint" and words & {"torso", "waist"}:
        return "torso", ""
    places = {
        "position": f"{side}_arm",
        "joint": f"{side}_arm",
        "hand": f"{side}_hand",
        "gripper": f"{side}_gripper",
        "base": "base_velocity",
        "velocity": "base_velocity",
    }
    if group.kind not in places:
        return "other", "takes nothing of unknown kind"
    return places[group.kind], ""
