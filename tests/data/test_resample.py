"""Resampling: exact inverses, conserved displacement, and SciPy's interpolators as an independent reference."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.spatial.transform import Rotation, Slerp

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.data.resample import resample, resampled_length, resampled_space
from actok.signal.rotations import to_matrix
from realdata import REAL, needs_real

SIZES = {
    "axis_angle": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rot6d": 6,
    "euler_xyz": 3,
    "euler_zyx": 3,
}

PLAIN = ActionSpace(
    embodiment="arm",
    dim=7,
    rate_hz=10.0,
    low=(-1.0,) * 7,
    high=(1.0,) * 7,
    groups=(
        ActionGroup(name="step", kind="position", dims=(5, 0), mode="delta"),
        ActionGroup(name="place", kind="position", dims=(1,)),
        ActionGroup(name="joint", kind="joint", dims=(2,), mode="relative"),
        ActionGroup(name="speed", kind="velocity", dims=(3,), mode="velocity"),
        ActionGroup(name="grip", kind="gripper", dims=(4,)),
        ActionGroup(name="hand", kind="hand", dims=(6,)),
    ),
)

rates = st.sampled_from([1.0, 3.0, 5.0, 10.0, 12.5, 15.0, 20.0, 29.97, 30.0, 50.0, 80.0])


def rotations(rotation, mode, side=None, scale=1.0):
    size = SIZES[rotation]
    group = ActionGroup(
        name="turn", kind="rotation", dims=tuple(range(size)), mode=mode, rotation=rotation, side=side, scale=scale
    )
    return ActionSpace(embodiment="wrist", dim=size, groups=(group,), rate_hz=10.0)


def random_rotations(rotation, count, rng, spread=1.0):
    turns = Rotation.from_rotvec(rng.normal(size=(count, 3)) * spread)
    return {
        "axis_angle": turns.as_rotvec,
        "quaternion_xyzw": turns.as_quat,
        "quaternion_wxyz": lambda: turns.as_quat(scalar_first=True),
        "rot6d": lambda: np.concatenate([turns.as_matrix()[..., 0], turns.as_matrix()[..., 1]], axis=-1),
        "euler_xyz": lambda: turns.as_euler("xyz"),
        "euler_zyx": lambda: turns.as_euler("ZYX"),
    }[rotation]().astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 37), st.integers(1, 7), rates, st.integers(0, 99))
def test_up_and_down_by_a_whole_factor_is_the_identity(steps, factor, rate, seed):
    actions = np.random.default_rng(seed).normal(size=(steps, 7)).astype(np.float32)
    up = resample(actions, PLAIN, rate, rate * factor)
    assert up.dtype == np.float32
    assert len(up) == steps * factor
    np.testing.assert_allclose(resample(up, PLAIN, rate * factor, rate), actions, atol=2e-5)


@pytest.mark.parametrize("rotation", SIZES)
@pytest.mark.parametrize(("mode", "side"), [("absolute", None), ("delta", "body"), ("delta", "world")])
def test_rotations_up_and_down_are_the_same_rotations(rotation, mode, side):
    space = rotations(rotation, mode, side)
    actions = random_rotations(rotation, 13, np.random.default_rng(3))
    back = resample(resample(actions, space, 10.0, 50.0), space, 50.0, 10.0)
    np.testing.assert_allclose(to_matrix(back, rotation), to_matrix(actions, rotation), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 53), rates, rates, st.integers(0, 99))
def test_deltas_keep_their_displacement_and_lengths_their_duration(steps, old, new, seed):
    actions = np.random.default_rng(seed).normal(size=(steps, 7)).astype(np.float32)
    got = resample(actions, PLAIN, old, new)
    assert len(got) == resampled_length(steps, old, new)
    assert 0 <= len(got) / new - steps / old + 1e-6 < 1 / new + 2e-6
    np.testing.assert_allclose(got[:, [5, 0]].sum(0), actions[:, [5, 0]].sum(0), atol=1e-4)


def test_paths_meet_at_all_common_times():
    actions = np.random.default_rng(5).normal(size=(31, 7)).astype(np.float32)
    for old, new, every, each in ((30.0, 20.0, 3, 2), (20.0, 50.0, 2, 5), (5.0, 15.0, 1, 3)):
        before = np.cumsum(actions[:, [5, 0]].astype(np.float64), axis=0)[every - 1 :: every]
        after = np.cumsum(resample(actions, PLAIN, old, new)[:, [5, 0]].astype(np.float64), axis=0)[each - 1 :: each]
        np.testing.assert_allclose(after[: len(before)], before, atol=1e-5)


@pytest.mark.parametrize("side", ["body", "world"])
def test_turns_compose_about_the_stated_axes(side):
    space = rotations("axis_angle", "delta", side, scale=0.5)
    actions = random_rotations("axis_angle", 11, np.random.default_rng(7), spread=0.3) / 0.5
    for rate in (20.0, 4.0, 5.0, 2.0):
        new = resample(actions, space, 10.0, rate)
        product = {}
        for name, steps in (("old", actions), ("new", new)):
            total = Rotation.identity()
            for step in Rotation.from_rotvec(steps.astype(np.float64) * 0.5):
                total = total * step if side == "body" else step * total
            product[name] = total.as_matrix()
        np.testing.assert_allclose(product["new"], product["old"], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 41), rates, rates, st.integers(0, 99))
def test_commands_equal_scipy_interpolation(steps, old, new, seed):
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(steps, 7)).astype(np.float32)
    got = resample(actions, PLAIN, old, new)
    times = np.minimum(np.arange(len(got)) * old / new, steps - 1)
    linear = interp1d(np.arange(steps), actions, axis=0)(times)
    np.testing.assert_allclose(got[:, [1, 2, 3, 6]], linear[:, [1, 2, 3, 6]], atol=1e-5)
    held = interp1d(np.arange(steps), actions[:, 4], kind="previous")(np.minimum(times + 1e-7, steps - 1))
    assert np.array_equal(got[:, 4], held.astype(np.float32))

    wrist = rotations("quaternion_xyzw", "absolute")
    turns = random_rotations("quaternion_xyzw", steps, rng)
    want = Slerp(np.arange(steps), Rotation.from_quat(turns))(times).as_matrix()
    np.testing.assert_allclose(to_matrix(resample(turns, wrist, old, new), "quaternion_xyzw"), want, atol=1e-5)


def test_angles_take_the_short_way_round():
    actions = np.array([[0, 0, np.deg2rad(170)], [0, 0, np.deg2rad(-170)]], np.float32)
    middle = resample(actions, rotations("euler_xyz", "absolute"), 10.0, 20.0)[1]
    assert abs(np.rad2deg(middle[2])) == pytest.approx(180, abs=1e-3)


def test_the_space_knows_its_new_rate_and_limits():
    space = resampled_space(PLAIN, 2.5)
    assert space.rate_hz == 2.5
    assert space.high == (4.0, 1.0, 1.0, 1.0, 1.0, 4.0, 1.0)
    assert space.low == (-4.0, -1.0, -1.0, -1.0, -1.0, -4.0, -1.0)
    assert PLAIN.differences(space) == []


def test_bad_input():
    actions = np.zeros((5, 7), np.float32)
    with pytest.raises(ConfigError, match="control rate of the data is unknown"):
        resample(actions, PLAIN, None, 5.0)
    with pytest.raises(ConfigError, match=r"to_hz is -1\.0"):
        resample(actions, PLAIN, 5.0, -1.0)
    with pytest.raises(DataError, match=r"shape \(0, 7\)"):
        resample(actions[:0], PLAIN, 5.0, 10.0)
    with pytest.raises(DataError, match="int64"):
        resample(actions.astype(np.int64), PLAIN, 5.0, 10.0)
    with pytest.raises(SpaceMismatchError, match="actions have 3 dimensions"):
        resample(actions[:, :3], PLAIN, 5.0, 10.0)
    unknown = rotations("euler_xyz", "delta", scale=None)
    with pytest.raises(DataError, match="'turn' has no scale"):
        resample(actions[:, :3], unknown, 5.0, 10.0)
    sixd = replace(rotations("rot6d", "delta", scale=None))  # numbers without a unit need no scale
    assert resample(np.eye(3, 6, dtype=np.float32) + 0.1, sixd, 5.0, 10.0).shape == (6, 6)


@needs_real
def test_real_joints_and_steps():
    with np.load(REAL / "sim" / "aloha_sim" / "insertion.npz") as data:
        joints = data["action"][: data["episode_length"][0]].astype(np.float32)
    group = ActionGroup(name="joints", kind="joint", dims=tuple(range(14)))
    arms = ActionSpace(embodiment="aloha", dim=14, groups=(group,), rate_hz=50.0)
    assert np.array_equal(resample(joints, arms, 50.0, 25.0), joints[::2])
    with np.load(REAL / "sim" / "robosuite_state" / "Lift_Panda.npz") as data:
        steps = data["action"][: data["episode_length"][0], :3].astype(np.float32)
    group = ActionGroup(name="move", kind="position", dims=(0, 1, 2), mode="delta", scale=0.05, unit="m")
    panda = ActionSpace(embodiment="panda", dim=3, groups=(group,), rate_hz=20.0)
    for rate in (5.0, 15.0, 80.0):
        np.testing.assert_allclose(resample(steps, panda, 20.0, rate).sum(0), steps.sum(0), atol=1e-4)
