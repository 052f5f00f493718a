"""LIBERO behind the environment interface.

The benchmark's meshes are on no test machine, so a small package stands in for hf-libero: one number falls, as objects do
before they settle, and fixtures are placed by NumPy's global generator, as LIBERO places them.
"""

import io
import pickle
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import actok.envs.libero as adapter
from actok.core import ConfigError, DataError, MissingExtraError, SpaceMismatchError
from actok.envs import env_class, list_envs, make_env
from actok.envs.libero import ASSET_FOLDERS, SETTLE_STEPS, axis_angle
from actok.evaluation import filming
from actok.evaluation.compatibility import check_environment
from actok.evaluation.trials import Trial
from actok.evaluation.vector import Start
from actok.evaluation.workers import Workers

START_STATES, SIZE = 5, 11

PACKAGE = """
import json, os
with open(os.path.join(os.environ.get("LIBERO_CONFIG_PATH", "/nowhere"), "config.yaml")) as file:  # else it asks
    PATHS = json.load(file)
_assets_path_cache = None
"""

BENCHMARK = """
import numpy as np
from types import SimpleNamespace
from libero.libero import PATHS
class Suite:
    def __init__(self): print("[info] using task orders")
    def get_task(self, i): return SimpleNamespace(language=f"{self.name}: do thing {i}")
    def get_task_bddl_file_path(self, i): return f"{PATHS['bddl_files']}/{self.name}/{i}.bddl"
    def get_task_init_states(self, i):
        states = np.random.RandomState(i).uniform(1, 2, (5, 11))
        states[:, 0] = 0
        return states
def get_benchmark(name): return type(name, (Suite,), {"name": name})
"""

WRAPPER = """
import numpy as np
import libero.libero as package
class ControlEnv:
    made = []
    def __init__(self, **options):
        self.options, self.assets, self.actions = options, package._assets_path_cache, []
        ControlEnv.made.append(self)
        self.fixture = np.random.uniform()
    def reset(self):
        self.fixture = np.random.uniform()
        self.state = np.zeros(11)
    def get_sim_state(self): return self.state
    def set_init_state(self, state):
        self.state = state.copy()
        self.actions = []
    def step(self, action):
        self.actions.append(np.array(action))
        self.state[0] += 1
        self.state[1] = max(0.0, self.state[1] - 0.3)  # falls, rests within eight steps
        self.state[2:5] += 0.05 * np.clip(action[:3], -1, 1)
        s = self.state
        raw = {
            "robot0_eef_pos": s[2:5] + self.fixture,
            "robot0_eef_quat": np.array([-0.8, 0.6, 0.0, 0.0]),
            "robot0_gripper_qpos": np.array([s[1], -s[1]]),
        }
        for name in self.options.get("camera_names", ()):
            size = self.options["camera_heights"]
            image = np.zeros((size, size, 3), np.uint8)
            image[0, 2] = 255  # robosuite's first row is the bottom one
            raw[f"{name}_image"] = image
        return raw, 0.0, False, {}
    def check_success(self): return self.state[2] > 2.5
    def close(self): self.state = None
"""


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, module)


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    for name in ASSET_FOLDERS:
        (tmp_path / "assets" / name).mkdir(parents=True)
    return tmp_path / "assets"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "site" / "libero" / "libero"
    (root / "envs").mkdir(parents=True)
    (root.parent / "__init__.py").write_text("")
    (root / "__init__.py").write_text(PACKAGE)
    (root / "benchmark.py").write_text(BENCHMARK)
    (root / "envs" / "__init__.py").write_text("")
    (root / "envs" / "env_wrapper.py").write_text(WRAPPER)
    forget(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(adapter, "import_robosuite", lambda purpose, extra: {})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    # Set, then deleted, so that what the adapter sets is taken back afterwards.
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    monkeypatch.delenv("LIBERO_CONFIG_PATH")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield root
    forget(monkeypatch)


@pytest.fixture
def env(package, assets):
    return make_env("libero", assets=assets)


def simulators() -> list:
    return sys.modules["libero.libero.envs.env_wrapper"].ControlEnv.made


# -- what is missing is said ----------------------------------------------------------------------------------------------


def test_without_the_package_both_commands_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(adapter, "import_robosuite", lambda purpose, extra: {})
    monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"--no-deps hf-libero==0.1.4 bddl==1.0.1.*'actok\[libero\]'"):
        make_env("libero")


def test_without_robosuite_the_extra_of_libero_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "robosuite"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(MissingExtraError, match=r"needs robosuite.*'actok\[libero\]'"):
        make_env("libero")


def test_missing_assets_are_explained(package, assets, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"not at .*libero/assets.*lerobot/libero-assets.*LIBERO_ASSETS=FOLDER"):
        make_env("libero")
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"not at .*elsewhere"):
        make_env("libero")
    (assets / "scenes").rmdir()
    with pytest.raises(ConfigError, match="no folder scenes"):
        make_env("libero", assets=assets)


def test_assets_are_found_by_the_variable_and_handed_to_libero(package, assets, monkeypatch) -> None:
    monkeypatch.setenv("LIBERO_ASSETS", str(assets))
    make_env("libero").reset("libero_goal-7", seed=0)
    assert [made.assets for made in simulators()] == [str(assets)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suites": ["libero_spacial"]}, "did you mean 'libero_spatial'"),
        ({"views": ["topview"]}, "no view 'topview'"),
        ({"views": ["agentview"], "image_size": 4}, "image_size is 4"),
        ({"suites": 90}, "suites is 90; give names of suites: libero_spatial, "),
        ({"state": "euler"}, "state is 'euler'; give quaternion or axis-angle"),
        ({"turned": "yes"}, "turned is 'yes'; give true or false"),
        ({"stated_hz": 0}, "stated_hz is 0; give the rate"),
        ({"sweets": 1}, "no option 'sweets'; it takes suites, assets, views, image_size, state, turned, stated_hz"),
    ],
)
def test_impossible_options_are_refused(env, assets, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_env("libero", assets=assets, **options)


# -- the adapter ----------------------------------------------------------------------------------------------------------


def test_tasks_are_suites_and_indices_and_words_are_the_benchmarks(env, assets, capsys) -> None:
    assert list_envs()["libero"] == "actok.envs.libero:LiberoEnv"
    assert env_class("libero").proprio_size == 9
    assert len(env.tasks) == 40
    assert env.instruction("libero_object-3") == "libero_object: do thing 3"
    assert capsys.readouterr().out == ""
    assert len(make_env("libero", assets=assets, suites="libero_90").tasks) == 90
    with pytest.raises(ConfigError, match="did you mean 'libero_goal-1'"):
        env.instruction("libero_goal_1")
    with pytest.raises(ConfigError, match="no expert"):
        env.expert("libero_goal-1")
    assert (env.rate_hz, env.space.embodiment) == (20, "libero_franka")


def test_objects_have_settled_before_the_first_observation(env) -> None:
    observation = env.reset("libero_10-4", seed=2)
    (simulator,) = simulators()
    assert simulator.options["bddl_file_name"].endswith("bddl_files/libero_10/4.bddl")
    assert np.array_equal(simulator.actions, [[0, 0, 0, 0, 0, 0, -1]] * SETTLE_STEPS)
    assert observation.proprio[7] == 0, "nothing falls any more"
    assert observation.state is None
    assert not env.success


def test_a_seed_chooses_one_of_the_benchmarks_start_states(env) -> None:
    starts = [
        env.reset("libero_goal-2", seed=seed) and env.start_state()["init_state"] for seed in (1, 4, 1 + START_STATES)
    ]
    assert starts[0].shape == (SIZE,)
    assert np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts[0], starts[1])


def test_a_restored_episode_is_the_same_whatever_ran_before(env) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (13, 7)).astype(np.float32)

    def run(env) -> np.ndarray:
        return np.stack([env.step(a).proprio for a in actions])

    env.reset("libero_goal-2", seed=3)
    start = env.start_state()
    expected = run(env)
    np.random.seed(8)  # noqa: NPY002 - LIBERO places fixtures by the global generator
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    env.reset("libero_spatial-0", seed=1)
    for other in (env, pickle.loads(pickle.dumps(env))):
        other.restore("libero_goal-2", start)
        assert np.array_equal(run(other), expected)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_observations_are_mapped(package, assets) -> None:
    env = make_env("libero", assets=assets, views=("agentview",), image_size=31)
    observation = env.reset("libero_goal-0", seed=0)
    assert observation.proprio.shape == (9,)
    assert np.allclose(observation.proprio[3:7], [0.8, -0.6, 0.0, 0.0])
    image = observation.images["agentview"]
    assert np.argwhere(image[..., 0]).tolist() == [[30, 2]], "upright, not mirrored"
    assert simulators()[0].options["camera_names"] == ["agentview"]


# -- as published data have it --------------------------------------------------------------------------------------------


def test_the_rotation_vector_is_that_of_the_quaternion_as_it_comes() -> None:
    transform = pytest.importorskip("scipy.spatial.transform")
    quaternions = np.random.default_rng(0).normal(size=(101, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    assert 20 < (quaternions[:, 3] < 0).sum() < 80
    for quaternion in quaternions:
        found = axis_angle(quaternion)
        shortest = transform.Rotation.from_quat(quaternion).as_rotvec()
        if quaternion[3] < 0:  # the long way round, about the opposite axis
            angle = np.linalg.norm(shortest)
            shortest = -shortest / angle * (2 * np.pi - angle)
        assert np.allclose(found, shortest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("w", [1.0, -1.0, 1 + 1e-9, -1 - 1e-9])
def test_a_quaternion_without_an_axis_has_no_rotation_vector(w: float) -> None:
    given = np.array([1e-12, 0.0, -1e-12, w])
    assert np.array_equal(axis_angle(given), np.zeros(3))
    assert given[3] == w, "it is the simulator's, and stays as it is"


def test_the_rotation_vector_is_robosuites() -> None:
    robosuite = pytest.importorskip("robosuite.utils.transform_utils")
    for quaternion in np.random.default_rng(1).normal(size=(53, 4)):
        quaternion /= np.linalg.norm(quaternion)
        assert np.allclose(axis_angle(quaternion), robosuite.quat2axisangle(quaternion.copy()), rtol=0, atol=1e-12)


def test_the_state_of_published_data_has_a_rotation_vector(env, assets) -> None:
    usual = env.reset("libero_goal-0", seed=2)
    published = make_env("libero", assets=assets, state="axis-angle")
    observation = published.reset("libero_goal-0", seed=2)
    assert (env.proprio_size, published.proprio_size) == (9, 8) == (len(usual.proprio), len(observation.proprio))
    assert np.array_equal(observation.proprio[:3], usual.proprio[:3])
    assert np.allclose(observation.proprio[3:6], np.pi * np.array([-0.8, 0.6, 0.0]), rtol=0, atol=1e-6)
    assert np.array_equal(observation.proprio[6:], usual.proprio[7:])


def test_turned_pictures_are_robosuites_by_180_degrees(package, assets) -> None:
    env = make_env("libero", assets=assets, views=("agentview",), image_size=31, turned=True)
    image = env.reset("libero_goal-0", seed=0).images["agentview"]
    # robosuite's has its mark at row 0, column 2.
    assert np.argwhere(image[..., 0]).tolist() == [[30, 28]]


def test_a_stated_rate_is_no_other_simulation(env, assets) -> None:
    slow = make_env("libero", assets=assets, stated_hz=10)
    assert (env.rate_hz, slow.rate_hz, slow.space.rate_hz) == (20, 10, 10)
    assert not slow.space.differences(env.space)
    for each in (env, slow):
        each.reset("libero_goal-0", seed=0)
    assert [made.options["control_freq"] for made in simulators()] == [20, 20]


def test_what_a_policy_of_published_data_needs_is_named(env, assets) -> None:
    from test_rollout import Scripted

    policy = Scripted(replace(env.space, rate_hz=10.0), proprio=8)
    with pytest.raises(SpaceMismatchError, match=r"gives 10 actions a second, .* takes 20; .* with stated_hz=10$"):
        check_environment(policy, env)
    stated = make_env("libero", assets=assets, stated_hz=10)
    with pytest.raises(
        SpaceMismatchError, match=r"a state of 8 numbers, .* gives 9; .*with state=axis-angle it gives 8: `--env-set"
    ):
        check_environment(policy, stated)
    check_environment(policy, make_env("libero", assets=assets, stated_hz=10, state="axis-angle"))


def test_a_copy_and_a_film_have_the_options_of_the_original(package, assets, tmp_path, monkeypatch) -> None:
    env = make_env("libero", suites=["libero_90"], assets=assets, state="axis-angle", turned=True)
    copy = pickle.loads(pickle.dumps(env))
    assert copy.tasks == env.tasks
    assert len(copy.reset("libero_90-57", seed=1).proprio) == 8
    trial = Trial(
        start=Start(task="libero_90-57", seed=1),
        number=0,
        limit=3,
        instruction="do thing 57",
        steps=3,
        executed=[np.zeros((3, 7), np.float32)],
    )
    monkeypatch.setattr(filming, "Workers", lambda made, count: Workers(pickle.loads(pickle.dumps(made)), 1))
    (filmed,) = filming.film_some(env, [trial], 1, tmp_path, size=32)
    assert (filmed["task"], filmed["view"], filmed["reproduced"]) == ("libero_90-57", "agentview", True)
    assert [made.options.get("camera_heights") for made in simulators()] == [None, 32]
    assert {made.assets for made in simulators()} == {str(assets)}


def test_success_is_the_benchmarks_after_the_last_step(env) -> None:
    env.reset("libero_goal-0", seed=0)
    flags = []
    for _ in range(40):
        env.step(np.array([1, 0, 0, 0, 0, 0, -1], np.float32))
        flags.append(env.success)
    assert flags[-1]
    assert not flags[0]
    env.restore("libero_goal-0", env.start_state())
    assert not env.success


@pytest.mark.parametrize(
    ("start_state", "words"),
    [
        ({}, "no init_state .it has: nothing"),
        ({"init_state": np.zeros(SIZE + 2)}, "has 11 finite numbers"),
        ({"init_state": np.full(SIZE, np.inf)}, "not a start state of libero_goal-0"),
    ],
)
def test_a_start_state_of_something_else_is_refused(env, start_state: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        env.restore("libero_goal-0", start_state)
    with pytest.raises(ConfigError, match="no episode has begun"):
        env.step(np.zeros(7))


def test_the_configuration_of_the_user_is_left_alone(package, assets, tmp_path, monkeypatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.yaml").write_text(textwrap.dedent('{"bddl_files": "/of/the/user"}'))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(own))
    make_env("libero", assets=assets).reset("libero_goal-0", seed=0)
    assert simulators()[0].options["bddl_file_name"] == "/of/the/user/libero_goal/0.bddl"
    assert not (tmp_path / "home").exists()
