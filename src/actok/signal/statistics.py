"""Per-dimension statistics of an action space's data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float

from actok.core.errors import ArtifactError, DataError

QUANTILES = (0.001, 0.01, 0.99, 0.999)

__all__ = ["QUANTILES", "Statistics"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Statistics over time steps, each array [D] float64 in raw units.

    Attributes:
        count: unpadded time steps seen.
        minimum, maximum, mean, std: exact.
        quantiles: [4, D] at the levels of QUANTILES (0.1 %, 1 %, 99 %, 99.9 %).
    """

    count: int
    minimum: Float[np.ndarray, "D"]
    maximum: Float[np.ndarray, "D"]
    mean: Float[np.ndarray, "D"]
    std: Float[np.ndarray, "D"]
    quantiles: Float[np.ndarray, "4 D"]

    @classmethod
    def from_array(
        cls, actions: Float[np.ndarray, "*batch D"], pad_mask: Bool[np.ndarray, "*batch"] | None = None
    ) -> Self:
        """Exact statistics of an array [..., D] in memory; `pad_mask` [...] is True on steps to leave out."""
        steps = np.asarray(actions, np.float64)
        steps = steps[~pad_mask] if pad_mask is not None else steps.reshape(-1, steps.shape[-1])
        if not len(steps):
            raise DataError("no unpadded time step is left to compute statistics from; give more data")
        return cls(
            count=len(steps),
            minimum=steps.min(0),
            maximum=steps.max(0),
            mean=steps.mean(0),
            std=steps.std(0),
            quantiles=np.quantile(steps, QUANTILES, axis=0),
        )

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    def quantile(self, level: float) -> Float[np.ndarray, "D"]:
        """[D] at one of QUANTILES."""
        return self.quantiles[QUANTILES.index(level)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse, exactly."""
        return {k: (v.tolist() if isinstance(v, np.ndarray) else v) for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        try:
            arrays: dict[str, Any] = {k: np.asarray(v, np.float64) for k, v in data.items() if k != "count"}
            return cls(count=int(data["count"]), **arrays)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"statistics are incomplete ({error}); fit the tokenizer again") from None
