"""Normalisers: exact inverses, ranges, constant and nearly constant dimensions, limits."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actok.core import ConfigError, DataError
from actok.signal.normalise import Normaliser, NormaliserKind
from actok.signal.statistics import Statistics

KINDS = get_args(NormaliserKind)


def data(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(499, 3)) * [1, 20, 0.01] + [0, 5, -1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(x=arrays(np.float64, (7, 3), elements=st.floats(-100, 100)))
def test_inverse(kind, x):
    normaliser = Normaliser.make(kind, Statistics.from_array(data()))
    np.testing.assert_allclose(normaliser.inverse(normaliser(x)), x, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "inside"), [("quantile", 0.98), ("quantile_wide", 0.998), ("min_max", 1.0), ("mean_std", 1.0)]
)
def test_range_holds_the_share_its_name_says(kind, inside):
    steps = np.random.default_rng(1).normal(size=(20_001, 3))
    normaliser = Normaliser.make(kind, Statistics.from_array(steps))
    share = 1 - normaliser.out_of_range(normaliser(steps)).mean(0)
    np.testing.assert_allclose(share, inside, atol=2e-4)


def test_constant_dimension_decodes_to_its_value_and_flags_others():
    steps = data()
    steps[:, 1] = 0.25
    normaliser = Normaliser.make("quantile", Statistics.from_array(steps))
    assert normaliser.constant.tolist() == [False, True, False]
    assert normaliser(steps)[:, 1].max() == 0
    assert normaliser.inverse(np.zeros((1, 3)))[0, 1] == 0.25
    moved = steps[:1].copy()
    moved[0, 1] = 0.3
    assert normaliser.out_of_range(normaliser(moved))[0].tolist()[1]


def test_collapsed_quantiles_fall_back_to_minimum_and_maximum():
    steps = np.full((1000, 1), -1.0)
    steps[:5] = 1.0  # open 0.5 % of the time
    normaliser = Normaliser.make("quantile", Statistics.from_array(steps))
    assert not normaliser.constant.any()
    assert normaliser(np.array([[-1.0], [1.0]])).ravel().tolist() == [-1, 1]


def test_clip_to_limits_counts_what_it_moved():
    statistics = Statistics.from_array(data())
    normaliser = Normaliser.make("quantile", statistics, limits=([-1] * 3, [1] * 3))
    chunk = np.zeros((2, 5, 3), np.float32)
    chunk[1, 3, 0] = 1.5
    inside, moved = normaliser.clip_to_limits(chunk)
    assert inside.max() == 1
    assert moved.tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_values_round_trip_exactly(kind):
    import json

    normaliser = Normaliser.make(kind, Statistics.from_array(data()))
    again = Normaliser.from_dict(json.loads(json.dumps(normaliser.to_dict())))
    for name in ("centre", "half", "lower", "upper"):
        np.testing.assert_array_equal(getattr(again, name), getattr(normaliser, name))
    x = data(3).astype(np.float32)
    np.testing.assert_array_equal(again(x), normaliser(x))


def test_unknown_kind_and_empty_data_are_refused():
    with pytest.raises(ConfigError, match="'median'"):
        Normaliser.make("median", Statistics.from_array(data()))
    with pytest.raises(DataError, match="no unpadded"):
        Statistics.from_array(np.zeros((1, 5, 3)), np.ones((1, 5), bool))
