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

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from actok.core.errors import ConfigError, DataError, MissingExtraError
from actok.core.spaces import ActionSpace
from actok.envs.base import Env, Expert, Observation
from actok.envs.cameras import Cameras, choose_backend
from actok.envs.packaged import packaged_instructions, packaged_space
from actok.envs.robosuite_expert import SceneState, Waypoints
from actok.envs.seeding import global_generator

VIEWS = ("agentview", "robot0_eye_in_hand", "frontview", "birdview", "robot0_robotview")
# robosuite's start positions have Gaussian noise of 0.02 rad on each joint of the arm; ten times that is another arm.
MOST_JOINT_NOISE = 0.2
# robosuite draws collision shapes as group 0, over the visual ones of group 1.
_COLLISION_GEOMS = (0,)

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
    "import_robosuite",
]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A task: robosuite's class, the object to be picked up, and where it is to be.

    `goal` is a place in world axes, m; with `goal_object` a displacement from that object. `carry_height` is that of
    the object, in m of world z, on its way; None where lifting is all.
    """

    simulator: str
    picked: str
    goal: tuple[float, float, float]
    goal_object: str | None = None
    carry_height: float | None = None


# The table's top, and the floor of both bins, are at z = 0.8 m; the bread's centre is 0.042 m above the bin's origin. The
# cubes are 0.04 and 0.05 m high; the bread's compartment is the far one of the nearer row.
_TASKS: Mapping[str, _Task] = {
    "lift": _Task(simulator="Lift", picked="cube_main", goal=(0.0, 0.0, 0.9)),
    "pick-place-bread": _Task(
        simulator="PickPlaceBread", picked="Bread_main", goal=(0.1975, 0.1575, 0.842), carry_height=0.98
    ),
    "stack": _Task(
        simulator="Stack", picked="cubeA_main", goal=(0.0, 0.0, 0.045), goal_object="cubeB_main", carry_height=0.92
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scene:
    """A built simulator with what is looked up in it at every step."""

    simulator: Any
    model: Any
    data: Any
    cameras: Cameras | None
    picked: int
    goal_object: int | None
    finger_joints: tuple[int, int]
    finger_pads: tuple[int, int]
    gripping: tuple[frozenset[int], frozenset[int], frozenset[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    """A moment of an episode: MuJoCo's state with its warm start, the controller's and the gripper's, success."""

    episode: object
    physics: np.ndarray
    goal_position: np.ndarray
    goal_rotation: np.ndarray
    gripper_command: np.ndarray
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

    def __init__(self, views: Sequence[str] = (), image_size: int = 128) -> None:
        self._views = (views,) if isinstance(views, str) else tuple(views)
        self._image_size = image_size
        for view in self._views:
            if view not in VIEWS:
                raise ConfigError(f"robosuite has no view {view!r}; it has {', '.join(VIEWS)}")
        if not isinstance(image_size, int) or not 16 <= image_size <= 2048:
            raise ConfigError(f"image_size is {image_size!r}; give a whole number of pixels from 16 to 2048")
        if self._views:
            choose_backend()
        self._library = import_robosuite()
        self._scenes: dict[str, _Scene] = {}
        self._task = ""
        self._qpos: np.ndarray | None = None
        self._success = False
        self._episode = object()  # its identity tells one episode's snapshots from another's

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._views, self._image_size)

    @property
    def tasks(self) -> Sequence[str]:
        """("lift", "pick-place-bread", "stack")"""
        return tuple(_TASKS)

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
        scene = self._open(task)
        with global_generator(seed):
            scene.simulator.reset()
        return self._begin(task, scene.data.qpos.copy())

    def start_state(self) -> dict[str, np.ndarray]:
        """{"qpos": float64 [17 to 45]}: positions of all joints; free ones are position in m and quaternion wxyz."""
        return {"qpos": self._begun()[1].copy()}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """See Env.restore."""
        scene = self._open(task)
        if "qpos" not in start_state:
            raise DataError(
                f"the start state of a {task} episode has no qpos (it has: {', '.join(start_state) or 'nothing'});"
                " record demonstrations with `actok collect`, which stores it"
            )
        qpos = np.array(start_state["qpos"], np.float64)
        robot = scene.simulator.robots[0]
        at_rest = np.asarray(robot.init_qpos)
        if (
            qpos.shape != scene.data.qpos.shape
            or not np.isfinite(qpos).all()
            or np.abs(qpos[robot._ref_joint_pos_indexes] - at_rest).max() > MOST_JOINT_NOISE
        ):
            raise DataError(
                f"qpos {qpos.tolist()} is not a start state of {task} on {self.arm}, which has {scene.data.qpos.size}"
                f" positions and its arm near {at_rest.round(2).tolist()}; check that the episode's task and arm are right"
            )
        return self._begin(task, qpos)

    def step(self, action: np.ndarray) -> Observation:
        """See Env.step."""
        scene, _ = self._begun()
        _, reward, _, _ = scene.simulator.step(self.check_action(action).astype(np.float64))
        self._success = bool(reward > 0)  # the reward is sparse
        return self._observe()

    @property
    def success(self) -> bool:
        """robosuite's own criterion after the last step, the one that its sparse reward goes by."""
        return self._success

    def expert(self, task: str) -> Expert:
        """Waypoints for the OSC controller, see Waypoints."""
        self.check_task(task)
        return Waypoints(_TASKS[task].carry_height)

    def snapshot(self) -> Any:
        """See Env.snapshot."""
        import mujoco

        scene, _ = self._begun()
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(scene.model, kind))
        mujoco.mj_getState(scene.model, scene.data, physics, kind)
        robot = scene.simulator.robots[0]
        return _Snapshot(
            episode=self._episode,
            physics=physics,
            goal_position=robot.controller.goal_pos.copy(),
            goal_rotation=robot.controller.goal_ori.copy(),
            gripper_command=robot.gripper.current_action.copy(),
            success=self._success,
        )

    def rollback(self, snapshot: Any) -> None:
        """See Env.rollback."""
        import mujoco

        scene, _ = self._begun()
        if not isinstance(snapshot, _Snapshot) or snapshot.episode is not self._episode:
            raise ConfigError("this snapshot is not of the current episode; take one with snapshot() after its start")
        mujoco.mj_setState(scene.model, scene.data, snapshot.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        robot = scene.simulator.robots[0]
        robot.controller.goal_pos = snapshot.goal_position.copy()
        robot.controller.goal_ori = snapshot.goal_rotation.copy()
        robot.controller.new_update = True  # what it has read of the simulator is out of date
        robot.gripper.current_action = snapshot.gripper_command.copy()
        self._success = snapshot.success

    def close(self) -> None:
        """See Env.close."""
        for scene in self._scenes.values():
            if scene.cameras is not None:
                scene.cameras.close()
            scene.simulator.close()
        self._scenes.clear()
        self._task, self._qpos, self._success = "", None, False

    # -- inside ---------------------------------------------------------------------------------------------------

    def _begun(self) -> tuple[_Scene, np.ndarray]:
        if self._qpos is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        return self._scenes[self._task], self._qpos

    def _open(self, task: str) -> _Scene:
        self.check_task(task)
        if task not in self._scenes:
            self._scenes[task] = self._build(_TASKS[task])
        return self._scenes[task]

    def _build(self, task: _Task) -> _Scene:
        with global_generator(0):
            simulator = self._library["make"](
                task.simulator,
                robots=self.arm,
                controller_configs=self._library["controller"](default_controller="OSC_POSE"),
                control_freq=round(self.rate_hz),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=False,
                hard_reset=False,
                ignore_done=True,  # whoever steps decides when an episode ends
            )
            simulator.reset()
        # What is observed is read off the simulator; robosuite would compute its own at each of 25 substeps.
        simulator._observables.clear()
        model, data = simulator.sim.model._model, simulator.sim.data._data
        robot = simulator.robots[0]
        joints = robot._ref_gripper_joint_pos_indexes
        pads = [
            [model.geom(name).id for name in robot.gripper.important_geoms[side]]
            for side in ("left_fingerpad", "right_fingerpad")
        ]
        fingers = [
            frozenset(model.geom(name).id for name in robot.gripper.important_geoms[side])
            for side in ("left_finger", "right_finger")
        ]
        picked = model.body(task.picked).id
        thing = np.flatnonzero((model.geom_bodyid == picked) & (model.geom_contype > 0))
        return _Scene(
            simulator=simulator,
            model=model,
            data=data,
            cameras=Cameras(model, self._views, self._image_size, hidden=_COLLISION_GEOMS) if self._views else None,
            picked=picked,
            goal_object=None if task.goal_object is None else model.body(task.goal_object).id,
            finger_joints=(joints[0], joints[len(joints) // 2]),
            finger_pads=(pads[0][0], pads[1][0]),
            gripping=(fingers[0], fingers[1], frozenset(thing.tolist())),
        )

    def _begin(self, task: str, qpos: np.ndarray) -> Observation:
        """Begin an episode with everything at rest at `qpos`, whatever happened before."""
        import mujoco

        scene = self._scenes[task]
        robot = scene.simulator.robots[0]
        mujoco.mj_resetData(scene.model, scene.data)
        scene.data.qpos[:] = qpos
        robot.controller.update_initial_joints(qpos[robot._ref_joint_pos_indexes])
        robot.controller.new_update = True
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._task, self._qpos, self._success, self._episode = task, qpos, False, object()
        return self._observe()

    def _observe(self) -> Observation:
        import mujoco

        scene, _ = self._begun()
        # Brings positions and contacts up to the last substep; unlike mj_forward it leaves the solver's start alone.
        mujoco.mj_fwdPosition(scene.model, scene.data)
        state = self._scene_state(scene)
        images = {} if scene.cameras is None else scene.cameras.images(scene.data)
        proprio = self._proprio(scene, state).astype(np.float32)
        return Observation(proprio=proprio, state=state.to_vector(), images=images)

    def _scene_state(self, scene: _Scene) -> SceneState:
        data, robot = scene.data, scene.simulator.robots[0]
        left, right = (data.geom_xpos[pad] for pad in scene.finger_pads)
        task = _TASKS[self._task]
        goal = np.array([*task.goal, 0.0, 0.0, 0.0, 1.0])
        if scene.goal_object is not None:
            goal = _pose(data, scene.goal_object)
            goal[:3] += task.goal
        motor = scene.simulator.robots[0].gripper.current_action
        closing = {"PandaGripper": -motor[0], "Robotiq140Gripper": motor[0], "Robotiq85Gripper": motor[0]}
        return SceneState(
            gripper=data.site_xpos[robot.eef_site_id].copy(),
            approach=data.site_xmat[robot.eef_site_id].reshape(3, 3)[:, 2].copy(),
            fingers=right - left,
            command=float(closing[type(robot.gripper).__name__]),
            held=float(_touching(data, scene.gripping)),
            object_pose=_pose(data, scene.picked),
            goal_pose=goal,
        )

    def _proprio(self, scene: _Scene, state: SceneState) -> np.ndarray:
        """[P] in float64."""
        import mujoco

        wxyz = np.empty(4)
        mujoco.mju_mat2Quat(wxyz, scene.data.site_xmat[scene.simulator.robots[0].eef_site_id])
        rotation = np.roll(wxyz, -1)
        if rotation[0] + rotation[1] < 0:
            rotation = -rotation
        return np.concatenate([state.gripper, rotation, scene.data.qpos[list(scene.finger_joints)]])


class _ObjectsInProprio(RobosuiteEnv):
    """For policies without cameras, which would otherwise be blind to the objects: the proprioception [23] is that of
    the arm [9], then the pose of the object to be picked up [7] and that of its goal [7], each position in m and
    quaternion xyzw. A policy of such an environment reads what no camera-less robot could: its success is a statement
    about tokens and decoding, not about perception.
    """

    proprio_size = 23

    def _proprio(self, scene: _Scene, state: SceneState) -> np.ndarray:
        return np.concatenate([super()._proprio(scene, state), state.object_pose, state.goal_pose])


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


def _pose(data: Any, body: int) -> np.ndarray:
    """[7] position and quaternion xyzw of a body."""
    return np.concatenate([data.xpos[body], np.roll(data.xquat[body], -1)])


def _touching(data: Any, gripping: tuple[frozenset[int], frozenset[int], frozenset[int]]) -> bool:
    """Whether both fingers touch the object."""
    left, right, thing = gripping
    pairs = [set(pair) for pair in data.contact.geom[: data.ncon].tolist()]
    return all(any(pair & side and pair & thing for pair in pairs) for side in (left, right))


def import_robosuite(purpose: str = "the environments 'robosuite-...'", extra: str = "robosuite") -> Mapping[str, Any]:
    """robosuite's functions "make" and "controller", without its warnings about macros and without its choice of OpenGL for the process."""
    log, backend = logging.getLogger("robosuite_logs"), os.environ.get("MUJOCO_GL")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mujoco  # noqa: F401 - before robosuite sets MUJOCO_GL, which MuJoCo reads once
            from robosuite import make
            from robosuite.controllers import load_controller_config
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] not in ("robosuite", "mujoco", "termcolor"):
            raise
        raise MissingExtraError("robosuite", extra, purpose) from error
    finally:
        log.setLevel(level)
        if backend is None:
            os.environ.pop("MUJOCO_GL", None)
        else:
            os.environ["MUJOCO_GL"] = backend
    return {"make": make, "controller": load_controller_config}
