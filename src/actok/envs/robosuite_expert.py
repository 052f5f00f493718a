"""A scripted expert for picking something up with robosuite's OSC_POSE controller, and for putting it somewhere.

It is a pure function of the state: which sub-task it is at follows from where things are, never from what it did
before. So it recovers from what disturbs it, and its demonstrations are of a policy that an observation suffices for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from actok.core.errors import DataError
from actok.envs.base import Expert, ExpertAction, Observation

# What one unit of an action means: robosuite's default OSC_POSE, 0.05 m and 0.5 rad.
METRES, RADIANS = 0.05, 0.5
# Asking for more than the distance makes up for friction, which stops some arms short of a target near by (the Kinova at
# 1.2 in 3 of 48 attempts). Asking for much more makes demonstrations of full speed and overshoot, from which a policy
# learns little: at 3 a small one lifted the cube in 11 of 50 episodes, at 1.2 in 28.
POSITION_GAIN, ROTATION_GAIN = 1.5, 1.0
OPEN, CLOSE = -1.0, 1.0
HOVER = 0.10  # m above the object, where the gripper turns
MOST_TURN = 0.15  # rad off, with which it still goes down
SUBTASKS = ("approach", "descend", "grasp", "lift", "transport", "lower", "release", "retreat")

__all__ = ["SceneState", "Waypoints"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneState:
    """What the expert knows, as the vector `Observation.state` [27] holds it; world axes, m, quaternions xyzw.

    Attributes:
        gripper: [3] the point between the fingertips.
        approach: [3] unit vector along the fingers; (0, 0, -1) points straight down.
        fingers: [3] from the left finger pad to the right one; its length is the opening.
        command: where the gripper's motor is told to be: -1 open, 1 closed.
        held: 1 where both fingers touch the object, else 0.
        object_pose: [7] of the object to be picked up.
        goal_pose: [7] where it is to be.
        beside: [2] horizontal unit vector from the object to what stands so near that open fingers, or the hand, may
            hit it; zero where nothing does.
    """

    gripper: np.ndarray
    approach: np.ndarray
    fingers: np.ndarray
    command: float
    held: float
    object_pose: np.ndarray
    goal_pose: np.ndarray
    beside: np.ndarray

    def to_vector(self) -> np.ndarray:
        """float64 [27]."""
        flags = [self.command, self.held]
        parts = (self.gripper, self.approach, self.fingers, flags, self.object_pose, self.goal_pose, self.beside)
        return np.concatenate(parts).astype(np.float64)

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> SceneState:
        """From float64 [27]. Raises DataError for another size."""
        if vector.shape != (27,):
            raise DataError(f"the state has shape {vector.shape}, the expert reads [27]; give one of RobosuiteEnv")
        return cls(
            gripper=vector[0:3],
            approach=vector[3:6],
            fingers=vector[6:9],
            command=float(vector[9]),
            held=float(vector[10]),
            object_pose=vector[11:18],
            goal_pose=vector[18:25],
            beside=vector[25:27],
        )


class Waypoints(Expert):
    """Goes above the object, down, grasps, lifts; with `carry_height` (m, of the object on its way) also carries it to
    the goal, lowers it, lets go `drop` m above it at most and moves off. Without, it lifts the object to the goal's
    height.
    """

    def __init__(self, carry_height: float | None = None, drop: float = 0.008) -> None:
        self._carry_height, self._drop = carry_height, drop
        self.subtask_names = SUBTASKS[:4] if carry_height is None else SUBTASKS

    def __call__(self, observation: Observation) -> ExpertAction:
        """See Expert; actions within [-1, 1]."""
        if observation.state is None:
            raise DataError("the observation has no state; give one of RobosuiteEnv")
        s = SceneState.from_vector(observation.state)
        turn = _turn(s, keep_clear=not s.held and s.command < 0)
        subtask, target, gripper = self._decide(s, float(np.linalg.norm(turn)))
        move = POSITION_GAIN / METRES * (target - s.gripper)
        turn *= ROTATION_GAIN / RADIANS
        action = np.clip(np.concatenate([move, turn, [gripper]]), -1, 1)
        return ExpertAction(action=action.astype(np.float32), subtask=SUBTASKS.index(subtask))

    def _decide(self, s: SceneState, off: float) -> tuple[str, np.ndarray, float]:
        """Sub-task, where the gripper should go [3], and what it should do. `off` is how far it has to turn, in rad."""
        thing, goal = s.object_pose[:3], s.goal_pose[:3]
        reach = thing - s.gripper
        aside = float(np.hypot(*reach[:2]))
        up = np.array([0.0, 0.0, 1.0])
        if self._carry_height is not None and _arrived(s, self._drop):
            if s.held or s.command > -0.9:
                return "release", s.gripper, OPEN
            return "retreat", s.gripper + 0.05 * up, OPEN
        if s.held and s.command > 0.9:
            if self._carry_height is None:
                return "lift", s.gripper + (goal - thing) * up, CLOSE
            return self._carry(s, self._carry_height)
        # While the fingers close they may push the object: what was near enough to begin stays near enough.
        near = 0.012 if s.command < 0 else 0.025
        if aside < near and abs(reach[2]) < near:
            return "grasp", thing, CLOSE
        # Going down, the gripper may be further off than where it begins to.
        begun = s.gripper[2] < thing[2] + HOVER - 0.03
        if aside < (0.02 if begun else 0.008) and (begun or off < MOST_TURN):
            return "descend", thing, OPEN
        return "approach", thing + HOVER * up, OPEN

    def _carry(self, s: SceneState, height: float) -> tuple[str, np.ndarray, float]:
        thing, goal = s.object_pose[:3], s.goal_pose[:3]
        aside = float(np.hypot(*(goal - thing)[:2]))
        low = thing[2] < height - 0.02
        if aside < (0.02 if low else 0.008):
            return "lower", s.gripper + goal - thing, CLOSE
        if low and aside > 0.04:
            return "lift", s.gripper + np.array([0.0, 0.0, height + 0.01 - thing[2]]), CLOSE
        return "transport", s.gripper + np.array([*(goal - thing)[:2], height - thing[2]]), CLOSE


def _arrived(s: SceneState, drop: float) -> bool:
    """Whether the object is where it should be, held or not: it may be let go of there."""
    off = s.object_pose[:3] - s.goal_pose[:3]
    return float(np.hypot(*off[:2])) < 0.022 and -0.012 < off[2] < drop


def _turn(s: SceneState, *, keep_clear: bool) -> np.ndarray:
    """Rotation vector [3], rad, that points the fingers down and lays their line along a side of the object.

    Objects are boxes as far as a grasp from above goes: four sides, of which the nearest is at most an eighth of a turn
    away. With `keep_clear`, where something is beside the object, it is the side that leaves it beside the fingers.
    """
    tilt = np.cross(s.approach, [0.0, 0.0, -1.0])
    side = Rotation.from_quat(s.object_pose[3:]).apply([1.0, 0.0, 0.0])
    now = np.arctan2(s.fingers[1], s.fingers[0])
    yaw = (np.arctan2(side[1], side[0]) - now + np.pi / 4) % (np.pi / 2) - np.pi / 4
    line = np.array([np.cos(now + yaw), np.sin(now + yaw)])
    if keep_clear and abs(line @ s.beside) > np.sqrt(0.5):
        yaw -= np.copysign(np.pi / 2, yaw)
    return tilt + np.array([0.0, 0.0, yaw])
