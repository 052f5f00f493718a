"""Kinematic chains against MuJoCo and SciPy, and joint-space arms as poses, there and back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.optimize import minimize

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.data import Chunks, FrameCache, find_space, open_dataset
from actok.data.kinematic import stated_kinematics, with_kinematics
from actok.signal.conversions import convert
from actok.signal.end_effector import EndEffectorMap
from actok.signal.kinematics import KinematicChain
from actok.signal.rotations import from_matrix, geodesic_distance, to_matrix
from actok.tokenizers.xtokenizer_layout import UnionMap
from realdata import REAL, needs_real
from urdfs import VIPERX, joint, random_chain, robot, viperx

B, T = 5, 11
ARM = KinematicChain.from_urdf(viperx(), "base", "tip")
KINDS = (
    ("revolute",),
    ("fixed", "revolute", "prismatic", "fixed", "continuous", "revolute", "fixed"),
    ("continuous", "revolute", "fixed", "fixed", "revolute", "prismatic", "revolute", "continuous"),
    ("revolute",) * 7,
)


def within(chain: KinematicChain, count: int, seed: int = 0, margin: float = 0.0) -> np.ndarray:
    """Joints [count, J] at least `margin` inside the limits; unlimited ones anywhere."""
    low = np.where(np.isfinite(chain.low), chain.low, -4.0) + margin
    high = np.where(np.isfinite(chain.high), chain.high, 4.0) - margin
    return np.random.default_rng(seed).uniform(low, high, (count, len(chain)))


def smallest(chain: KinematicChain, joints: np.ndarray) -> np.ndarray:
    """How far from singular: the least singular value of the Jacobian."""
    return np.linalg.svd(chain.jacobian(joints), compute_uv=False)[..., -1]


# -- forward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_poses_and_jacobians_are_those_of_mujoco(seed):
    mujoco = pytest.importorskip("mujoco")
    text = random_chain(seed, KINDS[seed])
    tip = f"l{len(KINDS[seed])}"
    model = mujoco.MjModel.from_xml_string(text)
    data, body = mujoco.MjData(model), model.body(tip).id
    chain = KinematicChain.from_urdf(text, "l0", tip)
    assert chain.names == tuple(model.joint(i).name for i in range(model.njnt))
    joints = within(chain, 7, seed)
    position, rotation = chain.forward(joints)
    jacobian = chain.jacobian(joints)
    for i, q in enumerate(joints):
        data.qpos[:] = q
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(position[i], data.body(tip).xpos, atol=1e-12)
        np.testing.assert_allclose(rotation[i], data.body(tip).xmat.reshape(3, 3), atol=1e-12)
        moved, turned = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        mujoco.mj_jacBody(model, data, moved, turned, body)
        np.testing.assert_allclose(jacobian[i], np.concatenate([moved, turned]), atol=1e-12)


def test_a_chain_from_the_middle_of_a_robot_is_the_rest_of_the_whole():
    """T(base, tip) = T(base, middle) T(middle, tip), whatever stands beside it."""
    upper = KinematicChain.from_urdf(viperx(), "base", "link3")
    lower = KinematicChain.from_urdf(viperx(), "link3", "tip")
    assert upper.names + lower.names == tuple(name for name, *_ in VIPERX)
    q = within(ARM, 7)
    (p, r), (p1, r1), (p2, r2) = ARM.forward(q), upper.forward(q[:, :3]), lower.forward(q[:, 3:])
    np.testing.assert_allclose(p, p1 + (r1 @ p2[..., None])[..., 0], atol=1e-14)
    np.testing.assert_allclose(r, r1 @ r2, atol=1e-14)


def test_leading_axes_are_free_and_a_batch_is_its_singles():
    q = within(ARM, B * T, margin=0.1).reshape(B, T, 6)
    p, r = ARM.forward(q)
    found = ARM.inverse(p, r, q + 0.01)
    assert found.joints.shape == (B, T, 6)
    assert found.converged.shape == found.position_error.shape == found.rotation_error.shape == (B, T)
    one = ARM.inverse(p[3, 7], r[3, 7], q[3, 7] + 0.01)
    np.testing.assert_allclose(one.joints, found.joints[3, 7], atol=1e-13)
    np.testing.assert_array_equal(ARM.forward(q[3, 7])[0], p[3, 7])
    spread = ARM.inverse(p[3], r[3], q[3, 0])  # one start for all
    np.testing.assert_array_equal(spread.joints, ARM.inverse(p[3], r[3], np.tile(q[3, 0], (T, 1))).joints)


# -- inverse ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, *range(1, 3)]))
@examples(max_examples=50, deadline=None)
def test_joints_come_back_from_their_pose(seed, kinds):
    """From a start within 0.02 rad or m, unless the configuration is singular."""
    chain = (
        ARM
        if kinds is None
        else KinematicChain.from_urdf(random_chain(kinds, KINDS[kinds]), "l0", f"l{len(KINDS[kinds])}")
    )
    rng = np.random.default_rng(seed)
    q = within(chain, 1, seed)[0]
    if len(chain) <= 6:
        assume(smallest(chain, q) > 0.04)
    start = np.clip(q + rng.uniform(-0.02, 0.02, len(chain)), chain.low, chain.high)
    found = chain.inverse(*chain.forward(q), start)
    assert found.converged
    np.testing.assert_allclose(found.joints, q, atol=1e-9)


def test_a_pose_out_of_reach_is_said_to_be_and_the_nearest_within_limits_is_given():
    q = within(ARM, 13, margin=0.2)
    p, r = ARM.forward(q)
    far = ARM.inverse(p * 3 + np.array([0, 0, 2.0]), r, q)
    assert not far.converged.any()
    assert (far.joints >= ARM.low).all()
    assert (far.joints <= ARM.high).all()
    at, turned = ARM.forward(far.joints)
    np.testing.assert_allclose(
        far.position_error, np.linalg.norm(at - (p * 3 + np.array([0, 0, 2.0])), axis=-1), atol=1e-9
    )
    np.testing.assert_allclose(far.rotation_error, geodesic_distance(turned, r), atol=1e-9)
    assert (far.position_error > 1.0).all()


def test_limits_hold_at_the_start_on_the_way_and_at_the_end():
    """A pose that only joints beyond a limit reach is not reached; one at the limit is, from a start beyond it."""
    q = within(ARM, 17, margin=0.2)
    beyond, at = q.copy(), q.copy()
    beyond[:, 4], at[:, 4] = ARM.high[4] + 0.05, ARM.high[4]
    start = q.copy()
    start[:, 4] = ARM.high[4] - 0.02
    found = ARM.inverse(*ARM.forward(beyond), start)
    assert not found.converged.any()
    assert (found.joints <= ARM.high).all()
    clear = smallest(ARM, at) > 0.04
    assert clear.sum() > 7
    found = ARM.inverse(*ARM.forward(at[clear]), beyond[clear])
    assert found.converged.all()
    np.testing.assert_allclose(found.joints, at[clear], atol=1e-9)


def test_an_arm_of_five_joints_reaches_its_own_poses_and_no_others():
    arm = KinematicChain.from_urdf(viperx(5), "base", "tip")
    q = within(arm, 13, margin=0.1)
    p, r = arm.forward(q)
    found = arm.inverse(p, r, q + 0.01)
    clear = smallest(arm, q) > 0.04
    assert found.converged.all()
    assert clear.sum() > 7
    np.testing.assert_allclose(found.joints[clear], q[clear], atol=1e-9)
    assert not arm.inverse(p, r @ to_matrix(np.array([0.3, 0.1, 0.2]), "axis_angle"), q).converged.any()


def test_a_redundant_arm_takes_the_solution_nearest_to_the_start():
    """Against SciPy's constrained minimum of |q - start|, and no farther than the joints the pose is of."""
    text = random_chain(3, KINDS[3])
    arm = KinematicChain.from_urdf(text, "l0", "l7")
    rng = np.random.default_rng(1)
    q = within(arm, 5, 1, margin=0.3)
    start = q + rng.uniform(-0.2, 0.2, q.shape)
    p, r = arm.forward(q)
    found = arm.inverse(p, r, start)
    assert found.converged.all()

    def miss(x: np.ndarray, i: int) -> np.ndarray:
        at, turned = arm.forward(x)
        return np.concatenate([at - p[i], from_matrix(r[i] @ turned.T, "axis_angle")])

    for i in range(len(q)):
        distance = np.linalg.norm(found.joints[i] - start[i])
        assert distance <= np.linalg.norm(q[i] - start[i]) + 1e-9
        best = minimize(
            lambda x, i=i: ((x - start[i]) ** 2).sum(),
            found.joints[i] + 1e-3,
            constraints={"type": "eq", "fun": miss, "args": (i,)},
            bounds=list(zip(arm.low, arm.high, strict=True)),
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        assert np.abs(miss(best.x, i)).max() < 1e-7
        assert distance == pytest.approx(np.linalg.norm(best.x - start[i]), abs=1e-6)


@pytest.mark.parametrize(
    ("position", "rotation", "start", "words"),
    [
        (np.zeros(2), np.eye(3), np.zeros(6), "position has dtype float64, shape"),
        (np.zeros(3), np.eye(3) * 2, np.zeros(6), "no rotations"),
        (np.zeros(3), -np.eye(3), np.zeros(6), "no rotations"),
        (np.full(3, np.nan), np.eye(3), np.zeros(6), "finite"),
        (np.zeros(3), np.eye(3), np.zeros(5), "start has dtype float64 and shape"),
        (np.zeros(3), np.eye(3), np.full(6, np.inf), "not finite"),
        (np.zeros((2, 3)), np.eye(3), np.zeros((3, 6)), "do not go together"),
    ],
)
def test_what_is_no_pose_or_no_start_is_refused(position, rotation, start, words):
    with pytest.raises(DataError, match=words):
        ARM.inverse(position, rotation, start)


# -- reading a URDF -----------------------------------------------------------------------------------------------------

AB = ["a", "b"]


@pytest.mark.parametrize(
    ("source", "base", "tip", "words"),
    [
        ("<robot", "a", "b", "no XML"),
        ("<mujoco/>", "a", "b", "<mujoco>, no <robot>"),
        ("missing.urdf", "a", "b", "missing.urdf cannot be read"),
        ('<robot xmlns:xacro="http://www.ros.org/wiki/xacro"><xacro:arg name="x"/></robot>', "a", "b", "expand it first"),
        (robot(AB, []), "a", "c", "no link 'c'; it has a, b"),
        (robot(AB, []), "a", "b", "no joints lead from 'a' to 'b'"),
        (viperx(), "finger", "tip", "above 'tip' stand base, link1, .*link5: name one"),
        (robot(AB, [joint("x", "fixed", "a", "b")]), "a", "b", "no joint between 'a' and 'b' moves"),
        (viperx(), "base", "mirror", "'mirror' copies 'finger'"),
        (robot(AB, [joint("x", "floating", "a", "b")]), "a", "b", "'x' is floating"),
        (robot(AB, [joint("x", "revolute", "a", "b", axis=(0, 0, 1))]), "a", "b", "no range between its limits 0 and 0"),
        (robot(AB, [joint("x", "continuous", "a", "b", axis=(0, 0, 0))]), "a", "b", "no direction"),
        (robot(AB, [joint("x", "fixed", "a", "b", xyz=(0, 0, np.nan))]), "a", "b", "three finite numbers"),
        (robot(AB, [joint("x", "fixed", "a", "b"), joint("y", "fixed", "a", "b")]), "a", "b", "hangs on two joints"),
        (robot([*AB, "c"], [joint("x", "fixed", "c", "b"), joint("y", "fixed", "b", "c")]), "a", "b", "loop"),
        ('<robot><link name="a"/><link name="b"/><joint name="x" type="fixed"><child link="b"/></joint></robot>', "a", "b", "no parent"),
    ],
)  # fmt: skip
def test_what_is_no_chain_is_refused_by_name(source, base, tip, words):
    with pytest.raises(ConfigError, match=words):
        KinematicChain.from_urdf(source, base, tip)


def test_a_path_a_text_and_an_axis_left_out(tmp_path):
    (tmp_path / "arm.urdf").write_text(viperx())
    for source in (tmp_path / "arm.urdf", str(tmp_path / "arm.urdf"), "\n" + viperx()):
        assert KinematicChain.from_urdf(source, "base", "tip").names == ARM.names
    plain = KinematicChain.from_urdf(robot(AB, [joint("x", "continuous", "a", "b")]), "a", "b")
    np.testing.assert_allclose(plain.forward(np.array([0.3]))[1], to_matrix(np.array([0.3, 0, 0]), "axis_angle"))


# -- actions ------------------------------------------------------------------------------------------------------------


def two_arms(mode: str = "absolute", scale: float = 1.0) -> ActionSpace:
    """Gripper, left arm backwards in the vector, right arm."""
    groups = (
        ActionGroup(name="grippers", kind="gripper", dims=(6, 0)),
        ActionGroup(name="left_arm", kind="joint", dims=(1, 2, 3, 4, 5, 13), unit="rad", scale=scale, mode=mode),
        ActionGroup(name="right_arm", kind="joint", dims=(7, 8, 9, 10, 11, 12), unit="rad", scale=1.0),
    )
    return ActionSpace(embodiment="two", dim=14, groups=groups, rate_hz=50.0, low=(-9.0,) * 14, high=(9.0,) * 14)


def motion(space: ActionSpace, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Actions [B, T, 14] along smooth paths and the states where they start, away from singular configurations."""
    rng = np.random.default_rng(seed)
    home = np.array([0.1, -0.9, 1.1, 0.2, -0.6, 0.1])
    path = np.cumsum(rng.normal(scale=0.02, size=(B, T + 1, 14)), 1)
    for group in space.groups[1:]:
        path[..., list(group.dims)] = (path[..., list(group.dims)] + home) / group.scale
    absolute = replace(space, groups=tuple(replace(g, mode="absolute") for g in space.groups))
    actions = path[:, 1:]
    for group in space.groups:
        if group.mode != "absolute":
            moved = convert(actions, absolute, group.mode, anchor=path[:, 0])[0]
            actions = actions.copy()
            actions[..., list(group.dims)] = moved[..., list(group.dims)]
    return actions, path[:, 0]


@pytest.mark.parametrize("rotation", ["rot6d", "quaternion_xyzw", "axis_angle"])
@pytest.mark.parametrize("mode", ["absolute", "relative", "delta"])
def test_actions_become_the_poses_they_lead_to_and_come_back(mode, rotation):
    space = two_arms(mode, scale=np.pi / 180)
    actions, state = motion(space)
    found = EndEffectorMap(space, {"left": ARM, "right_arm": ARM}, rotation=rotation)
    poses = found.there(actions, state)
    dims = list(space.group("left_arm").dims)
    joints = actions[..., dims]
    if mode == "delta":
        joints = np.cumsum(joints, 1)
    if mode != "absolute":
        joints = joints + state[:, None, dims]
    position, turned = ARM.forward(joints * np.pi / 180)
    target = found.target
    left = poses[..., list(target.group("left_arm_position").dims)]
    np.testing.assert_allclose(left, position, atol=1e-13)
    seen = to_matrix(poses[..., list(target.group("left_arm_rotation").dims)], rotation)
    np.testing.assert_allclose(seen, turned, atol=1e-13)
    right = ARM.forward(actions[..., 7:13])[0]
    np.testing.assert_allclose(poses[..., list(target.group("right_arm_position").dims)], right, atol=1e-13)
    np.testing.assert_array_equal(poses[..., list(target.group("grippers").dims)], actions[..., [6, 0]])
    back = found.back(poses, state)
    assert back.reached.all()
    assert max(back.position_error.max(), back.rotation_error.max()) < 1e-9
    np.testing.assert_allclose(back.actions, actions, atol=1e-8)
    assert target.low is None
    assert target.embodiment == "two_ee"
    assert all(target.group(f"left_arm_{part}").mode == "absolute" for part in ("position", "rotation"))


def test_states_are_absolute_whatever_the_actions_are():
    _, state = motion(two_arms("delta"))
    found, plain = (EndEffectorMap(two_arms(mode), {"left": ARM}) for mode in ("delta", "absolute"))
    np.testing.assert_array_equal(found.states(state), plain.states(state))
    np.testing.assert_allclose(found.states(state)[:, 1:4], ARM.forward(state[:, [1, 2, 3, 4, 5, 13]])[0], atol=1e-14)


def test_what_an_arm_does_not_reach_is_nan_from_there_on_unless_asked_otherwise():
    space = two_arms()
    actions, state = motion(space)
    found = EndEffectorMap(space, {"left": ARM, "right": ARM})
    poses = found.there(actions, state)
    poses[2, 7, list(found.target.group("left_arm_position").dims)] += 5.0
    back = found.back(poses, state)
    assert np.argwhere(~back.reached).tolist() == [[2, 7]]
    assert np.isnan(back.actions[2, 7:][:, [1, 2, 3, 4, 5, 13, *range(7, 13)]]).all()
    np.testing.assert_array_equal(back.actions[2, 7:][:, [0, 6]], actions[2, 7:][:, [0, 6]])
    kept = np.ones((B, T), bool)
    kept[2, 7:] = False
    np.testing.assert_allclose(back.actions[kept], actions[kept], atol=1e-9)
    closest = found.back(poses, state, unreachable="closest")
    assert np.isfinite(closest.actions).all()
    assert closest.position_error[2, 7] > 4
    at = ARM.forward(closest.actions[2, 7, [1, 2, 3, 4, 5, 13]])[0]
    wanted = poses[2, 7, list(found.target.group("left_arm_position").dims)]
    assert closest.position_error[2, 7] == pytest.approx(np.linalg.norm(at - wanted))
    np.testing.assert_array_equal(closest.reached, back.reached)


def test_joints_in_the_26_channels_are_refused_with_the_remedy():
    with pytest.raises(SpaceMismatchError, match=r"'left_arm' \(joint.*actok.data.with_kinematics"):
        UnionMap.infer(find_space("aloha"), "26")


def test_the_command_line_may_name_the_layout_by_its_number():
    pytest.importorskip("torch")
    from actok.core import build_config, parse_assignments
    from actok.tokenizers.xtokenizer import XTokenizerConfig

    assert build_config(XTokenizerConfig, parse_assignments(["layout=26"]), "test").layout == "26"
    with pytest.raises(ConfigError, match="layout is '27'"):
        build_config(XTokenizerConfig, parse_assignments(["layout=27"]), "test")


def test_one_arm_without_a_side_takes_the_right_channels():
    chain = KinematicChain.from_urdf(viperx(), "base", "tip")
    target = EndEffectorMap(find_space("robosuite_joint_6"), {"arm": chain}).target
    places = {group: place for group, (place, _) in UnionMap.infer(target, "26").places.items()}
    assert places == {"arm_position": "right_position", "arm_rotation": "right_rotation", "gripper": "right_gripper"}


@pytest.mark.parametrize(
    ("space", "chains", "words"),
    [
        ("aloha", {}, "no kinematic model|no kinematic chain"),
        ("aloha", {"arm": ARM}, "more than one joint group"),
        ("aloha", {"middle": ARM}, "names no joint group of 'aloha'; name one of left_arm, right_arm"),
        ("aloha", {"left": ARM, "left_arm": ARM}, "two chains"),
        ("droid_ee", {"left": ARM}, "it has no joints"),
        ("robosuite_joint_7", {"arm": ARM}, "has 7 joints, its chain from 'base' to 'tip' has 6"),
        ("agilex_piper", {"arm": ARM}, "no scale"),
    ],
)
def test_a_chain_that_does_not_belong_to_the_robot_is_refused(space, chains, words):
    with pytest.raises(ConfigError, match=words):
        EndEffectorMap(find_space(space), chains)


def test_a_missing_anchor_and_another_width_are_refused():
    found = EndEffectorMap(two_arms("delta"), {"left": ARM})
    actions, state = motion(two_arms("delta"))
    with pytest.raises(DataError, match=r"depends? on the joints at the chunk's start"):
        found.there(actions)
    with pytest.raises(DataError, match=r"anchor as floats \[B, 14\].*missing"):
        found.back(found.there(actions, state), None)
    with pytest.raises(SpaceMismatchError):
        found.back(actions, state)
    with pytest.raises(DataError, match="states have dtype"):
        found.states(state[:, :-1])


# -- datasets -----------------------------------------------------------------------------------------------------------


def recorded(mode: str = "absolute", extra: int = 3):
    """A dataset of B episodes with states [T, 14 + extra], and its arrays."""
    space = two_arms(mode)
    actions, state = motion(space)
    moved = state[:, None] + 0.01 * np.arange(T)[:, None]
    proprio = np.concatenate([moved, np.full((B, T, extra), 7.0)], -1).astype(np.float32)
    arrays = {
        "action": actions.astype(np.float32).reshape(-1, 14),
        "proprio": proprio.reshape(B * T, -1),
        "episode_length": np.full(B, T),
        "task": np.array([f"task{i % 2}" for i in range(B)]),
    }
    return open_dataset(arrays, space=space, name="two"), actions, proprio


def test_a_dataset_of_joints_is_read_as_a_dataset_of_poses():
    dataset, actions, proprio = recorded()
    poses = with_kinematics(dataset, {"left": ARM, "right": ARM}, state=range(14))
    assert len(poses) == B
    assert list(poses.tasks) == list(dataset.tasks)
    episode = poses.episode(3)
    np.testing.assert_allclose(episode.actions, poses.map.there(actions[3]), atol=1e-6)
    np.testing.assert_allclose(episode.proprio, poses.map.states(proprio[3, :, :14]), atol=1e-6)
    assert episode.task == "task1"
    assert "from base to tip" in poses.space_origin
    with pytest.raises(DataError, match=r"proprioception has 17 numbers, the actions 14; .*state=range\(14\)"):
        with_kinematics(dataset, {"left": ARM}).episode(0)
    with pytest.raises(ConfigError, match="state names 13 numbers"):
        with_kinematics(dataset, {"left": ARM}, state=range(13))
    with pytest.raises(ConfigError, match="state names number 17"):
        with_kinematics(dataset, {"left": ARM}, state=range(4, 18)).episode(0)


def test_steps_add_to_the_measured_joints_of_their_own_frame():
    dataset, actions, proprio = recorded("delta", extra=0)
    episode = with_kinematics(dataset, {"left": ARM}).episode(2)
    dims = [1, 2, 3, 4, 5, 13]
    led = ARM.forward(proprio[2][:, dims].astype(np.float64) + actions[2][:, dims])[0]
    np.testing.assert_allclose(episode.actions[:, 1:4], led, atol=1e-6)
    stateless = open_dataset({"action": actions.astype(np.float32)}, space=two_arms("delta"))
    with pytest.raises(DataError, match="no proprioception in episode 0"):
        with_kinematics(stateless, {"left": ARM}).episode(0)
    relative = open_dataset({"action": actions.astype(np.float32)}, space=two_arms("relative"))
    with pytest.raises(ConfigError, match="relative to the start of a chunk"):
        with_kinematics(relative, {"left": ARM})


def test_a_cache_of_other_chains_is_made_again(tmp_path):
    dataset, *_ = recorded()
    longer = KinematicChain.from_urdf(viperx().replace("0.069744", "0.169744"), "base", "tip")
    first, second = (
        FrameCache.build(with_kinematics(dataset, {"left": c}, state=range(14)), tmp_path / "cache")
        for c in (ARM, longer)
    )
    moved = np.linalg.norm(second.actions[:, 1:4] - first.actions[:, 1:4], axis=1)
    np.testing.assert_allclose(moved, 0.1, atol=1e-6)


TOML = """
embodiment = "two"
dim = 14
rate_hz = 50.0
groups = [
    { name = "left_arm", kind = "joint", dims = [0, 1, 2, 3, 4, 5], unit = "rad", scale = 1.0 },
    { name = "left_gripper", kind = "gripper", dims = [6] },
    { name = "right_arm", kind = "joint", dims = [7, 8, 9, 10, 11, 12], unit = "rad", scale = 1.0 },
    { name = "right_gripper", kind = "gripper", dims = [13] },
]
[kinematics]
left_arm = { urdf = "viperx.urdf", base = "base", tip = "tip" }
right_arm = { urdf = "viperx.urdf", base = "base", tip = "tip" }
rotation = "quaternion_wxyz"
state = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
"""


def test_a_space_file_names_the_chains_and_every_reader_takes_them(tmp_path):
    (tmp_path / "viperx.urdf").write_text(viperx())
    (tmp_path / "two.toml").write_text(TOML)
    rng = np.random.default_rng(0)
    joints = rng.uniform(-0.5, 0.5, (B, T, 14)).astype(np.float32)
    arrays = {"action": joints, "proprio": rng.uniform(-0.5, 0.5, (B, T, 17)).astype(np.float32)}
    dataset = open_dataset(arrays, space=str(tmp_path / "two.toml"))
    assert dataset.space.dim == 16
    assert dataset.episode(1).proprio.shape == (T, 16)
    stated = stated_kinematics(tmp_path / "two.toml")
    assert stated.space == find_space(tmp_path / "two.toml")
    np.testing.assert_allclose(dataset.episode(1).actions, stated.map.there(joints[1]), atol=1e-6)
    assert stated_kinematics("aloha") is None
    for wrong, words in (
        (TOML.replace('base = "base", ', ""), "a joint group takes"),
        (TOML.replace("state = [0,", 'state = ["a",'), "give whole numbers"),
        (TOML.replace("viperx.urdf", "other.urdf"), "other.urdf cannot be read"),
        (TOML.replace("[kinematics]", "[kinematics.x]"), "x = .*; a joint group takes"),
    ):
        (tmp_path / "wrong.toml").write_text(wrong)
        with pytest.raises(ConfigError, match=words):
            open_dataset(arrays, space=tmp_path / "wrong.toml")


# -- through X-Tokenizer ------------------------------------------------------------------------------------------------


@needs_real
def test_aloha_comes_back_through_the_26_channels_to_its_joints(record_property):
    """Joints -> poses -> relative to the chunk's start -> poses -> joints, in float64: the conversions lose nothing."""
    joints = open_dataset(REAL / "sim" / "aloha_sim")
    chunks = Chunks(FrameCache.build(joints), 50, stride=50).all()
    actions, state = chunks.actions.astype(np.float64), chunks.anchor[:, :14].astype(np.float64)
    found = EndEffectorMap(joints.space, {"left": ARM, "right": ARM})
    union, anchor = UnionMap.infer(found.target, "26"), found.states(state)
    shared = union.there(found.there(actions), anchor)
    assert union.channels.tolist() == list(range(20))
    back = found.back(union.back(shared, anchor), state)
    error = np.abs(back.actions - actions).max()
    record_property("error_rad", float(error))
    assert back.reached.all()
    assert error <= 1e-9


@needs_real
def test_aloha_comes_back_through_xtokenizer_without_its_quantiser(record_property, monkeypatch):
    """The whole of encode and decode but the codes, in float32, whose rounding grows where an arm is nearly singular."""
    torch = pytest.importorskip("torch")
    from actok.core import ChunkContext, FitPart, build_config
    from actok.tokenizers.xtokenizer import XTokenizer, XTokenizerConfig

    torch.set_num_threads(1)
    source = open_dataset(REAL / "sim" / "aloha_sim")
    poses = with_kinematics(source, {"left": ARM, "right": ARM}, state=range(14))
    recorded, chunks = (Chunks(FrameCache.build(d), 50, stride=50).all() for d in (source, poses))
    part = FitPart(actions=chunks.actions, space=poses.space, anchor=chunks.anchor)
    small = {"layout": "26", "width": 24, "heads": 3, "encoder_depth": 1, "decoder_depth": 1, "latent_dim": 10}
    tokenizer = XTokenizer.prepare([part], build_config(XTokenizerConfig, small, "test"), seed=0)
    kept = []

    def tokenize(batch):
        kept.append(batch.actions.float())
        return torch.zeros(len(batch.actions), tokenizer.layout.max_len, dtype=torch.int64)

    monkeypatch.setattr(tokenizer.codec, "tokenize", tokenize)
    monkeypatch.setattr(tokenizer.codec, "detokenize", lambda ids, blank: kept.pop(0))
    context = ChunkContext(anchor=chunks.anchor)
    decoded = tokenizer.decode(tokenizer.encode(chunks.actions, context), context)
    assert decoded.valid.all()
    back = poses.map.back(decoded.actions.astype(np.float64), recorded.anchor[:, :14])
    error = np.abs(back.actions - recorded.actions)
    record_property("error_rad", {q: float(np.quantile(error.max(-1), q)) for q in (0.5, 0.99, 0.999, 1.0)})
    assert back.reached.all()
    for dims in (slice(0, 6), slice(7, 13)):
        arm = error[..., dims].max(-1)
        singular = smallest(ARM, recorded.actions[..., dims].astype(np.float64))
        assert (arm * singular).max() <= 1e-7  # the rounding of float32, however much the arm magnifies it
        assert np.quantile(arm, 0.999) <= 1e-5
        assert arm[singular > 1e-3].max() <= 1e-6
