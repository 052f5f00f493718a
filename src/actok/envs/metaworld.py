"""Meta-World v3: fifty manipulation tasks of one Sawyer arm, each with a scripted expert (arXiv 1910.10897).

Actions [4]: displacement of the gripper in x, y, z (1 = 0.01 m) and gripper effort, each in [-1, 1]; the simulator
itself limits what lies beyond. Proprioception [26]: gripper position in m (3), opening (1), orientation of the mocap
body wxyz (4), the first nine positions and the first nine velocities of the model (seven arm joints, two fingers).
"metaworld-state" has another proprioception, see MetaWorldStateEnv.

A start state is the vector of Meta-World's randomisation, "rand_vec": positions of objects and goal. Meta-World draws
it from NumPy's global generator, and twice for each reset; here it is drawn from a generator of the given seed and then
held through the reset, so that a restored episode is the recorded one bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from actok.core.errors import ConfigError, DataError, MissingExtraError
from actok.core.spaces import ActionSpace
from actok.envs.base import Env, Expert, ExpertAction, Observation
from actok.envs.branches import branches_of
from actok.envs.cameras import Cameras, check_views
from actok.envs.packaged import packaged_instructions, packaged_space

VIEWS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
# Meta-World mounts its corner cameras upside down.
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
# A start state that a task accepts is read at most a few times in a reset; beyond this the task keeps rejecting it.
MOST_DRAWS = 20
# What a task remembers beside the physics (milestones of its reward among it) is of these types; models, spaces and
# renderers, which no step changes, are not.
_STATE = (bool, int, float, str, list, tuple, dict, np.ndarray, np.generic, type(None))

# Meta-World's observation [39]: gripper position 3 and opening 1, objects 14 (two times position 3 and quaternion
# 4, zero where the task has one object or none), the same 18 numbers of the step before, goal position 3.
_NOW, _GOAL = slice(0, 18), slice(36, 39)

__all__ = ["MetaWorldEnv", "MetaWorldStateEnv"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    """A moment of an episode: MuJoCo's data with all that derives from them, the task's attributes, success."""

    episode: object
    data: Any
    attributes: dict[str, Any]
    success: bool


class MetaWorldEnv(Env):
    """The fifty tasks of Meta-World v3 at 80 Hz. Goals are part of the expert's state, not of the proprioception.

    `views` are cameras to render, of VIEWS ("corner2", "topview" and "gripperPOV" show most); `image_size` their
    height and width in pixels. Raises ConfigError for an unknown view, MissingExtraError without metaworld.
    """

    name = "metaworld"
    max_steps = 500
    proprio_size: int | None = 26
    default_views = ("corner2", "topview", "gripperPOV")
    known_views = VIEWS

    def __init__(self, views: Sequence[str] = (), image_size: int = 128) -> None:
        self._views = check_views("Meta-World", views, VIEWS, image_size)
        self._image_size = image_size
        self._library = _import_metaworld()
        self._task = ""
        self._simulator: Any = None
        self._cameras: Cameras | None = None
        self._rand_vec: np.ndarray | None = None
        self._success = False
        self._episode = object()  # its identity tells one episode's snapshots from another's

    @cached_property
    def tasks(self) -> Sequence[str]:
        """The fifty task names, e.g. "reach-v3"."""
        return tuple(sorted(self._library["environments"]))

    @cached_property
    def space(self) -> ActionSpace:
        """The packaged space metaworld_sawyer."""
        return packaged_space("metaworld_sawyer")

    @cached_property
    def _instructions(self) -> Mapping[str, str]:
        return packaged_instructions("metaworld")

    def instruction(self, task: str) -> str:
        """The task in words; Meta-World has none, these are ours."""
        self.check_task(task)
        return self._instructions[task]

    def reset(self, task: str, *, seed: int) -> Observation:
        """See Env.reset."""
        self._open(task)
        generator = np.random.default_rng(seed)
        space = self._simulator._random_reset_space
        drawn: list[np.ndarray] = []

        def draw() -> np.ndarray:
            drawn.append(generator.uniform(space.low, space.high))
            return drawn[-1].copy()

        self._simulator._get_state_rand_vec = draw
        self._simulator.reset_model()
        return self._begin(drawn[-1])

    def start_state(self) -> dict[str, np.ndarray]:
        """{"rand_vec": float64 [3 or 6]}: positions of objects and goal in m."""
        if self._rand_vec is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        return {"rand_vec": self._rand_vec.copy()}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """See Env.restore."""
        self._open(task)
        if "rand_vec" not in start_state:
            raise DataError(
                f"the start state of a {task} episode has no rand_vec (it has: {', '.join(start_state) or 'nothing'});"
                " record demonstrations with `actok collect`, which stores it"
            )
        vector = np.asarray(start_state["rand_vec"], np.float64)
        space = self._simulator._random_reset_space
        low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
        if vector.shape != low.shape or not ((vector >= low - 1e-6) & (vector <= high + 1e-6)).all():
            raise DataError(
                f"rand_vec {vector.tolist()} is not a start state of {task}, whose range is {low.tolist()} to"
                f" {high.tolist()}; check that the episode's task is right"
            )
        return self._begin(vector)

    def step(self, action: np.ndarray) -> Observation:
        """See Env.step."""
        return self._observe(self._execute(action))

    def advance(self, action: np.ndarray) -> None:
        """See Env.advance."""
        self._execute(action)

    @property
    def success(self) -> bool:
        """Meta-World's own flag after the last step."""
        return self._success

    def expert(self, task: str) -> Expert:
        """Meta-World's scripted policy; its output is limited to [-1, 1], which is what the simulator executes."""
        self.check_task(task)
        return _ScriptedExpert(self._library["policies"][task](), self.instruction(task))

    def snapshot(self) -> Any:
        """See Env.snapshot; 0.5 ms."""
        if self._rand_vec is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        return _Snapshot(
            episode=self._episode,
            data=copy.copy(self._simulator.data),
            attributes=copy.deepcopy({k: v for k, v in vars(self._simulator).items() if isinstance(v, _STATE)}),
            success=self._success,
        )

    def rollback(self, snapshot: Any) -> None:
        """See Env.rollback."""
        if not isinstance(snapshot, _Snapshot) or snapshot.episode is not self._episode:
            raise ConfigError("this snapshot is not of the current episode; take one with snapshot() after its start")
        attributes = vars(self._simulator)
        for name in [k for k, v in attributes.items() if isinstance(v, _STATE) and k not in snapshot.attributes]:
            del attributes[name]  # set for the first time after the snapshot
        attributes.update(copy.deepcopy(snapshot.attributes))
        self._simulator.data = copy.copy(snapshot.data)
        self._success = snapshot.success

    def close(self) -> None:
        """See Env.close."""
        if self._cameras is not None:
            self._cameras.close()
        self._task, self._simulator, self._cameras, self._rand_vec = "", None, None, None

    # -- inside ---------------------------------------------------------------------------------------------------

    def _open(self, task: str) -> None:
        """Build the task's simulator unless it is the one at hand (0.1 s; a reset takes 0.01 s)."""
        self.check_task(task)
        if task == self._task:
            return
        self.close()
        simulator = self._library["environments"][task]()
        # Experts need the goal. The observation space is cached with the goal's place fixed at zero, so it is rebuilt.
        simulator._partially_observable = False
        simulator.__dict__.pop("sawyer_observation_space", None)
        simulator._set_task_called = True
        simulator.max_path_length = np.iinfo(np.int64).max  # whoever steps decides when an episode ends
        self._task, self._simulator = task, simulator
        if self._views:
            self._cameras = Cameras(simulator.model, self._views, self._image_size, UPSIDE_DOWN)

    def _begin(self, rand_vec: np.ndarray) -> Observation:
        draws = 0

        def draw() -> np.ndarray:
            nonlocal draws
            draws += 1
            if draws > MOST_DRAWS:  # tasks draw again, without end, where objects and goal lie too close together
                raise DataError(
                    f"task {self._task} rejects rand_vec {rand_vec.tolist()}; check that the episode's task is right"
                )
            return rand_vec.copy()

        self._simulator._get_state_rand_vec = draw
        state, _ = self._simulator.reset()
        self._rand_vec, self._success, self._episode = rand_vec, False, object()
        return self._observe(state)

    def _execute(self, action: np.ndarray) -> np.ndarray:
        """One step; Meta-World's observation after it."""
        if self._rand_vec is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        state, _, _, _, info = self._simulator.step(self.check_action(action))
        self._success = bool(info["success"])
        return np.asarray(state)

    def _observe(self, state: np.ndarray) -> Observation:
        images = {} if self._cameras is None else self._cameras.images(self._simulator.data)
        proprio = self._proprio(state).astype(np.float32)
        return Observation(proprio=proprio, state=np.array(state, np.float64), images=images)

    def _proprio(self, state: np.ndarray) -> np.ndarray:
        """[P] from Meta-World's observation [39] and the simulator."""
        data = self._simulator.data
        return np.concatenate([state[:4], data.mocap_quat[0], data.qpos[:9], data.qvel[:9]])


class MetaWorldStateEnv(MetaWorldEnv):
    """Meta-World for policies without cameras, which would otherwise be blind to the objects: same simulator, tasks,
    actions and experts, but the proprioception [21] tells where things are.

    Gripper position in m (3) and opening (1); positions (3, m) and quaternions (4) of the first and the second object,
    as Meta-World gives them, zero where the task has none; goal position in m (3). That is Meta-World's own
    observation without its copy of the step before. A policy of this environment reads what no camera-less robot
    could: its success is a statement about tokens and decoding, not about perception.
    """

    name = "metaworld-state"
    proprio_size = 21

    def _proprio(self, state: np.ndarray) -> np.ndarray:
        return np.concatenate([state[_NOW], state[_GOAL]])


class _ScriptedExpert(Expert):
    """A policy of `metaworld.policies`; its sub-task is the branch that decides where the gripper goes."""

    def __init__(self, policy: Any, instruction: str) -> None:
        self._policy = policy
        decides = getattr(type(policy), "_desired_pos", None)
        self._by_position = decides is not None
        # Two policies decide inside get_action, where a branch sets the position and does not return.
        self._branches = (
            branches_of(decides, by="return")
            if decides is not None
            else branches_of(type(policy).get_action, by="condition")
        )
        count = self._branches.count
        self.subtask_names = tuple(f"{instruction}, phase {phase} of {count}" for phase in range(1, count + 1))

    def __call__(self, observation: Observation) -> ExpertAction:
        if observation.state is None:
            raise DataError("the observation has no state; give one of MetaWorldEnv")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each step whose output exceeds the limits warns
            # Copies, because some policies shift the positions they read in place.
            if self._by_position:
                subtask = self._branches.which(self._policy._parse_obs(observation.state.copy()))
            else:
                subtask = self._branches.which(self._policy, observation.state.copy())
            raw = self._policy.get_action(observation.state.copy())
        return ExpertAction(action=np.clip(raw, -1, 1).astype(np.float32), subtask=int(subtask))


def _import_metaworld() -> Mapping[str, Any]:
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] not in ("metaworld", "mujoco", "gymnasium"):
            raise
        raise MissingExtraError("metaworld", "metaworld", "the environment 'metaworld'") from error
    return {"environments": ALL_V3_ENVIRONMENTS, "policies": ENV_POLICY_MAP}
