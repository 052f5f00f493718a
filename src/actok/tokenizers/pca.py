"""PCA scalar tokens: projections of the flattened chunk on its principal components, one token each.

The components are the leading eigenvectors of the covariance of normalised training chunks [T x D]; setting of the
published comparison (16 steps x 7 dimensions): 14 components of 8 bits, i.e. an eighth of the values.

The components are bound to the fitted T and D. A shorter chunk is encoded as if it held its last value, and decoded by
cutting; a longer one is cut into windows of T, the last held likewise, each with its own token of every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actok.tokenizers.scalars import ScalarTokenizer, Transform

_BLOCK = 4096  # chunks whose float64 copy is in memory at once while fitting

__all__ = ["PcaTokenizer"]


class PcaTokenizer(ScalarTokenizer):
    """One token a kept component and window. Total; N = components x ceil(T / fitted T)."""

    kind = "pca"

    @classmethod
    def fit_transform(cls, chunks: Sequence[np.ndarray], count: int) -> Transform:
        """See ScalarTokenizer.fit_transform. The largest entry of a component is positive, which fixes its sign."""
        blocks = [
            c[i : i + _BLOCK].reshape(len(c[i : i + _BLOCK]), -1) for c in chunks for i in range(0, len(c), _BLOCK)
        ]
        total = sum(map(len, blocks))
        mean = sum(b.sum(0, dtype=np.float64) for b in blocks) / total
        covariance = np.zeros((len(mean), len(mean)))
        for block in blocks:
            centred = block - mean
            covariance += centred.T @ centred / total
        basis = np.linalg.eigh(covariance)[1][:, ::-1][:, :count].T
        peak = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], axis=1)
        basis = basis * np.sign(peak)
        scalars = np.concatenate([(block - mean) @ basis.T for block in blocks])
        return Transform({"mean": mean, "basis": np.ascontiguousarray(basis)}, scalars, ("basis",))

    def _windows(self, horizon: int) -> int:
        return -(-horizon // self.horizon)

    def _analyse(self, chunks: np.ndarray) -> np.ndarray:
        windows = self._windows(chunks.shape[1])
        missing = windows * self.horizon - chunks.shape[1]
        held = np.concatenate([chunks, np.repeat(chunks[:, -1:], missing, axis=1)], axis=1)
        flat = held.reshape(len(chunks), windows, -1).astype(np.float64)
        return (flat - self._tensors["mean"]) @ self._tensors["basis"].T

    def _synthesise(self, scalars: np.ndarray, horizon: int) -> np.ndarray:
        flat = self._tensors["mean"] + scalars @ self._tensors["basis"]
        return flat.reshape(len(scalars), -1, self.embodiment().space.dim)[:, :horizon]

    def _coordinates(self, windows: int) -> tuple[np.ndarray, np.ndarray]:
        ranks = len(self._tensors["basis"])
        return np.broadcast_to(np.arange(windows), (ranks, windows)), np.full((ranks, windows), -1)
