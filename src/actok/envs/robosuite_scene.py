"""One task of robosuite on one arm: the built simulator, put into a state, stepped and read.

robosuite keeps state in its controller and its gripper beside the physics. What is here makes an episode a function of
the positions that it starts from, and a moment of it something to go back to.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actok.core.errors import DataError, MissingExtraError
from actok.envs.cameras import Cameras
from actok.envs.robosuite_expert import SceneState
from actok.envs.seeding import global_generator

# robosuite's start positions have Gaussian noise of 0.02 rad on each joint of the arm; ten times that is another arm.
MOST_JOINT_NOISE = 0.2
# Within this distance of an object, m, open fingers or the hand may hit what is there.
NEAR = 0.15
# robosuite draws collision shapes as group 0, over the visual ones of group 1.
_COLLISION_GEOMS = (0,)

__all__ = ["TASKS", "Moment", "Scene", "Task", "import_robosuite"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: robosuite's class, the object to be picked up, and where it is to be.

    `goal` is a place in world axes, m; with `goal_object` a displacement from that object. `carry_height` is that of
    the object, in m of world z, on its way, and `drop` the height above the goal at which it may be let go; None where
    lifting is all. `walls` are the sides of what the object lies in: least and largest x, then y, m.
    """

    simulator: str
    picked: str
    goal: tuple[float, float, float]
    goal_object: str | None = None
    carry_height: float | None = None
    drop: float = 0.008
    walls: tuple[float, float, float, float] | None = None


# The table's top and the origin of both bins are at z = 0.8 m; the bread at rest is 0.042 m above its bin's origin. The
# cubes are 0.04 and 0.05 m high; the bread's compartment is the far one of the nearer row.
TASKS: Mapping[str, Task] = {
    "lift": Task(simulator="Lift", picked="cube_main", goal=(0.0, 0.0, 0.9)),
    "pick-place-bread": Task(
        simulator="PickPlaceBread",
        picked="Bread_main",
        goal=(0.1975, 0.1575, 0.842),
        carry_height=0.98,
        drop=0.06,
        walls=(-0.095, 0.295, -0.495, -0.005),
    ),
    "stack": Task(
        simulator="Stack", picked="cubeA_main", goal=(0.0, 0.0, 0.045), goal_object="cubeB_main", carry_height=0.92
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """A moment of an episode: MuJoCo's state with the solver's start, the controller's and the gripper's."""

    physics: np.ndarray
    goal_position: np.ndarray
    goal_rotation: np.ndarray
    gripper_command: np.ndarray


class Scene:
    """The simulator of one task on one arm, with robosuite's OSC_POSE controller at `rate_hz`.

    It is built once, 1 to 3 s, with what robosuite draws for a model (the size of Lift's cube) always the same.
    """

    def __init__(
        self, task: Task, arm: str, *, rate_hz: float, views: Sequence[str] = (), image_size: int = 128
    ) -> None:
        make, controller = import_robosuite()
        self._task, self._arm = task, arm
        with global_generator(0):
            self.simulator = make(
                task.simulator,
                robots=arm,
                controller_configs=controller(default_controller="OSC_POSE"),
                control_freq=round(rate_hz),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=False,
                hard_reset=False,
                ignore_done=True,  # whoever steps decides when an episode ends
            )
            self.simulator.reset()
        # What is observed is read off the simulator; robosuite would compute its own at each of 25 substeps.
        self.simulator._observables.clear()
        self._model, self._data = self.simulator.sim.model._model, self.simulator.sim.data._data
        self._robot = self.simulator.robots[0]
        geoms = {
            name: [self._model.geom(geom).id for geom in self._robot.gripper.important_geoms[name]]
            for name in ("left_finger", "right_finger", "left_fingerpad", "right_fingerpad")
        }
        joints = self._robot._ref_gripper_joint_pos_indexes
        self._finger_joints = [joints[0], joints[len(joints) // 2]]
        self._finger_pads = geoms["left_fingerpad"][0], geoms["right_fingerpad"][0]
        self._fingers = set(geoms["left_finger"]), set(geoms["right_finger"])
        self._picked = self._model.body(task.picked).id
        self._goal = None if task.goal_object is None else self._model.body(task.goal_object).id
        solid = (self._model.geom_bodyid == self._picked) & (self._model.geom_contype > 0)
        self._object = set(np.flatnonzero(solid).tolist())
        self._cameras = Cameras(self._model, views, image_size, hidden=_COLLISION_GEOMS) if views else None

    def draw(self, seed: int) -> np.ndarray:
        """float64 [positions]: a start that robosuite draws for a seed."""
        with global_generator(seed):
            self.simulator.reset()
        return self._data.qpos.copy()

    def check(self, qpos: np.ndarray) -> np.ndarray:
        """Positions as float64. Raises DataError for what is no start of this task on this arm."""
        array = np.array(qpos, np.float64)
        size, at_rest = self._data.qpos.size, np.asarray(self._robot.init_qpos)
        if (
            array.shape != (size,)
            or not np.isfinite(array).all()
            or np.abs(array[self._robot._ref_joint_pos_indexes] - at_rest).max() > MOST_JOINT_NOISE
        ):
            raise DataError(
                f"qpos {array.tolist()} is not a start state of {self._task.simulator} on {self._arm}, which has {size}"
                f" positions and its arm near {at_rest.round(2).tolist()}; check that the episode's task and arm are right"
            )
        return array

    def begin(self, qpos: np.ndarray) -> None:
        """Put everything to rest at `qpos`, whatever happened before."""
        import mujoco

        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = qpos
        self._robot.controller.update_initial_joints(qpos[self._robot._ref_joint_pos_indexes])
        self._robot.controller.new_update = True
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)

    def step(self, action: np.ndarray) -> bool:
        """robosuite's own step with an action float32 [7]. Whether the task is solved, by its sparse reward."""
        _, reward, _, _ = self.simulator.step(action.astype(np.float64))
        return bool(reward > 0)

    def read(self) -> tuple[np.ndarray, SceneState, Mapping[str, np.ndarray]]:
        """The arm's proprioception float64 [9], what the expert knows, and images."""
        import mujoco

        data, site = self._data, self._robot.eef_site_id
        # Brings positions and contacts up to the last substep; unlike mj_forward it leaves the solver's start alone.
        mujoco.mj_fwdPosition(self._model, data)
        rotation = np.empty(4)
        mujoco.mju_mat2Quat(rotation, data.site_xmat[site])
        rotation = np.roll(rotation, -1)
        if rotation[0] + rotation[1] < 0:
            rotation = -rotation
        proprio = np.concatenate([data.site_xpos[site], rotation, data.qpos[self._finger_joints]])
        goal = np.array([*self._task.goal, 0.0, 0.0, 0.0, 1.0])
        if self._goal is not None:
            goal = self._pose(self._goal)
            goal[:3] += self._task.goal
        left, right = self._finger_pads
        # The first motor of the Panda's gripper opens with what closes those of the others.
        closing = -1.0 if type(self._robot.gripper).__name__ == "PandaGripper" else 1.0
        state = SceneState(
            gripper=data.site_xpos[site].copy(),
            approach=data.site_xmat[site].reshape(3, 3)[:, 2].copy(),
            fingers=data.geom_xpos[right] - data.geom_xpos[left],
            command=closing * float(self._robot.gripper.current_action[0]),
            held=float(self._held()),
            object_pose=self._pose(self._picked),
            goal_pose=goal,
            beside=self._beside(goal),
        )
        return proprio, state, {} if self._cameras is None else self._cameras.images(data)

    def moment(self) -> Moment:
        """All that decides the coming steps."""
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self._model, kind))
        mujoco.mj_getState(self._model, self._data, physics, kind)
        return Moment(
            physics=physics,
            goal_position=self._robot.controller.goal_pos.copy(),
            goal_rotation=self._robot.controller.goal_ori.copy(),
            gripper_command=self._robot.gripper.current_action.copy(),
        )

    def go_back(self, moment: Moment) -> None:
        """Go back to a moment of the current episode."""
        import mujoco

        mujoco.mj_setState(self._model, self._data, moment.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self._robot.controller.goal_pos = moment.goal_position.copy()
        self._robot.controller.goal_ori = moment.goal_rotation.copy()
        self._robot.controller.new_update = True  # what it has read of the simulator is out of date
        self._robot.gripper.current_action = moment.gripper_command.copy()

    def close(self) -> None:
        """Free the simulator."""
        if self._cameras is not None:
            self._cameras.close()
        self.simulator.close()

    def _pose(self, body: int) -> np.ndarray:
        """[7] position in m and quaternion xyzw."""
        return np.concatenate([self._data.xpos[body], np.roll(self._data.xquat[body], -1)])

    def _beside(self, goal: np.ndarray) -> np.ndarray:
        """[2] see SceneState.beside: the object that is the goal, or the nearest wall."""
        x, y = self._data.xpos[self._picked][:2]
        offsets = [goal[:2] - (x, y)] if self._goal is not None else []
        if self._task.walls is not None:
            left, right, front, back = self._task.walls
            offsets += [np.array(o) for o in ((left - x, 0.0), (right - x, 0.0), (0.0, front - y), (0.0, back - y))]
        distances = [float(np.linalg.norm(offset)) for offset in offsets]
        if not distances or not 0.0 < min(distances) < NEAR:
            return np.zeros(2)
        return np.asarray(offsets[int(np.argmin(distances))] / min(distances))

    def _held(self) -> bool:
        """Whether both fingers touch the object."""
        pairs = [set(pair) for pair in self._data.contact.geom[: self._data.ncon].tolist()]
        return all(any(pair & finger and pair & self._object for pair in pairs) for finger in self._fingers)


def import_robosuite(purpose: str = "the environments 'robosuite-...'", extra: str = "robosuite") -> tuple[Any, Any]:
    """robosuite's `make` and `load_controller_config`, without its remarks on macros and its choice of OpenGL for all.

    Raises MissingExtraError where it is not installed.
    """
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
    return make, load_controller_config
