"""robosuite 1.4: three tasks of one arm before a table, on four arms (arXiv 2009.12293).

Actions [7]: robosuite's OSC_POSE controller at 20 Hz with its default range, a displacement of the gripper (1 = 0.05 m),
a rotation vector about world axes (1 = 0.5 rad), both from the current pose, and the gripper (negative opens, positive
closes). The controller limits what lies beyond [-1, 1]. Proprioception [9]: position of the point between the fingertips
in m (3), orientation of the frame that the controller turns as a quaternion xyzw (4), position of the first joint of
either finger (2: m for the Panda's sliding fingers, rad for the Robotiq grippers of the other arms: the 85 mm one on UR5e
and Kinova3, the 140 mm one on IIWA). The quaternion's sign is the one with x + y >= 0, which is about 1.4 at the start;
w, by which signs are usually chosen, is about zero for a gripper that points down.

A start state is "qpos", the positions of all joints, the free ones of objects included. robosuite draws them from NumPy's
global generator; here that is put at the seed for the moment, then back. The model itself is built once for each task.
So the cube of Lift, whose size robosuite draws anew for each model (0.040 to 0.044 m), has one size here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from actok.core.errors import ConfigError, DataError
from actok.core.spaces import ActionSpace
from actok.envs.base import Env, Expert, Observation
from actok.envs.cameras import check_views
from actok.envs.packaged import packaged_instructions, packaged_space
from actok.envs.robosuite_expert import SceneState, Waypoints
from actok.envs.robosuite_scene import TASKS, Moment, Scene, import_robosuite

VIEWS = ("agentview", "robot0_eye_in_hand", "frontview", "birdview", "robot0_robotview")

__all__ = [
    "IIWAEnv",
    "IIWAStateEnv",
    "Kinova3Env",
    "Kinova3StateEnv",
    "PandaEnv",
    "PandaStateEnv",
    "RobosuiteEnv",
    "UR5eEnv",
    "UR5eStateEnv",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    episode: object
    moment: Moment
    success: bool


class RobosuiteEnv(Env):
    """The tasks "lift", "pick-place-bread" and "stack" of one arm; subclasses name the arm.

    Success is robosuite's own: the cube is more than 0.04 m above the table; the bread is in its compartment and the
    gripper has left it; the red cube lies on the green one and is not held. `views` are cameras to render, of VIEWS;
    `image_size` their height and width in pixels. Raises ConfigError for an unknown view, MissingExtraError without
    robosuite.
    """

    arm: str
    max_steps = 400
    proprio_size: int | None = 9
    default_views = ("agentview", "robot0_eye_in_hand")
    known_views = VIEWS

    def __init__(self, views: Sequence[str] = (), image_size: int = 128) -> None:
        self._views = check_views("robosuite", views, VIEWS, image_size)
        self._image_size = image_size
        import_robosuite()
        self._scenes: dict[str, Scene] = {}
        self._task = ""
        self._qpos: np.ndarray | None = None
        self._success = False
        self._episode = object()  # its identity tells one episode's snapshots from another's

    @property
    def tasks(self) -> Sequence[str]:
        """("lift", "pick-place-bread", "stack")"""
        return tuple(TASKS)

    @cached_property
    def space(self) -> ActionSpace:
        """The packaged space robosuite_osc_pose, with the arm's name in that of the embodiment."""
        return packaged_space("robosuite_osc_pose").renamed(f"robosuite_osc_pose_{self.arm.lower()}")

    @cached_property
    def _instructions(self) -> Mapping[str, str]:
        return packaged_instructions("robosuite")

    def instruction(self, task: str) -> str:
        """The task in words; robosuite has none, these are ours."""
        self.check_task(task)
        return self._instructions[task]

    def reset(self, task: str, *, seed: int) -> Observation:
        """See Env.reset. The first episode of a task builds its model, 1 to 3 s; later ones take some milliseconds."""
        return self._begin(task, self._open(task).draw(seed))

    def start_state(self) -> dict[str, np.ndarray]:
        """{"qpos": float64 [16 to 41]}: positions of all joints; free ones are position in m and quaternion wxyz."""
        return {"qpos": self._begun()[1].copy()}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """See Env.restore."""
        scene = self._open(task)
        if "qpos" not in start_state:
            raise DataError(
                f"the start state of a {task} episode has no qpos (it has: {', '.join(start_state) or 'nothing'});"
                " record demonstrations with `actok collect`, which stores it"
            )
        return self._begin(task, scene.check(start_state["qpos"]))

    def step(self, action: np.ndarray) -> Observation:
        """See Env.step."""
        self.advance(action)
        return self._observe(self._begun()[0])

    def advance(self, action: np.ndarray) -> None:
        """See Env.advance."""
        scene, _ = self._begun()
        self._success = scene.step(self.check_action(action))

    @property
    def success(self) -> bool:
        """robosuite's own criterion after the last step, the one that its sparse reward goes by."""
        return self._success

    def expert(self, task: str) -> Expert:
        """Waypoints for the OSC controller, see Waypoints."""
        self.check_task(task)
        return Waypoints(TASKS[task].carry_height, TASKS[task].drop)

    def snapshot(self) -> Any:
        """See Env.snapshot; some microseconds."""
        scene, _ = self._begun()
        return _Snapshot(episode=self._episode, moment=scene.moment(), success=self._success)

    def rollback(self, snapshot: Any) -> None:
        """See Env.rollback."""
        scene, _ = self._begun()
        if not isinstance(snapshot, _Snapshot) or snapshot.episode is not self._episode:
            raise ConfigError("this snapshot is not of the current episode; take one with snapshot() after its start")
        scene.go_back(snapshot.moment)
        self._success = snapshot.success

    def close(self) -> None:
        """See Env.close."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()
        self._task, self._qpos, self._success = "", None, False

    # -- inside ---------------------------------------------------------------------------------------------------

    def _open(self, task: str) -> Scene:
        self.check_task(task)
        if task not in self._scenes:
            self._scenes[task] = Scene(
                TASKS[task], self.arm, rate_hz=self.rate_hz, views=self._views, image_size=self._image_size
            )
        return self._scenes[task]

    def _begin(self, task: str, qpos: np.ndarray) -> Observation:
        scene = self._scenes[task]
        scene.begin(qpos)
        self._task, self._qpos, self._success, self._episode = task, qpos, False, object()
        return self._observe(scene)

    def _begun(self) -> tuple[Scene, np.ndarray]:
        if self._qpos is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        return self._scenes[self._task], self._qpos

    def _observe(self, scene: Scene) -> Observation:
        arm, state, images = scene.read()
        return Observation(proprio=self._proprio(arm, state).astype(np.float32), state=state.to_vector(), images=images)

    def _proprio(self, arm: np.ndarray, state: SceneState) -> np.ndarray:
        """[P] from that of the arm [9] and from where things are."""
        return arm


class _ObjectsInProprio(RobosuiteEnv):
    """For policies without cameras, which would otherwise be blind to the objects: the proprioception [26] is that of
    the arm [9], then the pose of the object to be picked up [7] and that of its goal [7], each position in m and
    quaternion xyzw, and the way from the hand to the object in m [3], which robosuite, too, observes. A policy of such an
    environment reads what no camera-less robot could: its success is a statement about tokens and decoding, not about
    perception.
    """

    proprio_size = 26

    def _proprio(self, arm: np.ndarray, state: SceneState) -> np.ndarray:
        return np.concatenate([arm, state.object_pose, state.goal_pose, state.object_pose[:3] - arm[:3]])


class PandaEnv(RobosuiteEnv):
    """Franka Panda, 7 joints, parallel gripper."""

    name, arm = "robosuite-panda", "Panda"


class PandaStateEnv(_ObjectsInProprio):
    """PandaEnv with objects in the proprioception."""

    name, arm = "robosuite-panda-state", "Panda"


class UR5eEnv(RobosuiteEnv):
    """Universal Robots UR5e, 6 joints, Robotiq 85 gripper."""

    name, arm = "robosuite-ur5e", "UR5e"


class UR5eStateEnv(_ObjectsInProprio):
    """UR5eEnv with objects in the proprioception."""

    name, arm = "robosuite-ur5e-state", "UR5e"


class IIWAEnv(RobosuiteEnv):
    """KUKA LBR IIWA, 7 joints, Robotiq 140 gripper."""

    name, arm = "robosuite-iiwa", "IIWA"


class IIWAStateEnv(_ObjectsInProprio):
    """IIWAEnv with objects in the proprioception."""

    name, arm = "robosuite-iiwa-state", "IIWA"


class Kinova3Env(RobosuiteEnv):
    """Kinova Gen3, 7 joints, Robotiq 85 gripper."""

    name, arm = "robosuite-kinova3", "Kinova3"


class Kinova3StateEnv(_ObjectsInProprio):
    """Kinova3Env with objects in the proprioception."""

    name, arm = "robosuite-kinova3-state", "Kinova3"
