"""B-splines against scipy's own fit and evaluation, and the laws that the codec leans on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline, make_lsq_spline

from actok.core import ConfigError
from actok.signal.bspline import clamped_knots, control_points, curve, design_matrix

B, D = 3, 5


def smooth(steps: int, seed: int = 0) -> np.ndarray:
    """Chunks [B, T, D] of a few random waves."""
    rng = np.random.default_rng(seed)
    u = np.linspace(0, 1, steps)[None, :, None]
    phase, pace = rng.uniform(0, 6, (2, B, 1, D))
    return np.sin(pace * u + phase) + 0.1 * rng.normal(size=(B, steps, D))


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 60), degree=st.integers(0, 5), extra=st.integers(1, 20))
def test_basis_functions_are_nonnegative_and_sum_to_one(steps: int, degree: int, extra: int) -> None:
    matrix = design_matrix(steps, degree + extra, degree)
    assert matrix.shape == (steps, degree + extra)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize(("steps", "bases", "degree"), [(31, 11, 4), (53, 7, 3), (29, 5, 4), (47, 13, 1)])
def test_fit_and_curve_equal_scipy(steps: int, bases: int, degree: int) -> None:
    chunks = smooth(steps)
    u = np.linspace(0, 1, steps)
    controls = control_points(chunks, bases, degree)
    for b in range(B):
        reference = make_lsq_spline(u, chunks[b], clamped_knots(bases, degree), degree)
        np.testing.assert_allclose(controls[b], reference.c, atol=2e-5)
        np.testing.assert_allclose(curve(controls, steps, degree)[b], reference(u), atol=2e-5)
    fine = np.linspace(0, 1, 101)
    spline = BSpline(clamped_knots(bases, degree), controls[1], degree)
    np.testing.assert_allclose(curve(controls, 101, degree)[1], spline(fine), atol=1e-12)


@pytest.mark.parametrize("power", range(5))
def test_polynomials_up_to_the_degree_are_reproduced_between_the_steps_too(power: int) -> None:
    steps, bases, degree = 37, 10, 4
    polynomial = (np.linspace(-1, 1, steps) ** power)[None, :, None]
    controls = control_points(polynomial, bases, degree)
    np.testing.assert_allclose(curve(controls, 211, degree)[0, :, 0], np.linspace(-1, 1, 211) ** power, atol=1e-5)


def test_degree_zero_is_the_mean_of_each_segment() -> None:
    chunks = smooth(30)[:, :28]
    controls = control_points(chunks, 7, 0)
    # 28 steps at u = t / 27: segment s holds the steps with floor(7 u) = s, the last step joining the last segment.
    segment = np.minimum(np.floor(7 * np.linspace(0, 1, 28)), 6)
    for s in range(7):
        np.testing.assert_allclose(controls[:, s], chunks[:, segment == s].mean(1), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 13), bases=st.integers(13, 29), degree=st.sampled_from([0, 3, 4]))
def test_fewer_steps_than_bases_are_met_and_a_constant_stays_one(steps: int, bases: int, degree: int) -> None:
    chunks = smooth(steps, seed=steps)
    controls = control_points(chunks, bases, degree)
    np.testing.assert_allclose(curve(controls, steps, degree), chunks, atol=2e-3)
    still = control_points(np.full((1, steps, 1), 0.7), bases, degree)
    np.testing.assert_allclose(still, 0.7, atol=1e-9)


def test_curve_starts_and_ends_at_its_outer_control_points_and_stays_in_their_hull() -> None:
    controls = np.random.default_rng(1).normal(size=(B, 11, D))
    points = curve(controls, 97, 4)
    np.testing.assert_allclose(points[:, 0], controls[:, 0], atol=1e-12)
    np.testing.assert_allclose(points[:, -1], controls[:, -1], atol=1e-12)
    assert (points.max(1) <= controls.max(1) + 1e-12).all()
    assert (points.min(1) >= controls.min(1) - 1e-12).all()


@pytest.mark.parametrize("steps", [1, 3, 31])
def test_a_fixed_start_is_met_exactly_and_the_rest_is_the_best_given_it(steps: int) -> None:
    chunks, bases, degree = smooth(steps), 7, 4
    start = chunks[:, 0] + 0.3
    controls = control_points(chunks, bases, degree, start)
    np.testing.assert_array_equal(controls[:, 0], start)
    np.testing.assert_array_equal(curve(controls, steps, degree)[:, 0], start)
    if steps > bases:
        design = design_matrix(steps, bases, degree)
        for b in range(B):
            rest = np.linalg.lstsq(design[:, 1:], chunks[b] - design[:, :1] * start[b], rcond=None)[0]
            np.testing.assert_allclose(controls[b, 1:], rest, atol=1e-4)


def test_too_few_bases_are_refused() -> None:
    with pytest.raises(ConfigError, match="degree 4 with 4 bases"):
        clamped_knots(4, 4)
