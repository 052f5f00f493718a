"""What the names of an action's dimensions say about them, and no more than that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

from actok.core import ActionGroup, ActionSpace
from actok.core.spaces import Kind, Mode, Rotation

__all__ = ["contradicts", "flat_names", "space_from_names"]

_HAND = {"hand", "finger", "thumb", "pinky", "little", "ring", "middle", "index"}
_GRIPPER = {"gripper", "grip", "claw", "jaw"}
_BASE = {"base", "chassis", "wheel", "wheels"}
# Not "motor": data sets call anything motor_0, motor_1, from joints to pixels.
_JOINT = {
    *("joint", "joints", "shoulder", "elbow", "wrist", "waist", "forearm", "hip", "knee", "ankle"),
    *("torso", "neck", "head", "j", "q", "qpos"),
}
_VELOCITY = {"vel", "velocity", "speed", "qvel"}
_DELTA = {"delta", "d", "rel", "diff"}
_ROTATIONS: dict[tuple[str, ...], Rotation] = {
    ("roll", "pitch", "yaw"): "euler_xyz",
    ("yaw", "pitch", "roll"): "euler_zyx",
    ("qx", "qy", "qz", "qw"): "quaternion_xyzw",
    ("qw", "qx", "qy", "qz"): "quaternion_wxyz",
}
_TURNS = {part for order in _ROTATIONS for part in order}
# Kinds that one name may stand for, depending on who named it.
_EXCHANGEABLE = ({"gripper", "hand"}, {"joint", "hand"}, {"base", "velocity"})


class _Meaning(NamedTuple):
    """What one name says. `kind` is None where it says nothing."""

    owner: str  # "left", "right", "head", "torso" or ""
    kind: str | None
    mode: str
    part: str


def flat_names(names: Any, dim: int) -> tuple[str, ...] | None:
    """One label per dimension from what metadata hold (lists, lists in lists, {"motors": [...]}), or None."""
    found = tuple(_leaves(names))
    return found if len(found) == dim else None


def _leaves(names: Any) -> Iterator[str]:
    if isinstance(names, str):
        yield names
    elif isinstance(names, dict):
        # {"motors": [names]} or {name: index}, as older LeRobot data sets have it.
        values = list(names.values())
        if values and all(isinstance(v, int) for v in values):
            yield from sorted(names, key=lambda name: names[name])
        else:
            for value in values:
                yield from _leaves(value)
    elif isinstance(names, (list, tuple)):
        for value in names:
            yield from _leaves(value)


def _meaning(name: str) -> _Meaning:
    text = re.sub(r"^k(?=[A-Z])", "", name)
    tokens = [t.lower() for t in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]
    words = set(tokens)
    owner = (
        "left" if "left" in words or tokens[:1] == ["l"] else "right" if "right" in words or tokens[:1] == ["r"] else ""
    )
    mode = "velocity" if words & _VELOCITY else "delta" if words & _DELTA else "absolute"
    last = next((t for t in reversed(tokens) if not t.isdigit() and t not in _VELOCITY | {"pos", "position"}), "")
    kind: str | None = None
    if words & _GRIPPER:
        kind = "gripper"
    elif words & _BASE or (mode == "velocity" and last in ("x", "y", "theta")):
        kind = "base"
    elif words & _HAND:
        kind = "hand"
    elif words & _JOINT:
        kind = "joint"
        owner = owner or next((w for w in ("head", "neck", "torso") if w in words), "")
    elif last in ("x", "y", "z", "dx", "dy", "dz"):
        kind = "position"
        mode = "delta" if last.startswith("d") else mode
    elif last in _TURNS or (last[:1] == "d" and last[1:] in _TURNS):
        kind = "rotation"
        mode = "delta" if last.startswith("d") else mode
        last = last.removeprefix("d")
    return _Meaning(owner, kind, mode, last)


def contradicts(space: ActionSpace, names: Sequence[str] | None) -> str | None:
    """Why names cannot belong to `space`, in words, or None."""
    if names is None:
        return None
    kinds = {d: g.kind for g in space.groups for d in g.dims}
    for d, name in enumerate(names):
        said = _meaning(name).kind
        if said in (None, kinds[d]) or any({said, kinds[d]} <= pair for pair in _EXCHANGEABLE):
            continue
        return f"dimension {d} is called {name!r}, where it has a {kinds[d]}"
    return None


def space_from_names(names: Sequence[str], *, embodiment: str, rate_hz: float | None) -> ActionSpace | None:
    """A space with the groups that names tell, without any scale; None where they tell nothing.

    Values are taken as absolute where a name does not say otherwise. A rotation is recognised by a complete set of
    (roll, pitch, yaw) or quaternion names in order; anything less stays raw, as do names that say nothing.
    """
    groups: list[ActionGroup] = []
    meanings = [_meaning(name) for name in names]
    if not any(m.kind for m in meanings):
        return None
    runs = groupby(range(len(names)), key=lambda d: meanings[d][:3])
    for (owner, kind, mode), run in runs:
        for dims, rotation in _cut(list(run), [m.part for m in meanings], kind):
            if kind in (None, "rotation") and rotation is None:
                found, title, mode_here = "raw", "other" if kind is None else "rotation", "absolute"
            else:
                found, title, mode_here = str(kind), "joints" if kind == "joint" else str(kind), mode
            title = f"{owner}_{title}" if owner and kind else title
            taken = [g.name for g in groups]
            unique = next(n for n in (title, *(f"{title}_{i}" for i in range(2, len(names) + 2))) if n not in taken)
            groups.append(
                ActionGroup(
                    name=unique,
                    kind=cast(Kind, found),
                    dims=tuple(dims),
                    mode=cast(Mode, mode_here),
                    rotation=rotation,
                )
            )
    return ActionSpace(
        embodiment=embodiment,
        dim=len(names),
        groups=tuple(groups),
        rate_hz=rate_hz,
        names=tuple(names),
        note="groups read from the names of the dimensions; units unknown",
    )


def _cut(dims: list[int], parts: list[str], kind: str | None) -> Iterator[tuple[list[int], Rotation | None]]:
    """A run of rotation names cut into complete rotations; any other run as it is."""
    if kind != "rotation":
        yield dims, None
        return
    while dims:
        for order, rotation in _ROTATIONS.items():
            if tuple(parts[d] for d in dims[: len(order)]) == order:
                yield dims[: len(order)], rotation
                dims = dims[len(order) :]
                break
        else:
            yield dims, None
            return
