"""The interface that every simulator implements: small enough for a point mass, enough for recording and replay.

An `Env` is one process's view of one simulator. A pickled one carries the options it was made with and nothing else, so
that worker processes build their own simulator; options must be picklable. Physics must be a pure function of the start
state and the actions, whatever ran before in the same process; exact replay depends on it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np

from actok.core.errors import ConfigError, DataError
from actok.core.registry import load_target, suggest
from actok.core.spaces import ActionSpace

ENTRY_POINT_GROUP = "actok.envs"
BUILT_IN: Mapping[str, str] = {
    "aloha": "actok.envs.aloha:AlohaEnv",
    "aloha-state": "actok.envs.aloha:AlohaStateEnv",
    "libero": "actok.envs.libero:LiberoEnv",
    "metaworld": "actok.envs.metaworld:MetaWorldEnv",
    "metaworld-state": "actok.envs.metaworld:MetaWorldStateEnv",
    "robosuite-iiwa": "actok.envs.robosuite:IIWAEnv",
    "robosuite-iiwa-state": "actok.envs.robosuite:IIWAStateEnv",
    "robosuite-kinova3": "actok.envs.robosuite:Kinova3Env",
    "robosuite-kinova3-state": "actok.envs.robosuite:Kinova3StateEnv",
    "robosuite-panda": "actok.envs.robosuite:PandaEnv",
    "robosuite-panda-state": "actok.envs.robosuite:PandaStateEnv",
    "robosuite-ur5e": "actok.envs.robosuite:UR5eEnv",
    "robosuite-ur5e-state": "actok.envs.robosuite:UR5eStateEnv",
}

__all__ = ["Env", "Expert", "ExpertAction", "Observation", "env_class", "list_envs", "make_env", "option_names"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a robot sees before it acts.

    Attributes:
        proprio: float32 [P], the robot's own state.
        state: float64, everything a scripted expert may know, goals included; None where the simulator has no expert.
            Never shown to a policy.
        images: view name -> uint8 [H, W, 3], upright; empty unless the environment was made with views.
    """

    proprio: np.ndarray
    state: np.ndarray | None = None
    images: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertAction:
    """What a scripted expert does: an action float32 [D] in raw units, and the index of the sub-task it is at."""

    action: np.ndarray
    subtask: int


class Expert(ABC):
    """A scripted policy: a pure function of the observation.

    Attributes:
        subtask_names: what the sub-tasks are called, by index.
    """

    subtask_names: tuple[str, ...]

    @abstractmethod
    def __call__(self, observation: Observation) -> ExpertAction:
        """The action for this observation, within the limits of the action space."""


class Env(ABC):
    """One simulator with a list of tasks.

    The arguments of a constructor are its options; each can be given by name. One that renders what it is asked for takes
    `views` and `image_size` among them; one that takes neither may show the same pictures always.

    Attributes:
        name: as given to `make_env`.
        made_with: option -> value, of those that it was made with; defaults are left out.
        max_steps: how many steps the benchmark allows an episode.
        proprio_size: how many numbers the proprioception has; None where only the first observation tells.
        starts: how many start states a task has where they are a list, seed s being number s modulo their count; None
            where seeds draw them.
        default_views: the views that recording takes unless others are asked for; empty where there are no cameras.
        known_views: all views that its option `views` may name; empty where only trying tells.
    """

    name: str
    made_with: Mapping[str, Any]
    max_steps: int
    proprio_size: int | None = None
    starts: int | None = None
    default_views: tuple[str, ...] = ()
    known_views: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        made = super().__new__(cls)
        made.made_with = _given(cls, args, options)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self.made_with), ()

    @property
    @abstractmethod
    def tasks(self) -> Sequence[str]:
        """Keys of the tasks."""

    @property
    @abstractmethod
    def space(self) -> ActionSpace:
        """What its actions mean."""

    @property
    def rate_hz(self) -> float:
        """Actions a second of simulated time."""
        assert self.space.rate_hz is not None, "an environment's action space states its rate"
        return self.space.rate_hz

    @abstractmethod
    def instruction(self, task: str) -> str:
        """The task in words."""

    @abstractmethod
    def reset(self, task: str, *, seed: int) -> Observation:
        """Begin an episode of a task from a start state that is a pure function of task and seed."""

    @abstractmethod
    def start_state(self) -> dict[str, np.ndarray]:
        """Arrays with which `restore` begins the current episode again, exactly."""

    @abstractmethod
    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """Begin an episode from a stored start state. Raises DataError where it is not one of this task."""

    @abstractmethod
    def step(self, action: np.ndarray) -> Observation:
        """Execute one action [D] in raw units. Raises DataError where it is not finite or of another size."""

    def advance(self, action: np.ndarray) -> None:
        """As `step`, where nobody looks: the same physics and success, without what an observation costs (images).

        This default steps; environments that render save time by an own one. Raises as `step` does.
        """
        self.step(action)

    @property
    @abstractmethod
    def success(self) -> bool:
        """Whether the task is solved at this moment (after the last step; False before the first)."""

    @abstractmethod
    def expert(self, task: str) -> Expert:
        """The scripted expert of a task. Raises ConfigError where there is none."""

    def snapshot(self) -> Any:
        """Everything that decides what the coming steps do, for `rollback`: a value of its own, in memory only.

        Raises ConfigError where no episode has begun, or where this environment cannot (the default).
        """
        raise ConfigError(
            f"environment {self.name!r} cannot go back to a moment of an episode (it implements no snapshot); closed-loop"
            " replay needs that, open-loop replay does not"
        )

    def rollback(self, snapshot: Any) -> None:
        """Go back to the moment of a snapshot of this episode, exactly: the same actions give the same observations,
        bit for bit, and `success` is what it was. A snapshot may be gone back to more than once.

        Raises ConfigError as `snapshot` does, and for a snapshot of another episode or environment.
        """
        raise ConfigError(
            f"environment {self.name!r} cannot go back to a moment of an episode (it implements no rollback); closed-loop"
            " replay needs that, open-loop replay does not"
        )

    def with_views(self, views: Sequence[str], image_size: int | None = None) -> Env:
        """Another environment, made as this one was, that shows these views, `image_size` pixels high and wide.

        Where the constructor takes no `views` or no `image_size`, it shows what it always shows; image_size None leaves the
        size as it is. Raises ConfigError as the constructor does.
        """
        wanted: dict[str, Any] = {"views": tuple(views)}
        if image_size is not None:
            wanted["image_size"] = image_size
        taken = option_names(type(self))
        return type(self)(**{**self.made_with, **{name: value for name, value in wanted.items() if name in taken}})

    def options_as_json(self) -> dict[str, Any]:
        """`made_with` as JSON values, for results; what JSON does not know is told as text."""
        found: dict[str, Any] = json.loads(json.dumps(dict(self.made_with), default=str))
        return found

    def option_for(self, attribute: str, value: float) -> str | None:
        """The option, written "KEY=VALUE", under which `proprio_size` or `rate_hz` has this value; None where none has.

        Error messages name it. This default knows of none.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most simulators hold nothing that outlives them
        """Free the simulator. The environment may be used again; it then builds a new one."""

    def check_task(self, task: str) -> None:
        """Raise ConfigError, with the nearest name, for a task that is not here."""
        if task not in self.tasks:
            raise ConfigError(f"environment {self.name!r} has no task {task!r}; {suggest(task, list(self.tasks))}")

    def check_action(self, action: np.ndarray) -> np.ndarray:
        """The action as float32 [D]. Raises DataError where it is not finite or of another size."""
        array = np.asarray(action, np.float32)
        if array.shape != (self.space.dim,):
            raise DataError(
                f"action has shape {array.shape}; environment {self.name!r} takes [{self.space.dim}]"
                f" ({', '.join(self.space.names)})"
            )
        if not np.isfinite(array).all():
            raise DataError(f"action {array.tolist()} is not finite; never execute an undecodable sequence")
        return array


def list_envs() -> dict[str, str]:
    """Name -> "module:Class" of every environment: the built-in ones, then entry points of the group "actok.envs"."""
    found = dict(BUILT_IN)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, point.value)
    return found


def env_class(name: str) -> type[Env]:
    """The class behind a name, without its simulator being loaded. Raises ConfigError for an unknown name."""
    targets = list_envs()
    if name not in targets:
        raise ConfigError(f"no environment is called {name!r}; {suggest(name, list(targets))}")
    found: type[Env] = load_target(targets[name])
    return found


def make_env(name: str, **options: Any) -> Env:
    """The environment of that name; `options` go to its constructor.

    Raises ConfigError for an unknown name or option, MissingExtraError where its simulator is not installed.
    """
    found = env_class(name)
    known = option_names(found)
    for option in options:
        if option not in known:
            raise ConfigError(f"environment {name!r} has no option {option!r}; it takes {', '.join(known) or 'none'}")
    return found(**options)


def option_names(found: type[Env]) -> list[str]:
    """What the constructor of an environment takes by name."""
    return [name for name, parameter in _parameters(found).items() if parameter.kind not in _VARIADIC]


def _given(found: type[Env], args: Sequence[Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of a constructor by their names. Those that it refuses are left out: it says so itself, next."""
    named = zip(option_names(found), args, strict=False)
    return {**dict(named), **options}


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(found: type[Env]) -> Mapping[str, inspect.Parameter]:
    """Of the constructor, without `self`. (`inspect.signature` of a class would show `Env.__new__` where it has none.)"""
    _, *rest = inspect.signature(found.__init__).parameters.items()
    return dict(rest)
