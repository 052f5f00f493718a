"""Normalisers: an affine map per dimension from raw units to the units that codecs work in.

    quantile       1 % and 99 % quantiles to -1 and 1         (OpenVLA, FAST)
    quantile_wide  0.1 % and 99.9 % quantiles to -1 and 1     (X-Tokenizer)
    min_max        minimum and maximum to -1 and 1
    mean_std       mean to 0, one standard deviation to 1     (range: where minimum and maximum fall)
    identity       unchanged; the data must already lie in [-1, 1]   (published FAST+)

Values outside the range are never clipped here; `out_of_range` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core.errors import ConfigError
from actok.signal.statistics import Statistics

NormaliserKind = Literal["quantile", "quantile_wide", "min_max", "mean_std", "identity"]

# A dimension narrower than this (in raw units, relative to its magnitude) counts as constant.
CONSTANT_WIDTH = 1e-7
# How far beyond the range a normalised value may lie before it counts as out of range: float32 rounding.
RANGE_SLACK = 1e-5

__all__ = ["CONSTANT_WIDTH", "Normaliser", "NormaliserKind"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Normaliser:
    """y = (x - centre) / half, per dimension.

    A constant dimension has half = 1 and centre = its value: it normalises to 0 and any other value is out of range.
    A dimension whose quantiles coincide although it does vary (a gripper that is closed 99 % of the time) falls back to
    its minimum and maximum.

    Attributes:
        kind: which rule made it.
        centre, half: [D] float64.
        lower, upper: [D] float64, the normalised range: -1 and 1 but for mean_std and constant dimensions (0 and 0).
        statistics: what it was made from; None for an identity.
        limits: [2, D] smallest and largest raw value a decoder may command; None: unlimited.
    """

    kind: NormaliserKind
    centre: Float[np.ndarray, "D"]
    half: Float[np.ndarray, "D"]
    lower: Float[np.ndarray, "D"]
    upper: Float[np.ndarray, "D"]
    statistics: Statistics | None
    limits: Float[np.ndarray, "2 D"] | None

    @classmethod
    def make(cls, kind: str, statistics: Statistics, limits: tuple[Any, Any] | None = None) -> Self:
        """From statistics. `limits`: (low [D], high [D]) for `clip_to_limits`; None: the observed minimum and maximum."""
        if kind not in get_args(NormaliserKind):
            raise ConfigError(f"normaliser {kind!r} is unknown; use one of {', '.join(get_args(NormaliserKind))}")
        s = statistics
        bounds = np.stack([s.minimum, s.maximum]) if limits is None else np.asarray(limits, np.float64)
        if kind == "identity":
            return cls.identity(s.dim, statistics=s, limits=None if limits is None else bounds)
        tiny = CONSTANT_WIDTH * np.maximum(1.0, np.abs(s.maximum))
        constant = s.maximum - s.minimum <= tiny
        if kind == "mean_std":
            centre, half = s.mean.copy(), s.std.copy()
        else:
            low, high = {
                "quantile": (s.quantile(0.01), s.quantile(0.99)),
                "quantile_wide": (s.quantile(0.001), s.quantile(0.999)),
                "min_max": (s.minimum, s.maximum),
            }[kind]
            collapsed = high - low <= tiny
            low, high = np.where(collapsed, s.minimum, low), np.where(collapsed, s.maximum, high)
            centre, half = (low + high) / 2, (high - low) / 2
        centre = np.where(constant, s.mean, centre)
        half = np.where(constant, 1.0, half)
        if kind == "mean_std":
            lower, upper = (s.minimum - centre) / half, (s.maximum - centre) / half
        else:
            lower, upper = -np.ones(s.dim), np.ones(s.dim)
        lower, upper = np.where(constant, 0.0, lower), np.where(constant, 0.0, upper)
        return cls(kind=kind, centre=centre, half=half, lower=lower, upper=upper, statistics=s, limits=bounds)  # type: ignore[arg-type]

    @classmethod
    def identity(
        cls, dim: int, statistics: Statistics | None = None, limits: Float[np.ndarray, "2 {dim}"] | None = None
    ) -> Self:
        """No change; data are expected in [-1, 1]."""
        one = np.ones(dim)
        return cls(
            kind="identity",
            centre=0 * one,
            half=one,
            lower=-one,
            upper=one.copy(),
            statistics=statistics,
            limits=limits,
        )

    @property
    def dim(self) -> int:
        """D."""
        return len(self.centre)

    @property
    def constant(self) -> Bool[np.ndarray, "D"]:
        """bool [D]: dimensions that did not vary in the data the normaliser was made from."""
        return self.lower == self.upper

    def __call__(self, actions: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch D"]:
        """Raw [..., D] -> normalised, in the input's float type."""
        return ((actions - self.centre) / self.half).astype(actions.dtype, copy=False)

    def inverse(self, normalised: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch D"]:
        """Normalised [..., D] -> raw, in the input's float type."""
        return (normalised * self.half + self.centre).astype(normalised.dtype, copy=False)

    def out_of_range(self, normalised: Float[np.ndarray, "*batch D"]) -> Bool[np.ndarray, "*batch D"]:
        """bool [..., D]: True where a normalised value lies outside [lower, upper]."""
        return (normalised < self.lower - RANGE_SLACK) | (normalised > self.upper + RANGE_SLACK)

    def clip_to_limits(
        self, actions: Float[np.ndarray, "B T D"]
    ) -> tuple[Float[np.ndarray, "B T D"], Int[np.ndarray, "B"]]:
        """Raw [B, T, D] moved inside `limits`, and how many values of each chunk moved by more than rounding [B]."""
        if self.limits is None:
            return actions, np.zeros(len(actions), np.int64)
        low, high = self.limits.astype(actions.dtype)
        inside = np.minimum(np.maximum(actions, low), high)
        if np.array_equal(inside, actions):
            return actions, np.zeros(len(actions), np.int64)
        slack = RANGE_SLACK * np.maximum(self.half, 1e-12)
        return inside, (np.abs(inside - actions) > slack).sum((1, 2))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse, exactly."""
        arrays = {k: getattr(self, k).tolist() for k in ("centre", "half", "lower", "upper")}
        return {
            "kind": self.kind,
            **arrays,
            "statistics": None if self.statistics is None else self.statistics.to_dict(),
            "limits": None if self.limits is None else self.limits.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            kind=data["kind"],
            **{k: np.asarray(data[k], np.float64) for k in ("centre", "half", "lower", "upper")},
            statistics=None if data["statistics"] is None else Statistics.from_dict(data["statistics"]),
            limits=None if data["limits"] is None else np.asarray(data["limits"], np.float64),
        )
