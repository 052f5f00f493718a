"""LIBERO: household tasks of a Franka Panda, with the benchmark's own words and start states (arXiv 2306.03310).

An adapter to the package hf-libero 0.1.4. It is installed by hand, because its stated dependencies replace torch:

    pip install 'actok[libero,torch]'
    pip install --no-deps hf-libero==0.1.4 bddl==1.0.1

The meshes and textures ("assets") are not in the package. Say where they are by the option `assets` or the environment
variable LIBERO_ASSETS; they are the Hub dataset lerobot/libero-assets. Nothing is downloaded here.

Tasks are "SUITE-INDEX", e.g. "libero_spatial-3", in the order of the benchmark's task order 0. Actions [7] are those of
robosuite's OSC_POSE controller at 20 Hz. Proprioception: position between the fingertips in m (3), orientation of the
hand, positions of the two fingers in m (2). The orientation is a quaternion xyzw with x >= 0, about 1 at the start, so 9
numbers in all; or, with state="axis-angle", what LIBERO's own and most published data hold, 8 numbers in all: see
`axis_angle`.

A seed chooses one of the start states that the benchmark has for each task: number seed modulo their count. As the
published evaluations do, the objects, which are stored a little above what they stand on, are let fall for SETTLE_STEPS
steps before the first observation. The arm is not asked to move meanwhile, the gripper opens.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from actok.core.errors import ConfigError, DataError, MissingExtraError
from actok.core.registry import CONFIGS, read_toml, suggest
from actok.core.spaces import ActionSpace
from actok.envs.base import Env, Expert, Observation
from actok.envs.cameras import check_views
from actok.envs.packaged import packaged_space
from actok.envs.robosuite_scene import import_robosuite
from actok.envs.seeding import global_generator

VIEWS = ("agentview", "robot0_eye_in_hand", "frontview", "birdview", "sideview")
ASSETS_VARIABLE = "LIBERO_ASSETS"
# Folders that a copy of the assets has.
ASSET_FOLDERS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects", "scenes")
SETTLE_STEPS = 10
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
CONTROL_HZ = 20
# How the orientation is told -> numbers of the proprioception.
STATES: Mapping[str, int] = {"quaternion": 9, "axis-angle": 8}
# Fixtures are placed at random when the model is built; a start state has no place for them, so it is always this draw.
_FIXTURE_SEED = 0

__all__ = ["LiberoEnv", "axis_angle"]


class LiberoEnv(Env):
    """The tasks of LIBERO; no expert.

    Args:
        suites: names of configs/envs/libero.toml; None: the four of ten tasks each.
        assets: folder of meshes and textures; None: of the environment variable LIBERO_ASSETS.
        views: cameras to render, of VIEWS, by LIBERO's own renderer, shadows included, because policies are trained on
            its pictures. They are upright and not mirrored.
        image_size: their height and width in pixels.
        state: how the proprioception tells the orientation, "quaternion" or "axis-angle".
        turned: pictures as published data have them: robosuite's own, whose first row is the bottom one, turned by 180
            degrees. They are upright, and mirrored left to right.
        stated_hz: rate by which `rate_hz` and `space` go. One action is one step of 1/20 s whatever is said here;
            published data state 10 Hz of actions recorded so, and a policy carries the rate of its data.

    Raises ConfigError for an unknown suite, view or state, or where the assets are not found; MissingExtraError without
    hf-libero or robosuite.
    """

    name = "libero"
    max_steps = 600
    proprio_size: int | None = STATES["quaternion"]
    starts: int | None = 50
    default_views = ("agentview", "robot0_eye_in_hand")
    known_views = VIEWS

    def __init__(
        self,
        suites: Sequence[str] | None = None,
        assets: str | Path | None = None,
        views: Sequence[str] = (),
        image_size: int = 128,
        state: str = "quaternion",
        turned: bool = False,
        stated_hz: float = CONTROL_HZ,
    ) -> None:
        if state not in STATES:
            raise ConfigError(f"state is {state!r}; give {' or '.join(STATES)}")
        if not isinstance(turned, bool):
            raise ConfigError(f"turned is {turned!r}; give true or false")
        if not isinstance(stated_hz, (int, float)) or not 0 < stated_hz < math.inf:
            raise ConfigError(f"stated_hz is {stated_hz!r}; give the rate that the data state, in Hz")
        self.proprio_size = STATES[state]
        self._tasks = _tasks_of(suites)
        self._views = check_views("LIBERO", views, VIEWS, image_size)
        self._image_size = image_size
        self._state, self._turned, self._stated_hz = state, turned, float(stated_hz)
        self._library = _import_libero()
        self._assets = _find_assets(assets, self._library["root"])
        self._benchmarks: dict[str, Any] = {}
        self._task = ""
        self._simulator: Any = None
        self._init_state: np.ndarray | None = None
        self._success = False

    @property
    def tasks(self) -> Sequence[str]:
        """Keys "SUITE-INDEX"."""
        return tuple(self._tasks)

    @cached_property
    def space(self) -> ActionSpace:
        """The packaged space libero_franka, at the stated rate."""
        return replace(packaged_space("libero_franka"), rate_hz=self._stated_hz)

    def instruction(self, task: str) -> str:
        """The benchmark's own words."""
        words: str = self._of_benchmark(task)[0].get_task(self._tasks[task][1]).language
        return words

    def reset(self, task: str, *, seed: int) -> Observation:
        """See Env.reset; the start state is the benchmark's number `seed` modulo their count (50 for each task)."""
        benchmark, index = self._of_benchmark(task)
        states = np.asarray(benchmark.get_task_init_states(index), np.float64)
        return self._begin(task, states[seed % len(states)].copy())

    def start_state(self) -> dict[str, np.ndarray]:
        """{"init_state": float64 [1 + positions + velocities]}: time, positions and velocities of all joints, before
        the objects settle.
        """
        if self._init_state is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        return {"init_state": self._init_state.copy()}

    def restore(self, task: str, start_state: Mapping[str, np.ndarray]) -> Observation:
        """See Env.restore."""
        self.check_task(task)
        if "init_state" not in start_state:
            raise DataError(
                f"the start state of a {task} episode has no init_state (it has: {', '.join(start_state) or 'nothing'})"
            )
        return self._begin(task, np.array(start_state["init_state"], np.float64))

    def step(self, action: np.ndarray) -> Observation:
        """See Env.step."""
        if self._init_state is None:
            raise ConfigError("no episode has begun; call reset or restore first")
        raw, _, _, _ = self._simulator.step(self.check_action(action).astype(np.float64))
        self._success = bool(self._simulator.check_success())
        return self._observe(raw)

    @property
    def success(self) -> bool:
        """The benchmark's goal condition after the last step."""
        return self._success

    def expert(self, task: str) -> Expert:
        """Raises ConfigError: LIBERO has human demonstrations, not scripted experts."""
        self.check_task(task)
        raise ConfigError(
            f"LIBERO has no expert for {task}; use its human demonstrations, which `actok` reads in LeRobot's format"
        )

    def option_for(self, attribute: str, value: float) -> str | None:
        """See Env.option_for."""
        if attribute == "rate_hz":
            return f"stated_hz={value:g}"
        return next((f"state={state}" for state, size in STATES.items() if size == value), None)

    def close(self) -> None:
        """See Env.close."""
        if self._simulator is not None:
            self._simulator.close()
        self._task, self._simulator, self._init_state, self._success = "", None, None, False

    # -- inside ---------------------------------------------------------------------------------------------------

    def _of_benchmark(self, task: str) -> tuple[Any, int]:
        self.check_task(task)
        suite, index = self._tasks[task]
        if suite not in self._benchmarks:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the order of its tasks
                self._benchmarks[suite] = self._library["benchmark"](suite)()
        return self._benchmarks[suite], index

    def _begin(self, task: str, init_state: np.ndarray) -> Observation:
        if task != self._task:
            self.close()
            self._task, self._simulator = task, self._build(task)
        with global_generator(_FIXTURE_SEED):
            self._simulator.reset()
        size = np.size(self._simulator.get_sim_state())
        if init_state.shape != (size,) or not np.isfinite(init_state).all():
            self._init_state = None
            raise DataError(
                f"init_state of shape {init_state.shape} is not a start state of {task}, which has {size} finite"
                " numbers; check that the episode's task is right"
            )
        self._simulator.set_init_state(init_state)
        for _ in range(SETTLE_STEPS):
            raw, _, _, _ = self._simulator.step(np.array(SETTLE_ACTION))
        self._init_state, self._success = init_state, False
        return self._observe(raw)

    def _build(self, task: str) -> Any:
        benchmark, index = self._of_benchmark(task)
        self._library["package"]._assets_path_cache = str(self._assets)  # else it looks beside itself and downloads
        options: dict[str, Any] = {"use_camera_obs": False, "has_offscreen_renderer": False}
        if self._views:
            options = {
                "use_camera_obs": True,
                "has_offscreen_renderer": True,
                "camera_names": list(self._views),
                "camera_heights": self._image_size,
                "camera_widths": self._image_size,
            }
        with global_generator(_FIXTURE_SEED):
            return self._library["simulator"](
                bddl_file_name=benchmark.get_task_bddl_file_path(index),
                controller="OSC_POSE",
                control_freq=CONTROL_HZ,
                ignore_done=True,  # whoever steps decides when an episode ends
                **options,
            )

    def _observe(self, raw: Mapping[str, np.ndarray]) -> Observation:
        rotation = raw["robot0_eef_quat"]
        if self._state == "axis-angle":
            rotation = axis_angle(rotation)
        elif rotation[0] < 0:
            rotation = -rotation
        proprio = np.concatenate([raw["robot0_eef_pos"], rotation, raw["robot0_gripper_qpos"]])
        # robosuite's images have their first row at the bottom.
        across = -1 if self._turned else 1
        images = {view: np.ascontiguousarray(raw[f"{view}_image"][::-1, ::across]) for view in self._views}
        return Observation(proprio=proprio.astype(np.float32), images=images)


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """The rotation vector in rad of a unit quaternion xyzw, as robosuite's `quat2axisangle` makes it.

    LIBERO's demonstrations, and what was made from them, hold the orientation so. The quaternion is taken with the sign
    that it has: where w < 0 the angle is above pi (up to 2 pi), and the vector jumps where the sign of the quaternion
    does. w is limited to [-1, 1]; at both ends the vector is zero.
    """
    w = min(1.0, max(-1.0, float(quaternion[3])))
    sine = math.sqrt(1.0 - w * w)  # of half the angle
    if sine == 0:
        return np.zeros(3)
    return np.asarray(quaternion[:3], np.float64) * (2.0 * math.acos(w) / sine)


def _tasks_of(suites: Sequence[str] | None) -> dict[str, tuple[str, int]]:
    """Key -> suite and index, of these suites or of the default ones."""
    known = read_toml(CONFIGS / "envs" / "libero.toml")
    chosen = known["default_suites"] if suites is None else [suites] if isinstance(suites, str) else suites
    if not isinstance(chosen, (list, tuple)) or not chosen:
        raise ConfigError(f"suites is {suites!r}; give names of suites: {', '.join(known['tasks'])}")
    for suite in chosen:
        if suite not in known["tasks"]:
            raise ConfigError(f"LIBERO has no suite {suite!r}; {suggest(str(suite), list(known['tasks']))}")
    return {f"{suite}-{i}": (suite, i) for suite in chosen for i in range(known["tasks"][suite])}


def _find_assets(given: str | Path | None, package: Path) -> Path:
    """The folder of meshes and textures: as given, or of the environment variable, or beside the package's code."""
    where = given if given is not None else os.environ.get(ASSETS_VARIABLE) or package / "assets"
    folder = Path(where).expanduser()
    remedy = (
        "download them (`hf download lerobot/libero-assets --repo-type dataset --local-dir FOLDER`) and give"
        f" assets=FOLDER or set {ASSETS_VARIABLE}=FOLDER"
    )
    if not folder.is_dir():
        raise ConfigError(f"LIBERO's meshes and textures are not at {folder}; {remedy}")
    if missing := [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]:
        raise ConfigError(f"{folder} is not LIBERO's assets: it has no folder {', '.join(missing)}; {remedy}")
    return folder


def _import_libero() -> Mapping[str, Any]:
    """hf-libero's parts. Without a configuration file it would ask questions on standard input; it gets one."""
    purpose = "the environment 'libero' (then: pip install --no-deps hf-libero==0.1.4 bddl==1.0.1)"
    import_robosuite(purpose, "libero")
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("hf-libero", "libero", purpose)
    root = Path(found.submodule_search_locations[0]).resolve() / "libero"
    configured = os.environ.get("LIBERO_CONFIG_PATH")
    if not (Path(configured or "~/.libero").expanduser() / "config.yaml").is_file():
        os.environ["LIBERO_CONFIG_PATH"] = _write_config(root)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from libero import libero as package
            from libero.libero.benchmark import get_benchmark
            from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise MissingExtraError(error.name or "hf-libero", "libero", purpose) from error
    return {"root": root, "package": package, "benchmark": get_benchmark, "simulator": ControlEnv}


def _write_config(root: Path) -> str:
    """A folder with LIBERO's configuration file, for the life of this process and those that it starts."""
    folder = tempfile.mkdtemp(prefix="actok_libero_")
    atexit.register(_remove, folder, os.getpid())
    paths = {
        "benchmark_root": str(root),
        "bddl_files": str(root / "bddl_files"),
        "init_states": str(root / "init_files"),
        "datasets": str(root.parent / "datasets"),
        "assets": str(root / "assets"),
    }
    (Path(folder) / "config.yaml").write_text(json.dumps(paths))  # JSON is YAML
    return folder


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a forked process inherits the registration, not the folder
        shutil.rmtree(folder, ignore_errors=True)
