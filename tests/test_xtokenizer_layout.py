"""The shared channels: every robot's way there and back, and where its groups go."""

import numpy as np
import pytest

from actok.core import ActionGroup, ActionSpace, DataError, SpaceMismatchError
from actok.data import find_space
from actok.data.spaces import FOLDER, list_spaces, union_mapping
from actok.signal.rotations import proper, to_matrix
from actok.tokenizers.xtokenizer_layout import UnionMap, layout_space

B, T = 5, 13
ROBOTS = [name for name in list_spaces() if not name.startswith("xtokenizer_")]
STATED = [name for name in ROBOTS if "[union.xtokenizer_26]" in (FOLDER / f"{name}.toml").read_text()]


def chunks(space: ActionSpace, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Actions and states of a space, rotations proper ones."""
    rng = np.random.default_rng(seed)
    values, anchor = rng.uniform(-0.5, 0.5, (B, T, space.dim)), rng.uniform(-0.5, 0.5, (B, space.dim))
    for group in space.groups:
        if group.rotation is not None:
            dims = list(group.dims)
            values[:, :, dims] = proper(values[:, :, dims], group.rotation)
            anchor[:, dims] = proper(anchor[:, dims], group.rotation)
    return values, anchor


@pytest.mark.parametrize("frame", ["relative", "step"])
@pytest.mark.parametrize("name", [*ROBOTS, "xtokenizer_26", "xtokenizer_wide"])
def test_there_and_back_is_exact(name, frame):
    space = find_space(name)
    values, anchor = chunks(space)
    union = UnionMap.infer(space, "wide", frame)
    there = union.there(values, anchor)
    assert there.shape == (B, T, 124)
    absent = np.setdiff1d(np.arange(124), union.channels)
    assert not there[:, :, absent].any()
    np.testing.assert_allclose(union.back(there, anchor), values, atol=1e-13)
    again = UnionMap.from_places(space, "wide", frame, union.places)
    np.testing.assert_array_equal(again.there(values, anchor), there)


@pytest.mark.parametrize("name", STATED)
def test_groups_go_where_the_presets_of_spaces_say(name):
    inferred = {group: place for group, (place, _) in UnionMap.infer(find_space(name), "26").places.items()}
    assert inferred == union_mapping(name, "xtokenizer_26")


def test_the_26_channels_are_the_first_of_the_wide_layout():
    narrow, wide = layout_space("26"), layout_space("wide")
    assert wide.groups[: len(narrow.groups)] == narrow.groups
    values, anchor = chunks(find_space("droid_ee"))
    few, many = (UnionMap.infer(find_space("droid_ee"), layout).there(values, anchor) for layout in ("26", "wide"))
    np.testing.assert_array_equal(many[:, :, :26], few)
    assert not many[:, :, 26:].any()


def test_steps_accumulate_about_the_axes_that_the_space_states():
    """Against rotation matrices multiplied by hand."""
    values, _ = chunks(find_space("libero_franka"))
    there = UnionMap.infer(find_space("libero_franka"), "wide").there(values)
    np.testing.assert_allclose(there[:, :, 3:6], np.cumsum(values[:, :, :3], 1), atol=1e-14)
    turn = np.eye(3)
    for t in range(T):
        turn = to_matrix(values[2, t, 3:6] * 0.5, "axis_angle") @ turn  # world axes: the new step on the left
        np.testing.assert_allclose(there[2, t, 12:18], turn.T[:2].ravel(), atol=1e-13)


def test_absolute_poses_are_relative_to_the_state_and_not_to_the_first_action():
    space = find_space("droid_ee")
    values, anchor = chunks(space)
    there = UnionMap.infer(space, "26").there(values, anchor)
    np.testing.assert_allclose(there[:, :, 3:6], values[:, :, :3] - anchor[:, None, :3], atol=1e-14)
    first = to_matrix(anchor[1, 3:6], "euler_xyz")
    wanted = first.T @ to_matrix(values[1, 7, 3:6], "euler_xyz")
    np.testing.assert_allclose(there[1, 7, 12:18], wanted.T[:2].ravel(), atol=1e-13)
    np.testing.assert_array_equal(there[:, :, 19], values[:, :, 6])


def test_step_frame_keeps_steps():
    space = find_space("metaworld_sawyer")
    values, _ = chunks(space)
    there = UnionMap.infer(space, "wide", "step").there(values)
    np.testing.assert_array_equal(there[:, :, [3, 4, 5, 19]], values)


def test_joints_and_hands_take_part_as_they_are():
    values, _ = chunks(find_space("unitree_g1_inspire"))
    union = UnionMap.infer(find_space("unitree_g1_inspire"), "wide")
    assert not union.needs_anchor
    np.testing.assert_array_equal(union.there(values)[:, :, union.channels], values)
    hand = UnionMap.infer(find_space("adroit_hand"), "wide").places
    assert [hand[g][0] for g in ("arm_slide", "wrist", "thumb")] == ["right_arm", "right_arm", "right_hand"]
    channels = [c for _, places in hand.values() for c in places]
    assert len(set(channels)) == len(channels) == 28


def test_a_missing_or_foreign_anchor_is_named():
    space = find_space("droid_ee")
    values, anchor = chunks(space)
    union = UnionMap.infer(space, "26")
    with pytest.raises(DataError, match=r"absolute position, rotation.* as anchor \[B, 7\]"):
        union.there(values)
    with pytest.raises(DataError, match="anchor has 6 numbers"):
        union.back(union.there(values, anchor), anchor[:, :6])


def test_a_group_without_a_place_is_named():
    with pytest.raises(SpaceMismatchError, match=r"'arm' \(joint, 6 dimensions\).*xtokenizer_26: it has no right_arm"):
        UnionMap.infer(find_space("robosuite_joint_6"), "26")
    with pytest.raises(SpaceMismatchError, match="rad per raw unit are unknown"):
        UnionMap.infer(find_space("kuka"), "26")
    assert UnionMap.infer(find_space("kuka"), "wide").places["rotation"][0] == "other"
    with pytest.raises(SpaceMismatchError, match="32 channels in other, of which 32 are left for its 33"):
        UnionMap.infer(ActionSpace.raw(33), "wide")


def test_a_rotation_is_present_as_a_whole_or_not_at_all():
    space = find_space("libero_franka")
    union = UnionMap.infer(space, "26")
    mask = np.ones((3, 7), bool)
    mask[1, 3:6] = False
    mask[2, 0] = False
    present = union.present(mask, 3)
    assert present.sum(1).tolist() == [10, 4, 9]
    mask[0, 4] = False
    with pytest.raises(DataError, match="part of the rotation 'rotation'"):
        union.present(mask, 3)


def test_a_second_group_for_a_full_place_stays_as_it_is():
    groups = tuple(
        ActionGroup(name=n, kind="position", dims=(3 * i, 3 * i + 1, 3 * i + 2), mode="delta")
        for i, n in enumerate("ab")
    )
    space = ActionSpace(embodiment="two", dim=6, groups=groups)
    assert {k: v[0] for k, v in UnionMap.infer(space, "wide").places.items()} == {"a": "right_position", "b": "other"}
    with pytest.raises(SpaceMismatchError, match="of which 0 are left for its 3"):
        UnionMap.infer(space, "26")
