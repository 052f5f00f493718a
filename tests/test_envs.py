"""The environment interface, and Meta-World behind it."""

import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest

from actok.core import ConfigError, DataError, MissingExtraError
from actok.envs import Observation, cameras, list_envs, make_env
from actok.envs.branches import branches_of
from pointmass import PointMass

# -- the registry -----------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'metaworld'"):
        make_env("metawrld")


def test_an_entry_point_adds_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("pointmass", "pointmass:PointMass", "actok.envs")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert list_envs()["pointmass"] == "pointmass:PointMass"
    env = make_env("pointmass", view=True)
    assert isinstance(env, PointMass)
    assert env.view
    with pytest.raises(ConfigError, match=r"no option 'veiw'; it takes view$"):
        make_env("pointmass", veiw=True)


def test_a_missing_simulator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "metaworld"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actok\[metaworld\]'"):
        make_env("metaworld")


def test_listing_environments_loads_no_simulator() -> None:
    code = "import sys, json, actok.envs as e; e.list_envs(); print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert "actok.envs.base" in loaded
    assert not loaded & {"metaworld", "mujoco", "gymnasium", "torch", "actok.data"}


@pytest.mark.parametrize(
    ("action", "words"),
    [([0.0, 0.0], r"shape \(2,\)"), ([[0.0, 0.0, 0.0]], r"shape \(1, 3\)"), ([0.0, np.nan, 0.0], "not finite")],
)
def test_an_action_that_is_none_is_never_executed(action: list, words: str) -> None:
    env = PointMass()
    env.reset("near", seed=0)
    with pytest.raises(DataError, match=words):
        env.step(np.array(action))
    assert env.steps_executed == 0


# -- sub-tasks from the branches of a scripted policy -------------------------------------------------------------------


def nested(x: float, y: float) -> str:
    if x > 0:
        if y > 0:
            return "a"
        return "b"
    elif y > 5:
        return "c"
    choose = lambda: "inner"  # noqa: E731 - a lambda inside must not be counted
    return choose()


def assigned(x: float, y: float) -> float:
    target = 0.0
    if x > 0:
        target = 1.0
        if y > 0:
            target = 2.0
    elif y > 0:
        target = 3.0
    else:
        target = 4.0
    return target


def test_returns_are_numbered_in_source_order() -> None:
    branches = branches_of(nested, by="return")
    assert branches.count == 4
    cases = {(1, 1): "a", (1, -1): "b", (-1, 6): "c", (-1, 0): "inner"}
    assert {k: nested(*k) for k in cases} == cases
    assert [branches.which(*k) for k in cases] == [0, 1, 2, 3]


def test_leaves_of_conditions_are_numbered_in_source_order() -> None:
    branches = branches_of(assigned, by="condition")
    assert branches.count == 4
    cases = {(1, 1): 2.0, (1, -1): 1.0, (-1, 1): 3.0, (-1, -1): 4.0}
    assert {k: assigned(*k) for k in cases} == cases
    assert [branches.which(*k) for k in cases] == [0, 1, 2, 3]


def returned_line(function, *arguments) -> int:
    """The line of the return statement that fired, watched from outside."""
    lines: list[int] = []

    def watch(frame, event, _):
        if frame.f_code is not function.__code__:
            return None
        if event == "return":
            lines.append(frame.f_lineno)
        return watch

    previous = sys.gettrace()
    sys.settrace(watch)
    try:
        function(*arguments)
    finally:
        sys.settrace(previous)
    return lines[-1]


def test_the_branch_of_each_policy_is_the_return_that_fires() -> None:
    policies = pytest.importorskip("metaworld.policies").ENV_POLICY_MAP
    generator = np.random.default_rng(0)
    fired = 0
    for policy_class in policies.values():
        decides = getattr(policy_class, "_desired_pos", None)
        if decides is None:
            continue
        branches, policy = branches_of(decides, by="return"), policy_class()
        index_of_line: dict[int, int] = {}
        for _ in range(60):
            state = generator.uniform(-1, 1, 39) * generator.choice([0.01, 0.05, 0.2, 1])
            line = returned_line(decides, policy._parse_obs(state.copy()))
            index = branches.which(policy._parse_obs(state.copy()))
            assert index_of_line.setdefault(line, index) == index
        by_line = [index_of_line[line] for line in sorted(index_of_line)]
        assert by_line == sorted(set(by_line))
        assert by_line[-1] < branches.count
        fired += len(by_line)
    assert fired > 100


# -- Meta-World -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("metaworld")
    return make_env("metaworld")


def trajectory(env, actions: np.ndarray) -> np.ndarray:
    return np.stack([env.step(a).state for a in actions])


def test_fifty_tasks_each_with_words_and_an_expert(env) -> None:
    assert len(env.tasks) == 50
    assert len({env.instruction(task) for task in env.tasks}) == 50
    names = [name for task in env.tasks for name in env.expert(task).subtask_names]
    assert len(names) == len(set(names)) > 150
    assert env.rate_hz == 80
    assert env.space.dim == 4
    assert env.space.group("position").scale == 0.01
    for call in (env.instruction, env.expert, lambda task: env.reset(task, seed=0)):
        with pytest.raises(ConfigError, match="did you mean 'reach-v3'"):
            call("reach")


# hand-insert moves the mocap target, door-open's expert changes what it reads, basketball places two things.
@pytest.mark.parametrize("task", ["basketball-v3", "door-open-v3", "hand-insert-v3"])
def test_a_restored_episode_is_the_same_bit_for_bit_whatever_ran_before(env, task: str) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (29, 4)).astype(np.float32)
    first = env.reset(task, seed=5)
    start = env.start_state()
    expected = trajectory(env, actions)

    env.reset(task, seed=6)
    trajectory(env, -actions)
    again = env.restore(task, start)
    assert np.array_equal(first.state, again.state)
    assert np.array_equal(first.proprio, again.proprio)
    assert np.array_equal(trajectory(env, actions), expected)

    copy = pickle.loads(pickle.dumps(env))
    copy.restore(task, start)
    assert np.array_equal(trajectory(copy, actions), expected)


def test_a_seed_decides_the_start_state_and_the_global_generator_does_not(env) -> None:
    np.random.seed(0)  # noqa: NPY002 - Meta-World itself draws from the global generator
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    starts = [env.reset("push-v3", seed=seed) and env.start_state()["rand_vec"] for seed in (3, 4, 3)]
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts[0], starts[1])


def test_the_expert_leaves_its_observation_alone_and_stays_within_the_limits(env) -> None:
    observation = env.reset("door-open-v3", seed=2)
    expert = env.expert("door-open-v3")
    for _ in range(17):
        state = observation.state.copy()
        choice = expert(observation)
        assert np.array_equal(observation.state, state)
        assert np.abs(choice.action).max() <= 1
        assert choice.subtask in range(len(expert.subtask_names))
        observation = env.step(choice.action)
    with pytest.raises(DataError, match="no state"):
        expert(Observation(proprio=observation.proprio))


def test_proprioception_is_of_the_robot(env) -> None:
    observation = env.reset("reach-v3", seed=2)
    assert observation.proprio.shape == (26,)
    assert np.allclose(observation.proprio[:4], observation.state[:4])
    up = np.array([0, 0, 1, 0], np.float32)
    for _ in range(13):
        moved = env.step(up)
    assert moved.proprio[2] > observation.proprio[2] + 0.03
    assert np.linalg.norm(moved.proprio[4:8]) == pytest.approx(np.sqrt(2), abs=1e-5)  # Meta-World sets (1, 0, 1, 0)


def test_the_state_variant_sees_objects_and_goal_and_is_else_the_same(env) -> None:
    seen = make_env("metaworld-state")
    assert (seen.tasks, seen.space, seen.max_steps) == (env.tasks, env.space, env.max_steps)
    assert (env.proprio_size, seen.proprio_size) == (26, 21)
    task = "pick-place-v3"
    blind, first = env.reset(task, seed=7), seen.reset(task, seed=7)
    expert, other = env.expert(task), seen.expert(task)
    assert np.array_equal(env.start_state()["rand_vec"], seen.start_state()["rand_vec"])
    observation = first
    for _ in range(61):
        assert blind.proprio.shape == (26,)
        assert np.array_equal(blind.state, observation.state)
        assert np.array_equal(other(observation).action, expert(blind).action)
        action = expert(blind).action
        blind, observation = env.step(action), seen.step(action)
    # The goal is the second half of the start state; the object has moved, and the numbers follow the simulator's.
    proprio, simulator = observation.proprio, seen._simulator
    assert np.allclose(proprio[18:21], seen.start_state()["rand_vec"][3:], atol=1e-6)
    assert np.allclose(proprio[4:7], simulator.get_body_com("obj"), atol=1e-6)
    assert np.linalg.norm(proprio[4:7] - first.proprio[4:7]) > 0.02
    assert np.allclose(proprio[:4], blind.proprio[:4])
    assert not proprio[11:18].any(), "there is no second object"
    copy = pickle.loads(pickle.dumps(seen))
    assert np.array_equal(copy.restore(task, seen.start_state()).proprio, first.proprio)


def test_success_is_that_of_the_episode_at_hand(env) -> None:
    observation, expert = env.reset("button-press-v3", seed=1), env.expert("button-press-v3")
    assert not env.success
    while not env.success:
        observation = env.step(expert(observation).action)
    env.restore("button-press-v3", env.start_state())
    assert not env.success


@pytest.mark.parametrize(
    ("start_state", "words"),
    [
        ({}, "has no rand_vec .it has: nothing.*actok collect"),
        ({"qpos": np.zeros(3)}, "it has: qpos"),
        ({"rand_vec": np.zeros(3)}, "not a start state of push-v3"),
        ({"rand_vec": np.full(6, 99.0)}, "not a start state of push-v3"),
        ({"rand_vec": np.full(6, np.nan)}, "not a start state of push-v3"),
        # Puck and goal on the same spot: the task would draw again for ever.
        ({"rand_vec": np.array([0.0, 0.7, 0.02, 0.0, 0.8, 0.02])}, "rejects rand_vec"),
    ],
)
def test_a_start_state_of_something_else_is_refused(env, start_state: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        env.restore("push-v3", start_state)


def test_nothing_happens_before_an_episode_begins(env) -> None:
    env.close()
    for call in (env.start_state, lambda: env.step(np.zeros(4))):
        with pytest.raises(ConfigError, match="no episode has begun"):
            call()


def test_impossible_cameras_are_refused() -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(ConfigError, match="no view 'front'"):
        make_env("metaworld", views=("front",))
    with pytest.raises(ConfigError, match="image_size is 4"):
        make_env("metaworld", views=("topview",), image_size=4)


def test_images_are_upright() -> None:
    """The arm is higher in the picture when it is higher, although the camera is mounted upside down."""
    pytest.importorskip("metaworld")
    code = """
import numpy as np
from actok.envs import make_env
env = make_env("metaworld", views=("corner2",), image_size=61)
def red(image):  # the arm's colour
    image = image.astype(int)
    return (image[..., 0] > 90) & (image[..., 1] < 60) & (image[..., 2] < 60)
image = env.reset("reach-v3", seed=0).images
assert image["corner2"].shape == (61, 61, 3) and image["corner2"].dtype == np.uint8
def centre(action):
    env.reset("reach-v3", seed=0)
    for _ in range(23):
        images = env.step(np.array(action, np.float32)).images
    return np.argwhere(red(images["corner2"])).mean(0)[0]
print(centre([0, 0, 1, 0]) < centre([0, 0, -1, 0]) - 0.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "need an offscreen OpenGL" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a window system is always there")
@pytest.mark.parametrize(
    ("installed", "told", "display", "chosen"),
    [
        ({"libEGL.so.1", "libOSMesa.so.8"}, None, None, "egl"),
        ({"libOSMesa.so.6"}, None, None, "osmesa"),
        (set(), None, None, "egl"),
        ({"libEGL.so.1"}, "osmesa", None, "osmesa"),
        ({"libOSMesa.so.8"}, None, ":0", None),
    ],
)
def test_the_library_that_is_installed_renders(
    monkeypatch: pytest.MonkeyPatch, installed: set, told: str | None, display: str | None, chosen: str | None
) -> None:
    def load(name: str) -> None:
        if name not in installed:
            raise OSError(name)

    monkeypatch.setattr(cameras.ctypes, "CDLL", load)
    monkeypatch.delitem(sys.modules, "mujoco.gl_context", raising=False)
    for variable, value in (("MUJOCO_GL", told), ("DISPLAY", display)):
        monkeypatch.setenv(variable, value or "")  # so that what is set here is undone in any case
        if value is None:
            monkeypatch.delenv(variable)
    cameras.choose_backend()
    assert os.environ.get("MUJOCO_GL") == chosen


def test_cameras_after_an_environment_without_any_in_the_same_process() -> None:
    pytest.importorskip("metaworld")
    code = """
from actok.envs import make_env
make_env("metaworld").reset("reach-v3", seed=0)  # imports MuJoCo, which reads then how to render
print(make_env("metaworld", views=("topview",), image_size=32).reset("reach-v3", seed=0).images["topview"].std() > 5)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if "install libegl1" in done.stderr and not any(map(cameras._loads, ("libEGL.so.1", "libOSMesa.so.8"))):
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("name", ["metaworld-state", "aloha-state"])
def test_a_way_to_render_that_mujoco_does_not_know_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(ConfigError, match=r"MUJOCO_GL is 'nonsense'.* or disable, or unset it"):
        make_env(name)
    for known in ("disabled", " GLFW"):
        monkeypatch.setenv("MUJOCO_GL", known)
        cameras.check_variable()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a window system is always there")
def test_a_bare_machine_is_told_how_to_render() -> None:
    pytest.importorskip("metaworld")
    code = "from actok.envs import make_env; make_env('metaworld', views=('topview',)).reset('reach-v3', seed=0)"
    environment = {"MUJOCO_GL": "glfw", "PATH": "", "HOME": "/tmp"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "MUJOCO_GL=egl" in done.stderr
