"""Uniform bins per dimension and time step (RT-1, RT-2, OpenVLA).

Each normalised value x in [-1, 1] becomes floor((x + 1) / 2 * K), and decodes to the centre of its bin. Published
setting: 256 bins over the 1 % to 99 % quantiles (OpenVLA, arXiv 2406.09246, section 3.2); RT-1 (arXiv 2212.06817) and
RT-2 (arXiv 2307.15818) use 256 bins over the action limits. Tokens run time step by time step, dimension by dimension.

Deviation: OpenVLA digitises against 256 edges and so has 255 centres; here K bins have K centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from actok.core import ChunkContext, ConfigError, TokenLayout
from actok.signal.normalise import RANGE_SLACK
from actok.tokenizers.base import CodecInput, Encoded, Reconstruction, fixed_rows
from actok.tokenizers.closed_form import ClosedFormTokenizer
from actok.tokenizers.embodiments import Embodiment

__all__ = ["BinsConfig", "BinsTokenizer"]


@dataclass(frozen=True, kw_only=True)
class BinsConfig:
    """Settings of BinsTokenizer: `bins` K per value, and the normaliser that sets their range."""

    bins: int = 256
    normaliser: str = "quantile"

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or not 2 <= self.bins <= 65536:
            raise ConfigError(f"bins is {self.bins!r}; give a whole number from 2 to 65536")


class BinsTokenizer(ClosedFormTokenizer):
    """T x D tokens, each one of K uniform bins. Total: every sequence of the right length decodes."""

    kind = "bins"
    config_class = BinsConfig

    @classmethod
    def fit_codec(cls, inputs: Sequence[CodecInput], config: Any, horizon: int) -> tuple[dict, dict]:
        """Nothing to fit beyond the normaliser."""
        return {}, {}

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """N = T x D; level 0, time t, part d; one block a time step."""
        steps, dim = self._resolve_horizon(horizon, ChunkContext()), self.embodiment(embodiment).space.dim
        time, part = np.divmod(np.arange(steps * dim), dim)
        coords = np.stack([np.zeros_like(time), time, part], axis=1)
        return TokenLayout.uniform(self.config.bins, coords, block=dim)

    def _encode(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment, context: ChunkContext) -> Encoded:
        lower, width = self._grid(embodiment)
        position = (chunks - lower) / width
        codes = np.clip(np.floor(position), 0, self.config.bins - 1).astype(np.int64)
        slack = RANGE_SLACK * self.config.bins
        saturated = ((position < -slack) | (position > self.config.bins + slack)).sum((1, 2))
        flat = codes.reshape(-1)
        return Encoded(flat, np.arange(len(codes) + 1) * codes[0].size, saturated)

    def _decode(
        self,
        flat: Int[np.ndarray, "_"],
        offsets: Int[np.ndarray, "_"],
        horizon: int,
        embodiment: Embodiment,
        context: ChunkContext,
        repair: str | None,
    ) -> Reconstruction:
        codes, valid, used, reasons = fixed_rows(flat, offsets, horizon * embodiment.space.dim)
        lower, width = self._grid(embodiment)
        chunks = lower + (codes.reshape(len(codes), horizon, embodiment.space.dim) + 0.5) * width
        constant = embodiment.normaliser.constant
        chunks = np.where(constant, 0.0, chunks).astype(np.float32)
        return Reconstruction(chunks, valid, used, reasons)

    def _grid(self, embodiment: Embodiment) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
        """Lower edge [D] and bin width [D] in normalised units; a constant dimension keeps the width of [-1, 1]."""
        n = embodiment.normaliser
        lower = np.where(n.constant, -1.0, n.lower)
        upper = np.where(n.constant, 1.0, n.upper)
        return lower, (upper - lower) / self.config.bins
