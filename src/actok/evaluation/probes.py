"""Linear probes: how well a linear model reads a label off the codes of a chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from actok.core import DataError

# Weights of the squared norm that are tried, and how long each is optimised.
PENALTIES = (1e-3, 1e-4, 1e-5)
ITERATIONS, HISTORY, BACKTRACKS, TOLERANCE = 30, 8, 30, 1e-4
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
    at most ITERATIONS steps of L-BFGS from zero (the last fit from the weights that chose the penalty), so nothing in it
    is random but which episodes choose. Columns that fewer than two training chunks have are left out. A label that no training
    chunk has can never be named and counts as wrong.

    Raises DataError where the training chunks have fewer than two labels, or there is no test chunk.
    """
    classes, y = np.unique(train_label, return_inverse=True)
    if len(classes) < 2 or not len(test_label):
        raise DataError(
            f"{len(classes)} labels among the training chunks and {len(test_label)} test chunks; a probe needs at least"
            " two labels and one test chunk"
        )
    # A column that a single training chunk has could only serve to memorise that chunk; one that none has stays at zero.
    seen = np.flatnonzero(np.asarray((train != 0).sum(0)).reshape(-1) > 1)
    x, x_test = train[:, seen], test[:, seen]
    rng = np.random.default_rng(seed)
    episodes = rng.permutation(np.unique(train_episode))
    held = np.isin(train_episode, episodes[: len(episodes) // CHOOSING])
    penalty, weights = PENALTIES[1], None
    if held.any() and len(np.unique(y[~held])) > 1:
        best, found = -1.0, None
        for value in PENALTIES:  # from strong to weak, each from where the one before ended
            found = _fit(x[~held], y[~held], len(classes), value, found)
            score = float((_scores(x[held], found).argmax(1) == y[held]).mean())
            if score > best:
                best, penalty, weights = score, value, found
    named = classes[_scores(x_test, _fit(x, y, len(classes), penalty, weights)).argmax(1)]
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
    rows = np.arange(len(y))
    transposed = x.T.tocsr() if hasattr(x, "tocsr") else x.T

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        score = _scores(x, weights)
        score -= score.max(1, keepdims=True)
        right = score[rows, y].sum()
        np.exp(score, out=score)
        total = score.sum(1, keepdims=True)
        score /= total
        score[rows, y] -= 1
        score /= len(y)
        gradient = np.empty_like(weights)
        gradient[:-1] = transposed @ score
        gradient[:-1] += penalty * weights[:-1]
        gradient[-1] = score.sum(0)
        squares = np.vdot(weights[:-1], weights[:-1])
        return float((np.log(total).sum() - right) / len(y) + penalty / 2 * squares), gradient

    return _minimise(loss, np.zeros((x.shape[1] + 1, classes)) if start is None else start)


def _minimise(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], point: np.ndarray) -> np.ndarray:
    """L-BFGS with the two-loop recursion and backtracking (Nocedal and Wright 2006, algorithms 7.4 and 3.1).

    scipy's L-BFGS-B keeps track of bounds that are not there, which takes most of its time at 10^5 weights.
    """
    value, gradient = loss(point)
    pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=HISTORY)
    for _ in range(ITERATIONS):
        direction = -gradient
        passed = []
        for step, change, rho in reversed(pairs):
            passed.append(rho * np.vdot(step, direction))
            direction -= passed[-1] * change
        if pairs:
            step, change, rho = pairs[-1]
            direction *= 1 / (rho * np.vdot(change, change))
        else:
            direction *= 1 / max(float(np.linalg.norm(gradient)), 1e-12)
        for (step, change, rho), factor in zip(pairs, reversed(passed), strict=True):
            direction += (factor - rho * np.vdot(change, direction)) * step
        slope = float(np.vdot(gradient, direction))
        length = 1.0
        for _ in range(BACKTRACKS):
            new = point + length * direction
            new_value, new_gradient = loss(new)
            if new_value <= value + 1e-4 * length * slope:
                break
            length /= 2
        else:
            break  # no descent left at this precision
        step, change = new - point, new_gradient - gradient
        curvature = float(np.vdot(step, change))
        if curvature > 1e-12 * float(np.vdot(change, change)):
            pairs.append((step, change, 1 / curvature))
        done = value - new_value <= TOLERANCE * abs(value)
        point, value, gradient = new, new_value, new_gradient
        if done:
            break
    return point


def _scores(x: Any, weights: Float[np.ndarray, "d c"]) -> Num[np.ndarray, "n c"]:
    return np.asarray(x @ weights[:-1]) + weights[-1]


def _interval(right: np.ndarray, episode: Int[np.ndarray, "m"], rng: np.random.Generator) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the accuracy over resampled episodes."""
    _, index = np.unique(episode, return_inverse=True)
    hits, counts = np.bincount(index, weights=right), np.bincount(index)
    draws = rng.integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.quantile(hits[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)
