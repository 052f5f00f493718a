"""A simulator in thirty lines, for tests of recording and replay: a point on a table that must reach a goal, pressing.

Sizes are different primes: D = 3 actions, P = 5 numbers of proprioception, 2 coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError
from actok.envs import Env, Expert, ExpertAction, Observation

STEP = 0.03  # metres per raw unit
RADIUS = 0.02
SPACE = ActionSpace(
    embodiment="pointmass",
    dim=3,
    groups=(
        ActionGroup(name="position", kind="position", dims=(0, 1), mode="delta", unit="m", scale=STEP),
        ActionGroup(name="press", kind="gripper", dims=(2,)),
    ),
    rate_hz=7.0,
    low=(-1, -1, 0),
    high=(1, 1, 1),
)


class PointMass(Env):
    """Tasks: "near" and "far" can be solved; "half" only from half of its start states; "never" not; "mute" lacks an expert."""

    name = "pointmass"
    max_steps = 61
    tasks: Sequence[str] = ("far", "half", "mute", "near", "never")
    space = SPACE

    def __init__(self, view: bool = False) -> None:
        self.view = view
        self.steps_executed = 0
        self._task = ""
        self._position = self._goal = self._start = np.zeros(2)
        self._press = 0.0

    def instruction(self, task: str) -> str:
        self.check_task(task)
        return f"go to the {task} goal and press"

    def reset(self, task: str, *, seed: int) -> Observation:
        self.check_task(task)
        generator = np.random.default_rng(seed)
        angle = generator.uniform(0, 2 * np.pi)
        reach = {"near": 0.2, "far": 0.9}.get(task, 0.5)
        return self.restore(
            task, {"position": generator.normal(size=2), "offset": reach * np.array([np.cos(angle), np.sin(angle)])}
        )

    def start_state(self) -> dict[str, np.ndarray]:
        return {"position": self._start.copy(), "offset": self._goal - self._start}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        self.check_task(task)
        if "position" not in start_state:
            raise DataError("no position; record again")
        self._task = task
        self._start = np.asarray(start_state["position"], np.float64)
        self._position = self._start.copy()
        self._goal = self._start + start_state["offset"]
        self._press = 0.0
        return self._observe()

    def step(self, action: np.ndarray) -> Observation:
        action = self.check_action(action)
        self.steps_executed += 1
        self._position = self._position + STEP * np.clip(action[:2], -1, 1)
        self._press = float(action[2])
        return self._observe()

    def snapshot(self) -> Any:
        return self._position.copy(), self._press

    def rollback(self, snapshot: Any) -> None:
        self._position, self._press = snapshot[0].copy(), snapshot[1]

    @property
    def success(self) -> bool:
        solvable = self._task != "never" and (self._task != "half" or self._goal[0] > self._start[0])
        return solvable and self._press > 0.5 and bool(np.linalg.norm(self._position - self._goal) < RADIUS)

    def expert(self, task: str) -> Expert:
        self.check_task(task)
        if task == "mute":
            raise ConfigError("task 'mute' has no expert; choose another one")
        return Straight()

    def _observe(self) -> Observation:
        state = np.concatenate([self._position, self._goal])
        images = {"top": np.full((2, 3, 3), int(1000 * abs(state[0])) % 256, np.uint8)} if self.view else {}
        return Observation(proprio=np.append(state, self._press).astype(np.float32), state=state, images=images)


class Straight(Expert):
    """Goes straight to the goal and presses; pressing shifts the point, so that it must go back: success flickers."""

    subtask_names = ("approach", "press")

    def __call__(self, observation: Observation) -> ExpertAction:
        assert observation.state is not None
        error = observation.state[2:] - observation.state[:2]
        if np.linalg.norm(error) > 0.5 * RADIUS:
            return ExpertAction(action=np.append(np.clip(error / STEP, -1, 1), 0).astype(np.float32), subtask=0)
        return ExpertAction(action=np.array([0, 0.2, 1], np.float32), subtask=1)
