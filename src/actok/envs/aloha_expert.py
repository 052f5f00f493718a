"""Scripted experts for the two ALOHA tasks: waypoints for the hands, turned into joint targets by inverse kinematics.

Each step every hand has a waypoint (a pose, an opening, a speed), which follows from where hands and objects are. The
*commanded* hand, which the joint targets of the step before place in space, moves towards it by at most speed x 0.02 s;
damped least squares on MuJoCo's Jacobian give the joint targets of that small displacement (Wampler 1986; Buss,
"Introduction to inverse kinematics", 2004, section 6). Targets that move smoothly give demonstrations that do.

An expert is a pure function of the observation. What it must remember, that a hand has been told to close, is in the
last command, which the state contains; the rest is geometry.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actok.core.errors import DataError
from actok.envs.base import Expert, ExpertAction, Observation

STEP_S = 0.02
DAMPING = 0.05  # of the least squares: displacements in m and rad
MOST_JOINT_STEP = 0.06  # rad in one step
APPROACH_GAIN = 0.2  # part of the way in one step, where that is below the speed limit
LAG_GAIN = 1.0  # times the lag of the hand behind its waypoint, added to the command; the joints have friction
MOST_LAG = 0.03  # m and tenths of rad
OPENING_STEP = 0.06  # of the gripper's range in one step
CLOSING = 0.97  # a gripper told to open less than this has begun to close
TRAVEL, CAREFUL, TURN = 0.4, 0.12, 2.0  # m/s, m/s, rad/s
REACH = 0.145  # m from the wrist, along the fingers, to where they hold; 0.009 before their tips
CLEARANCE = 0.08  # m above an object, backwards along the fingers, before going down
LOWEST = 0.012  # m, where hands hold without their tips touching the table
# Finger distance: half the object's width in m = 0.03956 x opening - 0.00386 (measured in the model).
FINGER_RANGE, FINGER_ZERO = 0.03956, 0.00386

__all__ = ["Insertion", "TransferCube"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pose:
    """A position [3] in m and a rotation [3, 3], whose columns are the axes."""

    position: np.ndarray
    rotation: np.ndarray

    def to(self, other: Pose) -> tuple[np.ndarray, np.ndarray]:
        """Displacement [3] and rotation vector [3], in the world's axes, that take this pose to the other."""
        return other.position - self.position, _rotation_vector(other.rotation @ self.rotation.T)


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Of a rotation [3, 3]: axis times angle; the axis of a half turn, which has no sign, is left at zero."""
    sine = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    length = float(np.sqrt(sine @ sine))  # twice the sine of the angle
    angle = float(np.arctan2(length, np.trace(rotation) - 1))
    return 0.5 * sine if length < 1e-9 else sine * (angle / length)


def _about(axis: int, angle: float) -> np.ndarray:
    """Rotation [3, 3] about the x, y or z axis, by an angle in rad."""
    following, last = (axis + 1) % 3, (axis + 2) % 3
    rotation = np.eye(3)
    rotation[following, following] = rotation[last, last] = np.cos(angle)
    rotation[last, following], rotation[following, last] = np.sin(angle), -np.sin(angle)
    return rotation


@dataclass(frozen=True, kw_only=True, eq=False)
class Hand:
    """Where a hand is, where its command places it, and its opening (0 to 1), measured and commanded."""

    pose: Pose
    commanded: Pose
    opening: float
    told: float

    def holds(self, thing: Pose, half_width: float) -> bool:
        """Whether it has been told to close, and the object between its fingers stops them."""
        stopped = (half_width + FINGER_ZERO) / FINGER_RANGE
        return (
            self.told < stopped - 0.2
            and self.opening < stopped + 0.08
            and bool(np.linalg.norm(thing.position - self.pose.position) < 0.035)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Waypoint:
    """Where a hand is to go, at which speed (m/s), and its opening (0 or 1)."""

    pose: Pose
    opening: float
    speed: float = TRAVEL


class _TwoArms(Expert):
    """What the tasks share: reading the state, and following waypoints. `model` is the MuJoCo model of the task."""

    def __init__(self, model: Any) -> None:
        import mujoco

        self._model, self._data, self._mujoco = model, mujoco.MjData(model), mujoco
        self._wrists = [model.body(f"vx300s_{side}/gripper_link").id for side in ("left", "right")]
        limits = np.stack([model.actuator_ctrlrange[8 * arm : 8 * arm + 6] for arm in range(2)])
        self._low, self._high = limits[..., 0], limits[..., 1]

    @abstractmethod
    def _decide(self, left: Hand, right: Hand, things: list[Pose]) -> tuple[int, Waypoint, Waypoint]:
        """The sub-task, and where the hands are to go."""

    def __call__(self, observation: Observation) -> ExpertAction:
        state = observation.state
        if state is None or state.shape != (42,):
            raise DataError("the observation has no ALOHA state [42]; give one of AlohaEnv")
        joints, command = state[:14].reshape(2, 7), state[14:28].reshape(2, 7)
        things = [self._thing(pose) for pose in state[28:].reshape(2, 7) if pose[3:].any()]
        actual, _ = self._hands(joints)
        commanded, jacobians = self._hands(command)
        left, right = (
            Hand(pose=actual[arm], commanded=commanded[arm], opening=joints[arm, 6], told=command[arm, 6])
            for arm in range(2)
        )
        subtask, *waypoints = self._decide(left, right, things)
        action = np.empty((2, 7))
        for arm, (hand, waypoint) in enumerate(zip((left, right), waypoints, strict=True)):
            step = _displacement(hand, waypoint)
            jacobian = jacobians[arm]
            turns = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING**2 * np.eye(6), step)
            turns *= min(1.0, MOST_JOINT_STEP / max(np.abs(turns).max(), 1e-9))
            action[arm, :6] = np.clip(command[arm, :6] + turns, self._low[arm], self._high[arm])
            action[arm, 6] = hand.told + np.clip(waypoint.opening - hand.told, -OPENING_STEP, OPENING_STEP)
        return ExpertAction(action=action.reshape(14).astype(np.float32), subtask=subtask)

    def _thing(self, pose: np.ndarray) -> Pose:
        rotation = np.empty(9)
        self._mujoco.mju_quat2Mat(rotation, pose[3:])
        return Pose(position=pose[:3], rotation=rotation.reshape(3, 3))

    def _hands(self, joints: np.ndarray) -> tuple[list[Pose], list[np.ndarray]]:
        """Of joint values [2, 7]: the poses between the fingertips, and their Jacobians [6, 6] (m and rad by rad)."""
        data, mujoco = self._data, self._mujoco
        data.qpos[:6], data.qpos[8:14] = joints[0, :6], joints[1, :6]
        mujoco.mj_kinematics(self._model, data)
        mujoco.mj_comPos(self._model, data)
        poses, jacobians = [], []
        for arm, wrist in enumerate(self._wrists):
            matrix = data.xmat[wrist].reshape(3, 3).copy()
            point = data.xpos[wrist] + REACH * matrix[:, 0]
            poses.append(Pose(position=point, rotation=matrix))
            full = np.zeros((6, self._model.nv))
            mujoco.mj_jac(self._model, data, full[:3], full[3:], point, wrist)
            jacobians.append(full[:, 8 * arm : 8 * arm + 6])
        return poses, jacobians


def _displacement(hand: Hand, waypoint: Waypoint) -> np.ndarray:
    """[6]: how far the commanded hand moves in this step (m and rad)."""
    lag, twist = hand.pose.to(waypoint.pose)
    move, turn = hand.commanded.to(waypoint.pose)
    move = move + _shortened(LAG_GAIN * lag, MOST_LAG)
    turn = turn + _shortened(LAG_GAIN * twist, 10 * MOST_LAG)
    return np.concatenate(
        [
            _shortened(APPROACH_GAIN * move, waypoint.speed * STEP_S),
            _shortened(APPROACH_GAIN * turn, TURN * STEP_S),
        ]
    )


def _shortened(vector: np.ndarray, most: float) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector if length <= most else vector * (most / length)


# -- picking up ---------------------------------------------------------------------------------------------------------

# Rotation of the hands that point down at an angle, and of the left hand lying on its side.
DOWN = np.deg2rad(60)
LEFT_DOWN = _about(1, DOWN)
RIGHT_DOWN = _about(2, np.pi) @ LEFT_DOWN
LEFT_SIDE = _about(0, np.pi / 2)


def _pick(hand: Hand, grasp: Pose, half_width: float) -> tuple[int, Waypoint]:
    """How far it is (0 above, 1 on the way down, 2 closing), and the waypoint to a grasp pose."""
    grasp = replace(grasp, position=np.maximum(grasp.position, [-np.inf, -np.inf, LOWEST]))
    back, twist = grasp.to(hand.pose)
    along = grasp.rotation[:, 0]
    sideways = np.linalg.norm(back - along * (back @ along))
    distance = np.linalg.norm(back)
    if (hand.told < CLOSING and distance < 0.02) or (hand.opening > 0.85 and distance < 0.6 * half_width):
        return 2, Waypoint(pose=grasp, opening=0.0, speed=CAREFUL)
    if hand.opening > 0.85 and sideways < 0.015 and np.linalg.norm(twist) < 0.15:
        return 1, Waypoint(pose=grasp, opening=1.0, speed=1.5 * CAREFUL)
    return 0, Waypoint(pose=replace(grasp, position=grasp.position - CLEARANCE * along), opening=1.0)


# -- the tasks ----------------------------------------------------------------------------------------------------------


class TransferCube(_TwoArms):
    """The right hand picks the cube up and holds it in the middle; the left one, on its side, takes it."""

    subtask_names = (
        "right hand above the cube",
        "right hand down to the cube",
        "right hand grasps the cube",
        "carry the cube to the middle",
        "left hand to the cube",
        "left hand grasps the cube",
        "right hand lets go",
        "right hand moves away",
    )
    meeting = np.array([0.02, 0.5, 0.28])
    half_width = 0.02

    def _decide(self, left: Hand, right: Hand, things: list[Pose]) -> tuple[int, Waypoint, Waypoint]:
        (cube,) = things
        middle = Pose(position=self.meeting, rotation=LEFT_SIDE)
        beside = replace(middle, position=self.meeting - [0.13, 0, 0])
        wait = Waypoint(pose=beside, opening=1.0)
        if left.holds(cube, self.half_width):
            stay = Waypoint(pose=middle, opening=0.0, speed=CAREFUL)
            if right.opening < 0.85:
                return 6, stay, Waypoint(pose=Pose(position=self.meeting, rotation=RIGHT_DOWN), opening=1.0)
            away = Pose(position=np.array([0.2, 0.5, 0.35]), rotation=RIGHT_DOWN)
            return 7, stay, Waypoint(pose=away, opening=1.0)
        if not right.holds(cube, self.half_width):
            stage, waypoint = _pick(right, Pose(position=cube.position, rotation=RIGHT_DOWN), self.half_width)
            return stage, wait, waypoint
        to_middle, _ = cube.to(middle)
        hold = Waypoint(pose=Pose(position=right.pose.position + to_middle, rotation=RIGHT_DOWN), opening=0.0)
        near = np.linalg.norm(left.pose.position - cube.position) < 0.1
        if np.linalg.norm(to_middle) > (0.03 if near else 0.012):
            return 3, wait, hold
        take = Pose(position=cube.position - [0.004, 0, 0], rotation=LEFT_SIDE)
        offset, twist = left.pose.to(take)
        there = np.linalg.norm(offset) < (0.02 if left.told < CLOSING else 0.012) and np.linalg.norm(twist) < 0.2
        if there:
            return 5, Waypoint(pose=take, opening=0.0, speed=CAREFUL), hold
        return 4, Waypoint(pose=take, opening=1.0, speed=1.5 * CAREFUL), hold


class Insertion(_TwoArms):
    """The left hand picks up the socket and the right one the peg; they meet on one line, and the peg goes in."""

    subtask_names = (
        "hands above socket and peg",
        "hands down to socket and peg",
        "hands grasp socket and peg",
        "bring socket and peg onto one line",
        "insert the peg into the socket",
    )
    height = 0.2
    socket_half_width, peg_half_width = 0.022, 0.01
    apart, inside = 0.165, 0.097  # m between the middles of peg and socket: waiting, and beyond the touch of the pin

    def _decide(self, left: Hand, right: Hand, things: list[Pose]) -> tuple[int, Waypoint, Waypoint]:
        peg, socket = things
        stages, waypoints = [], []
        hands = (left, socket, self.socket_half_width, LEFT_DOWN), (right, peg, self.peg_half_width, RIGHT_DOWN)
        between = peg.position - socket.position
        tilt = np.linalg.norm(peg.to(socket)[1])
        # The socket has 8 mm of play on each side; what has begun to move in is not called back for a little more.
        slack = 0.01 if between[0] < self.apart - 0.005 else 0.006
        joined = np.hypot(between[1], between[2]) < slack and tilt < 0.1 and between[0] < self.apart + 0.03
        distance = self.inside if joined else self.apart
        for side, (hand, thing, half_width, rotation) in zip((-1, 1), hands, strict=True):
            if not hand.holds(thing, half_width):
                stage, waypoint = _pick(hand, Pose(position=thing.position, rotation=rotation), half_width)
            else:
                place = Pose(position=np.array([side * distance / 2, 0.5, self.height]), rotation=np.eye(3))
                # The hand takes the object with it: the same rigid motion, for both.
                turn = place.rotation @ thing.rotation.T
                pose = Pose(
                    position=place.position + turn @ (hand.pose.position - thing.position),
                    rotation=turn @ hand.pose.rotation,
                )
                stage = 4 if joined else 3
                waypoint = Waypoint(pose=pose, opening=0.0, speed=CAREFUL if joined else TRAVEL)
            stages.append(stage)
            waypoints.append(waypoint)
        return min(stages), waypoints[0], waypoints[1]
