"""DCT scalar tokens: the coefficients that vary most over all frequencies and dimensions, one token each.

Each dimension is expanded in cosines over time (DCT-II). Coefficients are kept in units of amplitude, which do not
depend on T:

    x[t] = c[0] + sqrt(2) * sum over k of c[k] cos(pi k (2 t + 1) / (2 T))

so c is the orthonormal DCT over sqrt(T), c[0] is the mean over time, and the same tokens describe the same movement at
any number of steps. A frequency of T or more cannot be seen in T steps: it encodes as its mean and is left out on
decoding. The default keeps an eighth of the values with 8 bits each: 14 scalars for 16 steps x 7 dimensions.

Source: the DCT-II of Ahmed, Natarajan and Rao (1974), as scalar tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from actok.tokenizers.scalars import ScalarTokenizer, Transform

__all__ = ["DctTokenizer", "cosines"]


class DctTokenizer(ScalarTokenizer):
    """One token a kept (frequency, dimension). Total; any horizon with the same N tokens."""

    kind = "dct"

    @classmethod
    def fit_transform(
        cls, blocks: Sequence[Float[np.ndarray, "_ T D"]], sample: Float[np.ndarray, "_ T D"], count: int
    ) -> Transform:
        """See ScalarTokenizer.fit_transform. Keeps the mean of every coefficient, so that dropped ones have theirs."""
        steps, dim = sample.shape[1:]
        analysis = cosines(np.arange(steps), steps) / steps
        total = sum(map(len, blocks))
        mean = sum(np.matmul(analysis, b.sum(0, dtype=np.float64)) for b in blocks) / total
        variance = sum(np.square(np.matmul(analysis, b.astype(np.float64)) - mean).sum(0) for b in blocks) / total
        order = np.argsort(-variance, axis=None, kind="stable")[:count]
        frequency, part = np.divmod(order, dim)
        kept = (np.matmul(analysis, sample.astype(np.float64)) - mean)[:, frequency, part]
        pairs = np.stack([frequency, part], axis=1).astype(np.int64)
        return Transform({"mean": mean, "pairs": pairs}, ("pairs",), variance[frequency, part], kept)

    def _visible(
        self, steps: int
    ) -> tuple[Int[np.ndarray, "shown"], Int[np.ndarray, "shown"], Int[np.ndarray, "shown"], int]:
        """Positions, frequencies and dimensions of the kept scalars that T steps can show, and how many frequencies."""
        frequency, part = self._tensors["pairs"].T
        shown = np.flatnonzero(frequency < steps)
        return shown, frequency[shown], part[shown], min(steps, len(self._tensors["mean"]))

    def _analyse(self, chunks: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B 1 S"]:
        steps = chunks.shape[1]
        shown, frequency, part, count = self._visible(steps)
        coefficients = np.matmul(cosines(np.arange(count), steps) / steps, chunks.astype(np.float64))
        scalars = np.zeros((len(chunks), 1, len(self._tensors["pairs"])))
        scalars[:, 0, shown] = (coefficients - self._tensors["mean"][:count])[:, frequency, part]
        return scalars

    def _synthesise(self, scalars: Float[np.ndarray, "B 1 S"], horizon: int) -> Float[np.ndarray, "B {horizon} D"]:
        shown, frequency, part, count = self._visible(horizon)
        coefficients = np.repeat(self._tensors["mean"][None, :count], len(scalars), axis=0)
        coefficients[:, frequency, part] += scalars[:, 0, shown]
        return np.matmul(cosines(np.arange(count), horizon).T, coefficients)

    def _coordinates(self, windows: int) -> tuple[Int[np.ndarray, "S {windows}"], Int[np.ndarray, "S {windows}"]]:
        frequency, part = self._tensors["pairs"].T
        return frequency[:, None], part[:, None]


def cosines(frequencies: Int[np.ndarray, "frequencies"], steps: int) -> Float[np.ndarray, "frequencies {steps}"]:
    """float64 [F, T]: 1 for frequency 0, sqrt(2) cos(pi k (2 t + 1) / (2 T)) for the others; rows have norm sqrt(T)."""
    k = np.asarray(frequencies)[:, None]
    wave = np.cos(np.pi * k * (2 * np.arange(steps) + 1) / (2 * steps))
    return np.where(k == 0, 1.0, np.sqrt(2.0)) * wave
