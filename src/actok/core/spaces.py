"""Action spaces: what each dimension of an action means, in which unit, and relative to what.

A dimension belongs to one named group. Groups drive patching, physical metrics, masks and conversions. The *scale* of a
group is the physical unit of one raw unit (robosuite's OSC: 0.05 m); where it is unknown the group is reported in raw
units, never in millimetres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from actok.core.errors import ConfigError

Kind = Literal["position", "rotation", "gripper", "joint", "velocity", "base", "hand", "raw"]
Mode = Literal["absolute", "relative", "delta", "velocity"]
Rotation = Literal["axis_angle", "quaternion_xyzw", "quaternion_wxyz", "rot6d", "euler_xyz", "euler_zyx"]
Side = Literal["body", "world"]

ROTATION_SIZE: Mapping[str, int] = {
    "axis_angle": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rot6d": 6,
    "euler_xyz": 3,
    "euler_zyx": 3,
}

__all__ = ["ROTATION_SIZE", "ActionGroup", "ActionSpace", "Kind", "Mode", "Rotation", "Side"]


@dataclass(frozen=True, kw_only=True)
class ActionGroup:
    """Dimensions that belong together physically.

    Attributes:
        name: unique within the space, e.g. "left_position".
        kind: what is moved; decides which physical metric applies.
        dims: indices into the action vector, in order.
        mode: "absolute"; "relative" (to the state at the chunk's start); "delta" (to the step before);
            "velocity" (per second). Delta and velocity groups are padded with zero, the others hold their last value.
        rotation: format, for kind "rotation" only.
        unit: physical unit after scaling: "m", "rad", "fraction", "m/s", "rad/s" or "raw".
        scale: physical units per raw unit; None where nobody knows it.
        side: for rotations that are not absolute, the axes they turn about: "body" (R = R0 S) or "world" (R = S R0);
            None where nobody says, which is then treated as "body".
    """

    name: str
    kind: Kind
    dims: tuple[int, ...]
    mode: Mode = "absolute"
    rotation: Rotation | None = None
    unit: str = "raw"
    scale: float | None = None
    side: Side | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(int(d) for d in self.dims))
        where = f"action group {self.name!r}"
        if self.kind not in get_args(Kind):
            raise ConfigError(f"{where} has kind {self.kind!r}; use one of {', '.join(get_args(Kind))}")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"{where} has mode {self.mode!r}; use one of {', '.join(get_args(Mode))}")
        if not self.dims:
            raise ConfigError(f"{where} has no dimensions; name at least one")
        if self.kind == "rotation":
            if self.rotation is None or self.rotation not in ROTATION_SIZE:
                raise ConfigError(f"{where} has rotation {self.rotation!r}; use one of {', '.join(ROTATION_SIZE)}")
            if len(self.dims) != ROTATION_SIZE[self.rotation]:
                raise ConfigError(
                    f"{where} has {len(self.dims)} dimensions; {self.rotation} takes {ROTATION_SIZE[self.rotation]}"
                )
        elif self.rotation is not None:
            raise ConfigError(f"{where} of kind {self.kind!r} names a rotation format; only kind 'rotation' has one")
        if self.side is not None and (self.side not in get_args(Side) or self.kind != "rotation"):
            raise ConfigError(f"{where} has side {self.side!r}; rotations alone have one: {', '.join(get_args(Side))}")
        if self.scale is not None and not self.scale > 0:
            raise ConfigError(f"{where} has scale {self.scale}; give the physical units per raw unit, above 0")

    @property
    def incremental(self) -> bool:
        """True where standing still is the value 0 (delta and velocity)."""
        return self.mode in ("delta", "velocity")


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """The meaning of an action vector of `dim` numbers for one embodiment.

    Attributes:
        embodiment: key under which normalisers are stored, e.g. "libero_franka".
        dim: D, the length of an action.
        groups: disjoint; together they cover every dimension.
        rate_hz: control rate, None where unknown.
        names: one label per dimension (defaults to "group.i").
        low, high: limits of each dimension in raw units where the robot's interface states them.
        note: where the facts come from.
    """

    embodiment: str
    dim: int
    groups: tuple[ActionGroup, ...]
    rate_hz: float | None = None
    names: tuple[str, ...] = ()
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        where = f"action space {self.embodiment!r}"
        seen = sorted(d for g in self.groups for d in g.dims)
        if seen != list(range(self.dim)):
            raise ConfigError(f"{where}: groups cover dimensions {seen}; each of 0..{self.dim - 1} must occur once")
        if len({g.name for g in self.groups}) != len(self.groups):
            raise ConfigError(f"{where}: group names {[g.name for g in self.groups]} repeat; make them unique")
        if not self.names:
            labels = {
                d: g.name if len(g.dims) == 1 else f"{g.name}.{i}" for g in self.groups for i, d in enumerate(g.dims)
            }
            object.__setattr__(self, "names", tuple(labels[d] for d in range(self.dim)))
        object.__setattr__(self, "names", tuple(str(n) for n in self.names))
        if len(self.names) != self.dim:
            raise ConfigError(f"{where}: {len(self.names)} names for {self.dim} dimensions; give one each")
        for field in ("low", "high"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, tuple(float(v) for v in value))
                if len(value) != self.dim:
                    raise ConfigError(
                        f"{where}: {field} has {len(value)} values for {self.dim} dimensions; give one each"
                    )
        if self.rate_hz is not None and not self.rate_hz > 0:
            raise ConfigError(f"{where}: rate_hz is {self.rate_hz}; give a rate above 0 or leave it out")

    @classmethod
    def raw(cls, dim: int, embodiment: str = "unknown", rate_hz: float | None = None) -> ActionSpace:
        """A space about which nothing is known: one group in raw units, absolute values."""
        group = ActionGroup(name="raw", kind="raw", dims=tuple(range(dim)))
        return cls(embodiment=embodiment, dim=dim, groups=(group,), rate_hz=rate_hz, note="nothing known")

    def group(self, name: str) -> ActionGroup:
        """The group of that name. Raises ConfigError naming those there are."""
        for group in self.groups:
            if group.name == name:
                return group
        raise ConfigError(
            f"action space {self.embodiment!r} has no group {name!r}; it has {[g.name for g in self.groups]}"
        )

    @cached_property
    def incremental(self) -> tuple[bool, ...]:
        """Per dimension [D]: True where 0 means standing still, so padding is 0 (else padding holds the last value)."""
        flags = {d: g.incremental for g in self.groups for d in g.dims}
        return tuple(flags[d] for d in range(self.dim))

    @property
    def default_horizon(self) -> int:
        """T where nobody names one: one second of control, at least 10 and at most 50 steps; 16 at an unknown rate.

        Bridge (5 Hz) gives 10, LIBERO (20 Hz) 20, ALOHA (50 Hz) 50: the chunk sizes of FAST and of FASTer's table 4.
        """
        return 16 if self.rate_hz is None else int(min(50, max(10, round(self.rate_hz))))

    def differences(self, other: ActionSpace) -> list[str]:
        """What keeps data of `other` out of a tokenizer fitted on this space (embodiment and rate do not)."""
        if self.dim != other.dim:
            return [f"dimensions: {self.dim} against {other.dim}"]
        found = []
        mine = {g.dims: g for g in self.groups}
        theirs = {g.dims: g for g in other.groups}
        for dims in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(dims), theirs.get(dims)
            if a is None or b is None:
                where = self.embodiment if b is None else other.embodiment
                found.append(f"dimensions {list(dims)} form a group only in {where!r}")
                continue
            found += [
                f"{a.name} {field}: {getattr(a, field)} against {getattr(b, field)}"
                for field in ("kind", "mode", "rotation", "unit", "scale", "side")
                if getattr(a, field) != getattr(b, field)
            ]
        return found

    def renamed(self, embodiment: str) -> ActionSpace:
        """The same space under another embodiment's name."""
        return replace(self, embodiment=embodiment)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        groups = [
            {
                k: (list(v) if k == "dims" else v)
                for k, v in vars(g).items()
                if v is not None and k in g.__dataclass_fields__
            }
            for g in self.groups
        ]
        return {
            "embodiment": self.embodiment,
            "dim": self.dim,
            "rate_hz": self.rate_hz,
            "names": list(self.names),
            "low": None if self.low is None else list(self.low),
            "high": None if self.high is None else list(self.high),
            "note": self.note,
            "groups": groups,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActionSpace:
        """Build from JSON or TOML values. Raises ConfigError for unknown or missing keys.

        In TOML a space-wide `mode` may be given once; groups override it.
        """
        values = dict(data)
        mode = values.pop("mode", "absolute")
        raw_groups: Sequence[Mapping[str, Any]] = values.pop("groups", ())
        try:
            groups = tuple(ActionGroup(**{"mode": mode, **g}) for g in raw_groups)
            for key in ("names", "low", "high"):
                if values.get(key) is not None:
                    values[key] = tuple(values[key])
                else:
                    values.pop(key, None)
            return cls(groups=groups, **values)
        except TypeError as error:
            raise ConfigError(
                f"action space {values.get('embodiment')!r}: {error}; see docs/spaces.md for the keys"
            ) from None
