"""Statistics of success rates against scipy, published figures, and their own laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from actok.core import ActokError
from actok.evaluation.intervals import compare_paired, mcnemar, paired_difference, wilson

counts = st.integers(0, 60)


@given(n=st.integers(1, 400), data=st.data(), confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, data: st.DataObject, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(only_a=st.integers(0, 300), only_b=st.integers(0, 300))
def test_mcnemar_is_scipys_binomial_test_of_a_fair_coin(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_a_published_example() -> None:
    # Altman, Machin, Bryant and Gardner, Statistics with Confidence (2000), table 6.2: 0.011 to 0.226.
    low, high = paired_difference(14, 5, 0, 22)
    assert (round(low, 3), round(high, 3)) == (0.011, 0.226)


@given(n=st.integers(1, 80), data=st.data())
def test_without_correlation_the_squared_margins_of_both_rates_add(n: int, data: st.DataObject) -> None:
    # Where one rate is 0 or 1 no correlation is defined, and the interval is that of independent samples.
    k = data.draw(st.integers(0, n))
    expected_a, expected_b = (binomtest(x, n).proportion_ci(method="wilson") for x in (k, n))
    low, high = paired_difference(k, 0, n - k, 0)
    assert low == pytest.approx(max(-1, k / n - 1 - math.hypot(k / n - expected_a.low, 1 - expected_b.high)), abs=1e-9)
    assert high == pytest.approx(k / n - 1 + math.hypot(expected_a.high - k / n, 1 - expected_b.low), abs=1e-9)


@given(counts, counts, counts, counts)
def test_exchanging_a_and_b_negates_the_interval(both: int, only_a: int, only_b: int, neither: int) -> None:
    if both + only_a + only_b + neither == 0:
        return
    low, high = paired_difference(both, only_a, only_b, neither)
    other_low, other_high = paired_difference(both, only_b, only_a, neither)
    assert (low, high) == pytest.approx((-other_high, -other_low), abs=1e-12)
    difference = (only_a - only_b) / (both + only_a + only_b + neither)
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1


def test_the_paired_interval_covers_the_truth() -> None:
    """Exact coverage over all outcomes of eleven episodes, at several truths."""
    n = 11
    outcomes = [c for c in itertools.product(range(n + 1), repeat=3) if sum(c) <= n]
    tables = [(a, b, c, n - a - b - c) for a, b, c in outcomes]
    bounds = np.array([paired_difference(*t) for t in tables])
    ways = np.array([math.factorial(n) / math.prod(math.factorial(x) for x in t) for t in tables])
    for truth in [(0.6, 0.2, 0.1, 0.1), (0.25, 0.25, 0.25, 0.25), (0.1, 0.5, 0.1, 0.3), (0.4, 0.1, 0.1, 0.4)]:
        chance = ways * np.prod(np.array(truth) ** np.array(tables), axis=1)
        difference = truth[1] - truth[2]
        covered = (bounds[:, 0] <= difference) & (difference <= bounds[:, 1])
        assert chance.sum() == pytest.approx(1)
        assert chance[covered].sum() > 0.92


def test_compare_paired_counts_and_agrees_with_its_parts() -> None:
    a = np.array([1, 1, 1, 0, 0, 1, 1], bool)
    b = np.array([1, 0, 0, 0, 1, 0, 1], bool)
    c = compare_paired(a, b)
    assert (c.both, c.only_a, c.only_b, c.neither) == (2, 3, 1, 1)
    assert c.difference == pytest.approx(a.mean() - b.mean())
    assert (c.low, c.high) == paired_difference(2, 3, 1, 1)
    assert c.p_value == mcnemar(3, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: wilson(0, 0), "0 successes of 0"),
        (lambda: wilson(4, 3), "4 successes of 3"),
        (lambda: wilson(-1, 3), "successes is -1"),
        (lambda: wilson(1, 3, confidence=95), "confidence is 95"),
        (lambda: mcnemar(-2, 1), "only_a is -2"),
        (lambda: paired_difference(0, 0, 0, 0), "no episode"),
        (lambda: compare_paired(np.ones(3, bool), np.ones(2, bool)), "same"),
        (lambda: compare_paired(np.ones(3), np.ones(3)), "float64"),
    ],
)
def test_impossible_counts_are_named(call, words: str) -> None:
    with pytest.raises(ActokError, match=words):
        call()
