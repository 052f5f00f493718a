"""Wider layouts: actions of many embodiments in the channels of one union space, with masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from actok.core.errors import SpaceMismatchError
from actok.core.spaces import ActionSpace
from actok.signal.conversions import ANGLES, checked_actions

__all__ = ["from_union", "to_union"]


def to_union(
    actions: Any,
    space: ActionSpace,
    union: ActionSpace,
    *,
    mapping: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
) -> tuple[Float[np.ndarray, "*batch T D"], Bool[np.ndarray, "*batch D"]]:
    """Actions [..., T, D] in a wider layout: [..., T, U], absent channels 0, and which are present, bool [..., U].

    Groups go to the union's group of the same name, or where `mapping` {own name: union's name} sends them; groups in
    `drop` stay behind. Kind, mode, rotation format and side must agree (see `convert`, `convert_rotations`), and a group
    may be shorter than its place; scales are reconciled where the union states one. Raises SpaceMismatchError naming
    the groups that do not fit, ConfigError for names that do not exist.
    """
    values = checked_actions(actions, space)
    result = np.zeros((*values.shape[:-1], union.dim))
    present = np.zeros((*values.shape[:-2], union.dim), bool)
    for own, place, factor in _placements(space, union, mapping, drop):
        result[..., place] = values[..., own] * factor
        present[..., place] = True
    return result.astype(values.dtype, copy=False), present


def from_union(
    actions: Any,
    space: ActionSpace,
    union: ActionSpace,
    *,
    mapping: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
) -> tuple[Float[np.ndarray, "*batch T D"], Bool[np.ndarray, "*batch D"]]:
    """Inverse of `to_union` with the same arguments: [..., T, D] of `space`, and bool [..., D], False where dropped."""
    values = checked_actions(actions, union, "union actions")
    result = np.zeros((*values.shape[:-1], space.dim))
    present = np.zeros((*values.shape[:-2], space.dim), bool)
    for own, place, factor in _placements(space, union, mapping, drop):
        result[..., own] = values[..., place] / factor
        present[..., own] = True
    return result.astype(values.dtype, copy=False), present


def _placements(
    space: ActionSpace, union: ActionSpace, mapping: Mapping[str, str] | None, drop: Sequence[str]
) -> list[tuple[list[int], list[int], float]]:
    names = dict(mapping or {})
    for name in [*names, *drop]:
        space.group(name)
    kept = [g for g in space.groups if g.name not in drop]
    available = {g.name: g for g in union.groups}
    homeless = [g.name for g in kept if names.get(g.name, g.name) not in available]
    if homeless:
        raise SpaceMismatchError(
            f"{', '.join(homeless)} of {space.embodiment!r} have no place in {union.embodiment!r}, which has"
            f" {', '.join(available)}; map them, or name them in drop"
        )
    placed: dict[str, str] = {}
    result = []
    for g in kept:
        to = available[names.get(g.name, g.name)]
        if to.name in placed:
            raise SpaceMismatchError(f"{placed[to.name]} and {g.name} would both fill {to.name}; map one elsewhere")
        placed[to.name] = g.name
        found = [
            f"{field} {getattr(g, field)} against {getattr(to, field)}"
            for field in ("kind", "mode", "rotation")
            if getattr(g, field) != getattr(to, field)
        ]
        if g.kind == "rotation" and g.mode != "absolute" and (g.side or "body") != (to.side or "body"):
            found.append(f"side {g.side or 'body'} against {to.side or 'body'}")
        if len(g.dims) > len(to.dims):
            found.append(f"{len(g.dims)} dimensions against {len(to.dims)}")
        if g.scale is None and to.scale is not None and g.rotation in (None, *ANGLES):
            found.append(f"unknown scale against {to.scale} {to.unit}")
        if found:
            raise SpaceMismatchError(f"{g.name} does not fit {to.name}: {'; '.join(found)}; convert the actions first")
        scaled = g.scale is not None and to.scale is not None and g.rotation in (None, *ANGLES)
        factor = g.scale / to.scale if scaled and g.scale and to.scale else 1.0
        result.append((list(g.dims), list(to.dims)[: len(g.dims)], factor))
    return result
