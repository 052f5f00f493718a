"""ALOHA in simulation (gym-aloha 0.1.5): two ViperX arms on a table, in joint space at 50 Hz (arXiv 2304.13705).

Actions [14]: absolute joint targets in rad of six joints and the gripper (0 closed, 1 open), left arm first; the
simulator limits them to the ranges of its motors. Proprioception [28]: the same 14 joint positions as they are, then
their velocities per second. "aloha-state" has another proprioception, see AlohaStateEnv.

The models and the rule of success are gym-aloha's; its 480 x 640 pictures, which take most of its time, are not made.
Ten physics steps of 2 ms make one action, in the order in which gym-aloha (dm_control) takes them, so that trajectories
are its own to the last bit (of float64 actions; it rounds the grippers of float32 ones). A start state is where the
objects lie; gym-aloha's own random generator draws it, so that a seed means the same start there and here. The physics
of a start is deterministic: a restored episode is the recorded one bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from actok.core.errors import ConfigError, DataError, MissingExtraError
from actok.core.spaces import ActionSpace
from actok.envs.base import Env, Expert, Observation
from actok.envs.cameras import Cameras, check_views
from actok.envs.packaged import packaged_instructions, packaged_space

VIEWS = ("top", "angle", "front_close", "left_pillar", "right_pillar", "left_wrist", "right_wrist")
# Task -> gym-aloha's model of it.
MODELS = {"insertion": "bimanual_viperx_insertion.xml", "transfer-cube": "bimanual_viperx_transfer_cube.xml"}
SUBSTEPS = 10  # of 2 ms an action
# In the model's positions, velocities and motors each arm has six joints and two fingers that mirror each other.
ARM = 8
JOINTS = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]
GRIPPERS = [6, 13]  # of the 14 numbers of an action
FINGER = "10_left_gripper_finger"  # the one finger of each hand whose contacts gym-aloha looks at

__all__ = ["AlohaEnv", "AlohaStateEnv"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    """One moment: the episode it is of, a copy of the simulator's data, the last action."""

    episode: object
    data: Any
    command: np.ndarray


class AlohaEnv(Env):
    """Two tasks of two arms, "transfer-cube" and "insertion", each with a scripted expert of ours.

    `views` are cameras to render, of VIEWS ("top" and "angle" show most; in the wrists' views the hand itself takes most
    of the picture); `image_size` their height and width in pixels. Raises ConfigError for an unknown view,
    MissingExtraError without gym-aloha.
    """

    name = "aloha"
    max_steps = 300
    proprio_size: int | None = 28
    default_views = ("top", "angle", "front_close")  # those that gym-aloha renders
    known_views = VIEWS
    tasks: Sequence[str] = tuple(MODELS)
    _current: Any  # the model and the data of the episode at hand
    _data: Any

    def __init__(self, views: Sequence[str] = (), image_size: int = 128) -> None:
        self._views = check_views("ALOHA", views, VIEWS, image_size)
        self._image_size = image_size
        self._library = _import_aloha()
        self._models: dict[str, Any] = {}
        self._cameras: Cameras | None = None
        self._close_episode()

    @cached_property
    def space(self) -> ActionSpace:
        """The packaged space aloha_sim."""
        return packaged_space("aloha_sim")

    @cached_property
    def _instructions(self) -> Mapping[str, str]:
        return packaged_instructions("aloha")

    def instruction(self, task: str) -> str:
        """The task in words; gym-aloha has none, these are ours."""
        self.check_task(task)
        return self._instructions[task]

    def reset(self, task: str, *, seed: int) -> Observation:
        """See Env.reset; the start state is gym-aloha's own of that seed. Raises ConfigError for one beyond 32 bits."""
        self.check_task(task)
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed is {seed!r}; gym-aloha takes one from 0 to {2**32 - 1}")
        drawn = self._library.sample[task](seed)
        return self._begin(task, np.concatenate(drawn) if isinstance(drawn, tuple) else drawn)

    def start_state(self) -> dict[str, np.ndarray]:
        """{"objects": float64 [7 or 14]}: position in m and quaternion wxyz of the cube, or of peg and socket."""
        self._check_begun()
        return {"objects": self._objects.copy()}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """See Env.restore."""
        self.check_task(task)
        if "objects" not in start_state:
            raise DataError(
                f"the start state of an episode of {task} has no objects (it has: {', '.join(start_state) or 'nothing'});"
                " record demonstrations with `actok collect`, which stores them"
            )
        objects = np.asarray(start_state["objects"], np.float64)
        size = self._model(task).nq - 2 * ARM
        sound = objects.shape == (size,) and np.isfinite(objects).all()
        if not sound or np.abs(np.linalg.norm(objects.reshape(-1, 7)[:, 3:], axis=1) - 1).max() > 1e-3:
            raise DataError(
                f"objects {objects.tolist()} are not a start state of {task}, which has {size // 7} poses of 7 numbers"
                " (position in m, unit quaternion wxyz); check that the episode's task is right"
            )
        return self._begin(task, objects)

    def step(self, action: np.ndarray) -> Observation:
        """See Env.step."""
        self.advance(action)
        return self._observe()

    def advance(self, action: np.ndarray) -> None:
        """See Env.advance."""
        import mujoco

        self._check_begun()
        self._command = self.check_action(action).astype(np.float64)
        self._data.ctrl[:] = self._motors(self._command)
        # The positions at hand have been updated already; so are those that the next observation reads.
        mujoco.mj_step2(self._current, self._data)
        mujoco.mj_step(self._current, self._data, SUBSTEPS - 1)
        mujoco.mj_step1(self._current, self._data)

    @property
    def success(self) -> bool:
        """Whether gym-aloha's reward is at its maximum of 4 after the last step: the cube is touched by the left hand
        and off the table; the peg touches the pin at the middle of the socket's inside."""
        if self._data is None or not self._data.time:
            return False
        touching = {frozenset(pair) for pair in self._data.contact.geom[: self._data.ncon].tolist()}

        def touch(one: str, other: str) -> bool:
            return frozenset((self._current.geom(one).id, self._current.geom(other).id)) in touching

        if self._task == "insertion":
            return touch("red_peg", "pin")
        return touch("red_box", f"vx300s_left/{FINGER}") and not touch("red_box", "table")

    def expert(self, task: str) -> Expert:
        """A scripted expert of ours; see aloha_expert.py."""
        from actok.envs.aloha_expert import Insertion, TransferCube

        self.check_task(task)
        return (Insertion if task == "insertion" else TransferCube)(self._model(task))

    def snapshot(self) -> Any:
        """See Env.snapshot."""
        self._check_begun()
        return _Snapshot(episode=self._episode, data=copy.copy(self._data), command=self._command)

    def rollback(self, snapshot: Any) -> None:
        """See Env.rollback."""
        if not isinstance(snapshot, _Snapshot) or snapshot.episode is not self._episode:
            raise ConfigError("this snapshot is not of the current episode; take one with snapshot() after its start")
        self._data, self._command = copy.copy(snapshot.data), snapshot.command

    def close(self) -> None:
        """See Env.close."""
        if self._cameras is not None:
            self._cameras.close()
        self._cameras = None
        self._models.clear()
        self._close_episode()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _close_episode(self) -> None:
        self._task, self._episode = "", object()
        self._current = self._data = None
        self._objects = self._command = np.zeros(0)

    def _check_begun(self) -> None:
        if self._data is None:
            raise ConfigError("no episode has begun; call reset or restore first")

    def _model(self, task: str) -> Any:
        """The task's model (read once, 0.3 s)."""
        import mujoco

        if task not in self._models:
            self._models[task] = mujoco.MjModel.from_xml_path(str(self._library.assets / MODELS[task]))
        return self._models[task]

    def _begin(self, task: str, objects: np.ndarray) -> Observation:
        import mujoco

        model = self._model(task)
        if task != self._task and self._cameras is not None:
            self._cameras.close()
            self._cameras = None
        if self._views and self._cameras is None:
            self._cameras = Cameras(model, self._views, self._image_size)
        data = mujoco.MjData(model)
        # As gym-aloha begins (dm_control's nested resets), to the last bit, since each solution starts the solver's next:
        # without motors, once in the model's own posture and twice in that of the start.
        enabled = model.opt.disableflags
        model.opt.disableflags = enabled | int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        mujoco.mj_forward(model, data)
        data.qpos[:] = np.concatenate([self._library.start_pose, objects])
        data.ctrl[:] = self._library.start_pose
        mujoco.mj_forward(model, data)
        mujoco.mj_forward(model, data)
        model.opt.disableflags = enabled
        self._task, self._episode = task, object()
        self._current, self._data, self._objects = model, data, objects
        self._command = self._joints(data.ctrl)
        return self._observe()

    def _motors(self, action: np.ndarray) -> np.ndarray:
        """Motor targets [16] of an action [14]."""
        closed, opened = self._library.gripper
        arms = []
        for arm in action.reshape(2, 7):
            finger = closed + arm[6] * (opened - closed)
            arms.append(np.append(arm[:6], [finger, -finger]))
        return np.concatenate(arms)

    def _joints(self, values: np.ndarray) -> np.ndarray:
        """[14] as an action has them, from the model's positions or motor targets."""
        closed, opened = self._library.gripper
        joints = np.array(values[JOINTS], np.float64)
        joints[GRIPPERS] = (joints[GRIPPERS] - closed) / (opened - closed)
        return joints

    def _observe(self) -> Observation:
        data = self._data
        closed, opened = self._library.gripper
        velocities = np.array(data.qvel[JOINTS], np.float64)
        velocities[GRIPPERS] /= opened - closed
        joints = self._joints(data.qpos)
        poses = np.zeros(14)
        poses[: len(self._objects)] = data.qpos[2 * ARM :]
        images = {} if self._cameras is None else self._cameras.images(data)
        proprio = self._proprio(np.concatenate([joints, velocities]), poses).astype(np.float32)
        return Observation(proprio=proprio, state=np.concatenate([joints, self._command, poses]), images=images)

    def _proprio(self, robot: np.ndarray, poses: np.ndarray) -> np.ndarray:
        """[P] from the robot's numbers [28] and the poses of the objects [14]."""
        return robot


class AlohaStateEnv(AlohaEnv):
    """ALOHA for policies without cameras: the proprioception [42] ends with the poses of the objects, 7 numbers each
    (position in m, quaternion wxyz): peg and socket, or the cube and seven zeros."""

    name = "aloha-state"
    proprio_size = 42

    def _proprio(self, robot: np.ndarray, poses: np.ndarray) -> np.ndarray:
        return np.concatenate([robot, poses])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Library:
    """What is gym-aloha's: models, start pose of the motors [16], finger positions closed and open in m, placements."""

    assets: Any
    start_pose: np.ndarray
    gripper: tuple[float, float]
    sample: Mapping[str, Any]


def _import_aloha() -> _Library:
    try:
        import mujoco  # noqa: F401 - its absence is told here
        from gym_aloha import constants
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] not in ("gym_aloha", "gymnasium", "mujoco"):
            raise
        raise MissingExtraError("gym_aloha", "aloha", "the environment 'aloha'") from error
    return _Library(
        assets=constants.ASSETS_DIR,
        start_pose=np.array(constants.START_ARM_POSE),
        gripper=(constants.PUPPET_GRIPPER_POSITION_CLOSE, constants.PUPPET_GRIPPER_POSITION_OPEN),
        sample={"transfer-cube": sample_box_pose, "insertion": sample_insertion_pose},
    )
