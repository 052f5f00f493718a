"""Ranges of X-Tokenizer's shared channels, by embodiment: measured on training chunks, or estimated for a robot added later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float

from actok.core import ActionSpace, DataError, FitPart
from actok.signal.normalise import CONSTANT_WIDTH, Normaliser, NormaliserKind
from actok.signal.sketch import StatisticsAccumulator
from actok.signal.statistics import Statistics
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.xtokenizer_layout import FrameName, LayoutName, Placement, UnionMap

# Of the shared channels (arXiv 2606.14752): the 0.1 % and 99.9 % quantiles to -1 and 1.
KIND: NormaliserKind = "quantile_wide"
# Chunks that are converted at once.
ROWS = 4096
# Standard deviations of the proprioception, see `Shared.state`.
FARTHEST = 5.0

__all__ = ["Shared", "estimate", "measure"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """One robot in the shared channels: the way there, ranges, and the scale of its proprioception.

    Attributes:
        union: raw actions to channels and back.
        ranges: of the channels that the robot fills, in ascending order.
        mean, std: [P] of the proprioception at the starts of training chunks; None where the robot was trained without.
    """

    union: UnionMap
    ranges: Normaliser
    mean: Float[np.ndarray, "P"] | None
    std: Float[np.ndarray, "P"] | None

    @classmethod
    def of(cls, space: ActionSpace, facts: Mapping[str, Any], layout: LayoutName, frame: FrameName) -> Self:
        """From what the artifact holds."""
        state = facts["state"]
        return cls(
            union=UnionMap.from_places(space, layout, frame, facts["places"]),
            ranges=Normaliser.from_dict(facts["ranges"]),
            mean=None if state is None else np.array(state["mean"]),
            std=None if state is None else np.array(state["std"]),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values; `of` is the inverse."""
        state = (
            None if self.mean is None or self.std is None else {"mean": self.mean.tolist(), "std": self.std.tolist()}
        )
        return {"places": self.union.places, "ranges": self.ranges.to_dict(), "state": state}

    def there(
        self, actions: Float[np.ndarray, "B T D"], anchor: Float[np.ndarray, "B P"] | None
    ) -> Float[np.ndarray, "B T U"]:
        """Raw actions as normalised channels, float32, 0 where the robot has none; nothing is clipped."""
        union = self.union.there(actions, anchor)
        result = np.zeros(union.shape, np.float32)
        result[:, :, self.union.channels] = self.ranges(union[:, :, self.union.channels])
        return result

    def back(
        self,
        channels: Float[np.ndarray, "B T U"],
        anchor: Float[np.ndarray, "B P"] | None,
        centre: Float[np.ndarray, "D"] | None = None,
    ) -> Float[np.ndarray, "B T D"]:
        """Inverse of `there`, float64. What never changed in training comes back as it was; `centre`: see UnionMap."""
        union = np.zeros(channels.shape)
        own = np.where(self.ranges.constant, 0.0, channels[:, :, self.union.channels].astype(np.float64))
        union[:, :, self.union.channels] = self.ranges.inverse(own)
        return self.union.back(union, anchor, centre)

    def state(
        self, anchor: Float[np.ndarray, "B P"] | None, count: int, width: int
    ) -> tuple[Float[np.ndarray, "B W"], Bool[np.ndarray, "B"]]:
        """Normalised proprioception, zero-padded to `width` numbers, and whether it is known.

        Beyond `FARTHEST` standard deviations a number says no more: one that hardly moved in training may be anywhere
        later, and would drown everything else that encoder and decoder read.

        Raises DataError where it has another length than in training.
        """
        state, known = np.zeros((count, width), np.float32), np.zeros(count, bool)
        if anchor is None or self.mean is None or self.std is None:
            return state, known
        if anchor.shape[1] != len(self.mean):
            raise DataError(
                f"anchor has {anchor.shape[1]} numbers, embodiment {self.union.space.embodiment!r} was trained with"
                f" {len(self.mean)}; give that proprioception, or none"
            )
        state[:, : len(self.mean)] = np.clip((anchor - self.mean) / self.std, -FARTHEST, FARTHEST)
        known[:] = True
        return state, known

    def check_anchor(self, anchor: Float[np.ndarray, "B P"], statistics: Statistics) -> None:
        """Raise DataError where an anchor is no state that these actions could begin at.

        A robot that commands absolute positions is commanded near where it is. A state that is farther beyond the range of
        its actions than this range is wide (that of the group's widest dimension) is of another point, frame or unit, and
        what is decoded about it would lead the robot astray. Rotations are not looked at; smaller errors go unnoticed.
        """
        for place in self.union.placements:
            own = list(place.own)
            low, high = statistics.minimum[own], statistics.maximum[own]
            reach = float((high - low).max())
            if not place.needs_anchor or place.group.rotation or reach <= CONSTANT_WIDTH:
                continue
            astray = np.maximum(low - anchor[:, own], anchor[:, own] - high) > reach
            if astray.any():
                row, i = (int(n) for n in np.argwhere(astray)[0])
                space = self.union.space
                raise DataError(
                    f"anchor of chunk {row} has {anchor[row, own[i]]:g} in {space.names[own[i]]}, where the actions of"
                    f" {space.embodiment!r} lie between {low[i]:g} and {high[i]:g}; give the state of the point that is"
                    " commanded, in the frame and unit of the actions"
                )

    def tables(self) -> dict[str, np.ndarray]:
        """What the codec's losses read: centre and half of all channels [U], and which of the two rotations turn [2]."""
        centre, half = np.zeros(self.union.dim, np.float32), np.ones(self.union.dim, np.float32)
        centre[self.union.channels], half[self.union.channels] = self.ranges.centre, self.ranges.half
        turning = {p.place for p in self.union.placements if p.frame is not None}
        rotates = np.array([f"{side}_rotation" in turning for side in ("left", "right")])
        return {"centre": centre, "half": half, "rotates": rotates}


def measure(
    parts: Sequence[FitPart], embodiments: Mapping[str, Embodiment], layout: LayoutName, frame: FrameName
) -> dict[str, Shared]:
    """Ranges and scales by embodiment, from all unpadded steps of the parts' chunks, and all their anchors.

    Raises SpaceMismatchError where a group has no place; DataError where an anchor is missing or does not fit, or where
    the median anchor of a part lies far from its actions (`Shared.check_anchor`; the message counts it as chunk 0).
    """
    found = {}
    for name, embodiment in embodiments.items():
        union = UnionMap.infer(embodiment.space, layout, frame)
        own = [p for p in parts if p.space.embodiment == name]
        values = StatisticsAccumulator(len(union.channels))
        for part in own:
            for rows in (slice(i, i + ROWS) for i in range(0, len(part.actions), ROWS)):
                anchor = None if part.anchor is None else part.anchor[rows]
                steps = union.there(part.actions[rows], anchor)[:, :, union.channels]
                real = np.ones(steps.shape[:2], bool) if part.pad_mask is None else ~part.pad_mask[rows]
                values.update(steps[real])
        mean, std = _scale([p.anchor for p in own], name)
        found[name] = Shared(union=union, ranges=Normaliser.make(KIND, values.result()), mean=mean, std=std)
        statistics = embodiment.normaliser.statistics
        if union.needs_anchor and statistics is not None:
            for known in (
                p.anchor for p in own if p.anchor is not None
            ):  # what is typical: a single frame may be broken
                found[name].check_anchor(np.median(known, axis=0, keepdims=True), statistics)
    return found


def _scale(
    anchors: Sequence[np.ndarray | None], name: str
) -> tuple[Float[np.ndarray, "P"] | None, Float[np.ndarray, "P"] | None]:
    known = [a for a in anchors if a is not None and len(a)]
    if not known:
        return None, None
    if len(widths := {a.shape[1] for a in known}) > 1:
        raise DataError(
            f"the anchors of embodiment {name!r} have {' and '.join(map(str, sorted(widths)))} numbers; give one"
            " proprioception, or its data sets different embodiment names"
        )
    seen = StatisticsAccumulator(known[0].shape[1])
    for anchor in known:
        seen.update(anchor)
    statistics = seen.result()
    still = statistics.std <= CONSTANT_WIDTH * np.maximum(1.0, np.abs(statistics.maximum))
    return statistics.mean, np.where(still, 1.0, statistics.std)


def estimate(
    embodiment: Embodiment,
    trained: Sequence[tuple[Embodiment, Shared]],
    layout: LayoutName,
    frame: FrameName,
    horizon: int,
) -> Shared:
    """Ranges of a robot of which only raw statistics are known, from robots that were measured.

    * What stays as it is: its own quantiles, exactly.
    * Rotations: the ranges of the measured robots together, since an angle is an angle on every arm; [-1, 1] without any.
    * Accumulated positions: the range of its own steps times the ratio of both on the measured robots (the median);
      times the horizon, which bounds it, without any. Absolute positions likewise, the bound being 2.

    Its state counts as unknown: the numbers of a proprioception mean something else on every robot.
    """
    union = UnionMap.infer(embodiment.space, layout, frame)
    raw = _raw_ranges(embodiment)
    order = {int(c): i for i, c in enumerate(union.channels)}
    arrays = {key: np.zeros(len(order)) for key in ("centre", "half", "lower", "upper")}
    for p in union.placements:
        at, own = [order[c] for c in p.channels], list(p.own)
        alike = [(e, s, q) for e, s in trained for q in s.union.placements if q.place == p.place and q.frame == p.frame]
        if not p.changes:
            found = {key: getattr(raw, key)[own] for key in arrays}
        elif p.group.rotation:
            spans = [_span(s, q) for _, s, q in alike]
            low = np.min([a for a, _ in spans], 0) if spans else -np.ones(6)
            high = np.max([b for _, b in spans], 0) if spans else np.ones(6)
            found = _between(low, high)
        else:
            steps = p.group.incremental
            reach = _reach(raw, own, steps)
            same = [(e, s, q) for e, s, q in alike if q.group.incremental == steps and q.changes]
            ratios = [
                _far(_span(s, q)) / np.maximum(_reach(_raw_ranges(e), list(q.own), steps), 1e-12) for e, s, q in same
            ]
            ratio = np.median(ratios, 0) if ratios else np.full(len(own), float(horizon) if steps else 2.0)
            found = _between(-ratio * reach, ratio * reach)
        for key, values in found.items():
            arrays[key][at] = values
    ranges = Normaliser(kind=KIND, **arrays, statistics=None, limits=None)
    return Shared(union=union, ranges=ranges, mean=None, std=None)


def _raw_ranges(embodiment: Embodiment) -> Normaliser:
    """Raw 0.1 % and 99.9 % quantiles."""
    statistics = embodiment.normaliser.statistics
    assert statistics is not None, "a robot's normaliser is made from statistics"
    return Normaliser.make(KIND, statistics)


def _reach(raw: Normaliser, dims: list[int], steps: bool) -> Float[np.ndarray, "n"]:
    """How far a step leads; of absolute values, half their range."""
    half = np.where(raw.constant, 0.0, raw.half)[dims]
    return half + np.abs(raw.centre[dims]) if steps else half


def _span(shared: Shared, placement: Placement) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Lower and upper end of the range of a placement's channels."""
    at = np.searchsorted(shared.union.channels, placement.channels)
    half = np.where(shared.ranges.constant, 0.0, shared.ranges.half)[at]
    return shared.ranges.centre[at] - half, shared.ranges.centre[at] + half


def _far(span: tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]) -> Float[np.ndarray, "n"]:
    return np.maximum(np.abs(span[0]), np.abs(span[1]))


def _between(low: Float[np.ndarray, "n"], high: Float[np.ndarray, "n"]) -> dict[str, np.ndarray]:
    half = (high - low) / 2
    still = half <= CONSTANT_WIDTH
    one = np.where(still, 0.0, 1.0)
    return {"centre": (low + high) / 2, "half": np.where(still, 1.0, half), "lower": -one, "upper": one}
