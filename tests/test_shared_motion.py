"""Codes of two arms for the same achieved motion."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from actok.core import ActionSpace, ChunkContext, ConfigError, DataError, FitPart, TokenLayout, Tokens
from actok.data import open_dataset
from actok.data.arrays import from_arrays
from actok.evaluation.achieved import ArmChunks, achieved_poses, arm_chunks
from actok.evaluation.shared_motion import SameMotion, shared_codes
from actok.training import fit_parts
from realdata import REAL, needs_real

T = 7


class Steps:
    """Codes [B, N] that a function of the context's embodiment makes of the chunks; two levels by turns."""

    kind = "steps"

    def __init__(self, make, length=6):
        self.make, self.length = make, length

    def layout_for(self, horizon, embodiment):
        coords = np.array([[n % 2, n // 2, 0] for n in range(self.length)])
        return TokenLayout.uniform(97, coords)

    def encode(self, actions, context):
        assert isinstance(context, ChunkContext)
        assert context.anchor is not None
        ids = self.make(actions, context)
        return Tokens(
            flat=ids.reshape(-1),
            offsets=np.arange(len(ids) + 1) * self.length,
            horizon=T,
            fixed_length=self.length,
            out_of_range=np.zeros(len(ids), int),
            saturated=np.zeros(len(ids), int),
        )


def arm(name: str, count: int = 60, episodes: int = 5, seed: int = 0, noise: float = 0.0) -> ArmChunks:
    """Straight paths of 10 cm: the phase says which way. Which chunk it is stands in actions[:, 0, 0]."""
    rng = np.random.default_rng(seed)
    phase = np.arange(count) % 3
    path = np.arange(1, T + 1)[None, :, None] / T * 0.1 * np.eye(3)[phase][:, None]
    path = path + rng.uniform(-noise, noise, (count, 1, 3))
    actions = np.zeros((count, T, 2), np.float32)
    actions[:, 0, 0] = phase
    return ArmChunks(
        embodiment=name,
        actions=actions,
        anchor=np.zeros((count, 9), np.float32),
        positions=path,
        rotations=np.broadcast_to(np.eye(3), (count, T, 3, 3)),
        label=np.array(["ahead", "aside", "up"])[phase],
        episode=np.arange(count) % episodes,
    )


def codes_of(phase, context, rng):
    """Level 0 tells the phase, level 1 is drawn from 11 codes."""
    ids = np.empty((len(phase), 6), np.int64)
    ids[:, ::2] = phase[:, None] * 17
    ids[:, 1::2] = rng.integers(0, 11, (len(phase), 3))
    return ids


def test_a_level_that_tells_the_phase_is_shared_and_one_that_is_drawn_is_not():
    rng = np.random.default_rng(3)
    tokenizer = Steps(lambda x, c: codes_of(x[:, 0, 0].astype(int), c, rng))
    found = shared_codes(tokenizer, arm("one", 300), arm("two", 300, seed=1, noise=0.002), resamples=199)
    assert found.levels == (0, 1)
    assert found.share.value[0] == 1
    assert found.chance.value[0] == 0  # other phases have other codes
    assert found.same_arm.value[0] == 1
    assert found.share.value[1] == pytest.approx(1 / 11, abs=0.04)
    assert found.chance.value[1] == pytest.approx(1 / 11, abs=0.01)
    assert found.excess.low[1] < 0 < found.excess.high[1]
    assert (found.excess.low[0], found.excess.high[0]) == pytest.approx((1, 1))
    assert (found.pairs, found.same_arm_pairs, found.episodes[0]) == (300, 600, 5)
    assert 0 < found.deviation_m < 0.002 * np.sqrt(3)


def test_arms_whose_codes_depend_on_the_embodiment_share_nothing():
    def own(x, context):
        return codes_of(x[:, 0, 0].astype(int) + (3 if context.embodiment == "two" else 0), context, rng)

    rng = np.random.default_rng(5)
    found = shared_codes(Steps(own), arm("one"), arm("two"), resamples=7)
    assert found.share.value[0] == 0
    assert found.same_arm.value[0] == 1


def test_chance_is_the_share_over_all_pairs_of_other_labels():
    rng = np.random.default_rng(7)
    ids = {name: rng.integers(0, 3, (60, 6)) for name in ("one", "two")}
    a, b = arm("one"), arm("two")
    found = shared_codes(Steps(lambda x, c: ids[c.embodiment]), a, b, resamples=7)
    for level in (0, 1):
        each = [
            np.mean(
                [(ids["one"][i, level::2] == ids["two"][j, level::2]).mean() for j in range(60) if b.label[j] != la]
            )
            for i, la in enumerate(a.label)
        ]
        assert found.chance.value[level] == pytest.approx(np.mean(each))
        assert found.excess.value[level] == pytest.approx(found.share.value[level] - found.chance.value[level])


def test_the_nearest_path_is_taken_and_only_if_it_is_near_in_place_and_turn():
    a, b = arm("one", 9), arm("two", 9)
    shifts = np.repeat([0.007, 0.003, 0.02], 3)  # of the three chunks of each phase
    b = replace(b, positions=b.positions + shifts[:, None, None] * np.array([0.6, 0.0, 0.8]))
    tokenizer = Steps(lambda x, c: np.zeros((len(x), 6), np.int64))
    assert shared_codes(tokenizer, a, b, resamples=7).deviation_m == pytest.approx(0.003)
    turned = Rotation.from_rotvec([0.1, 0, 0.0]).as_matrix()
    turns = np.where((shifts == 0.003)[:, None, None, None], turned, np.eye(3)) * np.ones((9, T, 1, 1))
    b = replace(b, rotations=turns)
    found = shared_codes(tokenizer, a, b, criterion=SameMotion(rotation_rad=0.11), resamples=7)
    assert found.deviation_rad == pytest.approx(0.1)
    found = shared_codes(tokenizer, a, b, criterion=SameMotion(rotation_rad=0.09), resamples=7)
    assert found.deviation_m == pytest.approx(0.007)  # the nearest one turns too far
    with pytest.raises(DataError, match=r"nearest is 0\.003 m away\); raise the thresholds"):
        shared_codes(tokenizer, a, b, criterion=SameMotion(position_m=0.001), resamples=7)


def test_chunks_that_stand_still_are_no_motion():
    still = arm("two")
    still = replace(still, positions=np.where((np.arange(60) % 2 == 0)[:, None, None], 0.0, still.positions))
    assert len(still.moving(0.03)) == 30
    tokenizer = Steps(lambda x, c: np.zeros((len(x), 6), np.int64))
    assert shared_codes(tokenizer, still, arm("one"), resamples=7).pairs == 30
    with pytest.raises(DataError, match="lower least_m"):
        shared_codes(tokenizer, still, arm("one"), criterion=SameMotion(least_m=1.0))


def test_intervals_cover_the_share_and_depend_on_the_seed_alone():
    rng = np.random.default_rng(11)
    ids = {name: rng.integers(0, 2, (60, 6)) for name in ("one", "two")}
    tokenizer = Steps(lambda x, c: ids[c.embodiment])
    found = [shared_codes(tokenizer, arm("one"), arm("two"), resamples=501, seed=s) for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    for q in (0, 1):
        assert found[0].share.low[q] < found[0].share.value[q] < found[0].share.high[q]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.array(["else"] * 60)}, "no chunk of 'one' is within"),
        ({k: getattr(arm("two"), k)[:, :5] for k in ("actions", "positions", "rotations")}, "7 and 5 steps"),
        ({"label": np.array(["up"] * 60)}, "no other phase"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    tokenizer = Steps(lambda x, c: np.zeros((len(x), 6), np.int64))
    with pytest.raises(DataError, match=message):
        shared_codes(tokenizer, arm("one"), replace(arm("two"), **change), resamples=7)


def test_sequences_of_varying_length_are_refused():
    parts = [FitPart(actions=arm(n).actions, space=ActionSpace.raw(2, n)) for n in ("one", "two")]
    with pytest.raises(DataError, match="different lengths"):
        shared_codes(fit_parts("fast", parts), arm("one"), arm("two"))
    with pytest.raises(ConfigError, match="position_m is 0"):
        SameMotion(position_m=0)


# -- achieved poses ---------------------------------------------------------------------------------------------------


def recording(mount=None, seed=0, quaternion_sign=1):
    """Two episodes of a smooth path; `mount` turns the tool frame against the hand."""
    rng = np.random.default_rng(seed)
    lengths = [13, 17]
    turns = Rotation.from_rotvec(np.cumsum(rng.normal(0, 0.05, (30, 3)), 0)) * Rotation.from_euler("x", 3.1)
    turns = turns * mount if mount is not None else turns
    positions = np.cumsum(rng.normal(0, 0.01, (30, 3)), 0)
    proprio = np.concatenate([positions, quaternion_sign * turns.as_quat(), rng.normal(size=(30, 2))], 1)
    return from_arrays(
        {
            "action": rng.normal(size=(30, 7)).astype(np.float32),
            "episode_length": np.array(lengths),
            "proprio": proprio.astype(np.float32),
            "phase": np.arange(30) % 3,
            "phase_names": np.array(["reach", "grasp", "lift"]),
            "instruction": "lift it",
            "control_hz": 20.0,
        },
        name="recorded",
    )


def test_both_frames_describe_the_recorded_path():
    data = recording()
    paths = []
    for frame in ("absolute", "delta"):
        poses = achieved_poses([data], "arm", frame=frame)
        assert poses.lengths.tolist() == [12, 16]
        assert poses.space.rate_hz == 20.0
        chunks = arm_chunks(poses, 5)
        assert len(chunks) == 8 + 12  # those that reach beyond the end are left out
        paths.append(chunks)
    proprio = data.episode(1).proprio.astype(np.float64)
    turns = Rotation.from_quat(proprio[:, 3:7])
    for chunks in paths:
        last = [i for i in range(len(chunks)) if chunks.episode[i] == 1][-1]
        start = 11  # the last whole chunk: actions 11..15 lead to frames 12..16
        np.testing.assert_allclose(chunks.positions[last], proprio[start + 1 :, :3] - proprio[start, :3], atol=1e-5)
        expected = (turns[start + 1 :] * turns[start].inv()).as_matrix()
        np.testing.assert_allclose(chunks.rotations[last], expected, atol=1e-5)
        assert chunks.label[last] == f"lift it: {['reach', 'grasp', 'lift'][(13 + start) % 3]}"
    np.testing.assert_allclose(paths[0].positions, paths[1].positions, atol=1e-5)
    np.testing.assert_array_equal(paths[0].anchor, paths[1].anchor)
    assert arm_chunks(poses, 5, by_task=False).label[0] == "reach"


def test_paths_do_not_depend_on_the_mount_of_the_tool_nor_on_the_sign_of_quaternions():
    mount = Rotation.from_euler("xyz", [0.3, -0.7, 1.1])
    plain = arm_chunks(achieved_poses([recording()], "one", frame="delta"), 5)
    other = arm_chunks(achieved_poses([recording(mount, quaternion_sign=-1)], "two", frame="delta"), 5)
    np.testing.assert_allclose(plain.rotations, other.rotations, atol=1e-5)
    np.testing.assert_allclose(plain.actions, other.actions, atol=1e-5)
    assert np.abs(plain.anchor - other.anchor).max() > 0.1


def test_datasets_of_one_arm_are_joined_with_their_sub_tasks():
    first, second = recording(), recording(seed=1)
    for part in second._parts:
        part.phase_names = ("lift", "reach", "turn")
    joined = achieved_poses([first, second], "arm")
    assert len(joined) == 4
    names = joined.episode(3).subtask_names
    assert [names[s] for s in joined.episode(3).subtask[:3]] == ["reach", "turn", "lift"]


def test_what_is_no_pose_is_refused():
    data = recording()
    data._parts[0].proprio = data._parts[0].proprio * np.float32(1.1)
    with pytest.raises(DataError, match="no quaternion"):
        achieved_poses([data], "arm")
    data._parts[0].proprio = None
    with pytest.raises(DataError, match="has none"):
        achieved_poses([data], "arm")
    with pytest.raises(DataError, match=r"no episode .* as long as a chunk"):
        arm_chunks(achieved_poses([recording()], "arm"), 23)
    with pytest.raises(ConfigError, match="frame is 'body'"):
        achieved_poses([recording()], "arm", frame="body")


@needs_real
def test_two_real_arms_lifting_a_cube_share_more_than_by_chance():
    arms = []
    for name in ("Panda", "UR5e"):
        data = open_dataset(REAL / "sim" / "robosuite_state" / f"Lift_{name}.npz")
        arms.append(achieved_poses([data], f"robosuite_{name.lower()}", frame="delta"))
    chunks = [arm_chunks(a, 20, stride=3) for a in arms]
    parts = [FitPart(actions=c.actions, space=a.space, anchor=c.anchor) for a, c in zip(arms, chunks, strict=True)]
    found = shared_codes(
        fit_parts("bins", parts, bins=11), *chunks, criterion=SameMotion(position_m=0.02), resamples=199
    )
    assert found.pairs > 20
    assert 0 < found.deviation_m <= 0.02
    assert found.excess.low[0] > 0
    assert found.same_arm.value[0] > found.share.value[0]
