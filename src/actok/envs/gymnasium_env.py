"""Any gymnasium environment as an `Env`: a subclass says what its numbers mean, the rest is done here.

A subclass names the tasks and their words, the action space, how to make the gymnasium environment of a task, and what
of its observation is proprioception; where there are such things, also what a scripted expert may know, images and the
rule of success. An entry point of the group "actok.envs" gives it a name for `make_env` and the command line
(docs/simulators.md shows a whole one).

What is relied on is gymnasium's contract: `reset(seed=...)` alone decides an episode's start, whatever ran before, and
steps from there are deterministic. So a start state is its seed, and going back to a moment of an episode begins it
again and repeats its actions. An environment that draws from another generator (NumPy's global one, say) breaks that,
and with it replay: tests of an adapter should restore an episode and compare.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from actok.core.errors import ConfigError, DataError
from actok.envs.base import Env, Expert, Observation

__all__ = ["GymnasiumEnv"]


class GymnasiumEnv(Env):
    """Base class of adapters. A subclass sets `name`, `max_steps`, `tasks`, `space` and `instruction`, and implements
    `make` and `proprio`; it may override `state`, `images`, `succeeded` and `expert`.

    Options of the constructor are the subclass's own; it then calls `super().__init__()`. gymnasium's time limits end
    nothing here (whoever steps decides); once an environment says that it has terminated, further actions change
    nothing, and the last observation is repeated.

    Pictures: `images` gives those of every observation. Where it always gives the same views at one size, that is all there
    is to it: a policy looks at them if they are those of its training. To make only what is asked for, the constructor
    takes `views` (names; () for none) and `image_size` (pixels of a side), and `images` heeds them; whoever needs pictures
    then asks. `default_views` names the views that recording and filming take, `known_views` all that there are.
    """

    _simulator: Any
    _seen: Any
    _episode: object
    _actions: list[np.ndarray]
    _task: str
    _seed: int
    _success: bool
    _over: bool

    def __init__(self) -> None:
        self._forget()

    # -- what a subclass says ---------------------------------------------------------------------------------------

    @abstractmethod
    def make(self, task: str) -> Any:
        """The gymnasium environment of a task, e.g. `gymnasium.make("Pendulum-v1")`; made anew when the task changes."""

    @abstractmethod
    def proprio(self, observation: Any) -> np.ndarray:
        """The robot's own state [P] in gymnasium's observation."""

    def state(self, observation: Any) -> np.ndarray | None:
        """Everything a scripted expert may know [X], goals included; None (the default) where there is no expert."""
        return None

    def images(self, observation: Any) -> Mapping[str, np.ndarray]:
        """View name -> uint8 [H, W, 3], upright; none by default. `self.simulator.render()` may make one.

        Called once an observation, not at steps at which nobody looks (`advance`).
        """
        return {}

    def succeeded(self, observation: Any, reward: float, info: Mapping[str, Any]) -> bool:
        """Whether a step ended in success: by default what `info` says under "success" or "is_success".

        Raises ConfigError where it says neither.
        """
        for key in ("success", "is_success"):
            if key in info:
                return bool(info[key])
        raise ConfigError(
            f"environment {self.name!r}: info has neither 'success' nor 'is_success' (it has: {', '.join(info) or 'nothing'});"
            f" override {type(self).__name__}.succeeded"
        )

    def expert(self, task: str) -> Expert:
        """See Env.expert; raises ConfigError unless the subclass has one."""
        self.check_task(task)
        raise ConfigError(f"environment {self.name!r} has no scripted expert; override {type(self).__name__}.expert")

    # -- Env --------------------------------------------------------------------------------------------------------

    @property
    def simulator(self) -> Any:
        """The live gymnasium environment. Raises ConfigError before the first episode."""
        if self._simulator is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        return self._simulator

    def reset(self, task: str, *, seed: int) -> Observation:
        """See Env.reset."""
        self.check_task(task)
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed!r}; give a whole number from 0 to {2**63 - 1}")
        if self._simulator is None or task != self._task:
            self.close()
            simulator = self.make(task)
            shape = getattr(simulator.action_space, "shape", None)
            if shape != (self.space.dim,) or not np.issubdtype(simulator.action_space.dtype, np.floating):
                simulator.close()
                raise ConfigError(
                    f"environment {self.name!r}: the action space of task {task!r} is {simulator.action_space}; its"
                    f" `space` has {self.space.dim} continuous dimensions ({', '.join(self.space.names)})"
                )
            self._simulator, self._task = simulator, task
        self._seed, self._episode = seed, object()
        return self._begin()

    def start_state(self) -> dict[str, np.ndarray]:
        """{"seed": int64 [1]}."""
        self._check_begun()
        return {"seed": np.array([self._seed], np.int64)}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """See Env.restore."""
        seed = np.asarray(start_state.get("seed", []))
        if seed.shape != (1,) or not np.issubdtype(seed.dtype, np.integer) or seed[0] < 0:
            raise DataError(
                f"a start state of environment {self.name!r} is {{'seed': [a whole number]}}, not {dict(start_state)};"
                " record demonstrations with `actok collect`, which stores it"
            )
        return self.reset(task, seed=int(seed[0]))

    def step(self, action: np.ndarray) -> Observation:
        """See Env.step."""
        self.advance(action)
        return self._observe()

    def advance(self, action: np.ndarray) -> None:
        """See Env.advance."""
        self._check_begun()
        checked = self.check_action(action)
        self._actions.append(checked)
        if not self._over:
            given = checked.astype(self.simulator.action_space.dtype)
            self._seen, reward, self._over, _, info = self.simulator.step(given)
            self._success = self.succeeded(self._seen, float(reward), info)

    @property
    def success(self) -> bool:
        """What `succeeded` said of the last step."""
        return self._success

    def snapshot(self) -> Any:
        """See Env.snapshot; a list of the actions so far."""
        self._check_begun()
        return self._episode, tuple(self._actions)

    def rollback(self, snapshot: Any) -> None:
        """See Env.rollback; as slow as the steps from the start of the episode to the snapshot."""
        if not isinstance(snapshot, tuple) or snapshot[0] is not self._episode:
            raise ConfigError("this snapshot is not of the current episode; take one with snapshot() after its start")
        self._begin()
        for action in snapshot[1]:
            self.advance(action)

    def close(self) -> None:
        """See Env.close."""
        if self._simulator is not None:
            self._simulator.close()
        self._forget()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._simulator = self._seen = self._episode = None
        self._task, self._seed, self._success, self._over = "", 0, False, False
        self._actions = []

    def _check_begun(self) -> None:
        if self._episode is None:
            raise ConfigError("no episode has begun; call reset or restore first")

    def _begin(self) -> Observation:
        self._seen, _ = self.simulator.reset(seed=self._seed)
        self._actions, self._success, self._over = [], False, False
        return self._observe()

    def _observe(self) -> Observation:
        proprio = np.asarray(self.proprio(self._seen), np.float32)
        if proprio.ndim != 1 or not np.isfinite(proprio).all():
            raise DataError(
                f"environment {self.name!r}: proprio gave shape {proprio.shape}, {proprio.tolist()}; it is to be [P], finite"
            )
        state = self.state(self._seen)
        return Observation(
            proprio=proprio.copy(),
            state=None if state is None else np.array(state, np.float64),
            images={view: np.array(image, np.uint8) for view, image in self.images(self._seen).items()},
        )
