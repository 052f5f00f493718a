"""Closed-loop replay: the expert's next actions, through the tokenizer, from wherever the robot is now."""

import json
from dataclasses import replace

import numpy as np
import pytest

from actok.core import ConfigError, DataError, FitPart, SpaceMismatchError
from actok.data import Episode
from actok.envs import Env, make_env
from actok.evaluation.closed_loop import replay_closed_loop
from actok.evaluation.record import collect
from actok.evaluation.replay import replay
from actok.tokenizers.bins import BinsConfig, BinsTokenizer
from pointmass import SPACE, PointMass

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


# -- replay -----------------------------------------------------------------------------------------------------------

HORIZON = 7


class Refusing(BinsTokenizer):
    """Bins that decline to decode chunks that begin with a press."""

    kind = "refusing"

    def _decode(self, flat, offsets, horizon, embodiment, context, repair):
        result = super()._decode(flat, offsets, horizon, embodiment, context, repair)
        valid = result.chunks[:, 0, 2] <= 0
        return result._replace(valid=valid, reasons=[None if ok else "declined" for ok in valid])


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return list(collect(PointMass(), ["far", "half", "near"], 5, seed=2))


def fitted(bins: int, episodes, horizon: int = HORIZON, cls=BinsTokenizer, space=SPACE):
    steps = np.concatenate([e.actions for e in episodes])
    chunks = steps[: len(steps) // horizon * horizon].reshape(-1, horizon, space.dim)
    return cls.fit([FitPart(actions=chunks, space=space)], BinsConfig(bins=bins, normaliser="min_max"))


def replayed(episodes, tokenizers, **settings) -> dict:
    return replay_closed_loop(PointMass(), episodes, tokenizers, **{"workers": 1, "progress": False, **settings})


def test_whoever_sees_recovers_from_what_open_loop_does_not(episodes) -> None:
    """At six bins the error of each step is large: open loop it adds up, closed loop the next chunk makes up for it."""
    tokenizers = {"fine": fitted(997, episodes), "coarse": fitted(6, episodes)}
    far = [e for e in episodes if e.task == "far"]
    loose = replay(PointMass(), far, tokenizers, workers=1, progress=False)["tokenizers"]
    tight = replayed(far, tokenizers)
    rows = tight["tokenizers"]
    assert list(rows) == ["expert", "fine", "coarse"]
    assert rows["expert"]["rate"] == rows["fine"]["rate"] == 1.0
    assert rows["expert"]["normalised_l1"] is None
    assert 0 < rows["fine"]["normalised_l1"] < rows["coarse"]["normalised_l1"]
    assert loose["coarse"]["rate"] < 0.5 < rows["coarse"]["rate"]
    assert tight["horizon"] == rows["fine"]["horizon"] == HORIZON
    assert json.loads(json.dumps(tight)) == tight


def test_the_expert_in_chunks_does_what_it_did_step_by_step(episodes) -> None:
    result = replayed(episodes, {"fine": fitted(997, episodes)}, limit=1.0)
    assert result["tokenizers"]["expert"]["success"] == [True] * 15
    # Demonstrations end ten steps after their first success.
    assert result["tokenizers"]["expert"]["chunks"] == sum(-(-(len(e) - 10) // HORIZON) for e in episodes)


def test_a_chunk_that_does_not_decode_ends_its_episode(episodes) -> None:
    result = replayed(episodes, {"declining": fitted(97, episodes, cls=Refusing)})
    row = result["tokenizers"]["declining"]
    assert 0 < row["invalid"] <= 15 - sum(row["success"])
    assert result["tokenizers"]["expert"]["invalid"] == 0


def test_closed_loop_results_depend_neither_on_processes_nor_on_the_batch(episodes) -> None:
    tokenizers = {"bins": fitted(11, episodes)}

    def facts(result: dict) -> dict:
        rows = {n: {k: v for k, v in r.items() if k != "seconds"} for n, r in result["tokenizers"].items()}
        return {**result, "tokenizers": rows}

    one = facts(replayed(episodes, tokenizers, batch=4))
    assert one == facts(replayed(episodes, tokenizers, batch=4, workers=2))
    other = facts(replayed(episodes, tokenizers, batch=15))
    assert other["tokenizers"]["bins"].pop("normalised_l1") == pytest.approx(
        one["tokenizers"]["bins"].pop("normalised_l1"), rel=1e-9
    )
    assert one == other


def test_each_horizon_has_its_expert(episodes) -> None:
    result = replayed(episodes[:3], {"short": fitted(97, episodes, 2), "long": fitted(97, episodes, 13)})
    rows = result["tokenizers"]
    assert list(rows) == ["expert T=2", "expert T=13", "short", "long"]
    assert (rows["short"]["baseline"], rows["long"]["baseline"]) == ("expert T=2", "expert T=13")
    assert result["horizon"] is None
    assert rows["short"]["chunks"] > rows["long"]["chunks"]
    assert len(result["paired"]) == 6


def test_an_episode_is_over_at_its_limit(episodes) -> None:
    far = [e for e in episodes if e.task == "far"]
    result = replayed(far, {"fine": fitted(997, episodes)}, limit=0.3)
    assert result["tokenizers"]["expert"]["rate"] == 0.0
    assert result["tokenizers"]["expert"]["chunks"] == sum(-(-int(np.ceil(0.3 * len(e))) // HORIZON) for e in far)


def test_what_cannot_be_replayed_closed_loop_is_refused(episodes) -> None:
    fine = {"fine": fitted(97, episodes)}
    with pytest.raises(ConfigError, match="no tokenizer"):
        replayed(episodes, {})
    with pytest.raises(ConfigError, match="the name of the expert's own row"):
        replayed(episodes, {"expert": fine["fine"]})
    with pytest.raises(ConfigError, match="limit is 0"):
        replayed(episodes, fine, limit=0)
    with pytest.raises(ConfigError, match="has no expert"):
        replayed([replace(episodes[0], task="mute")], fine)
    with pytest.raises(DataError, match="no start state"):
        replayed([replace(episodes[0], start_state={})], fine)
    other = replace(SPACE, embodiment="else")
    with pytest.raises(SpaceMismatchError, match="knows the embodiments else"):
        replayed(episodes, {"other": fitted(97, episodes, space=other)})


def test_meta_world_closes_the_loop() -> None:
    pytest.importorskip("metaworld")
    env = make_env("metaworld-state")
    episodes = list(collect(env, ["reach-v3", "door-open-v3"], 2, seed=0))
    chunks = np.concatenate([e.actions[: len(e) // 20 * 20].reshape(-1, 20, 4) for e in episodes])
    tokenizer = BinsTokenizer.fit([FitPart(actions=chunks, space=env.space)], BinsConfig(bins=256))
    result = replay_closed_loop(env, episodes, {"bins": tokenizer}, workers=1, progress=False)
    assert result["tokenizers"]["expert"]["success"] == [True] * 4
    assert result["tokenizers"]["bins"]["success"] == [True] * 4
