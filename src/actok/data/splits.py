"""Training, validation and test episodes: whole episodes only, so no window of one episode is ever in two splits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actok.core import ConfigError, DataError
from actok.data.episodes import EpisodeDataset

__all__ = ["Split", "split_dataset", "split_episodes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Disjoint, sorted int64 episode indices that together are all episodes."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_episodes(
    count_or_lengths: int | Sequence[int] | np.ndarray,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    tasks: Sequence[str] | None = None,
) -> Split:
    """Deal episodes to train, validation and test.

    The result depends on the number of episodes, `fractions`, `seed` and `tasks` alone, on every machine and NumPy
    version: the order comes from the raw PCG64 stream, whose bits NumPy guarantees.

    A split whose fraction is above 0 gets at least one episode where there are enough episodes. Where there are not,
    train is filled first, then test, then validation, and a warning names what stays empty: with two episodes there is
    no validation, with one there is training data only. No episode is ever shared to fill a gap.

    Args:
        count_or_lengths: number of episodes E, or one entry per episode (only their number counts).
        fractions: of train, validation and test, adding up to 1; 0 leaves a split out on purpose.
        seed: at least 0.
        tasks: task of each episode [E]; then each task gives every split at least its whole share: with 20 episodes of
            a task and the default fractions, 16, 2 and 2 of them.

    Raises:
        DataError: no episode, or `tasks` of another length.
        ConfigError: fractions that do not add up to 1, or a negative seed.
    """
    count = int(count_or_lengths) if np.ndim(count_or_lengths) == 0 else len(count_or_lengths)  # type: ignore[arg-type]
    if count < 1:
        raise DataError(f"{count} episodes cannot be split; give at least one")
    share = np.asarray(fractions, np.float64)
    if share.shape != (3,) or not (share >= 0).all() or abs(share.sum() - 1) > 1e-6 or share[0] == 0:
        raise ConfigError(
            f"fractions are {tuple(fractions)}; give train, validation and test adding up to 1, with train above 0"
        )
    if seed < 0:
        raise ConfigError(f"split seed is {seed}; give 0 or more")
    if tasks is not None and len(tasks) != count:
        raise DataError(f"{len(tasks)} tasks are given for {count} episodes; give one per episode")

    totals = _totals(count, share)
    empty = [name for name, n, f in zip(("train", "validation", "test"), totals, share, strict=True) if f and not n]
    if empty:
        warnings.warn(
            f"{count} episode{'s are' if count > 1 else ' is'} too few for every split: {' and '.join(empty)}"
            f" {'are' if len(empty) > 1 else 'is'} empty, nothing can be measured there; give at least"
            f" {np.count_nonzero(share)} episodes",
            stacklevel=2,
        )
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    owner = _deal(order, tasks, share, totals)
    train, validation, test = (np.flatnonzero(owner == s) for s in range(3))
    return Split(train=train, validation=validation, test=test)


def split_dataset(dataset: EpisodeDataset, *, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """`split_episodes` of a dataset, each of its tasks in every split where the dataset names tasks."""
    return split_episodes(len(dataset), fractions=fractions, seed=seed, tasks=dataset.tasks)


def _totals(count: int, share: np.ndarray) -> np.ndarray:
    """Episodes of each split [3]: largest remainders, then one from the largest split for each empty one."""
    exact = count * share
    totals = np.floor(exact + 1e-9).astype(np.int64)
    for s in np.argsort(totals - exact, kind="stable")[: count - totals.sum()]:
        totals[s] += 1
    for s in (0, 2, 1):
        if share[s] > 0 and totals[s] == 0 and totals.max() > 1:
            totals[np.argmax(totals)] -= 1
            totals[s] = 1
    return totals


def _deal(order: np.ndarray, tasks: Sequence[str] | None, share: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Split of each episode [E]: every task's whole shares first, the rest as the totals ask."""
    owner = np.full(len(order), -1)
    if tasks is not None:
        _, task_of = np.unique(np.asarray(tasks, dtype=str), return_inverse=True)
        by_task = order[np.argsort(task_of[order], kind="stable")]
        for members in np.split(by_task, np.cumsum(np.bincount(task_of))[:-1]):
            quota = np.floor(len(members) * share + 1e-9).astype(np.int64)
            owner[members[: quota.sum()]] = np.repeat(np.arange(3), quota)
        for s in range(3):  # a split that gave an episode to an empty one takes no more than its total
            owner[order[owner[order] == s][totals[s] :]] = -1
    missing = totals - np.array([(owner == s).sum() for s in range(3)])
    owner[order[owner[order] == -1]] = np.repeat(np.arange(3), missing)
    return owner
