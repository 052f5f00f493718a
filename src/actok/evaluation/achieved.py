"""What the end effector of an arm did: achieved poses of recordings as a dataset, and chunks of them.

Identical commands to two arms get identical codes from any tokenizer; what the arms then did is their own. So arms are
compared (`actok.evaluation.shared_motion`) and trained on by their *achieved* end-effector paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError
from actok.data import Chunks, EpisodeDataset, FrameCache
from actok.data.arrays import ArrayDataset, from_arrays
from actok.signal.conversions import accumulate, convert, convert_rotations, with_rotation
from actok.signal.rotations import from_matrix, to_matrix

# Numbers of proprioception that are a pose: position in m, then a quaternion (x, y, z, w).
POSE = 7

__all__ = ["ArmChunks", "achieved_poses", "arm_chunks"]


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
