"""The robots a closed-form tokenizer knows: action space, normaliser, and limits of what it may command."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from actok.core import ActionGroup, ActionSpace
from actok.signal.conversions import ANGLES
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics

__all__ = ["Embodiment", "make_embodiment", "redundant_rotations"]

# How far beyond the observed range a decoded value may lie, as a share of the range's width: held-out motions reach a
# little further than the training ones did. Grippers and hands have hard stops and get none.
LIMIT_MARGIN = 0.25


@dataclass(frozen=True, eq=False)
class Embodiment:
    """One robot that a tokenizer knows: its action space, its normaliser, and what else its kind found in the data.

    `facts` are plain JSON values, stored in the artifact beside the two; most tokenizers have none.
    """

    space: ActionSpace
    normaliser: Normaliser
    facts: Mapping[str, Any] = field(default_factory=dict)


def redundant_rotations(space: ActionSpace) -> list[ActionGroup]:
    """Groups whose numbers are a rotation only under constraints (6-D, quaternion), which quantisation breaks."""
    return [g for g in space.groups if g.rotation not in (None, *ANGLES) and g.mode != "velocity"]


def _limits(space: ActionSpace, statistics: Statistics) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    """Smallest and largest raw value [D] that decoding may give: stated by the space, else observed plus a margin.

    6-D rotations and quaternions, unless stated, lie in [-1, 1], since decoding makes their vectors unit vectors.
    """
    if space.low is not None and space.high is not None:
        return np.array(space.low), np.array(space.high)
    soft = np.ones(space.dim)
    for group in space.groups:
        if group.kind in ("gripper", "hand"):
            soft[list(group.dims)] = 0.0
    margin = LIMIT_MARGIN * soft * (statistics.maximum - statistics.minimum)
    low, high = statistics.minimum - margin, statistics.maximum + margin
    for group in redundant_rotations(space):
        dims = list(group.dims)
        low[dims], high[dims] = np.minimum(statistics.minimum[dims], -1.0), np.maximum(statistics.maximum[dims], 1.0)
    return low, high


def make_embodiment(space: ActionSpace, statistics: Statistics, kind: str) -> Embodiment:
    """A robot with a normaliser of that kind made from its statistics. Warns of dimensions that never change."""
    limits = None if kind == "identity" and space.low is None else _limits(space, statistics)
    normaliser = Normaliser.make(kind, statistics, limits)
    if normaliser.constant.any():
        names = [space.names[d] for d in np.flatnonzero(normaliser.constant)]
        warnings.warn(
            f"embodiment {space.embodiment!r}: {', '.join(names)} never changes in the data; it will decode to that"
            " constant",
            stacklevel=4,
        )
    return Embodiment(space, normaliser)
