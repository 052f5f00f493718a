"""Do two arms share codes for the same motion? Measured on what their end effectors did, not on what they were told.

Two arms that are given identical actions get identical codes from any tokenizer, which proves nothing. So the chunks
compared here are *achieved* end-effector paths (`achieved_poses`), the arms keep their own embodiment and state, and two
chunks are called the same motion where one arm's path relative to its start runs close to the other's (`SameMotion`).
Codes are then compared position by position, level by level, against chance: the same arm's chunks of other phases.

Source of the question: X-Tokenizer (arXiv 2606.14752), which says that its codes are shared between arms. The paper gives
no procedure; this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionGroup, ActionSpace, ActionTokenizer, ChunkContext, ConfigError, DataError, to_numpy
from actok.data import Chunks, EpisodeDataset, FrameCache
from actok.data.arrays import ArrayDataset, from_arrays
from actok.signal.conversions import accumulate, convert, convert_rotations, with_rotation
from actok.signal.rotations import from_matrix, to_matrix

# Numbers of proprioception that are a pose: position in m, then a quaternion (x, y, z, w).
POSE = 7
ANYWHERE_M = 1e9
BLOCK = 64  # chunks whose distances to all others are held in memory at a time

__all__ = ["ArmChunks", "Estimate", "SameMotion", "SharedCodes", "achieved_poses", "arm_chunks", "shared_codes"]


# -- achieved paths as a dataset --------------------------------------------------------------------------------------


def achieved_poses(
    datasets: Sequence[EpisodeDataset], embodiment: str, *, frame: Literal["absolute", "delta"] = "absolute"
) -> ArrayDataset:
    """What an arm's end effector did, as a dataset whose "actions" are achieved poses of the following frame.

    Frame t of an episode of n frames becomes the action that led to the pose of frame t + 1, so n - 1 remain. Positions
    are in m, rotations in rad. Proprioception is the pose at frame t: position and 6-D rotation, P = 9. The gripper is
    left out, since its command means the same to every arm and would be shared for that reason alone.

    Args:
        datasets: of one arm; the first seven numbers of proprioception are position (m) and quaternion (x, y, z, w) of
            the end effector, as in recordings of robosuite and LIBERO.
        embodiment: name of the arm.
        frame: "absolute": poses, D = 9, which are converted against the state at a chunk's start. "delta": steps from
            frame to frame as position and rotation vector about world axes, D = 6, which any tokenizer takes as they are.

    Raises DataError where proprioception is missing or no pose, where control rates differ, or an episode has one frame.
    """
    if not datasets:
        raise DataError("no dataset is given; give those of one arm")
    if frame not in ("absolute", "delta"):
        raise ConfigError(f"frame is {frame!r}; use absolute or delta")
    rates = {d.space.rate_hz for d in datasets}
    if len(rates) > 1:
        raise DataError(f"control rates differ: {rates} Hz; resample to one rate before")
    space = _pose_space(embodiment, rates.pop())
    actions, states, phases, instructions, tasks, lengths = [], [], [], [], [], []
    names: dict[str, int] = {}
    for dataset in datasets:
        for episode in dataset:
            poses = _poses(episode.proprio, f"episode {episode.index} of {dataset.name!r}")
            states.append(poses[:-1])
            actions.append(poses[1:])
            if frame == "delta":
                steps, stepped = convert(poses[1:], space, "delta", anchor=poses[0], side="world")
                actions[-1] = convert_rotations(steps, stepped, "axis_angle")[0]
            phases.append(_phases(episode, names))
            instructions.append(episode.instruction)
            tasks.append(episode.task)
            lengths.append(len(poses) - 1)
    if frame == "delta":
        space = with_rotation(_delta_space(space), "axis_angle")
    arrays: dict[str, Any] = {
        "action": np.concatenate(actions).astype(np.float32),
        "proprio": np.concatenate(states).astype(np.float32),
        "phase": np.concatenate(phases),
        "phase_names": np.array(list(names)),
        "episode_length": np.array(lengths),
        "instruction": np.array(instructions),
        "task": np.array(tasks),
    }
    return from_arrays(arrays, space=space, name=embodiment)


def _pose_space(embodiment: str, rate_hz: float | None) -> ActionSpace:
    groups = (
        ActionGroup(name="position", kind="position", dims=(0, 1, 2), unit="m", scale=1.0),
        ActionGroup(name="rotation", kind="rotation", dims=tuple(range(3, 9)), rotation="rot6d", unit="rad", scale=1.0),
    )
    note = "achieved end-effector poses in the world's axes, from proprioception"
    return ActionSpace(embodiment=embodiment, dim=9, groups=groups, rate_hz=rate_hz, note=note)


def _delta_space(space: ActionSpace) -> ActionSpace:
    still = np.zeros((1, space.dim), np.float32)
    still[0, 3:] = from_matrix(np.eye(3), "rot6d")
    return convert(still, space, "delta", anchor=still[0], side="world")[1]


def _poses(proprio: np.ndarray | None, where: str) -> Float[np.ndarray, "T 9"]:
    """Position and 6-D rotation of every frame."""
    if proprio is None or proprio.shape[1] < POSE:
        found = "none" if proprio is None else f"{proprio.shape[1]} numbers"
        raise DataError(f"{where}: proprioception has {found}; give position and quaternion of the end effector first")
    if len(proprio) < 2:
        raise DataError(f"{where} has one frame, which moves nowhere; drop it")
    norm = np.linalg.norm(proprio[:, 3:POSE], axis=1)
    if not (np.abs(norm - 1) < 1e-2).all():
        raise DataError(
            f"{where}: numbers 3 to 6 of proprioception have length {norm[np.argmax(np.abs(norm - 1))]:.3g}, so they are no"
            " quaternion; give position and quaternion (x, y, z, w) of the end effector first"
        )
    rotations = from_matrix(to_matrix(proprio[:, 3:POSE].astype(np.float64), "quaternion_xyzw"), "rot6d")
    return np.concatenate([proprio[:, :3], rotations], axis=1)


def _phases(episode: Any, names: dict[str, int]) -> Int[np.ndarray, "_"]:
    """Sub-task of all frames but the last, numbered over all datasets; one without name where there is none."""
    if episode.subtask is None:
        return np.full(len(episode) - 1, names.setdefault("", len(names)))
    own = [names.setdefault(n, len(names)) for n in episode.subtask_names]
    none = names.setdefault("", len(names)) if (episode.subtask < 0).any() else -1
    return np.array([*own, none])[episode.subtask[:-1]]


# -- chunks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmChunks:
    """Chunks of one arm without padding, and the paths they are.

    Attributes:
        embodiment: under which the tokenizer knows the arm.
        actions: float32 [B, T, D], raw units of the arm's space.
        anchor: float32 [B, P] proprioception at the chunks' starts.
        positions: [B, T, 3] m, relative to the chunk's start, world axes.
        rotations: [B, T, 3, 3] relative to the chunk's start, about world axes (R_t R_0^T), so that it does not matter how
            an arm's tool frame is mounted.
        label: [B] what must be equal for two chunks to be compared, e.g. "lift the cube: descend".
        episode: int [B] episode each chunk is cut from.
    """

    embodiment: str
    actions: Float[np.ndarray, "B T D"]
    anchor: Float[np.ndarray, "B P"]
    positions: Float[np.ndarray, "B T 3"]
    rotations: Float[np.ndarray, "B T 3 3"]
    label: np.ndarray
    episode: Int[np.ndarray, "B"]

    def __len__(self) -> int:
        return len(self.actions)

    def moving(self, least_m: float) -> ArmChunks:
        """Those whose path is at least so long."""
        steps = np.diff(self.positions, axis=1, prepend=0.0)
        keep = np.linalg.norm(steps, axis=2).sum(1) >= least_m
        return ArmChunks(
            embodiment=self.embodiment,
            **{k: v[keep] for k, v in vars(self).items() if k != "embodiment"},
        )


def arm_chunks(
    dataset: EpisodeDataset,
    horizon: int,
    episodes: Sequence[int] | np.ndarray | None = None,
    *,
    stride: int = 1,
    by_task: bool = True,
) -> ArmChunks:
    """Cut chunks of `horizon` steps from a dataset of `achieved_poses`; those that reach beyond an episode are left out.

    A chunk's label is the sub-task at its first step, with the task before it unless `by_task` is False (for datasets
    that share sub-tasks but no task). Raises DataError where no chunk remains.
    """
    cache = FrameCache.build(dataset)
    batch = Chunks(cache, horizon, episodes, stride=stride).all()
    whole = np.flatnonzero(~batch.pad_mask.any(1))
    if not len(whole):
        raise DataError(
            f"no episode of {dataset.name!r} is as long as a chunk of {horizon} steps; use a shorter horizon"
        )
    assert batch.anchor is not None, "achieved_poses gives proprioception"
    actions, anchor = batch.actions[whole], batch.anchor[whole]
    absolute = dataset.space.groups[0].mode == "absolute"
    if absolute:
        path, space = convert(actions, dataset.space, "relative", anchor=anchor, side="world")
    else:
        path, space = accumulate(actions, dataset.space), dataset.space
    rotation = space.group("rotation")
    labels = {}
    for index in np.unique(batch.episode[whole]):
        one = dataset.episode(int(index))
        assert one.subtask is not None, "achieved_poses gives sub-tasks"
        task = f"{one.task or one.instruction}: " if by_task else ""
        labels[int(index)] = [task + one.subtask_names[s] for s in one.subtask]
    return ArmChunks(
        embodiment=dataset.space.embodiment,
        actions=actions,
        anchor=anchor,
        positions=path[..., :3].astype(np.float64),
        rotations=to_matrix(path[..., list(rotation.dims)].astype(np.float64), str(rotation.rotation)),
        label=np.array([labels[int(e)][int(t)] for e, t in zip(batch.episode[whole], batch.start[whole], strict=True)]),
        episode=batch.episode[whole],
    )


# -- codes ------------------------------------------------------------------------------------------------------------


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
