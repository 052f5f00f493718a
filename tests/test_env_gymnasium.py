"""Any gymnasium environment: the documented adapter, installed as somebody's distribution, works everywhere by name."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError
from actok.envs import env_class, list_envs, make_env

gymnasium = pytest.importorskip("gymnasium")
from actok.envs.gymnasium_env import GymnasiumEnv  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "simulators.md"


class Slide(gymnasium.Env):
    """A bead on two rails that must get to a random place; pushing it off an end terminates."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(-9, 9, (5,), np.float64)

    def __init__(self, report: str = "is_success") -> None:
        self.report = report
        self.closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = np.zeros(2), self.np_random.uniform(-1, 1, 2)
        self.steps = 0
        return self._seen(), {}

    def step(self, action):
        assert action.dtype == np.float32
        self.steps += 1
        self.position = self.position + 0.1 * action + 0.001 * self.np_random.normal(size=2)
        near = bool(np.abs(self.position - self.goal).max() < 0.1)
        over = bool(np.abs(self.position).max() > 1.5)
        return self._seen(), float(near), over, self.steps >= 5, {self.report: near}

    def _seen(self):
        return np.array([*self.position, *self.goal, self.steps])

    def close(self):
        self.closed = True


class Bead(GymnasiumEnv):
    """The adapter of Slide: P = 3, D = 2."""

    name = "bead"
    max_steps = 37
    proprio_size = 3
    tasks = ("quiet", "slide")
    space = ActionSpace(
        embodiment="bead",
        dim=2,
        groups=(ActionGroup(name="rails", kind="position", dims=(0, 1), mode="delta", unit="m", scale=0.1),),
        rate_hz=11.0,
    )

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def instruction(self, task):
        self.check_task(task)
        return f"{task} to the place"

    def make(self, task):
        return Slide("nothing" if task == "quiet" else "is_success")

    def proprio(self, observation):
        return observation[[0, 1, 4]]

    def images(self, observation):
        return {"side": np.full((3, 5, 3), int(observation[4]), np.uint8)}


def run(env, actions):
    return np.stack([np.append(env.step(a).proprio, env.success) for a in actions])


ACTIONS = np.random.default_rng(0).uniform(-1, 1, (17, 2)).astype(np.float32)


# -- the adapter --------------------------------------------------------------------------------------------------------


def test_an_episode_is_a_function_of_its_seed_whatever_ran_before() -> None:
    env = Bead()
    env.reset("slide", seed=3)
    start = env.start_state()
    expected = run(env, ACTIONS)
    assert expected[-1, 2] == 17, "the time limit of 5 ended nothing"
    env.reset("slide", seed=4)
    assert not np.array_equal(run(env, ACTIONS), expected)
    env.restore("slide", start)
    assert np.array_equal(run(env, ACTIONS), expected)
    env.reset("quiet", seed=8)
    copy = pickle.loads(pickle.dumps(env))
    copy.restore("slide", start)
    assert np.array_equal(run(copy, ACTIONS), expected)


def test_a_copy_carries_the_options_and_not_the_simulator() -> None:
    env = Bead(gain=2.5)
    env.reset("slide", seed=1)
    copy = pickle.loads(pickle.dumps(env))
    assert copy.gain == 2.5
    with pytest.raises(ConfigError, match="no episode has begun"):
        copy.step(ACTIONS[0])
    assert env.simulator.steps == 0


def test_going_back_repeats_the_episode_exactly() -> None:
    env = Bead()
    env.reset("slide", seed=2)
    run(env, ACTIONS[:7])
    moment, success = env.snapshot(), env.success
    expected = run(env, ACTIONS[7:])
    for _ in range(2):
        env.rollback(moment)
        assert env.success == success
        assert np.array_equal(run(env, ACTIONS[7:]), expected)
    env.reset("slide", seed=2)
    with pytest.raises(ConfigError, match="not of the current episode"):
        env.rollback(moment)


def test_after_the_end_nothing_moves() -> None:
    env = Bead()
    env.reset("slide", seed=2)
    push = np.array([1, 0], np.float32)
    seen = [env.step(push).proprio for _ in range(23)]
    last = env.simulator.steps
    assert last in (15, 16)  # 0.1 a step, over 1.5, a little noise
    assert all(np.array_equal(proprio, seen[last - 1]) for proprio in seen[last:])
    env.reset("slide", seed=2)
    assert np.array_equal(env.step(push).proprio, seen[0])


def test_success_is_what_info_says_or_an_error() -> None:
    env = Bead()
    observation = env.reset("slide", seed=5)
    assert not env.success
    while not env.success:
        seen = env._seen
        observation = env.step(np.clip((seen[2:4] - seen[:2]) / 0.1, -1, 1))
    assert np.abs(env.simulator.position - env.simulator.goal).max() < 0.1
    assert observation.images["side"].shape == (3, 5, 3)
    env.restore("slide", env.start_state())
    assert not env.success
    env.reset("quiet", seed=5)
    with pytest.raises(ConfigError, match=r"it has: nothing.*override Bead\.succeeded"):
        env.step(ACTIONS[0])


def test_a_new_task_closes_the_old_simulator() -> None:
    env = Bead()
    env.reset("slide", seed=0)
    old = env.simulator
    env.reset("slide", seed=1)
    assert env.simulator is old
    env.reset("quiet", seed=1)
    assert old.closed
    assert env.simulator is not old


@pytest.mark.parametrize(
    "start_state", [{}, {"seed": np.array([1.5])}, {"seed": np.array([-1])}, {"seed": np.zeros(2, int)}]
)
def test_a_start_state_of_something_else_is_refused(start_state: dict) -> None:
    with pytest.raises(DataError, match="start state of environment 'bead' is"):
        Bead().restore("slide", start_state)


def test_mismatched_declarations_are_refused_with_names() -> None:
    class Wide(Bead):
        def make(self, task):
            return gymnasium.make("Pendulum-v1")

    class Discrete(Bead):
        def make(self, task):
            return gymnasium.make("CartPole-v1")

    class Square(Bead):
        def proprio(self, observation):
            return observation[:4].reshape(2, 2)

    class Nan(Bead):
        def proprio(self, observation):
            return observation * np.nan

    for wrong in (Wide, Discrete):
        with pytest.raises(ConfigError, match="2 continuous dimensions"):
            wrong().reset("slide", seed=0)
    for wrong in (Square, Nan):
        with pytest.raises(DataError, match=r"it is to be \[P\], finite"):
            wrong().reset("slide", seed=0)
    with pytest.raises(ConfigError, match=r"no scripted expert; override Bead\.expert"):
        Bead().expert("slide")
    with pytest.raises(ConfigError, match="seed is -1"):
        Bead().reset("slide", seed=-1)
    env = Bead()
    env.reset("slide", seed=0)
    with pytest.raises(DataError, match="not finite"):
        env.step(np.array([0, np.nan]))
    assert env.simulator.steps == 0


# -- as somebody's distribution -----------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's own code as an installed distribution with an entry point, in a folder on the path."""
    site = tmp_path / "site"
    folder = site / "pendulum_env-1.2.dist-info"
    folder.mkdir(parents=True)
    text = PAGE.read_text()
    code = next(c for c in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "GymnasiumEnv):" in c)
    (site / "pendulum_env.py").write_text(code)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pendulum-env\nVersion: 1.2\n")
    points = re.search(r'^\[project\.entry-points\."actok\.envs"\]\n(.*?)^```', text, re.M | re.S)
    assert points is not None
    (folder / "entry_points.txt").write_text("[actok.envs]\n" + points[1].replace('"', ""))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.delitem(sys.modules, "pendulum_env", raising=False)
    return site


def test_the_pages_environment_is_found_by_name(installed: Path) -> None:
    assert list_envs()["pendulum"] == "pendulum_env:Pendulum"
    assert "pendulum_env" not in sys.modules, "listing imports nothing"
    assert env_class("pendulum").max_steps == 200
    env = make_env("pendulum")
    first = env.reset("swing-up", seed=4)
    assert first.proprio.shape == (env.proprio_size,) == (3,)
    with pytest.raises(ConfigError, match="did you mean 'pendulum'"):
        make_env("pendulun")


def test_collect_records_the_pages_environment_in_two_processes(installed: Path, tmp_path: Path) -> None:
    from actok.data import open_dataset

    arguments = [
        "collect",
        "--env",
        "pendulum",
        "--tasks",
        "all",
        "--episodes",
        "3",
        "--workers",
        "2",
        "--out",
        "demos",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "actok", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    stored = list(open_dataset(tmp_path / "demos"))
    assert len(stored) == 3
    env = make_env("pendulum")
    for episode in stored:
        assert episode.success
        assert set(episode.subtask_names) == {"swing", "balance"}
        observation = env.restore(episode.task, episode.start_state)
        solved = []
        for proprio, action in zip(episode.proprio, episode.actions, strict=True):
            assert np.array_equal(observation.proprio, proprio)
            observation = env.step(action)
            solved.append(env.success)
        assert any(solved)
    info = json.loads((tmp_path / "demos" / "meta" / "info.json").read_text())
    assert info["features"]["observation.state"]["shape"] == [3]
