"""PCA scalar tokens: projections of the flattened chunk on its principal components, one token each.

The components are the leading eigenvectors of the covariance of normalised training chunks [T x D] (Hotelling, 1933).
The default keeps an eighth as many as there are values, with 8 bits each: 14 for 16 steps x 7 dimensions.

The components are bound to the fitted T and D. A shorter chunk is encoded as if it held its last value, and decoded by
cutting; a longer one is cut into windows of T, the last held likewise, each with its own token of every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import eigh

from actok.tokenizers.scalars import ScalarTokenizer, Transform

__all__ = ["PcaTokenizer"]


class PcaTokenizer(ScalarTokenizer):
    """One token a kept component and window. Total; N = components x ceil(T / fitted T)."""

    kind = "pca"

    @classmethod
    def fit_transform(
        cls, blocks: Sequence[Float[np.ndarray, "_ T D"]], sample: Float[np.ndarray, "_ T D"], count: int
    ) -> Transform:
        """See ScalarTokenizer.fit_transform. The largest entry of a component is positive, which fixes its sign."""
        size = sample[0].size
        total = sum(map(len, blocks))
        mean = sum(b.reshape(-1, size).sum(0, dtype=np.float64) for b in blocks) / total
        covariance = np.zeros((size, size))
        for block in blocks:
            centred = block.reshape(-1, size) - mean
            covariance += centred.T @ centred / total
        variance, vectors = eigh(covariance, subset_by_index=(size - count, size - 1))
        variance, basis = np.maximum(variance[::-1], 0.0), vectors.T[::-1]
        peak = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], axis=1)
        basis = np.ascontiguousarray(basis * np.sign(peak))
        scalars = (sample.reshape(-1, size) - mean) @ basis.T
        return Transform({"mean": mean, "basis": basis}, ("basis",), variance, scalars)

    def _windows(self, horizon: int) -> int:
        return -(-horizon // self.horizon)

    def _analyse(self, chunks: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B windows S"]:
        windows = self._windows(chunks.shape[1])
        missing = windows * self.horizon - chunks.shape[1]
        held = np.concatenate([chunks, np.repeat(chunks[:, -1:], missing, axis=1)], axis=1)
        flat = held.reshape(len(chunks), windows, -1).astype(np.float64)
        return (flat - self._tensors["mean"]) @ self._tensors["basis"].T

    def _synthesise(
        self, scalars: Float[np.ndarray, "B windows S"], horizon: int
    ) -> Float[np.ndarray, "B {horizon} D"]:
        flat = self._tensors["mean"] + scalars @ self._tensors["basis"]
        steps = scalars.shape[1] * self.horizon
        return flat.reshape(len(scalars), steps, self.embodiment().space.dim)[:, :horizon]

    def _coordinates(self, windows: int) -> tuple[Int[np.ndarray, "S {windows}"], Int[np.ndarray, "S {windows}"]]:
        ranks = len(self._tensors["basis"])
        return np.broadcast_to(np.arange(windows), (ranks, windows)), np.full((ranks, windows), -1)
