"""Action-space presets: well formed, true to the data they describe, found by metadata and never guessed."""

import subprocess
import sys

import numpy as np
import pytest

from actok.core import ActionSpace, ConfigError
from actok.data.spaces import FOLDER, describe_space, find_space, infer_space, list_spaces, union_mapping
from actok.signal.conversions import convert, convert_rotations
from actok.signal.rotations import from_matrix, to_matrix
from actok.signal.unions import to_union
from realdata import REAL, needs_real

PRESETS = sorted(path.stem for path in FOLDER.glob("*.toml"))
SO = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_well_formed(name):
    space = find_space(name)
    assert space.embodiment == name
    assert ActionSpace.from_dict(space.to_dict()) == space
    assert len(space.note) > 40, "a preset says where its facts come from"
    assert len(set(space.names)) == space.dim
    for group in space.groups:
        assert (group.scale is None) == (group.unit == "raw"), f"{group.name}: unit and scale are known together or not"
        if group.scale is not None:
            units = {"position": {"m"}, "rotation": {"rad"}, "joint": {"rad", "rad/s"}, "gripper": {"fraction"}, "hand": {"fraction", "rad"}}  # fmt: skip
            assert group.unit in units[group.kind]
        if group.side is not None:
            assert group.mode != "absolute"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_described(name):
    text = describe_space(find_space(name), "a test")
    assert text.splitlines()[0].startswith(f"action space {name}: {find_space(name).dim} dimensions")
    assert "known from: a test" in text
    assert ("unknown (raw)" in text) == any(g.scale is None for g in find_space(name).groups)


def test_list_is_the_folder():
    assert list_spaces() == PRESETS


@pytest.mark.parametrize("name", [n for n in PRESETS if "[union.xtokenizer_26]" in (FOLDER / f"{n}.toml").read_text()])
def test_union_mapping_leads_into_the_26_channels(name):
    """Once relative and 6-D (where the scales are known), each group has its place, and no two share one."""
    space, union = find_space(name), find_space("xtokenizer_26")
    values = np.random.default_rng(0).uniform(-0.4, 0.4, (7, 11, space.dim))
    anchor = np.zeros((7, space.dim))
    relative, now = convert(values, space, "relative", anchor=anchor, side=None)
    relative, now = convert_rotations(relative, now, "rot6d")
    # A world-side rotation keeps its side: it cannot silently become a body-side one.
    worldly = [g.name for g in now.groups if g.side == "world"]
    _, present = to_union(relative, now, union, mapping=union_mapping(name, "xtokenizer_26"), drop=worldly)
    kept = sum(len(g.dims) for g in now.groups if g.name not in worldly)
    assert (present.sum(-1) == kept).all()


# -- inference ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "preset"),
    [
        ({"dim": 7, "robot": "panda_libero", "rate_hz": 20.0, "dataset": "libero_object"}, "libero_franka"),
        ({"dim": 7, "dataset": "IPEC-COMMUNITY/bridge_orig_lerobot"}, "bridge_widowx"),
        ({"dim": 4, "robot": "sawyer", "rate_hz": 80.0, "dataset": "reach-v3"}, "metaworld_sawyer"),
        ({"dim": 7, "robot": "UR5e", "dataset": "Lift_UR5e"}, "robosuite_osc_pose_ur5e"),
        ({"dim": 8, "robot": "Panda", "dataset": "Lift_Panda"}, "robosuite_joint_7_panda"),
        ({"dim": 14, "robot": "Panda", "dataset": "robosuite_human"}, "robosuite_osc_pose_bimanual_panda"),
        ({"dim": 14, "robot": "aloha", "dataset": "towel"}, "aloha"),
        ({"dim": 14, "robot": "aloha", "dataset": "lerobot/aloha_sim_insertion_human"}, "aloha_sim"),
        ({"dim": 26, "robot": "Unitree_G1_Inspire", "rate_hz": 30.0}, "unitree_g1_inspire"),
        ({"dim": 28, "robot": "adroit_shadowhand_28d"}, "adroit_hand"),
        ({"dim": 6, "robot": "so101_follower", "names": {"motors": SO}}, "so101"),
    ],
)
def test_metadata_find_the_preset(facts, preset):
    space, origin = infer_space(**facts)
    assert space.embodiment == preset
    assert origin.startswith("preset ")
    assert "matched by" in origin
    assert space.dim == facts["dim"]


@pytest.mark.parametrize(
    "facts",
    [
        {"dim": 3},
        {"dim": 7, "robot": "UR5e", "dataset": "my_kitchen"},
        {"dim": 13, "dataset": "libero_10"},
        {"dim": 4, "robot": "sawyer", "rate_hz": 10.0},
        {"dim": 7, "dataset": "droid_100"},
        {"dim": 5, "names": ["a", "b", "c", "d", "e"]},
        {"dim": 5, "names": ["x", "y"]},
        {"dim": 2, "names": {"motors": ["motor_0", "motor_1"]}, "dataset": "lerobot/pusht"},
    ],
)
def test_nothing_is_guessed(facts):
    space, origin = infer_space(**facts)
    assert origin == "nothing known: reported in raw units"
    assert [g.kind for g in space.groups] == ["raw"]
    assert space.groups[0].scale is None


def test_names_that_contradict_a_preset_keep_it_out():
    space, origin = infer_space(6, robot="so100", names=["x", "y", "z", "roll", "pitch", "yaw"])
    assert [g.kind for g in space.groups] == ["position", "rotation"]
    assert "not preset so100 (robot 'so100'): dimension 0 is called 'x', where it has a joint" in origin


def test_equally_good_presets_are_both_left_alone(monkeypatch):
    from actok.data import spaces

    one = spaces._presets()["so100"]
    monkeypatch.setattr(spaces, "_presets", lambda: {"first": one, "second": one})
    space, origin = infer_space(6, robot="so100")
    assert space.groups[0].kind == "raw"
    assert origin.endswith("presets first and second fit equally well; name one")


def test_the_rate_of_the_data_wins():
    space, origin = infer_space(7, dataset="libero_10", rate_hz=10.0)
    assert space.rate_hz == 10.0
    assert "rate 10 Hz from the data instead of 20 Hz" in origin
    assert infer_space(6, robot="so100", rate_hz=30.0)[0].rate_hz == 30.0


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["x", "y", "z", "roll", "pitch", "yaw", "gripper"], ["position 0-2", "rotation:euler_xyz 3-5", "gripper 6"]),
        (["eef_x", "eef_y", "eef_z", "qw", "qx", "qy", "qz"], ["position 0-2", "rotation:quaternion_wxyz 3-6"]),
        (["yaw", "pitch", "roll"], ["rotation:euler_zyx 0-2"]),
        (["rx", "ry", "rz", "grip"], ["other=raw 0-2", "gripper 3"]),
        (["roll", "pitch", "claw"], ["rotation=raw 0-1", "gripper 2"]),
        (["joint_0.pos", "joint_1.pos", "gripper.pos"], ["joints 0-1", "gripper 2"]),
        (["q1", "q2", "j3", "qpos_4"], ["joints 0-3"]),
        (["left_waist", "left_wrist_rotate", "left_gripper", "right_elbow"], ["left_joints 0-1", "left_gripper 2", "right_joints 3"]),
        (["kLeftShoulderPitch", "kLeftWristYaw", "kLeftHandPinky", "kRightHandThumbBend"], ["left_joints 0-1", "left_hand 2", "right_hand 3"]),
        ([*SO, "x.vel", "y.vel", "theta.vel"], ["joints 0-4", "gripper 5", "base@velocity 6-8"]),
        (["delta_x", "delta_y", "delta_z"], ["position@delta 0-2"]),
        (["x", "y", "z", "x", "y", "z", "something"], ["position 0-5", "other=raw 6"]),
    ],
)  # fmt: skip
def test_names_tell_groups_and_no_units(names, groups):
    space, origin = infer_space(len(names), names=names)
    found = []
    for g in space.groups:
        title = g.name.split("_")[-1] if g.kind != "raw" else g.name
        kind = {"joint": "joints"}.get(g.kind, g.kind)
        text = g.name if title == kind else f"{g.name}={g.kind}"
        text += f":{g.rotation}" if g.rotation else ""
        text += f"@{g.mode}" if g.mode != "absolute" else ""
        found.append(f"{text} {g.dims[0]}-{g.dims[-1]}" if len(g.dims) > 1 else f"{text} {g.dims[0]}")
    assert found == groups
    assert all(g.scale is None and g.unit == "raw" for g in space.groups)
    assert space.names == tuple(names)
    assert "units unknown" in origin


def test_names_in_the_nestings_of_real_metadata():
    flat = infer_space(6, names=SO)[0]
    for nested in ([SO], {"motors": SO}, {name: i for i, name in reversed(list(enumerate(SO)))}, tuple(SO)):
        assert infer_space(6, names=nested)[0] == flat


# -- a user's own file --------------------------------------------------------------------------------------------------

OWN = """
embodiment = "lab_arm"
dim = 3
mode = "delta"
groups = [{ name = "tip", kind = "position", dims = [0, 1, 2], unit = "m", scale = 0.001 }]
"""


def test_own_file_works_where_a_name_does(tmp_path):
    path = tmp_path / "arm.toml"
    path.write_text(OWN + '[union.xtokenizer_26]\ntip = "left_position"\n')
    assert find_space(path) == find_space(str(path))
    assert find_space(path).group("tip").mode == "delta"
    assert union_mapping(path, "xtokenizer_26") == {"tip": "left_position"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN + "colour = 1\n", r"arm.toml: .*'colour'"),
        (OWN.replace("[0, 1, 2]", "[0, 1]"), r"arm.toml: .*dim"),
        (OWN + 'match = [{ robot = "x" }]\n', "match has the key 'robot'; it takes robots, datasets, names, rate_hz"),
        (OWN + "match = [{}]\n", "an empty match would fit every dataset"),
        (OWN + '[union.xtokenizer_26]\nhand = "left_position"\n', "has no group 'hand'"),
        (OWN.replace("embodiment", "#"), r"arm.toml: .*embodiment"),
        ("embodiment = ", "arm.toml cannot be read as TOML"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "arm.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_space(path)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="no action space is called 'bridge_widow'; did you mean 'bridge_widowx'"):
        find_space("bridge_widow")
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        find_space("none.toml")


def test_listing_stays_light():
    code = (
        "import sys; from actok.data.spaces import list_spaces; list_spaces();"
        " print([m for m in ('torch', 'scipy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# -- true to the data ---------------------------------------------------------------------------------------------------


def npz(*path: str) -> dict[str, np.ndarray]:
    folder = REAL.joinpath(*path)
    files = [folder] if folder.suffix else sorted(folder.glob("*.npz"))
    keys = ("action", "action_joint", "episode_index", "proprio", "control_hz", "robot")
    loaded = [{k: d[k] for k in keys if k in d.files} for d in map(np.load, files)]
    return {k: [d[k] for d in loaded if k in d] for k in keys}


def check_limits(space: ActionSpace, actions: np.ndarray, slack: float = 0.0) -> None:
    assert actions.shape[-1] == space.dim
    if space.low is not None:
        assert (actions >= np.array(space.low) - slack).all()
        assert (actions <= np.array(space.high) + slack).all()
    for g in space.groups:
        part = actions[..., list(g.dims)] * (g.scale or 1.0)
        if g.unit == "fraction":
            assert part.min() >= 0, g.name
            assert part.max() <= 1, g.name
        if g.unit == "rad" and g.kind == "joint":
            # Radians: within a turn and a half, and using more than a few hundredths of one.
            assert np.abs(part).max() < 1.5 * np.pi, g.name
            assert np.abs(part).max() > 0.1, g.name


@needs_real
@pytest.mark.parametrize(
    ("path", "preset"),
    [
        (("sim", "metaworld_state"), "metaworld_sawyer"),
        (("sim", "libero_state"), "libero_franka"),
        (("sim", "robosuite_state"), "robosuite_osc_pose"),
        (("sim", "aloha_sim"), "aloha_sim"),
    ],
)
def test_simulated_sets_fit_their_presets(path, preset):
    data, space = npz(*path), find_space(preset)
    check_limits(space, np.concatenate(data["action"]), slack=1e-6)
    assert {float(hz) for hz in data["control_hz"]} == {space.rate_hz}
    for robot, hz in zip(data["robot"], data["control_hz"], strict=True):
        found, _ = infer_space(space.dim, robot=str(robot), rate_hz=float(hz), dataset=path[1])
        assert found.groups == space.groups


@needs_real
@pytest.mark.parametrize(("arm", "preset"), [("Panda", "robosuite_joint_7"), ("UR5e", "robosuite_joint_6")])
def test_joint_targets_are_radians_of_the_next_state(arm, preset):
    data = np.load(REAL / "sim" / "robosuite_state" / f"Lift_{arm}.npz")
    space = find_space(preset)
    check_limits(space, data["action_joint"])
    same = data["episode_index"][1:] == data["episode_index"][:-1]
    joints = list(space.group("arm").dims)
    np.testing.assert_allclose(data["action_joint"][:-1][same][:, joints], data["qpos"][1:][same], atol=1e-5)


@needs_real
@pytest.mark.parametrize(
    ("path", "preset", "fastest"),
    [
        (("sim", "metaworld_state"), "metaworld_sawyer", 1.0),
        (("sim", "libero_state"), "libero_franka", 1.0),
        (("sim", "robosuite_state"), "robosuite_osc_pose", 1.0),
    ],
)
def test_a_step_moves_no_further_than_its_scale_says(path, preset, fastest):
    """An arm follows a clipped command with a lag: along each axis its motion correlates, with a slope in (0, scale]."""
    data, space = npz(*path), find_space(preset)
    commands, moves = [], []
    for action, proprio, episode in zip(data["action"], data["proprio"], data["episode_index"], strict=True):
        same = episode[1:] == episode[:-1]
        commands.append(action[:-1][same][:, :3] * space.group("position").scale)
        moves.append(np.diff(proprio[:, :3], axis=0)[same])
    command, move = np.concatenate(commands), np.concatenate(moves)
    for axis in range(3):
        slope = (command[:, axis] @ move[:, axis]) / (command[:, axis] @ command[:, axis])
        assert 0.05 < slope <= fastest, (axis, slope)


@needs_real
def test_osc_rotations_turn_about_world_axes():
    """The gripper points down, so a turn about the body's z would show with the opposite sign: on all five arms."""
    space = find_space("robosuite_osc_pose")
    assert space.group("rotation").side == "world"
    turn = list(space.group("rotation").dims)
    data = npz("sim", "robosuite_state")
    for action, proprio, episode, robot in zip(*(data[k] for k in ("action", "proprio", "episode_index", "robot")), strict=True):  # fmt: skip
        same = episode[1:] == episode[:-1]
        pose = to_matrix(proprio[:, 3:7].astype(np.float64), "quaternion_xyzw")
        before, after = pose[:-1][same], pose[1:][same]
        command = action[:-1][same][:, turn[2]]
        about_world = from_matrix(after @ before.swapaxes(1, 2), "axis_angle")[:, 2]
        about_body = from_matrix(before.swapaxes(1, 2) @ after, "axis_angle")[:, 2]
        assert np.corrcoef(command, about_world)[0, 1] > 0.75, robot
        assert np.corrcoef(command, about_body)[0, 1] < -0.75, robot


@needs_real
def test_unitree_g1_fits():
    import json

    import pyarrow.parquet as pq

    folder = REAL / "real" / "unitree_g1_inspire"
    info = json.loads((folder / "meta" / "info.json").read_text())
    space = find_space("unitree_g1_inspire")
    names = info["features"]["action"]["names"]
    assert list(space.names) == names[0]
    assert space.rate_hz == info["fps"]
    files = sorted((folder / "data").rglob("*.parquet"))[:20]
    check_limits(
        space, np.concatenate([np.stack(pq.read_table(f, columns=["action"])["action"].to_numpy()) for f in files])
    )
    found, origin = infer_space(26, names=names, robot=info["robot_type"], rate_hz=info["fps"], dataset="g1")
    assert found == space
    assert origin == "preset unitree_g1_inspire, matched by robot 'Unitree_G1_Inspire' and 26 dimensions"
    # What the names alone say is what the preset says, unit aside.
    told, _ = infer_space(26, names=names)
    assert [(g.kind, g.mode) for g in told.groups] == [("joint", "absolute")] * 2 + [("hand", "absolute")] * 2


@needs_real
def test_bridge_is_metres_and_radians():
    raw = (REAL / "real" / "bridge_widowx" / "1.0.0" / "bridge_dataset-train.tfrecord-00000-of-00001").read_bytes()

    def column(key: bytes) -> np.ndarray:
        # A float list of 10 x 7 values: 280 bytes after their tag and length.
        pieces = raw.split(key + b"\x12")[1:]
        starts = [piece.index(b"\x0a\x98\x02") + 3 for piece in pieces]
        return np.stack(
            [np.frombuffer(p[s : s + 280], "<f4").reshape(10, 7) for p, s in zip(pieces, starts, strict=True)]
        )

    action, state = column(b"steps/action"), column(b"steps/observation/state")
    assert len(action) == len(state) == 25
    space = find_space("bridge_widowx")
    check_limits(space, action)
    moved = np.diff(state, axis=1)
    for d in range(6):
        slope = (action[:, :-1, d] * moved[..., d]).sum() / (action[:, :-1, d] ** 2).sum()
        assert 0.5 < slope < 1.2, space.names[d]


@needs_real
def test_human_sets_exceed_the_limits_that_their_interface_clips_to():
    """The reason why limits are stated by the space and not read off the data."""
    h5py = pytest.importorskip("h5py")
    found = {}
    for file, preset in (("lift", "robosuite_osc_pose"), ("wipe_panda", "robosuite_wipe"), ("handover_two_panda", "robosuite_osc_pose_bimanual")):  # fmt: skip
        with h5py.File(REAL / "real" / "robosuite_human" / f"{file}.hdf5") as h:
            actions = np.concatenate([h["data"][d]["actions"][:] for d in h["data"]])
            stated = h["data"].attrs.get("env_args") or h["data"].attrs["env_info"]
        space = find_space(preset)
        assert actions.shape[1] == space.dim
        for g in space.groups:
            assert g.kind == "gripper" or str(g.scale) in stated
        found[file] = float(np.abs(actions).max())
    door = np.load(REAL / "real" / "adroit_door_human" / "adroit_door_human.npz")
    assert door["action"].shape[1] == find_space("adroit_hand").dim
    assert float(door["control_hz"]) == find_space("adroit_hand").rate_hz
    found["door"] = float(np.abs(door["action"]).max())
    assert {k for k, v in found.items() if v > 1} == {"lift", "wipe_panda", "door"}


@needs_real
def test_adroit_joints_are_in_the_order_of_the_state():
    """Observations are qpos without its first entry: command i moves what observation i - 1 measures."""
    door = np.load(REAL / "real" / "adroit_door_human" / "adroit_door_human.npz")
    action, state = door["action"], door["proprio"]

    def mean_correlation(offset: int) -> float:
        return float(np.mean([np.corrcoef(action[:, i], state[:, i + offset])[0, 1] for i in range(2, 27)]))

    with np.errstate(invalid="ignore"):
        assert mean_correlation(-1) > 0.5 > max(mean_correlation(-2), mean_correlation(0))
