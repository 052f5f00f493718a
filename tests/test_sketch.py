"""Streaming statistics: exact where they say so, within a stated rank error where not, in any order and grouping."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ArtifactError, DataError
from actok.signal import sketch
from actok.signal.sketch import EXACT_FRAMES, StatisticsAccumulator
from actok.signal.statistics import QUANTILES, Statistics
from realdata import REAL, needs_real

# Tolerated distance in rank at 0.1, 1, 99 and 99.9 %, as `actok.signal.sketch` states it.
RANK_ERROR = (5e-5, 4e-4, 4e-4, 5e-5)


def collect(blocks, dim):
    accumulator = StatisticsAccumulator(dim)
    for block in blocks:
        accumulator.update(block)
    return accumulator


def assert_close(got: Statistics, frames: np.ndarray) -> None:
    """Everything exact up to rounding but quantiles, which are within RANK_ERROR of their level."""
    assert_moments(got, frames)
    ordered = np.sort(frames.astype(np.float64), axis=0)
    for row, (level, tolerance) in enumerate(zip(QUANTILES, RANK_ERROR, strict=True)):
        for d in range(frames.shape[1]):
            below = np.searchsorted(ordered[:, d], got.quantiles[row, d], side="left") / len(frames)
            up_to = np.searchsorted(ordered[:, d], got.quantiles[row, d], side="right") / len(frames)
            assert below - tolerance <= level <= up_to + tolerance + 1 / len(frames), (d, level, below, up_to)


def assert_moments(got: Statistics, frames: np.ndarray) -> None:
    frames = frames.astype(np.float64)
    assert got.count == len(frames)
    assert np.array_equal(got.minimum, frames.min(0))
    assert np.array_equal(got.maximum, frames.max(0))
    scale = np.abs(frames).max(0) + 1e-12
    np.testing.assert_allclose(got.mean / scale, frames.mean(0) / scale, atol=1e-11)
    np.testing.assert_allclose(got.std / scale, frames.std(0) / scale, atol=1e-11)


def hard(count: int, seed: int = 0) -> np.ndarray:
    """[count, 7]: normal, heavy-tailed, sorted, 82 % one value, rarely open gripper, constant, far from zero."""
    rng = np.random.default_rng(seed)
    columns = [
        rng.normal(size=count),
        rng.standard_cauchy(count),
        np.sort(rng.normal(size=count)),
        np.where(rng.random(count) < 0.82, 0.25, rng.normal(size=count)),
        (rng.random(count) < 0.004).astype(float),
        np.full(count, 0.1),
        1e6 + rng.random(count),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 23), min_size=1, max_size=9).filter(any), st.integers(0, 99))
def test_few_frames_are_exact_in_any_grouping(sizes, seed):
    frames = np.random.default_rng(seed).choice([-1.0, 0.0, 0.5, 3.7], size=(sum(sizes), 5))
    got = collect(np.split(frames, np.cumsum(sizes)[:-1]), 5).result()
    assert np.array_equal(got.quantiles, np.quantile(frames, QUANTILES, axis=0))
    assert_moments(got, frames)


def test_one_frame_and_constant_data_have_no_spread():
    got = collect([np.full((1, 3), 0.1)], 3).result()
    for value in (got.minimum, got.maximum, got.mean, *got.quantiles):
        assert np.array_equal(value, [0.1] * 3)
    many = collect([np.full((70_001, 2), 0.1)] * 3, 2).result()
    for value in (many.minimum, many.maximum, many.mean, *many.quantiles):
        assert np.array_equal(value, [0.1] * 2)
    assert np.array_equal(many.std, [0.0] * 2)


@pytest.mark.parametrize("order", ["as they come", "reversed", "shuffled"])
def test_many_frames_in_any_order(order):
    frames = hard(3 * EXACT_FRAMES + 12345)
    index = np.arange(len(frames))
    if order == "reversed":
        index = index[::-1]
    elif order == "shuffled":
        index = np.random.default_rng(1).permutation(index)
    assert_close(collect(np.array_split(frames[index], 17), 7).result(), frames)


def test_merging_is_associative_and_leaves_its_argument_alone():
    frames = hard(250_007)
    parts = np.split(frames, [3, 90_001, 90_002, 231_013])  # few and many frames, in every combination
    left = collect(parts[:1], 7)
    for part in parts[1:]:
        left.merge(collect([part], 7))
    right = collect(parts[-1:], 7)
    for part in parts[-2::-1]:
        other = collect([part], 7)
        before = {k: v.copy() for k, v in other.to_arrays().items()}
        other_result = other.result().to_dict()
        right.merge(other)
        assert all(np.array_equal(v, other.to_arrays()[k]) for k, v in before.items())
        assert other.result().to_dict() == other_result
    assert_close(left.result(), frames)
    assert_close(right.result(), frames)


def test_sixty_workers_ship_their_state():
    frames = hard(300_011, seed=3)
    total = StatisticsAccumulator(7)
    for part in np.array_split(frames, 61):
        state = pickle.loads(pickle.dumps(collect([part], 7).to_arrays()))
        total.merge(StatisticsAccumulator.from_arrays(state))
        assert all(isinstance(v, np.ndarray) and v.dtype != object for v in state.values())
    assert_close(total.result(), frames)
    again = StatisticsAccumulator.from_arrays(total.to_arrays())
    assert again.result().to_dict() == total.result().to_dict()
    again.update(frames[:1])
    assert again.result().count == 300_012


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=13),
    weights=st.lists(st.integers(1, 9), min_size=13, max_size=13),
    cuts=st.lists(st.integers(0, 2999), max_size=7),
    seed=st.integers(0, 99),
)
def test_few_distinct_values_in_any_grouping(values, weights, cuts, seed):
    # Only atoms, most of them heavy: what a discretised teleoperation device sends.
    share = np.array(weights[: len(values)]) / sum(weights[: len(values)])
    frames = np.random.default_rng(seed).choice(np.array(values, np.float32), size=(2999, 2), p=share)
    parts = np.split(frames, sorted(cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch, "EXACT_FRAMES", 211)
        total = StatisticsAccumulator(2)
        for part in parts:
            total.merge(collect([part], 2))
        assert "digests" in total.to_arrays()
        assert_close(total.result(), frames)


def test_merging_nothing_changes_nothing():
    some = collect([hard(11)], 7)
    before = some.result().to_dict()
    some.merge(StatisticsAccumulator(7))
    assert some.result().to_dict() == before
    none = StatisticsAccumulator(7)
    none.merge(some)
    assert none.result().to_dict() == before


def test_memory_is_bounded():
    state = collect(np.array_split(hard(800_003), 5), 7).to_arrays()
    assert sum(v.nbytes for v in state.values()) < 7 * 32_000


def test_variance_far_from_zero_survives():
    frames = np.random.default_rng(0).normal(1e9, 1e-3, size=(1009, 2))
    got = collect(np.array_split(frames, 13), 2).result()
    np.testing.assert_allclose(got.std, (frames - 1e9).std(0), rtol=1e-5)  # a sum of squares would lose all digits


def test_bad_input():
    accumulator = StatisticsAccumulator(3)
    with pytest.raises(DataError, match="no frame was seen"):
        accumulator.result()
    accumulator.update(np.zeros((5, 3)))
    broken = np.zeros((4, 3), np.float32)
    broken[2, 1] = np.nan
    with pytest.raises(DataError, match="frame 7 holds nan in dimension 1"):
        accumulator.update(broken)
    assert accumulator.result().count == 5
    with pytest.raises(DataError, match=r"shape \(4, 2\)"):
        accumulator.update(broken[:, :2])
    with pytest.raises(DataError, match="dimensions cannot be merged"):
        accumulator.merge(StatisticsAccumulator(2))
    with pytest.raises(DataError, match="0 dimensions"):
        StatisticsAccumulator(0)


@pytest.mark.parametrize("count", [5, EXACT_FRAMES + 5])
def test_incomplete_states_are_refused(count):
    state = collect([np.random.default_rng(0).normal(size=(count, 2))], 2).to_arrays()
    for key in state:
        with pytest.raises(ArtifactError, match="compute them again"):
            StatisticsAccumulator.from_arrays({k: v for k, v in state.items() if k != key})
    with pytest.raises(ArtifactError, match="frames; compute them again"):
        StatisticsAccumulator.from_arrays({**state, "count": state["count"] + 1})
    if "digests" in state:
        with pytest.raises(ArtifactError, match="incomplete"):
            StatisticsAccumulator.from_arrays({**state, "digests": state["digests"][:-40]})


@needs_real
def test_real_sets_beyond_the_exact_limit(monkeypatch):
    monkeypatch.setattr(sketch, "EXACT_FRAMES", 4001)
    files = sorted((REAL / "sim" / "metaworld_state").glob("*.npz"))
    blocks = []
    for file in files:
        with np.load(file) as data:
            blocks.append(data["action"].astype(np.float32))
    assert_close(collect(blocks, 4).result(), np.concatenate(blocks))


@needs_real
def test_human_data_with_many_repeats(monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(sketch, "EXACT_FRAMES", 211)
    with h5py.File(REAL / "real" / "robosuite_human" / "lift.hdf5") as file:
        blocks = [np.asarray(demo["actions"], np.float32) for demo in file["data"].values()]
    assert_close(collect(blocks, blocks[0].shape[1]).result(), np.concatenate(blocks))
