"""Laws of the split by episode."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ActionSpace, ConfigError, DataError
from actok.data.episodes import EpisodeDataset
from actok.data.splits import split_dataset, split_episodes
from realdata import REAL, needs_real


def parts(split):
    return split.train, split.validation, split.test


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 400), st.integers(0, 2**40), st.booleans(), st.data())
def test_a_partition_with_nothing_empty(count, seed, with_tasks, data):
    tasks = data.draw(st.lists(st.sampled_from("abcde"), min_size=count, max_size=count)) if with_tasks else None
    split = split_episodes(count, seed=seed, tasks=tasks)
    assert sorted(np.concatenate(parts(split))) == list(range(count))
    for part, fraction in zip(parts(split), (0.8, 0.1, 0.1), strict=True):
        assert len(part) >= 1
        assert (np.diff(part) > 0).all()
        assert abs(len(part) - fraction * count) < 2
    again = split_episodes(count, seed=seed, tasks=tasks)
    assert all(np.array_equal(a, b) for a, b in zip(parts(split), parts(again), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=17), st.integers(0, 99))
def test_every_task_gets_its_whole_share(sizes, seed):
    tasks = np.repeat([f"task{i}" for i in range(len(sizes))], sizes)
    if len(tasks) < 10:  # below that, filling every split may take from a task's share
        return
    split = split_episodes(np.ones(len(tasks), int), seed=seed, tasks=list(tasks))
    for i, size in enumerate(sizes):
        for part, fraction in zip(parts(split), (0.8, 0.1, 0.1), strict=True):
            assert (tasks[part] == f"task{i}").sum() >= np.floor(size * fraction + 1e-9)


def test_a_fixed_draw_on_every_platform():
    # A change here would silently move test episodes of published results into training.
    split = split_episodes(13, seed=7)
    assert [len(p) for p in parts(split)] == [11, 1, 1]
    raw = np.random.PCG64(7).random_raw(13)
    assert sorted(split.train) == sorted(np.argsort(raw)[:11])
    assert int(split.test[0]) == int(np.argmax(raw))


def test_seeds_differ_and_lengths_do_not_matter():
    one, two = split_episodes(101, seed=1), split_episodes(101, seed=2)
    assert not np.array_equal(one.test, two.test)
    assert np.array_equal(one.test, split_episodes(np.arange(101) + 5, seed=1).test)


def test_two_episodes_have_no_validation_and_one_has_training_only():
    with pytest.warns(UserWarning, match="2 episodes are too few for every split: validation is empty"):
        split = split_episodes(2)
    assert [len(p) for p in parts(split)] == [1, 0, 1]
    with pytest.warns(UserWarning, match="1 episode is too few for every split: validation and test are empty"):
        split = split_episodes(1, tasks=["only"])
    assert [len(p) for p in parts(split)] == [1, 0, 0]


def test_a_zero_fraction_is_meant():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_episodes(2, fractions=(0.9, 0.0, 0.1))
    assert [len(p) for p in parts(split)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"count_or_lengths": 0}, DataError, "0 episodes"),
        ({"count_or_lengths": 9, "fractions": (0.5, 0.5, 0.5)}, ConfigError, "adding up to 1"),
        ({"count_or_lengths": 9, "fractions": (1.1, -0.1, 0.0)}, ConfigError, "adding up to 1"),
        ({"count_or_lengths": 9, "fractions": (0.9, 0.1)}, ConfigError, "adding up to 1"),
        ({"count_or_lengths": 9, "seed": -1}, ConfigError, "seed is -1"),
        ({"count_or_lengths": 9, "tasks": ["a"]}, DataError, "1 tasks are given for 9 episodes"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        split_episodes(**arguments)


class Named(EpisodeDataset):
    """Episodes of which only number and tasks are known; a split reads none."""

    name, space, space_origin = "named", ActionSpace.raw(5), "nothing known"

    def __init__(self, tasks):
        self.lengths, self.tasks = np.full(len(tasks), 2), tasks

    def episode(self, index, *, images=False):
        raise AssertionError("a split reads no episode")


def test_a_dataset_is_split_by_its_own_tasks():
    tasks = ["push"] * 20 + ["pull"] * 10
    split = split_dataset(Named(tasks), seed=11)
    for part, push, pull in zip(parts(split), (16, 2, 2), (8, 1, 1), strict=True):
        assert (len(part[part < 20]), len(part[part >= 20])) == (push, pull)
    assert np.array_equal(split_dataset(Named(tasks), seed=12).test, split_episodes(30, seed=12, tasks=tasks).test)


@needs_real
def test_every_meta_world_task_is_trained_and_tested():
    files = sorted((REAL / "sim" / "metaworld_state").glob("*.npz"))
    tasks = [f.stem for f in files for _ in np.load(f)["episode_length"]]
    split = split_episodes(len(tasks), tasks=tasks)
    for part, each in zip(parts(split), (16, 2, 2), strict=True):
        names, counts = np.unique(np.array(tasks)[part], return_counts=True)
        assert len(names) == len(files)
        assert set(counts) == {each}
