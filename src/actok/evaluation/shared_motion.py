"""Do two arms share codes for the same motion? Measured on what their end effectors did, not on what they were told.

Two arms that are given identical actions get identical codes from any tokenizer, which proves nothing. So the chunks
compared here are *achieved* end-effector paths (`actok.evaluation.achieved`), the arms keep their own embodiment and
state, and two chunks are called the same motion where one arm's path relative to its start runs close to the other's
(`SameMotion`). Codes are then compared position by position, level by level, against chance: the same arm's chunks of
other phases.

Source of the question: X-Tokenizer (arXiv 2606.14752), which says that its codes are shared between arms. The paper gives
no procedure; this one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionTokenizer, ChunkContext, ConfigError, DataError, to_numpy
from actok.evaluation.achieved import ArmChunks

ANYWHERE_M = 1e9
BLOCK = 64  # chunks whose distances to all others are held in memory at a time

__all__ = ["Estimate", "SameMotion", "SharedCodes", "shared_codes"]


@dataclass(frozen=True, kw_only=True)
class SameMotion:
    """When two chunks of one label are the same motion.

    Attributes:
        position_m: largest mean distance of the two relative paths, over the steps.
        rotation_rad: largest mean angle between the two relative rotations, over the steps.
        least_m: shortest length of a path that counts as motion; chunks that stand still are left out on both sides.
    """

    position_m: float = 0.01
    rotation_rad: float = 0.15
    least_m: float = 0.03

    def __post_init__(self) -> None:
        for name in ("position_m", "rotation_rad", "least_m"):
            value = getattr(self, name)
            if not 0 < value < np.inf:
                raise ConfigError(f"{name} is {value!r}; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share for each of Q levels, with its 95 % interval (percentiles of a bootstrap over episodes of both arms)."""

    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SharedCodes:
    """How often two arms have equal codes, position by position, for each level of the codes.

    Attributes:
        a, b: the arms.
        levels: level numbers [Q] of the tokenizer's layout, in whose order the estimates stand.
        share: over pairs of the same motion, one chunk of each arm.
        chance: the same chunks of a with every chunk of b that moves and has another label: the expected share of
            pairs drawn at random from other phases.
        excess: share less chance, whose interval tells whether more is shared than by chance.
        same_arm: over pairs of the same motion of two episodes of one arm, both arms together: what can be reached.
        pairs, same_arm_pairs: how many.
        episodes: episodes of a and of b that pairs come from.
        deviation_m, deviation_rad: mean over the pairs of the mean distance of their paths.
        same_arm_deviation_m: the same of the same-arm pairs, which are nearer to each other as a rule; None without any.
        criterion: what counts as the same motion.
    """

    a: str
    b: str
    levels: tuple[int, ...]
    share: Estimate
    chance: Estimate
    excess: Estimate
    same_arm: Estimate | None
    pairs: int
    same_arm_pairs: int
    episodes: tuple[int, int]
    deviation_m: float
    deviation_rad: float
    same_arm_deviation_m: float | None
    criterion: SameMotion


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pairs:
    first: Int[np.ndarray, "pairs"]
    second: Int[np.ndarray, "pairs"]
    metres: Float[np.ndarray, "pairs"]
    radians: Float[np.ndarray, "pairs"]


def shared_codes(
    tokenizer: ActionTokenizer,
    a: ArmChunks,
    b: ArmChunks,
    *,
    criterion: SameMotion | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> SharedCodes:
    """Share of equal codes of two arms for the same motion, against chance and against the same arm.

    Every moving chunk of `a` is paired with the chunk of `b` of its label whose relative path is nearest, if it is near
    enough (`SameMotion`). Chance is computed exactly over all chunks of other labels, not sampled. The tokenizer is given
    embodiment and state of each arm. Same-arm pairs come from different episodes.

    Raises:
        DataError: sequences without fixed length (no position by position comparison), other horizons, no
            other label to compare with, or no pair that is near enough (the message says how near the nearest is).
        SpaceMismatchError: an embodiment that the tokenizer does not know.
    """
    criterion = criterion or SameMotion()
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; give at least 1")
    a, b = a.moving(criterion.least_m), b.moving(criterion.least_m)
    for arm in (a, b):
        if not len(arm):
            raise DataError(f"no chunk of {arm.embodiment!r} moves {criterion.least_m} m; lower least_m")
    pairs = _match(a, b, criterion)
    if not len(pairs.first):
        nearest = _match(a, b, replace(criterion, position_m=ANYWHERE_M))
        found = f"the nearest is {nearest.metres.min():.3g} m away" if len(nearest.first) else "none turns alike at all"
        raise DataError(
            f"no chunk of {a.embodiment!r} is within {criterion.position_m} m and {criterion.rotation_rad} rad of one of"
            f" {b.embodiment!r} with the same label ({found}); raise the thresholds, or compare tasks that both arms do"
        )
    levels, codes_a = _codes(tokenizer, a)
    _, codes_b = _codes(tokenizer, b)
    rng = np.random.default_rng(seed)
    share = _equal(codes_a[pairs.first], codes_b[pairs.second], levels)
    chance = _chance(codes_a[pairs.first], a.label[pairs.first], codes_b, b, levels)
    clusters = (a.episode[pairs.first], b.episode[pairs.second])
    estimates = _estimates(np.stack([share, chance, share - chance]), clusters, resamples, rng)
    alike, metres = [], []
    for arm, codes in ((a, codes_a), (b, codes_b)):
        own = _match(arm, arm, criterion)
        metres.append(own.metres)
        alike.append(
            (_equal(codes[own.first], codes[own.second], levels), arm.episode[own.first], arm.episode[own.second])
        )
    (same_a, *clusters_a), (same_b, *clusters_b) = alike
    offset = int(a.episode.max()) + 1  # so that the two arms' episodes stay apart
    same = np.concatenate([same_a, same_b])
    same_clusters = [np.concatenate([x, y + offset]) for x, y in zip(clusters_a, clusters_b, strict=True)]
    return SharedCodes(
        a=a.embodiment,
        b=b.embodiment,
        levels=tuple(int(q) for q in np.unique(levels)),
        share=estimates[0],
        chance=estimates[1],
        excess=estimates[2],
        same_arm=_estimates(same[None], (same_clusters[0], same_clusters[1]), resamples, rng)[0] if len(same) else None,
        pairs=len(pairs.first),
        same_arm_pairs=len(same),
        episodes=(len(np.unique(clusters[0])), len(np.unique(clusters[1]))),
        deviation_m=float(pairs.metres.mean()),
        deviation_rad=float(pairs.radians.mean()),
        same_arm_deviation_m=float(np.concatenate(metres).mean()) if len(same) else None,
        criterion=criterion,
    )


def _match(a: ArmChunks, b: ArmChunks, criterion: SameMotion) -> _Pairs:
    """The nearest chunk of b for each of a that has one near enough; of another episode where a and b are one arm."""
    if a.positions.shape[1] != b.positions.shape[1]:
        raise DataError(
            f"chunks have {a.positions.shape[1]} and {b.positions.shape[1]} steps; cut both arms at one horizon"
        )
    found: list[tuple[int, int, float, float]] = []
    for label in np.intersect1d(a.label, b.label):
        theirs = np.flatnonzero(b.label == label)
        mine = np.flatnonzero(a.label == label)
        for start in range(0, len(mine), BLOCK):
            rows = mine[start : start + BLOCK]
            metres, radians = _deviation(a, rows, b, theirs)
            near = radians <= criterion.rotation_rad
            if a is b:
                near &= a.episode[rows][:, None] != a.episode[theirs]
            ranked = np.where(near, metres, np.inf)
            best = ranked.argmin(1)
            for i, j in enumerate(best):
                if ranked[i, j] <= criterion.position_m:
                    found.append((rows[i], theirs[j], metres[i, j], radians[i, j]))
    table = np.array(found, np.float64).reshape(-1, 4)
    return _Pairs(
        first=table[:, 0].astype(np.int64), second=table[:, 1].astype(np.int64), metres=table[:, 2], radians=table[:, 3]
    )


def _deviation(
    a: ArmChunks, rows: Int[np.ndarray, "n"], b: ArmChunks, others: Int[np.ndarray, "m"]
) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, "n m"]]:
    """Mean over the steps of distance (m) and angle (rad) between relative paths."""
    metres = np.linalg.norm(a.positions[rows][:, None] - b.positions[others], axis=-1).mean(-1)
    # The trace of R^T S is the sum of the products of their entries.
    trace = np.einsum("ntij,mtij->nmt", a.rotations[rows], b.rotations[others])
    return metres, np.arccos(np.clip((trace - 1) / 2, -1, 1)).mean(-1)


def _codes(tokenizer: ActionTokenizer, arm: ArmChunks) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "B N"]]:
    """Level of each position, and the codes."""
    horizon = arm.actions.shape[1]
    context = ChunkContext(horizon=horizon, embodiment=arm.embodiment, anchor=arm.anchor)
    tokens = tokenizer.encode(arm.actions, context)
    if tokens.fixed_length is None:
        raise DataError(
            f"{tokenizer.kind} gives sequences of different lengths, whose positions cannot be compared one by one; use"
            " a tokenizer of fixed length"
        )
    return tokenizer.layout_for(horizon, arm.embodiment).coords[:, 0], to_numpy(tokens.ids).astype(np.int64)


def _by_level(values: Float[np.ndarray, "n N"], levels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "n Q"]:
    return np.stack([values[:, levels == q].mean(1) for q in np.unique(levels)], axis=1)


def _equal(
    first: Int[np.ndarray, "n N"], second: Int[np.ndarray, "n N"], levels: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "n Q"]:
    return _by_level((first == second).astype(np.float64), levels)


def _chance(
    codes: Int[np.ndarray, "n N"],
    labels: np.ndarray,
    others: Int[np.ndarray, "B N"],
    b: ArmChunks,
    levels: Int[np.ndarray, "N"],
) -> Float[np.ndarray, "n Q"]:
    """Expected share of equal codes with a chunk of b drawn from other labels."""
    positions = np.arange(codes.shape[1])
    size = int(max(codes.max(), others.max())) + 1
    result = np.empty((len(codes), len(np.unique(levels))))
    for label in np.unique(labels):
        pool = others[b.label != label]
        if not len(pool):
            raise DataError(
                f"all moving chunks of {b.embodiment!r} are of {label!r}, so there is no other phase to compare with;"
                " give more tasks or phases"
            )
        share = np.zeros((len(positions), size))
        np.add.at(share, (np.broadcast_to(positions, pool.shape), pool), 1 / len(pool))
        rows = np.flatnonzero(labels == label)
        result[rows] = _by_level(share[positions, codes[rows]], levels)
    return result


def _estimates(
    values: Float[np.ndarray, "M n Q"],
    clusters: tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]],
    resamples: int,
    rng: np.random.Generator,
) -> list[Estimate]:
    """Means over pairs with percentile intervals; episodes of both sides are drawn with replacement, a pair counting as
    often as both of its episodes were drawn (the bootstrap for crossed factors of Owen 2007, Ann. Appl. Stat. 1:386).
    """
    index, counts = [], []
    for cluster in clusters:
        unique, inverse = np.unique(cluster, return_inverse=True)
        index.append(inverse)
        counts.append(rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=resamples))
    weights = (counts[0][:, index[0]] * counts[1][:, index[1]]).astype(np.float64)
    total = weights.sum(1)
    weights = weights[total > 0] / total[total > 0, None]  # a resample without any pair says nothing
    drawn = np.einsum("rn,mnq->mrq", weights, values, optimize=True)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1) if len(weights) else np.full((2, *drawn[:, 0].shape), np.nan)
    return [
        Estimate(value=tuple(v.tolist()), low=tuple(x.tolist()), high=tuple(y.tolist()))
        for v, x, y in zip(values.mean(1), low, high, strict=True)
    ]
