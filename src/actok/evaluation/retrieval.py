"""Retrieval between chunks and instructions through a linear map from codes to a teacher's features."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core import DataError

# The weight of the squared norm: as much as one chunk whose only symbol is that code.
RIDGE = 1.0

__all__ = ["Ranking", "Retrieval", "retrieval"]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """One direction of retrieval, and what a random order would give.

    Attributes:
        queries: how many were asked.
        candidates: how many were ranked for each.
        recall1, recall5: share of queries with a right candidate first, or among the first five.
        median_rank: of the first right candidate, from 1.
        chance1, chance5, chance_rank: expected recalls and median over queries of the expected rank, in random order.
    """

    queries: int
    candidates: int
    recall1: float
    recall5: float
    median_rank: float
    chance1: float
    chance5: float
    chance_rank: float


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Both directions, over the distinct instructions of the test chunks."""

    chunk_to_text: Ranking
    text_to_chunk: Ranking


def retrieval(
    train: Any,
    train_text: Int[np.ndarray, "n"],
    train_features: Float[np.ndarray, "n F"],
    test: Any,
    test_text: Int[np.ndarray, "m"],
    *,
    seed: int = 0,
) -> Retrieval:
    """Rank instructions for a chunk, and chunks for an instruction, by cosine in the teacher's space.

    The heads of an alignment are dropped with the training, and most tokenizers never had any, so every tokenizer gets
    the same map: ridge regression from the bag of codes (`train`, `test`: [n, d] and [m, d], sparse or dense) to the feature of
    the chunk's instruction, fitted on training chunks. An instruction's feature is the mean of the teacher's features
    over its training chunks; the mean over instructions is taken off, since all sentences share most of their direction.
    Equal cosines (chunks of equal codes) stand in random order.

    Raises DataError where the training chunks have fewer than two instructions, or no test chunk has one of them.
    """
    texts, index = np.unique(train_text, return_inverse=True)
    known = np.isin(test_text, texts)
    if len(texts) < 2 or not known.any():
        raise DataError(
            f"{len(texts)} instructions among the training chunks, known to {int(known.sum())} test chunks; retrieval needs"
            " at least two and one"
        )
    features = np.zeros((len(texts), train_features.shape[1]))
    np.add.at(features, index, train_features.astype(np.float64))
    features /= np.bincount(index)[:, None]
    features -= features.mean(0)
    asked = np.isin(texts, test_text[known])
    mapped = _ridge(train, features[index], test[np.flatnonzero(known)])
    cosine = _unit(mapped) @ _unit(features[asked]).T
    right = test_text[known][:, None] == texts[asked]
    rng = np.random.default_rng(seed)
    return Retrieval(chunk_to_text=_rank(cosine, right, rng), text_to_chunk=_rank(cosine.T, right.T, rng))


def _ridge(x: Any, y: Float[np.ndarray, "n F"], x_new: Any) -> Float[np.ndarray, "m F"]:
    """Predictions for `x_new` of the ridge regression of y on x, through whichever of the two Gram matrices is smaller."""
    seen = np.flatnonzero(np.asarray(abs(x).sum(0)).reshape(-1))
    x, x_new = x[:, seen], x_new[:, seen]
    if x.shape[1] <= x.shape[0]:
        gram = _dense(x.T @ x) + RIDGE * np.eye(x.shape[1])
        return np.asarray(x_new @ np.linalg.solve(gram, x.T @ y))
    gram = _dense(x @ x.T) + RIDGE * np.eye(x.shape[0])
    return np.asarray(x_new @ (x.T @ np.linalg.solve(gram, y)))


def _dense(matrix: Any) -> Float[np.ndarray, "d d"]:
    return np.asarray(matrix.todense() if hasattr(matrix, "todense") else matrix)


def _unit(rows: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _rank(cosine: Float[np.ndarray, "q c"], right: Bool[np.ndarray, "q c"], rng: np.random.Generator) -> Ranking:
    """Every query has a right candidate."""
    count, candidates = cosine.shape
    shuffled = rng.permutation(candidates)
    order = np.argsort(-cosine[:, shuffled], axis=1, kind="stable")
    first = np.take_along_axis(right[:, shuffled], order, 1).argmax(1) + 1
    hits = right.sum(1).tolist()

    def chance(k: int) -> float:
        k = min(k, candidates)
        return float(np.mean([1 - comb(candidates - h, k) / comb(candidates, k) for h in hits]))

    return Ranking(
        queries=count,
        candidates=candidates,
        recall1=float((first <= 1).mean()),
        recall5=float((first <= 5).mean()),
        median_rank=float(np.median(first)),
        chance1=chance(1),
        chance5=chance(5),
        chance_rank=float(np.median([(candidates + 1) / (h + 1) for h in hits])),
    )
