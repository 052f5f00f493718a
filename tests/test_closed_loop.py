"""Closed-loop replay: the expert's next actions, through the tokenizer, from wherever the robot is now."""

import numpy as np
import pytest

from actok.core import ConfigError
from actok.envs import Env, make_env
from pointmass import PointMass

# Tasks whose simulators remember more than the physics, or hold objects with contacts and hinges.
TASKS = ("assembly-v3", "bin-picking-v3", "door-open-v3", "hammer-v3", "reach-v3", "soccer-v3")


def drive(env, task: str, observation, steps: int) -> tuple[list, list]:
    """What the expert does from here, and what is seen on the way."""
    expert, seen, done = env.expert(task), [], []
    for _ in range(steps):
        done.append(expert(observation).action)
        observation = env.step(done[-1])
        seen.append((observation, env.success))
    return done, seen


# -- going back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_after_going_back_the_same_actions_give_the_same_observations(task: str) -> None:
    env = make_env("metaworld")
    observation = env.reset(task, seed=3)
    _, seen = drive(env, task, observation, 31)
    moment = env.snapshot()
    actions, first = drive(env, task, seen[-1][0], 23)
    rng = np.random.default_rng(0)
    for detour in range(2):
        env.rollback(moment)
        again = [(env.step(action), env.success) for action in actions]
        for (a, a_success), (b, b_success) in zip(first, again, strict=True):
            assert np.array_equal(a.state, b.state)
            assert np.array_equal(a.proprio, b.proprio)
            assert a_success == b_success
        for _ in range(5 + detour):
            env.step(rng.uniform(-1, 1, 4))


def test_a_snapshot_of_another_episode_is_refused() -> None:
    env = make_env("metaworld")
    with pytest.raises(ConfigError, match="no episode has begun"):
        env.snapshot()
    env.reset("reach-v3", seed=0)
    moment = env.snapshot()
    env.reset("reach-v3", seed=0)
    with pytest.raises(ConfigError, match="not of the current episode"):
        env.rollback(moment)


def test_an_environment_that_cannot_go_back_says_so() -> None:
    env = PointMass()
    with pytest.raises(ConfigError, match="'pointmass' cannot go back"):
        Env.snapshot(env)
    with pytest.raises(ConfigError, match="'pointmass' cannot go back"):
        Env.rollback(env, None)


def test_advancing_is_stepping_without_looking() -> None:
    one, other = make_env("metaworld"), make_env("metaworld")
    rng = np.random.default_rng(1)
    for env in (one, other):
        env.reset("button-press-v3", seed=2)
    for action in rng.uniform(-1, 1, (19, 4)):
        seen = one.step(action)
        other.advance(action)
    a, b = one.step(np.zeros(4)), other.step(np.zeros(4))
    assert np.array_equal(a.state, b.state)
    assert not np.array_equal(seen.state, a.state)
