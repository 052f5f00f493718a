"""Linear probes: how well a linear model reads a label off the codes of a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from actok.core import DataError

# Weights of the squared norm that are tried, and how long each is optimised.
PENALTIES = (1e-3, 1e-4, 1e-5)
ITERATIONS = 60
# The fifth of the training episodes that chooses among them.
CHOOSING = 5
# Resamples of the test episodes for the interval.
RESAMPLES = 1000

__all__ = ["Probe", "linear_probe"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear probe on chunks of episodes that it was not trained on.

    Attributes:
        accuracy: share of test chunks whose label it names.
        low, high: 95 % interval of it, by resampling test episodes.
        balanced: mean over the labels of the test chunks of the share named right.
        majority: accuracy of always naming the most frequent training label.
        classes: labels in the training chunks; 1 / classes is the balanced accuracy of naming any one.
        train, test: chunks.
        penalty: of the squared norm, chosen on a fifth of the training episodes.
    """

    accuracy: float
    low: float
    high: float
    balanced: float
    majority: float
    classes: int
    train: int
    test: int
    penalty: float


def linear_probe(
    train: Any,
    train_label: Int[np.ndarray, "n"],
    train_episode: Int[np.ndarray, "n"],
    test: Any,
    test_label: Int[np.ndarray, "m"],
    test_episode: Int[np.ndarray, "m"],
    *,
    seed: int = 0,
) -> Probe:
    """Multinomial logistic regression, fitted on training chunks and judged on test chunks.

    `train` [n, d] and `test` [m, d] are NumPy arrays or scipy sparse matrices, such as `LevelCodes.bags`. The loss is the
    mean cross-entropy plus penalty / 2 times the squared norm of the weights (not of the intercepts), minimised by
    L-BFGS from zero, so nothing in it is random but the choice of episodes for the penalty. A label that no training
    chunk has can never be named and counts as wrong.

    Raises DataError where the training chunks have fewer than two labels, or there is no test chunk.
    """
    classes, y = np.unique(train_label, return_inverse=True)
    if len(classes) < 2 or not len(test_label):
        raise DataError(
            f"{len(classes)} labels among the training chunks and {len(test_label)} test chunks; a probe needs at least"
            " two labels and one test chunk"
        )
    # A column that no training chunk has would keep its initial weight of zero.
    seen = np.flatnonzero(np.asarray(abs(train).sum(0)).reshape(-1))
    x, x_test = train[:, seen], test[:, seen]
    rng = np.random.default_rng(seed)
    episodes = rng.permutation(np.unique(train_episode))
    held = np.isin(train_episode, episodes[: len(episodes) // CHOOSING])
    penalty = PENALTIES[1]
    if held.any() and len(np.unique(y[~held])) > 1:
        weights, scores = None, []
        for value in PENALTIES:  # from strong to weak, each from where the one before ended
            weights = _fit(x[~held], y[~held], len(classes), value, weights)
            scores.append(float((_scores(x[held], weights).argmax(1) == y[held]).mean()))
        penalty = PENALTIES[int(np.argmax(scores))]
    named = classes[_scores(x_test, _fit(x, y, len(classes), penalty)).argmax(1)]
    right = named == test_label
    present = np.unique(test_label)
    low, high = _interval(right, test_episode, rng)
    return Probe(
        accuracy=float(right.mean()),
        low=low,
        high=high,
        balanced=float(np.mean([right[test_label == label].mean() for label in present])),
        majority=float((test_label == classes[np.bincount(y).argmax()]).mean()),
        classes=len(classes),
        train=len(y),
        test=len(test_label),
        penalty=penalty,
    )


def _fit(x: Any, y: Int[np.ndarray, "n"], classes: int, penalty: float, start: Any = None) -> Float[np.ndarray, "d c"]:
    """Weights [d + 1, classes], the last row the intercepts."""
    from scipy.optimize import minimize

    shape = (x.shape[1] + 1, classes)
    rows = np.arange(len(y))
    transposed = x.T.tocsr() if hasattr(x, "tocsr") else x.T

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        score = _scores(x, weights)
        score -= score.max(1, keepdims=True)
        right = score[rows, y].sum()
        np.exp(score, out=score)
        total = score.sum(1, keepdims=True)
        score /= total
        score[rows, y] -= 1
        score /= len(y)
        gradient = np.concatenate([transposed @ score + penalty * weights[:-1], score.sum(0, keepdims=True)])
        value = (np.log(total).sum() - right) / len(y) + penalty / 2 * (weights[:-1] ** 2).sum()
        return float(value), gradient.reshape(-1)

    first = np.zeros(shape) if start is None else start
    found = minimize(loss, first.reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    return np.asarray(found.x).reshape(shape)


def _scores(x: Any, weights: Float[np.ndarray, "d c"]) -> Num[np.ndarray, "n c"]:
    return np.asarray(x @ weights[:-1]) + weights[-1]


def _interval(right: np.ndarray, episode: Int[np.ndarray, "m"], rng: np.random.Generator) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the accuracy over resampled episodes."""
    _, index = np.unique(episode, return_inverse=True)
    hits, counts = np.bincount(index, weights=right), np.bincount(index)
    draws = rng.integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.quantile(hits[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)
