"""Means of distinct rows over stretches of time: what is the same for many frames is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["columns", "mixtures", "pool"]


def columns(
    spans: Int[np.ndarray, "S 2"], steps: int
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "S"], Bool[np.ndarray, "M"]]:
    """The steps of all spans one after the other, where each span begins in them, and which of them count.

    What a span has beyond the chunk is left out; a span with nothing left keeps one step that does not count.
    """
    found = [np.arange(max(int(a), 0), min(int(b), steps)) for a, b in spans]
    counts = np.concatenate([np.ones(len(f), bool) if len(f) else np.zeros(1, bool) for f in found])
    found = [f if len(f) else np.zeros(1, np.int64) for f in found]
    begins = np.cumsum([0, *(len(f) for f in found)])[:-1]
    return np.concatenate(found), begins, counts


def _bags(
    table: Float[Tensor, "n F"], ids: Int[np.ndarray, "m"], weights: np.ndarray, begins: Int[np.ndarray, "k"]
) -> Float[Tensor, "k F"]:
    """Weighted sums of rows ids[begins[i]:begins[i + 1]]."""
    import torch
    from torch.nn.functional import embedding_bag

    return embedding_bag(
        torch.from_numpy(ids.astype(np.int64, copy=False)),
        table,
        torch.from_numpy(begins),
        mode="sum",
        per_sample_weights=torch.from_numpy(weights.astype(np.float32)),
    )


def pool(
    ids: Int[np.ndarray, "B M"], weights: Bool[np.ndarray, "B M"], begins: Int[np.ndarray, "S"], table: Tensor
) -> Float[Tensor, "B S F"]:
    """Means over the steps that count of each span, 0 where none does; a run of one row is read once."""
    edge = np.ones(ids.shape, bool)
    edge[:, 1:] = ids[:, 1:] != ids[:, :-1]
    edge[:, begins] = True
    runs = np.flatnonzero(edge)
    total = np.maximum(np.add.reduceat(weights, begins, axis=1, dtype=np.int64), 1)
    counts = np.add.reduceat(weights.ravel(), runs, dtype=np.int64)
    bag = np.searchsorted(runs, (np.arange(len(ids))[:, None] * ids.shape[1] + begins).ravel())
    shares = counts / np.repeat(total.ravel(), np.diff(np.append(bag, len(runs))))
    return _bags(table, ids.ravel()[runs], shares, bag).reshape(*total.shape, -1)


def mixtures(
    ids: Int[np.ndarray, "B T"], known: Bool[np.ndarray, "B T"], table: Tensor, hashes: Int[np.ndarray, "n"]
) -> tuple[Float[Tensor, "B F"], Int[np.ndarray, "B"]]:
    """Mean feature of each chunk, and a hash of which rows it mixes in which shares."""
    ids = np.sort(np.where(known, ids, -1), axis=1)
    edge = np.ones(ids.shape, bool)
    edge[:, 1:] = ids[:, 1:] != ids[:, :-1]
    runs = np.flatnonzero(edge)
    counts = np.diff(np.append(runs, ids.size))
    real = ids.ravel()[runs] >= 0
    chunk, row, counts = runs[real] // ids.shape[1], ids.ravel()[runs][real], counts[real]
    begins = np.searchsorted(chunk, np.arange(len(ids)))
    counts = counts // np.gcd.reduceat(counts, begins)[chunk]
    shares = counts / np.add.reduceat(counts, begins)[chunk]
    with np.errstate(over="ignore"):
        mixed = np.add.reduceat(_mix(hashes[row].view(np.uint64)) * counts.astype(np.uint64), begins)
        group = _mix(mixed).view(np.int64)
    return _bags(table, row, shares, begins), group


def _mix(value: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
