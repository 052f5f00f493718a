"""Recording: what is kept, what is dropped, and that nothing but the seed decides it."""

import json
import os

import numpy as np
import pytest

from actok.core import ActokError
from actok.data import Episode, open_dataset
from actok.envs import Observation
from actok.evaluation.record import SETTLE_STEPS, collect, demonstrate, record_lerobot
from pointmass import SPACE, PointMass, Straight


def same(a: Episode, b: Episode) -> bool:
    arrays = ("actions", "proprio", "subtask", "timestamps")
    return (
        (a.index, a.task, a.instruction, a.success, a.subtask_names)
        == (b.index, b.task, b.instruction, b.success, b.subtask_names)
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
        and all(np.array_equal(a.start_state[k], b.start_state[k]) for k in a.start_state | b.start_state)
        and a.images.keys() == b.images.keys()
        and all(np.array_equal(a.images[k], b.images[k]) for k in a.images)
    )


def test_an_episode_ends_some_steps_after_its_first_success() -> None:
    env = PointMass()
    episode = demonstrate(env, "near", seed=3, attempt=5, max_steps=61)
    env.restore("near", episode.start_state)
    solved = []
    for action in episode.actions:
        env.step(action)
        solved.append(env.success)
    assert episode.success
    first = int(np.argmax(solved))
    assert len(episode) == first + 1 + SETTLE_STEPS
    assert not all(solved[first:]), "success counts at any step, held or not"


def test_an_episode_holds_what_was_seen_before_each_action() -> None:
    env = PointMass(view=True)
    episode = demonstrate(env, "far", seed=3, attempt=0, max_steps=61)
    observation = env.restore("far", episode.start_state)
    expert = Straight()
    for t, action in enumerate(episode.actions):
        choice = expert(observation)
        assert np.array_equal(episode.proprio[t], observation.proprio)
        assert np.array_equal(episode.images["top"][t], observation.images["top"])
        assert np.array_equal(action, choice.action)
        assert episode.subtask[t] == choice.subtask
        observation = env.step(action)
    assert episode.subtask_names == ("approach", "press")
    assert np.allclose(np.diff(episode.timestamps), 1 / 7)
    assert episode.instruction == "go to the far goal and press"


def test_episodes_are_a_function_of_seed_task_and_attempt() -> None:
    first = demonstrate(PointMass(), "far", seed=1, attempt=2, noise=0.1, max_steps=61)
    env = PointMass()
    demonstrate(env, "near", seed=9, attempt=9, noise=0.3, max_steps=61)
    assert same(first, demonstrate(env, "far", seed=1, attempt=2, noise=0.1, max_steps=61))
    for other in ({"seed": 2}, {"attempt": 3}, {"noise": 0.0}):
        changed = demonstrate(env, "far", **({"seed": 1, "attempt": 2, "noise": 0.1, "max_steps": 61} | other))
        assert not np.array_equal(first.actions[:5], changed.actions[:5])


def test_tasks_begin_at_start_states_of_their_own() -> None:
    near, far = (demonstrate(PointMass(), task, seed=1, attempt=2, max_steps=61) for task in ("near", "far"))
    assert not np.array_equal(near.start_state["position"], far.start_state["position"])


def test_noise_is_recorded_as_executed_and_stays_within_the_limits() -> None:
    env = PointMass()
    clean = demonstrate(env, "far", seed=1, attempt=2, max_steps=61)
    noisy = demonstrate(env, "far", seed=1, attempt=2, noise=0.4, max_steps=61)
    assert (noisy.actions >= SPACE.low).all()
    assert (noisy.actions <= SPACE.high).all()
    spread = np.abs(noisy.actions[:5] - clean.actions[:5])
    assert spread.max() > 0.1
    observations = [env.restore("far", noisy.start_state), *(env.step(a) for a in noisy.actions[:-1])]
    assert np.array_equal(np.stack([o.proprio for o in observations]), noisy.proprio)


def test_failures_are_dropped_counted_and_made_up_for() -> None:
    collection = collect(PointMass(), ["half", "near"], 7, seed=5)
    episodes = list(collection)
    report = collection.report
    assert [e.index for e in episodes] == list(range(14))
    assert all(e.success for e in episodes)
    assert {t: sum(e.task == t for e in episodes) for t in ("half", "near")} == {"half": 7, "near": 7}
    half = report.tasks["half"]
    assert half.failed > 0
    assert half.attempted == half.kept + half.failed
    assert report.tasks["near"].attempted == 7
    assert half.steps == sum(len(e) for e in episodes if e.task == "half")
    assert report.failed == half.failed
    assert report.short == {}
    # Independently: attempt by attempt, until seven succeeded.
    wins = [demonstrate(PointMass(), "half", seed=5, attempt=i, max_steps=61).success for i in range(half.attempted)]
    assert sum(wins) == 7
    assert json.loads(json.dumps(report.to_dict()))["tasks"]["half"]["failed"] == half.failed


def test_a_task_that_never_succeeds_ends_and_is_reported() -> None:
    collection = collect(PointMass(), ["never", "near"], 2, seed=0, max_steps=11)
    assert [e.task for e in collection] == ["near", "near"]
    assert collection.report.short == {"never": 2}
    assert collection.report.tasks["never"].attempted == collection.report.tasks["never"].failed == 10


def test_two_processes_record_what_one_does() -> None:
    arguments = {"tasks": ["far", "half", "near"], "episodes_per_task": 3, "seed": 11, "noise": 0.2}
    one = collect(PointMass(view=True), **arguments)
    two = collect(PointMass(view=True), workers=2, **arguments)
    pairs = list(zip(one, two, strict=True))
    assert len(pairs) == 9
    assert all(same(a, b) for a, b in pairs)
    assert one.report.tasks == two.report.tasks


def test_leaving_early_ends_the_processes_and_a_second_pass_is_refused() -> None:
    collection = collect(PointMass(), ["near"], 5, workers=2)
    iterator = iter(collection)
    assert next(iterator).index == 0
    iterator.close()
    with pytest.raises(ActokError, match="iterated over before"):
        list(collection)


class Dying(PointMass):
    """A simulator that takes its process down."""

    def step(self, action: np.ndarray) -> Observation:
        os._exit(3)


def test_a_dead_process_is_explained() -> None:
    with pytest.raises(ActokError, match=r"process died.*workers=1"):
        list(collect(Dying(), ["near"], 3, workers=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ["neat"]}, "no task 'neat'; did you mean 'near'"),
        ({"tasks": ["mute"]}, "no expert"),
        ({"tasks": ["near", "near"]}, "each once"),
        ({"tasks": []}, "at least one"),
        ({"episodes_per_task": 0}, "episodes_per_task is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"noise": -0.5}, "noise is -0.5"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(change: dict, words: str) -> None:
    with pytest.raises(ActokError, match=words):
        collect(PointMass(), **({"tasks": ["near"], "episodes_per_task": 1} | change))


def test_zero_workers_are_refused() -> None:
    with pytest.raises(ActokError, match="workers is 0"):
        list(collect(PointMass(), ["near"], 1, workers=0))


def test_a_recorded_lerobot_dataset_gives_the_episodes_back(tmp_path) -> None:
    env = PointMass()
    report = record_lerobot(collect(env, ["far", "near"], 2, seed=4), env, tmp_path / "demos")
    assert report.kept == 4
    expected = list(collect(env, ["far", "near"], 2, seed=4))
    stored = list(open_dataset(tmp_path / "demos"))
    assert len(stored) == 4
    for a, b in zip(expected, stored, strict=True):
        assert np.array_equal(a.actions, b.actions)
        assert np.array_equal(a.proprio, b.proprio)
        assert (a.task, a.instruction, a.success) == (b.task, b.instruction, b.success)
        assert [a.subtask_names[i] for i in a.subtask] == [b.subtask_names[i] for i in b.subtask]
        assert all(np.array_equal(a.start_state[k], b.start_state[k]) for k in a.start_state)
