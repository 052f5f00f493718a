"""BEAST: B-spline Encoded Action Sequence Tokenizer (Zhou et al., arXiv 2506.06072).

Each dimension of a chunk becomes a uniform clamped B-spline fitted by least squares over normalised time: degree 4 for
motion, degree 0 (a constant per segment) for grippers, which jump. The control points are quantised uniformly and are
the tokens, so N does not depend on T and all of them can be emitted in one pass. Published setting: 5 or 10 bases,
degree 4, 256 bins.

Control points are quantised to levels that include both ends of their range, which is the minimum and maximum over the
training chunks, per basis and dimension; so a gripper's open and closed are exact. An embodiment added by `adapt` has
no training chunks: it takes, per basis, the widest range of the fitted dimensions of its kind (gripper or not).

Deviations: where a chunk has fewer steps than bases, differences of neighbouring control points are kept small instead
of the points themselves, so that the curve is extended evenly and not towards zero; with `clamp_start` the first
control point is not transmitted, since the anchor gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core import ActionSpace, ChunkContext, ConfigError, DataError, SpaceMismatchError, TokenLayout, to_numpy
from actok.signal.bspline import control_points, curve
from actok.signal.normalise import RANGE_SLACK
from actok.tokenizers.base import CodecInput, Encoded, Reconstruction, fixed_rows
from actok.tokenizers.closed_form import ClosedFormTokenizer
from actok.tokenizers.embodiments import Embodiment

# What a relative rotation is where nothing has moved; every other relative quantity is 0 there.
_REST = {"quaternion_xyzw": (0, 0, 0, 1), "quaternion_wxyz": (1, 0, 0, 0), "rot6d": (1, 0, 0, 0, 1, 0)}

_FIT_BLOCK = 4096  # chunks whose control points are in memory at once while fitting

__all__ = ["BeastConfig", "BeastTokenizer"]


@dataclass(frozen=True, kw_only=True)
class BeastConfig:
    """Settings of BeastTokenizer.

    Attributes:
        bases: control points K per dimension.
        degree: of the spline of everything but grippers.
        bins: levels of a control point.
        clamp_start: start each curve at the robot's state (absolute groups: `context.anchor`; relative groups: no
            displacement). The first step then repeats that state. Grippers are left as they are.
        normaliser: sets what counts as out of range; the ranges of control points follow the data in any case.
    """

    bases: int = 10
    degree: int = 4
    bins: int = 256
    clamp_start: bool = False
    normaliser: str = "min_max"

    def __post_init__(self) -> None:
        if not isinstance(self.degree, int) or not 0 <= self.degree <= 7:
            raise ConfigError(f"degree is {self.degree!r}; give a whole number from 0 to 7")
        if not isinstance(self.bases, int) or not self.degree < self.bases <= 1024:
            raise ConfigError(
                f"bases is {self.bases!r}; a spline of degree {self.degree} takes from {self.degree + 1} to 1024"
            )
        if not isinstance(self.bins, int) or not 2 <= self.bins <= 65536:
            raise ConfigError(f"bins is {self.bins!r}; give a whole number from 2 to 65536")
        if not isinstance(self.clamp_start, bool):
            raise ConfigError(f"clamp_start is {self.clamp_start!r}; give true or false")
        if self.clamp_start and self.bases < 2:
            raise ConfigError("clamp_start leaves nothing of a spline with 1 base; give at least 2 bases")


class BeastTokenizer(ClosedFormTokenizer):
    """K x D tokens (less one per clamped dimension), each a control point. Total: any such sequence decodes."""

    kind = "beast"
    config_class = BeastConfig
    config: BeastConfig

    @classmethod
    def fit_codec(cls, inputs: Sequence[CodecInput], config: Any, horizon: int) -> tuple[dict, dict]:
        """Range of every control point by embodiment, and the pooled ranges for embodiments added later."""
        ranges: dict[str, np.ndarray] = {}
        pooled: dict[bool, list[np.ndarray]] = {False: [], True: []}
        for codec_input in inputs:
            embodiment = codec_input.embodiment
            space = embodiment.space
            _check_clampable(space, config)
            rest = embodiment.normaliser(_rest(space))
            low = np.full((config.bases, space.dim), np.inf)
            high = -low
            for i in range(0, len(codec_input.chunks), _FIT_BLOCK):
                chunks = codec_input.chunks[i : i + _FIT_BLOCK]
                # A fit sees no anchor, so the first action stands for it: it is where the state is but for the lag of
                # the robot's controller, and the control point that it sets is not quantised.
                start = np.where(_relative(space), rest, chunks[:, 0]) if config.clamp_start else None
                controls = _fit(chunks, config, space, start)
                low, high = np.minimum(low, controls.min(0)), np.maximum(high, controls.max(0))
            if (known := ranges.get(space.embodiment)) is not None:
                low, high = np.minimum(low, known[0]), np.maximum(high, known[1])
            ranges[space.embodiment] = np.stack([low, high])
            for flag in (False, True):
                pooled[flag] += list(np.moveaxis(np.stack([low, high])[:, :, _grippers(space) == flag], 2, 0))
        tensors = {f"range.{name}": r for name, r in ranges.items()}
        for gripper, key in ((False, "pooled.motion"), (True, "pooled.gripper")):
            stack = np.stack(pooled[gripper] or pooled[not gripper])
            tensors[key] = np.stack([stack[:, 0].min(0), stack[:, 1].max(0)])
        return tensors, {}

    def _check_adaptable(self, space: ActionSpace) -> None:
        _check_clampable(space, self.config)

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """Level 0, time = basis, part = dimension, basis by basis; one block. N is the same for every horizon."""
        self._resolve_horizon(horizon, ChunkContext())
        basis, part = np.nonzero(self._sent(self.embodiment(embodiment).space))
        coords = np.stack([np.zeros_like(basis), basis, part], axis=1)
        return TokenLayout.uniform(self.config.bins, coords, block=len(coords))

    def _encode(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment, context: ChunkContext) -> Encoded:
        controls = _fit(chunks, self.config, embodiment.space, self._start(len(chunks), embodiment, context))
        sent = self._sent(embodiment.space)
        low, step = self._grid(embodiment)
        position = ((controls - low) / step)[:, sent]
        top = self.config.bins - 1
        saturated = (position < -RANGE_SLACK * top) | (position > (1 + RANGE_SLACK) * top)
        codes = np.clip(np.rint(position), 0, top).astype(np.int64)
        return Encoded(codes.reshape(-1), np.arange(len(codes) + 1) * codes.shape[1], saturated.sum(1))

    def _decode(
        self,
        flat: Int[np.ndarray, "_"],
        offsets: Int[np.ndarray, "_"],
        horizon: int,
        embodiment: Embodiment,
        context: ChunkContext,
        repair: str | None,
    ) -> Reconstruction:
        space = embodiment.space
        sent = self._sent(space)
        codes, valid, used, reasons = fixed_rows(flat, offsets, int(sent.sum()))
        low, step = self._grid(embodiment)
        controls = np.zeros((len(codes), *sent.shape))
        controls[:, sent] = low[sent] + codes * step[sent]
        start = self._start(len(codes), embodiment, context)
        if start is not None:
            controls[:, 0] = np.where(sent[0], controls[:, 0], start)
        gripper = _grippers(space)
        chunks = np.empty((len(codes), horizon, space.dim), np.float32)
        for flag, degree in ((False, self.config.degree), (True, 0)):
            chunks[:, :, gripper == flag] = curve(controls[:, :, gripper == flag], horizon, degree)
        return Reconstruction(np.where(embodiment.normaliser.constant, np.float32(0), chunks), valid, used, reasons)

    def _sent(self, space: ActionSpace) -> Bool[np.ndarray, "K D"]:
        """bool [K, D]: which control points are tokens; the first of a clamped dimension is not."""
        sent = np.ones((self.config.bases, space.dim), bool)
        if self.config.clamp_start:
            sent[0] = _grippers(space)
        return sent

    def _grid(self, embodiment: Embodiment) -> tuple[Float[np.ndarray, "K D"], Float[np.ndarray, "K D"]]:
        """Lowest level and distance of levels, [K, D] each, normalised; a range without width counts as 1 wide."""
        space = embodiment.space
        found = self._tensors.get(f"range.{space.embodiment}")
        if found is None or found.shape[2] != space.dim:
            gripper = _grippers(space)
            found = np.where(
                gripper, self._tensors["pooled.gripper"][:, :, None], self._tensors["pooled.motion"][:, :, None]
            )
        width = found[1] - found[0]
        return found[0], np.where(width > 1e-9, width, 1.0) / (self.config.bins - 1)

    def _start(
        self, batch: int, embodiment: Embodiment, context: ChunkContext
    ) -> Float[np.ndarray, "{batch} D"] | None:
        """Normalised [B, D] value that the curves start at, or None where they are free."""
        if not self.config.clamp_start:
            return None
        space = embodiment.space
        relative = _relative(space)
        start = np.broadcast_to(_rest(space), (batch, space.dim))
        if not (relative | _grippers(space)).all():
            if context.anchor is None:
                raise DataError(
                    "clamp_start needs the robot's state at the start of each chunk; give"
                    " ChunkContext(anchor=...) in action units, or fit with clamp_start=False"
                )
            anchor = np.asarray(to_numpy(context.anchor), np.float64)
            if anchor.shape != (batch, space.dim):
                raise DataError(
                    f"anchor has shape {anchor.shape}; clamp_start needs {(batch, space.dim)}: one state a chunk, in"
                    " the order and units of the actions"
                )
            if not np.isfinite(anchor).all():
                raise DataError("anchor holds non-finite values; give the robot's measured state")
            start = np.where(relative, start, anchor)
        start = embodiment.normaliser(start)
        if context.dof_mask is not None:
            start = np.where(self._mask(context.dof_mask, start.shape, "dof_mask"), start, 0.0)
        return start


def _fit(
    chunks: Float[np.ndarray, "B T D"], config: BeastConfig, space: ActionSpace, start: Float[np.ndarray, "B D"] | None
) -> Float[np.ndarray, "B K D"]:
    """Control points [B, K, D] of normalised chunks; `start` binds everything but grippers."""
    gripper = _grippers(space)
    controls = np.empty((len(chunks), config.bases, space.dim))
    motion_start = None if start is None else start[:, ~gripper]
    controls[:, :, ~gripper] = control_points(chunks[:, :, ~gripper], config.bases, config.degree, motion_start)
    controls[:, :, gripper] = control_points(chunks[:, :, gripper], config.bases, 0)
    return controls


def _grippers(space: ActionSpace) -> Bool[np.ndarray, "D"]:
    """bool [D]: dimensions of gripper groups."""
    return np.isin(np.arange(space.dim), [d for g in space.groups if g.kind == "gripper" for d in g.dims])


def _relative(space: ActionSpace) -> Bool[np.ndarray, "D"]:
    """bool [D]: dimensions relative to the state at the chunk's start."""
    return np.isin(np.arange(space.dim), [d for g in space.groups if g.mode == "relative" for d in g.dims])


def _rest(space: ActionSpace) -> Float[np.ndarray, "D"]:
    """[D] raw value of a relative action that does not move: 0, or the identity of a rotation format that has another."""
    rest = np.zeros(space.dim)
    for group in space.groups:
        if group.mode == "relative" and group.rotation in _REST:
            rest[list(group.dims)] = _REST[group.rotation]
    return rest


def _check_clampable(space: ActionSpace, config: BeastConfig) -> None:
    if not config.clamp_start:
        return
    moving = [g for g in space.groups if g.kind != "gripper"]
    for group in moving:
        if group.incremental:
            raise SpaceMismatchError(
                f"clamp_start cannot serve action space {space.embodiment!r}: group {group.name!r} holds {group.mode}"
                " values, which do not start at the robot's state; fit with clamp_start=False"
            )
