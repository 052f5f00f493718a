"""Rotations against SciPy's independent implementation, and the laws that no implementation may break."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from actok.core import ConfigError, DataError
from actok.core.spaces import ROTATION_SIZE
from actok.signal.rotations import (
    canonical_quaternion,
    compose,
    convert_rotation,
    degenerate,
    from_matrix,
    geodesic_distance,
    nearest_angles,
    rotation_distance,
    to_matrix,
)

FORMATS = list(ROTATION_SIZE)
finite = st.floats(-7, 7, allow_nan=False, width=64)


def scipy_values(rotation: Rotation, form: str) -> np.ndarray:
    matrix = rotation.as_matrix()
    return {
        "axis_angle": rotation.as_rotvec,
        "quaternion_xyzw": lambda: rotation.as_quat(canonical=True),
        "quaternion_wxyz": lambda: rotation.as_quat(canonical=True, scalar_first=True),
        "rot6d": lambda: np.concatenate([matrix[..., 0], matrix[..., 1]], -1),
        "euler_xyz": lambda: rotation.as_euler("xyz"),
        "euler_zyx": lambda: rotation.as_euler("ZYX"),
    }[form]()


def random_rotations(count: int, seed: int = 0) -> Rotation:
    return Rotation.random(count, rng=seed)


def hard_matrices() -> np.ndarray:
    """Rotations where naive formulas fail: tiny angles, angles near pi, gimbal lock, quarter and half turns."""
    axes = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, -2], [-3, 1e-9, 4], [1, 1, 1]], float)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = [0.0, 1e-300, 1e-17, 1e-9, 1e-4, np.pi / 2, np.pi - 1e-4, np.pi - 1e-9, np.pi]
    turns = [Rotation.from_rotvec(a * n).as_matrix() for a in angles for n in axes]
    locks = [
        Rotation.from_euler("xyz", [r, p, y]).as_matrix()
        for r in (0.0, 0.7, -2.9)
        for y in (0.0, 1.3)
        for p in (np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-8, np.pi / 2 - 1e-5)
    ]
    return np.stack(turns + locks)


@pytest.mark.parametrize("form", FORMATS)
def test_agrees_with_scipy(form):
    rotation = random_rotations(211)
    values = scipy_values(rotation, form)
    np.testing.assert_allclose(to_matrix(values, form), rotation.as_matrix(), atol=1e-14)
    np.testing.assert_allclose(from_matrix(rotation.as_matrix(), form), values, atol=1e-13)


@pytest.mark.parametrize("form", FORMATS)
def test_hard_cases_survive_the_round_trip(form):
    matrices = hard_matrices()
    values = from_matrix(matrices, form)
    assert np.isfinite(values).all()
    back = to_matrix(values, form)
    np.testing.assert_allclose(back, matrices, atol=2e-15 if form == "rot6d" else 1e-14)
    np.testing.assert_allclose(np.linalg.det(back), 1.0, atol=1e-13)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_pair_of_formats_inverts(source, target):
    values = scipy_values(random_rotations(13 * 7, seed=1), source).reshape(13, 7, -1)
    there = convert_rotation(values, source, target)
    assert there.shape == (13, 7, ROTATION_SIZE[target])
    np.testing.assert_allclose(convert_rotation(there, target, source), values, atol=1e-12)


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_numbers_become_a_proper_rotation(form, data):
    """Decoders emit anything: the result is orthonormal with determinant 1, and is a fixed point."""
    values = data.draw(arrays(np.float64, (3, ROTATION_SIZE[form]), elements=finite))
    matrix = to_matrix(values, form)
    np.testing.assert_allclose(matrix @ np.swapaxes(matrix, -1, -2), np.broadcast_to(np.eye(3), (3, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-12)
    np.testing.assert_allclose(to_matrix(from_matrix(matrix, form), form), matrix, atol=1e-12)


@given(axis=arrays(np.float64, 3, elements=finite), scale=st.floats(0, 3.2))
@settings(max_examples=60, deadline=None)
def test_axis_angle_beyond_pi_is_the_same_rotation(axis, scale):
    vector = axis * scale
    expected = Rotation.from_rotvec(vector).as_matrix()
    back = from_matrix(to_matrix(vector, "axis_angle"), "axis_angle")
    np.testing.assert_allclose(to_matrix(back, "axis_angle"), expected, atol=1e-12)
    assert np.linalg.norm(back) <= np.pi + 1e-12


@pytest.mark.parametrize("form", FORMATS)
def test_float32_stays_float32_and_accurate(form):
    matrices = np.concatenate([random_rotations(101, seed=2).as_matrix(), hard_matrices()]).astype(np.float32)
    values = from_matrix(matrices, form)
    assert values.dtype == np.float32
    back = to_matrix(values, form)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, matrices, atol=1e-6)


def test_euler_conventions():
    """euler_xyz turns about the fixed x, then y, then z; euler_zyx lists the same three angles backwards."""
    roll, pitch, yaw = 0.3, -0.5, 1.1
    x, y, z = (Rotation.from_rotvec(v).as_matrix() for v in ([roll, 0, 0], [0, pitch, 0], [0, 0, yaw]))
    np.testing.assert_allclose(to_matrix(np.array([roll, pitch, yaw]), "euler_xyz"), z @ y @ x, atol=1e-15)
    np.testing.assert_allclose(to_matrix(np.array([yaw, pitch, roll]), "euler_zyx"), z @ y @ x, atol=1e-15)


def test_rot6d_is_the_first_two_columns():
    matrix = random_rotations(5).as_matrix()
    np.testing.assert_array_equal(from_matrix(matrix, "rot6d")[:, :3], matrix[:, :, 0])
    np.testing.assert_array_equal(from_matrix(matrix, "rot6d")[:, 3:], matrix[:, :, 1])


def test_rot6d_is_read_by_gram_schmidt():
    rng = np.random.default_rng(3)
    noisy = rng.normal(size=(31, 6))
    a, b = noisy[:, :3], noisy[:, 3:]
    first = a / np.linalg.norm(a, axis=1, keepdims=True)
    rest = b - (first * b).sum(1, keepdims=True) * first
    second = rest / np.linalg.norm(rest, axis=1, keepdims=True)
    expected = np.stack([first, second, np.cross(first, second)], -1)
    np.testing.assert_allclose(to_matrix(noisy, "rot6d"), expected, atol=1e-12)


DEGENERATE_6D = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 2, 3],
        [1, 2, 3, 0, 0, 0],
        [1, 2, 3, 2, 4, 6],
        [1, 0, 0, -5, 0, 0],
        [0, 0, 1, 0, 1e-9, -1],
        [1e-9, 0, 0, 0, 1, 0],
        [1e-300, 0, 0, 0, 1e-300, 0],
    ],
    float,
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_degenerate_6d_is_flagged_and_finite(dtype):
    values = DEGENERATE_6D.astype(dtype)
    assert degenerate(values, "rot6d").all()
    matrix = to_matrix(values, "rot6d").astype(np.float64)
    np.testing.assert_allclose(
        matrix @ np.swapaxes(matrix, -1, -2), np.broadcast_to(np.eye(3), matrix.shape), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-6)


def test_degenerate_flags_nothing_else():
    assert not degenerate(from_matrix(hard_matrices(), "rot6d"), "rot6d").any()
    assert not degenerate(np.array([10.0, 0, 0, 10, 0.1, 0]), "rot6d")
    assert not degenerate(np.zeros((2, 3)), "axis_angle").any()
    assert degenerate(np.array([[0, 0, 0, 0], [0, 0, 0, 1.0]]), "quaternion_xyzw").tolist() == [True, False]


@pytest.mark.parametrize("form", FORMATS)
def test_all_zeros_mean_no_rotation(form):
    """Padding of an incremental space is zero, and zero means standing still in every format."""
    np.testing.assert_allclose(to_matrix(np.zeros(ROTATION_SIZE[form]), form), np.eye(3), atol=1e-15)


@pytest.mark.parametrize("angle", [0.0, 1e-15, 1e-9, 1e-5, 0.1, 1.0, np.pi / 2, np.pi - 1e-5, np.pi - 1e-9, np.pi])
def test_geodesic_distance_is_accurate_everywhere(angle):
    base = random_rotations(17, seed=4)
    axis = np.random.default_rng(5).normal(size=(17, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    moved = base * Rotation.from_rotvec(angle * axis)
    found = geodesic_distance(base.as_matrix(), moved.as_matrix())
    np.testing.assert_allclose(found, angle, atol=1e-15 * 4, rtol=1e-13)


def test_geodesic_distance_is_a_metric_on_random_triples():
    a, b, c = (random_rotations(53, seed=s).as_matrix() for s in (6, 7, 8))
    np.testing.assert_allclose(geodesic_distance(a, b), geodesic_distance(b, a), atol=1e-14)
    assert (geodesic_distance(a, c) <= geodesic_distance(a, b) + geodesic_distance(b, c) + 1e-12).all()
    turn = random_rotations(1, seed=9).as_matrix()
    np.testing.assert_allclose(geodesic_distance(turn @ a, turn @ b), geodesic_distance(a, b), atol=1e-12)
    np.testing.assert_allclose(geodesic_distance(a @ turn, b @ turn), geodesic_distance(a, b), atol=1e-12)


def test_rotation_distance_ignores_the_sign_of_a_quaternion():
    q = scipy_values(random_rotations(11), "quaternion_xyzw")
    np.testing.assert_allclose(rotation_distance(q, -q, "quaternion_xyzw"), 0.0, atol=1e-15)
    assert rotation_distance(q.astype(np.float32), q.astype(np.float32), "quaternion_xyzw").dtype == np.float32


@given(q=arrays(np.float64, 4, elements=finite))
@settings(max_examples=60, deadline=None)
def test_canonical_quaternion(q):
    one = canonical_quaternion(q)
    np.testing.assert_array_equal(one, canonical_quaternion(-q))
    np.testing.assert_array_equal(np.roll(one, 1), canonical_quaternion(np.roll(q, 1), "quaternion_wxyz"))
    assert one[3] >= 0
    np.testing.assert_array_equal(np.abs(one), np.abs(q))


@pytest.mark.parametrize("side", ["body", "world"])
def test_compose_agrees_with_scipy(side):
    steps = random_rotations(3 * 11, seed=10)
    path = compose(steps.as_matrix().reshape(3, 11, 3, 3), side)
    for b in range(3):
        total = Rotation.identity()
        for t in range(11):
            step = steps[b * 11 + t]
            total = total * step if side == "body" else step * total
            np.testing.assert_allclose(path[b, t], total.as_matrix(), atol=1e-13)


def test_input_is_not_changed():
    values = np.random.default_rng(11).normal(size=(7, 6))
    before = values.copy()
    to_matrix(values, "rot6d")
    degenerate(values, "rot6d")
    np.testing.assert_array_equal(values, before)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="'euler_yzx' is unknown; use one of axis_angle"):
        to_matrix(np.zeros(3), "euler_yzx")
    with pytest.raises(DataError, match=r"shape \(2, 4\); axis_angle takes \[\.\.\., 3\]"):
        to_matrix(np.zeros((2, 4)), "axis_angle")
    with pytest.raises(DataError, match="dtype int64"):
        to_matrix(np.zeros(3, np.int64), "axis_angle")
    with pytest.raises(DataError, match=r"shape \(3, 2\)"):
        from_matrix(np.zeros((3, 2)), "axis_angle")
    with pytest.raises(ConfigError, match="'rot6d' is not a quaternion format"):
        canonical_quaternion(np.zeros(4), "rot6d")


@pytest.mark.parametrize("rotation", ["axis_angle", "euler_xyz", "euler_zyx"])
@pytest.mark.parametrize("turn", [2 * np.pi, 360.0])
def test_whole_turns_bring_angles_near_a_centre(rotation, turn):
    """Whatever range they were recorded in comes back from the canonical one, and what is canonical stays bit by bit."""
    unit = 2 * np.pi / turn
    centre = np.array([3.3, 0.2, -0.1]) / unit
    values = centre + np.random.default_rng(0).uniform(-0.4, 0.4, (5, 7, 3)) / unit
    canonical = from_matrix(to_matrix(values * unit, rotation), rotation) / unit
    assert np.abs(canonical - values).max() > 0.9 * turn
    np.testing.assert_allclose(nearest_angles(canonical, rotation, centre, turn), values, atol=1e-11 / unit)
    np.testing.assert_array_equal(nearest_angles(canonical, rotation, np.zeros(3), turn), canonical)
    assert not nearest_angles(np.zeros((1, 3)), rotation, np.zeros(3), turn).any()


def test_formats_without_angles_have_no_turns():
    with pytest.raises(ConfigError, match="has no angles to add whole turns to"):
        nearest_angles(np.zeros((2, 3)), "quaternion_xyzw", np.zeros(3))
