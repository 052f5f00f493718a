"""Conversions over an action space: exact inverses, equality with SciPy's rotations, padding, paths and layouts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.core.spaces import ROTATION_SIZE
from actok.data.spaces import find_space, union_mapping
from actok.signal.conversions import accumulate, convert, convert_rotations, path_space, with_frame, with_rotation
from actok.signal.rotations import from_matrix, rotation_distance, to_matrix
from actok.signal.unions import from_union, to_union
from realdata import REAL, needs_real

FORMATS = list(ROTATION_SIZE)
FRAMES = ["absolute", "relative", "delta"]
B, T = 5, 11


def space_with(form: str = "axis_angle", mode: str = "absolute", side=None, scale: float = 0.5) -> ActionSpace:
    """Gripper first and the rotation in the middle, so that nothing works by accident of order."""
    n = ROTATION_SIZE[form]
    groups = (
        ActionGroup(name="gripper", kind="gripper", dims=(0,)),
        ActionGroup(name="position", kind="position", dims=(1, 3, 2), mode=mode, unit="m", scale=0.05),
        ActionGroup(
            name="rotation", kind="rotation", rotation=form, dims=tuple(range(4, 4 + n)), mode=mode, unit="rad",
            scale=scale if form in ("axis_angle", "euler_xyz", "euler_zyx") else None, side=side,
        ),
        ActionGroup(name="arm", kind="joint", dims=(4 + n, 5 + n), mode=mode, unit="rad", scale=1.0),
        ActionGroup(name="base", kind="base", dims=(6 + n,), mode="velocity", unit="m/s", scale=2.0),
    )  # fmt: skip
    return ActionSpace(embodiment="test", dim=7 + n, groups=groups, rate_hz=10.0)


def actions_of(space: ActionSpace, rng: np.random.Generator, shape=(B, T)) -> np.ndarray:
    values = rng.normal(size=(*shape, space.dim))
    group = space.group("rotation")
    turns = Rotation.random(int(np.prod(shape)), rng=rng).as_matrix().reshape(*shape, 3, 3)
    values[..., list(group.dims)] = from_matrix(turns, group.rotation) / (group.scale or 1.0)
    return values


def matrices(values: np.ndarray, space: ActionSpace) -> np.ndarray:
    group = space.group("rotation")
    return to_matrix(values[..., list(group.dims)] * (group.scale or 1.0), group.rotation)


@pytest.mark.parametrize("side", ["body", "world"])
@pytest.mark.parametrize("form", FORMATS)
@given(seed=st.integers(0, 2**32 - 1), route=st.permutations(FRAMES), steps=st.integers(1, 13))
@settings(max_examples=12, deadline=None)
def test_any_route_leads_back(form, side, seed, route, steps):
    rng = np.random.default_rng(seed)
    space = space_with(form)
    values, anchor = actions_of(space, rng, (3, steps)), actions_of(space, rng, (3,))
    there, now = values, space
    for frame in [*route, "absolute"]:
        there, now = convert(
            there, now, frame, anchor=anchor, side=side if now.group("rotation").side is None else None
        )
    assert now == space
    np.testing.assert_allclose(there, values, atol=1e-12)


@pytest.mark.parametrize("frame", ["relative", "delta"])
@pytest.mark.parametrize("form", FORMATS)
def test_float32_round_trip(form, frame):
    rng = np.random.default_rng(1)
    space = space_with(form)
    values, anchor = (actions_of(space, rng, s).astype(np.float32) for s in ((B, T), (B,)))
    there, now = convert(values, space, frame, anchor=anchor)
    back, _ = convert(there, now, "absolute", anchor=anchor)
    assert there.dtype == back.dtype == np.float32
    group = list(space.group("rotation").dims)
    rest = [d for d in range(space.dim) if d not in group]
    np.testing.assert_allclose(back[..., rest], values[..., rest], atol=1e-5)
    np.testing.assert_allclose(matrices(back, space), matrices(values, space), atol=1e-5)


@pytest.mark.parametrize("side", ["body", "world"])
def test_relative_and_delta_are_what_they_say(side):
    """Against the definitions, with SciPy doing the rotations."""
    rng = np.random.default_rng(2)
    space = space_with()
    values, anchor = actions_of(space, rng), actions_of(space, rng, (B,))
    relative, relative_space = convert(values, space, "relative", anchor=anchor, side=side)
    delta, _ = convert(values, space, "delta", anchor=anchor, side=side)
    moving = [1, 2, 3, 7, 8]
    np.testing.assert_allclose(relative[..., moving], values[..., moving] - anchor[:, None, moving], atol=1e-14)
    before = np.concatenate([anchor[:, None], values[:, :-1]], 1)
    np.testing.assert_allclose(delta[..., moving], (values - before)[..., moving], atol=1e-14)
    turn = [4, 5, 6]
    now = Rotation.from_rotvec(values[..., turn].reshape(-1, 3) * 0.5)
    for origin, found in ((np.repeat(anchor[:, None], T, 1), relative), (before, delta)):
        start = Rotation.from_rotvec(origin[..., turn].reshape(-1, 3) * 0.5)
        expected = start.inv() * now if side == "body" else now * start.inv()
        np.testing.assert_allclose(found[..., turn].reshape(-1, 3) * 0.5, expected.as_rotvec(), atol=1e-12)
    assert relative_space.group("rotation").side == side
    assert [g.mode for g in relative_space.groups] == ["absolute", "relative", "relative", "relative", "velocity"]


def test_grippers_and_bases_are_left_alone():
    rng = np.random.default_rng(3)
    space = space_with()
    values = actions_of(space, rng)
    for frame in ("relative", "delta"):
        there, _ = convert(values, space, frame, anchor=actions_of(space, rng, (B,)))
        np.testing.assert_array_equal(there[..., [0, 9]], values[..., [0, 9]])


def test_batch_is_the_stack_of_its_singles_and_input_survives():
    rng = np.random.default_rng(4)
    space = space_with("rot6d")
    values, anchor = actions_of(space, rng), actions_of(space, rng, (B,))
    kept = values.copy()
    batch, now = convert(values, space, "delta", anchor=anchor)
    np.testing.assert_array_equal(values, kept)
    for b in range(B):
        np.testing.assert_array_equal(convert(values[b], space, "delta", anchor=anchor[b])[0], batch[b])
        np.testing.assert_array_equal(accumulate(batch[b], now), accumulate(batch, now)[b])


def test_relative_and_delta_need_no_anchor_between_them():
    rng = np.random.default_rng(5)
    space = space_with("quaternion_wxyz", mode="delta")
    values = actions_of(space, rng)
    relative, now = convert(values, space, "relative")
    np.testing.assert_allclose(convert(relative, now, "delta")[0], values, atol=1e-13)
    same, unchanged = convert(values, space, "delta")
    assert unchanged is space
    np.testing.assert_array_equal(same, values)


@pytest.mark.parametrize("form", FORMATS)
def test_padding_follows_the_frame(form):
    """Held values become zero steps, zero steps become held values, and decode to standing still."""
    rng = np.random.default_rng(6)
    space = space_with(form)
    values, anchor = actions_of(space, rng), actions_of(space, rng, (B,))
    real = np.array([1, 4, 7, 10, T])
    pad = np.arange(T) >= real[:, None]
    delta, now = convert(values, space, "delta", anchor=anchor, pad_mask=pad)
    incremental = np.array(now.incremental)
    assert (delta[pad][:, incremental] == 0).all()
    back, _ = convert(delta, now, "absolute", anchor=anchor, pad_mask=pad)
    for b in range(B):
        np.testing.assert_allclose(back[b, : real[b]], values[b, : real[b]], atol=1e-12)
        held = ~np.array(space.incremental)
        np.testing.assert_allclose(back[b, real[b] :, held].T, np.broadcast_to(values[b, real[b] - 1, held], (T - real[b], held.sum())), atol=1e-12)  # fmt: skip
    # Without the mask, zero steps still mean holding the pose.
    loose, _ = convert(delta, now, "absolute", anchor=anchor)
    np.testing.assert_allclose(matrices(loose, space), matrices(back, space), atol=1e-12)


def test_limits_go_where_they_no_longer_bind():
    space = find_space("libero_franka")
    assert with_frame(space, "delta") is space
    assert with_frame(space, "relative").low is None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_rotation_format_of_a_space_and_back(source, form):
    rng = np.random.default_rng(7)
    space = space_with(source)
    values = actions_of(space, rng)
    there, now = convert_rotations(values, space, form, scale=0.25 if form in ("axis_angle", "euler_zyx") else 1.0)
    assert now.dim == space.dim - ROTATION_SIZE[source] + ROTATION_SIZE[form] == there.shape[-1] == len(now.names)
    np.testing.assert_allclose(matrices(there, now), matrices(values, space), atol=1e-12)
    back, former = convert_rotations(there, now, source, scale=space.group("rotation").scale or 1.0)
    np.testing.assert_allclose(back, values, atol=1e-12)
    assert [g.dims for g in former.groups] == [g.dims for g in space.groups]
    for name in ("gripper", "position", "arm", "base"):
        np.testing.assert_array_equal(there[..., list(now.group(name).dims)], values[..., list(space.group(name).dims)])


def test_rotation_format_keeps_the_other_limits_and_names():
    space = with_rotation(find_space("libero_franka"), "rot6d")
    assert space.dim == 10
    assert space.names[3:] == (*(f"rotation.{c}" for c in ("r00", "r10", "r20", "r01", "r11", "r21")), "gripper")
    assert space.low == (-1.0,) * 10
    angles = with_rotation(space, "euler_xyz", scale=0.5)
    assert angles.high == pytest.approx((1, 1, 1, 2 * np.pi, 2 * np.pi, 2 * np.pi, 1))


@pytest.mark.parametrize("form", ["rot6d", "quaternion_xyzw", "axis_angle"])
def test_frame_and_format_commute(form):
    rng = np.random.default_rng(8)
    space = space_with("euler_xyz")
    values, anchor = actions_of(space, rng), actions_of(space, rng, (B,))
    first, a = convert(*convert_rotations(values, space, form), "relative", anchor=convert_rotations(anchor[:, None], space, form)[0][:, 0])  # fmt: skip
    second, b = convert_rotations(*convert(values, space, "relative", anchor=anchor), form)
    assert a == b
    np.testing.assert_allclose(first, second, atol=1e-12)


# -- paths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["body", "world"])
@pytest.mark.parametrize("form", FORMATS)
def test_path_of_steps_is_the_relative_pose_in_physical_units(form, side):
    rng = np.random.default_rng(9)
    space = space_with(form)
    values, anchor = actions_of(space, rng), actions_of(space, rng, (B,))
    steps, delta_space = convert(values, space, "delta", anchor=anchor, side=side)
    relative, _ = convert(values, space, "relative", anchor=anchor, side=side)
    path, where = accumulate(steps, delta_space), path_space(delta_space)
    np.testing.assert_allclose(path[..., [1, 2, 3]], relative[..., [1, 2, 3]] * 0.05, atol=1e-12)
    np.testing.assert_allclose(matrices(path, where), matrices(relative, space), atol=1e-12)
    np.testing.assert_allclose(path[..., -1], np.cumsum(values[..., -1], -1) * 2.0 / 10.0, atol=1e-12)
    np.testing.assert_array_equal(path[..., 0], values[..., 0])
    assert where.group("position").mode == "relative"
    assert where.group("base").unit == "m"
    assert where.group("gripper").scale is None
    # A path is in its own space: accumulating it again changes nothing.
    np.testing.assert_allclose(accumulate(path, where), path, atol=1e-15)


def test_path_of_angular_velocities():
    """A constant angular velocity of 0.7 rad/s for 13 steps at 10 Hz turns by 0.91 rad."""
    group = ActionGroup(name="turn", kind="rotation", rotation="axis_angle", dims=(0, 1, 2), mode="velocity", unit="rad/s", scale=1.0)  # fmt: skip
    space = ActionSpace(embodiment="test", dim=3, groups=(group,), rate_hz=10.0)
    axis = np.array([2.0, -1.0, 2.0]) / 3
    path = accumulate(np.broadcast_to(0.7 * axis, (13, 3)), space)
    np.testing.assert_allclose(path, 0.07 * np.arange(1, 14)[:, None] * axis, atol=1e-14)
    assert path_space(space).groups[0].unit == "rad"


def test_unknown_scale_or_rate_stays_raw():
    position = ActionGroup(name="p", kind="position", dims=(0, 1, 2), mode="delta")
    turn = ActionGroup(name="r", kind="rotation", rotation="euler_xyz", dims=(3, 4, 5), mode="delta")
    base = ActionGroup(name="b", kind="base", dims=(6,), mode="velocity", unit="m/s", scale=1.0)
    space = ActionSpace(embodiment="test", dim=7, groups=(position, turn, base))
    values = np.random.default_rng(10).normal(size=(B, T, 7))
    np.testing.assert_allclose(accumulate(values, space), np.cumsum(values, 1), atol=1e-14)
    assert all(g.scale is None and g.unit == "raw" for g in path_space(space).groups)


@needs_real
def test_paths_follow_real_robots():
    """The integrated command of real and simulated arms leads where their proprioception says they went."""
    data = np.load(REAL / "sim" / "libero_state" / "libero_spatial.npz")
    space = find_space("libero_franka")
    steps = slice(0, int(data["episode_length"][0]))
    path = accumulate(data["action"][steps], space)[:-1, :3]
    moved = (data["proprio"][steps, :3] - data["proprio"][steps.start, :3])[1:]
    assert np.corrcoef(path[:, 0], moved[:, 0])[0, 1] > 0.9
    assert np.corrcoef(path[:, 1], moved[:, 1])[0, 1] > 0.9


@needs_real
def test_real_joint_trajectories_round_trip():
    data = np.load(REAL / "sim" / "aloha_sim" / "transfer_cube.npz")
    space = find_space("aloha_sim")
    chunk, anchor = data["action"][:400].reshape(8, 50, 14), data["proprio"][:400:50, :14]
    for frame in ("relative", "delta"):
        there, now = convert(chunk, space, frame, anchor=anchor)
        np.testing.assert_allclose(convert(there, now, "absolute", anchor=anchor)[0], chunk, atol=1e-5)
        assert np.abs(there[..., :6]).mean() < np.abs(chunk[..., :6]).mean()


# -- layouts ------------------------------------------------------------------------------------------------------------


def test_union_of_x_tokenizer_from_one_arm_and_back():
    """An absolute pose goes to the right arm's channels of the 26, and nothing else is present."""
    union, space = find_space("xtokenizer_26"), find_space("droid_ee")
    rng = np.random.default_rng(11)
    values = rng.uniform(-1, 1, (B, T, 7))
    anchor = rng.uniform(-1, 1, (B, 7))
    mapping = union_mapping("droid_ee", "xtokenizer_26")
    relative, now = convert_rotations(*convert(values, space, "relative", anchor=anchor), "rot6d")
    wide, present = to_union(relative, now, union, mapping=mapping)
    assert wide.shape == (B, T, 26)
    assert present.shape == (B, 26)
    assert np.flatnonzero(present[0]).tolist() == [3, 4, 5, 12, 13, 14, 15, 16, 17, 19]
    assert (wide[..., ~present[0]] == 0).all()
    np.testing.assert_array_equal(wide[..., 3:6], relative[..., :3])
    back, kept = from_union(wide, now, union, mapping=mapping)
    np.testing.assert_array_equal(back, relative)
    assert kept.all()
    euler, former = convert_rotations(back, now, "euler_xyz")
    np.testing.assert_allclose(convert(euler, former, "absolute", anchor=anchor)[0], values, atol=1e-12)


def test_union_reconciles_scales_and_sizes():
    narrow = ActionGroup(name="arm", kind="joint", dims=(1, 0), unit="rad", scale=0.5)
    wide = ActionGroup(name="arm", kind="joint", dims=(2, 3, 4), unit="rad", scale=0.25)
    rest = ActionGroup(name="rest", kind="raw", dims=(0, 1))
    space = ActionSpace(embodiment="two", dim=2, groups=(narrow,))
    union = ActionSpace(embodiment="five", dim=5, groups=(rest, wide))
    values = np.random.default_rng(12).normal(size=(7, 2))
    there, present = to_union(values, space, union)
    np.testing.assert_allclose(there[:, 2], values[:, 1] * 2)
    assert present.tolist() == [False, False, True, True, False]
    np.testing.assert_allclose(from_union(there, space, union)[0], values)
    twice = ActionSpace(embodiment="two", dim=2, groups=tuple(ActionGroup(name=n, kind="raw", dims=(i,)) for i, n in enumerate("ab")))  # fmt: skip
    with pytest.raises(SpaceMismatchError, match="a and b would both fill rest"):
        to_union(values, twice, union, mapping={"a": "rest", "b": "rest"})


def test_union_refuses_what_does_not_fit():
    union, space = find_space("xtokenizer_26"), find_space("droid_ee")
    values = np.zeros((T, 7))
    mapping = union_mapping("droid_ee", "xtokenizer_26")
    with pytest.raises(SpaceMismatchError, match=r"position, rotation, gripper of 'droid_ee' have no place"):
        to_union(values, space, union)
    with pytest.raises(
        SpaceMismatchError, match="position does not fit right_position: mode absolute against relative"
    ):
        to_union(values, space, union, mapping=mapping)
    kept, present = to_union(values, space, union, mapping=mapping, drop=["position", "rotation"])
    assert present.sum() == 1
    assert not from_union(kept, space, union, mapping=mapping, drop=["position", "rotation"])[1][:6].any()
    with pytest.raises(ConfigError, match="has no group 'hand'"):
        to_union(values, space, union, drop=["hand"])
    with pytest.raises(ConfigError, match="states no place in 'xtokenizer_26'"):
        union_mapping("so100", "xtokenizer_26")


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    space = space_with()
    values = np.zeros((B, T, space.dim))
    with pytest.raises(DataError, match=r"no anchor was given.*\[\.\.\., 10\]"):
        convert(values, space, "relative")
    with pytest.raises(DataError, match=r"anchor has dtype float64 and shape \(5, 3\); give floats \(5, 10\)"):
        convert(values, space, "relative", anchor=np.zeros((B, 3)))
    with pytest.raises(DataError, match="anchor holds non-finite"):
        convert(values, space, "relative", anchor=np.full((B, 10), np.nan))
    with pytest.raises(ConfigError, match="cannot convert actions to 'velocity'"):
        convert(values, space, "velocity")
    with pytest.raises(SpaceMismatchError, match="actions have 3 dimensions, action space 'test' has 10"):
        convert(values[..., :3], space, "delta")
    with pytest.raises(DataError, match="dtype int64"):
        accumulate(values.astype(np.int64), space)
    with pytest.raises(DataError, match="1 non-finite"):
        accumulate(np.where(np.arange(10) == 3, np.nan, values[:1, :1]), space)
    with pytest.raises(DataError, match="padding must stand at the end"):
        convert(values, space, "relative", anchor=values[:, 0], pad_mask=np.arange(T)[None].repeat(B, 0) < 2)
    _, turned = convert(values, space, "relative", anchor=values[:, 0], side="world")
    with pytest.raises(ConfigError, match="turns about world axes"):
        convert(values, turned, "delta", side="body")
    unknown = find_space("xarm7_ee")
    with pytest.raises(ConfigError, match="'rotation' has no scale"):
        convert(np.zeros((T, 7)), unknown, "relative")


def test_distance_of_a_decoded_delta_in_world_and_body_axes_differs():
    """The side matters for the path, which is why a space states it."""
    rng = np.random.default_rng(13)
    body, world = (space_with("axis_angle", "delta", side) for side in ("body", "world"))
    steps = actions_of(body, rng) * 0.3
    turn = list(body.group("rotation").dims)
    apart = rotation_distance(accumulate(steps, body)[..., turn], accumulate(steps, world)[..., turn], "axis_angle")
    np.testing.assert_allclose(apart[:, 0], 0, atol=1e-12)
    assert (apart[:, -1] > 1e-3).all()
