"""Action-space presets (configs/spaces/*.toml, or a user's own file), and finding the right one for a dataset.

A file holds the keys of `ActionSpace.from_dict`, and beside them:

    per_robot = true                   # the embodiment gets the robot's name appended when inferred
    match = [{ robots = ["so100*"] }]  # what in a dataset's metadata points here; every key of an entry must agree
                                       # keys: robots, datasets, names (shell patterns, any case), rate_hz
    [union.xtokenizer_26]              # which group of a wider layout each group goes to
    position = "right_position"
    [kinematics]                       # joint groups to be read as end-effector poses, see `actok.data.kinematic`
    left_arm = { urdf = "arm.urdf", base = "base_link", tip = "gripper_link" }
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from actok.core import ActionSpace, ConfigError
from actok.core.registry import CONFIGS, read_toml, suggest
from actok.data.space_names import contradicts, flat_names, space_from_names

FOLDER = CONFIGS / "spaces"
MATCH_KEYS = ("robots", "datasets", "names", "rate_hz")

__all__ = ["describe_space", "find_space", "infer_space", "kinematics_table", "list_spaces", "union_mapping"]


@dataclass(frozen=True, kw_only=True)
class _SpaceFile:
    space: ActionSpace
    match: tuple[Mapping[str, Any], ...]
    union: Mapping[str, Mapping[str, str]]
    kinematics: Mapping[str, Any]
    per_robot: bool


def _read(path: Path) -> _SpaceFile:
    values = read_toml(path)
    match, union, per_robot = values.pop("match", []), values.pop("union", {}), values.pop("per_robot", False)
    kinematics = values.pop("kinematics", {})
    if not isinstance(kinematics, Mapping):
        raise ConfigError(f"{path}: kinematics is {kinematics!r}; give a table [kinematics]")
    for entry in match:
        if unknown := [k for k in entry if k not in MATCH_KEYS]:
            raise ConfigError(f"{path}: match has the key {unknown[0]!r}; it takes {', '.join(MATCH_KEYS)}")
        if not entry:
            raise ConfigError(f"{path}: an empty match would fit every dataset; give it {', '.join(MATCH_KEYS)}")
    try:
        space = ActionSpace.from_dict(values)
        for mapping in union.values():
            for group in mapping:
                space.group(group)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return _SpaceFile(space=space, match=tuple(match), union=union, kinematics=kinematics, per_robot=bool(per_robot))


@cache
def _presets() -> Mapping[str, _SpaceFile]:
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.toml"))}


def _find(name_or_path: str | Path) -> _SpaceFile:
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in _presets():
        return _presets()[name]
    if name.endswith(".toml") or Path(name).is_file():
        return _read(Path(name))
    raise ConfigError(f"no action space is called {name!r}; {suggest(name, list_spaces())}, or give the path of a TOML")


def list_spaces() -> list[str]:
    """Names of the presets, in alphabetical order."""
    return list(_presets())


def find_space(name_or_path: str | Path) -> ActionSpace:
    """The preset of that name, or the space in that TOML file. Raises ConfigError with the nearest name."""
    return _find(name_or_path).space


def kinematics_table(name_or_path: str | Path) -> dict[str, Any]:
    """The [kinematics] table of a preset or TOML file, as it stands there; empty where there is none."""
    return dict(_find(name_or_path).kinematics)


def union_mapping(name_or_path: str | Path, union: str) -> dict[str, str]:
    """Which group of the layout `union` each group of a preset goes to, for `actok.signal.unions.to_union`.

    Raises ConfigError where the preset states none.
    """
    known = _find(name_or_path).union
    if union not in known:
        raise ConfigError(
            f"action space {str(name_or_path)!r} states no place in {union!r} (it does in:"
            f" {', '.join(known) or 'none'}); give a mapping {{own group: its group}}"
        )
    return dict(known[union])


# -- inference ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Hit:
    name: str
    preset: _SpaceFile
    strength: tuple[int, int]  # keys that agree, then length of the patterns without wildcards
    words: str


def infer_space(
    dim: int,
    *,
    names: Any = None,
    robot: str | None = None,
    rate_hz: float | None = None,
    dataset: str | None = None,
) -> tuple[ActionSpace, str]:
    """The action space of a dataset from its metadata, and where it came from, in words.

    A preset is taken where number of dimensions and its `match` agree with the metadata and the names of the dimensions
    do not contradict it; the most specific match wins, and where two are equally good neither is taken. Otherwise names
    give groups without units; otherwise everything is raw. The data's rate always wins over the preset's.

    Args:
        names: one label per dimension, in any nesting that metadata use; ignored where the number differs.
    """
    labels = flat_names(names, dim)
    hits, refused = [], []
    for hit in _hits(dim, labels, robot, rate_hz, dataset):
        why = contradicts(hit.preset.space, labels)
        if why is None:
            hits.append(hit)
        else:
            refused.append(f"not preset {hit.name} ({hit.words}): {why}")
    best = [h for h in hits if h.strength == max(h.strength for h in hits)]
    if len(best) == 1:
        return _taken(best[0], labels, robot, rate_hz)
    if best:
        refused.append(f"presets {' and '.join(h.name for h in best)} fit equally well; name one")
    embodiment = _slug(robot) or _slug(dataset) or "unknown"
    space = None if labels is None else space_from_names(labels, embodiment=embodiment, rate_hz=rate_hz)
    if space is not None:
        words = "names of the dimensions; units unknown, values taken as absolute where the names do not say"
        return space, "; ".join(["inferred from the " + words, *refused])
    space = ActionSpace.raw(dim, embodiment, rate_hz)
    if labels is not None:
        space = replace(space, names=labels)
    return space, "; ".join(["nothing known: reported in raw units", *refused])


def _hits(
    dim: int, labels: Sequence[str] | None, robot: str | None, rate_hz: float | None, dataset: str | None
) -> list[_Hit]:
    title = (dataset or "").casefold()
    have = {
        "robots": [robot.casefold()] if robot else [],
        "datasets": [t for t in (title, title.rsplit("/", 1)[-1]) if t],
        "names": [label.casefold() for label in labels or ()],
    }
    shown = {"robots": f"robot {robot!r}", "datasets": f"dataset {dataset!r}", "names": "the dimensions' names"}
    found = []
    for name, preset in _presets().items():
        if preset.space.dim != dim:
            continue
        options = []
        for entry in preset.match:
            if "rate_hz" in entry and entry["rate_hz"] != rate_hz:
                continue
            patterns = {k: [p for p in entry[k] if any(fnmatchcase(t, p) for t in have[k])] for k in have if k in entry}
            if not all(patterns.values()):
                continue
            length = sum(max(len(p.replace("*", "")) for p in hit) for hit in patterns.values())
            words = [shown[k] for k in patterns] + ([f"{rate_hz:g} Hz"] if "rate_hz" in entry and rate_hz else [])
            options.append(_Hit(name=name, preset=preset, strength=(len(entry), length), words=" and ".join(words)))
        if options:
            found.append(max(options, key=lambda h: h.strength))
    return found


def _taken(
    hit: _Hit, labels: Sequence[str] | None, robot: str | None, rate_hz: float | None
) -> tuple[ActionSpace, str]:
    space = hit.preset.space
    words = f"preset {hit.name}, matched by {hit.words} and {space.dim} dimensions"
    if rate_hz is not None and space.rate_hz != rate_hz:
        if space.rate_hz is not None:
            words += f"; rate {rate_hz:g} Hz from the data instead of {space.rate_hz:g} Hz"
        space = replace(space, rate_hz=rate_hz)
    if hit.preset.per_robot and _slug(robot):
        space = space.renamed(f"{space.embodiment}_{_slug(robot)}")
    if labels is not None:
        space = replace(space, names=tuple(labels))
    return space, words


def _slug(text: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "_", (text or "").rsplit("/", 1)[-1].casefold()).strip("_")


# -- showing ------------------------------------------------------------------------------------------------------------


def describe_space(space: ActionSpace, origin: str) -> str:
    """A table for people: what each group is, in which unit, and how this is known. Several lines, no trailing newline."""
    rate = "control rate unknown" if space.rate_hz is None else f"{space.rate_hz:g} Hz"
    lines = [f"action space {space.embodiment}: {space.dim} dimensions, {rate}", f"  known from: {origin}"]
    rows = [("group", "dims", "kind", "mode", "one raw unit is", "names")]
    for g in space.groups:
        unit = "unknown (raw)" if g.scale is None else f"{g.scale:.6g} {g.unit}"
        kind = g.kind if g.rotation is None else f"{g.kind} {g.rotation}"
        mode = g.mode if g.side is None else f"{g.mode} ({g.side})"
        rows.append((g.name, _ranges(g.dims), kind, mode, unit, _shortened([space.names[d] for d in g.dims])))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines += ["  " + "  ".join([*(f"{c:{w}}" for c, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
    if space.low is not None and space.high is not None:
        pairs = set(zip(space.low, space.high, strict=True))
        each = ", ".join(f"{a:g}..{b:g}" for a, b in zip(space.low, space.high, strict=True))
        lines.append("  limits: " + (each if len(pairs) > 1 else f"{space.low[0]:g}..{space.high[0]:g} everywhere"))
    if space.note:
        lines.append(f"  note: {space.note}")
    return "\n".join(lines)


def _ranges(dims: Sequence[int]) -> str:
    if len(dims) > 1 and tuple(dims) == tuple(range(dims[0], dims[0] + len(dims))):
        return f"{dims[0]}-{dims[-1]}"
    return ",".join(str(d) for d in dims)


def _shortened(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 60 else f"{names[0]} ... {names[-1]}"
