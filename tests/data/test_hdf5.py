"""HDF5 of robomimic, LIBERO and robosuite: files written here in each of the three dialects, and the real ones."""

import json

import h5py
import numpy as np
import pytest

from actok.core import DataError, SpaceMismatchError
from actok.data import open_dataset
from actok.data.hdf5 import Hdf5Dataset
from realdata import REAL, needs_real

D, LENGTHS = 7, {"demo_10": 5, "demo_2": 11, "demo_0": 3}
CONTROLLER = {"type": "OSC_POSE", "control_delta": True, "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5]}


def write(path, *, dialect="robomimic", rate=20, dim=D, controller=CONTROLLER, robots="Panda", seed=0, **attributes):
    rng = np.random.default_rng(seed)
    environment = {"robots": robots, "controller_configs": controller} | ({"control_freq": rate} if rate else {})
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if dialect == "robosuite":
            data.attrs["env"] = "Lift"
            data.attrs["env_info"] = json.dumps(environment)
        else:
            data.attrs["env_args"] = json.dumps({"env_name": "Libero_Task", "type": 1, "env_kwargs": environment})
        if dialect == "libero":
            data.attrs["problem_info"] = json.dumps({"language_instruction": '"open the drawer"'})
        data.attrs.update(attributes)
        for demo, length in LENGTHS.items():
            group = data.create_group(demo)
            group["actions"] = rng.standard_normal((length, dim))
            group["states"] = rng.standard_normal((length, 13))
            group.attrs["model_file"] = f"<mujoco model='{demo}'/>"
            if dialect == "robomimic":
                group.attrs["num_samples"] = length
                group.attrs["success"] = demo != "demo_2"
                for key, width in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2)):
                    group[f"obs/robot0_{key}"] = rng.standard_normal((length, width))
                group["obs/agentview_image"] = rng.integers(0, 256, (length, 6, 10, 3), np.uint8)
                group["obs/object"] = rng.standard_normal((length, 19))
            if dialect == "libero":
                group["obs/gripper_states"] = rng.standard_normal((length, 2))
                group["obs/ee_states"] = rng.standard_normal((length, 6))
    return path


def test_robomimic(tmp_path):
    path = write(tmp_path / "demo.hdf5")
    dataset = open_dataset(path)
    # By number, not by name: demo_10 is the last.
    assert dataset.lengths.tolist() == [3, 11, 5]
    assert dataset.space.rate_hz == 20
    with h5py.File(path) as file:
        for episode, demo in zip(dataset, ("demo_0", "demo_2", "demo_10"), strict=True):
            group = file["data"][demo]
            assert np.array_equal(episode.actions, group["actions"][()].astype(np.float32))
            parts = [group[f"obs/robot0_{k}"][()] for k in ("eef_pos", "eef_quat", "gripper_qpos")]
            assert np.array_equal(episode.proprio, np.concatenate(parts, 1).astype(np.float32))
            assert episode.start_state["states"].dtype == np.float64
            assert np.array_equal(episode.start_state["states"], group["states"][0])
            assert episode.success is (demo != "demo_2")
            assert episode.task == "Libero_Task"
            assert episode.images == {}
            images = dataset.episode(episode.index, images=True).images
            assert list(images) == ["agentview_image"]
            assert np.array_equal(images["agentview_image"], group["obs/agentview_image"][()])
            assert dataset.model_file(episode.index) == f"<mujoco model='{demo}'/>"
    frames, offsets = dataset.all_actions()
    assert offsets.tolist() == [0, 3, 14, 19]
    assert np.array_equal(frames[3:14], dataset.episode(1).actions)


def test_libero_language_and_robosuite_environment(tmp_path):
    libero = open_dataset(write(tmp_path / "libero.hdf5", dialect="libero"))
    assert libero.episode(0).instruction == "open the drawer"
    with h5py.File(tmp_path / "libero.hdf5") as file:
        obs = file["data/demo_2/obs"]
        expected = np.concatenate([obs["ee_states"][()], obs["gripper_states"][()]], 1).astype(np.float32)
    assert np.array_equal(libero.episode(1).proprio, expected)
    robosuite = open_dataset(write(tmp_path / "collected.hdf5", dialect="robosuite", rate=None))
    assert robosuite.episode(0).task == "Lift"
    assert robosuite.episode(0).proprio is None
    assert robosuite.episode(0).success is None


def test_the_preset_is_only_taken_for_the_controller_it_describes(tmp_path):
    usual = open_dataset(write(tmp_path / "a.hdf5"))
    assert usual.space.embodiment == "robosuite_osc_pose_panda"
    assert usual.space.group("position").scale == 0.05
    other = CONTROLLER | {"output_max": [0.01, 0.01, 0.01, 0.1, 0.1, 0.1]}
    assert {g.kind for g in open_dataset(write(tmp_path / "b.hdf5", controller=other)).space.groups} == {"raw"}


def test_files_of_a_folder_are_joined_where_they_agree(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    write(folder / "a.hdf5")
    write(folder / "b.hdf5", rate=None, seed=1)
    joined = open_dataset(folder)
    assert joined.lengths.tolist() == [3, 11, 5] * 2
    assert np.array_equal(joined.episode(4).actions, open_dataset(folder / "b.hdf5").episode(1).actions)
    write(folder / "c.hdf5", rate=10)
    with pytest.raises(DataError, match=r"mixes control rates: .*a\.hdf5 has 20 Hz, .*c\.hdf5 has 10 Hz"):
        open_dataset(folder)
    write(folder / "c.hdf5", dim=6)
    with pytest.raises(SpaceMismatchError, match=r"a\.hdf5 has 7 dimensions, .*c\.hdf5 has 6"):
        open_dataset(folder)


@pytest.mark.parametrize("part", ["demo", "actions", "env_args", "num_samples"])
def test_another_layout_is_named(tmp_path, part):
    path = tmp_path / "odd.hdf5"
    with h5py.File(path, "w") as stored:
        root = stored.create_group("data")
        if part == "demo":
            root["demo_0"] = np.zeros((3, 7))
        elif part == "actions":
            root.create_group("demo_0/actions")
        else:
            root["demo_0/actions"] = np.zeros((3, 7))
        if part == "env_args":
            root.attrs["env_args"] = '{"env_kwargs": {"control_freq": "fast"}}'
        elif part == "num_samples":
            root["demo_0"].attrs["num_samples"] = "three"
    with pytest.raises(DataError, match=r"odd\.hdf5 is not laid out as robomimic.*correct the file"):
        open_dataset(path)


def test_damage(tmp_path):
    path = write(tmp_path / "x.hdf5")
    with h5py.File(path, "r+") as file:
        file["data/demo_2/actions"][4, 3] = np.nan
    dataset = open_dataset(path)
    for read in (lambda: dataset.episode(1), dataset.all_actions):
        with pytest.raises(DataError, match="'x' holds nan in episode 1, step 4, dimension 3"):
            read()
    with h5py.File(path, "r+") as file:
        file["data/demo_2"].attrs["num_samples"] = 12
    with pytest.raises(DataError, match="demo_2 has 11 actions, its num_samples states 12"):
        open_dataset(path)
    with h5py.File(path, "r+") as file:
        del file["data/demo_2"]["actions"]
    with pytest.raises(DataError, match="demo_2 has no 'actions'"):
        open_dataset(path)
    write(path, problem_info="{no json")
    with pytest.raises(DataError, match="'problem_info' is no JSON"):
        open_dataset(path)
    content = write(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        open_dataset(path)
    with h5py.File(path, "w") as file:
        file["observations/qpos"] = np.zeros((3, 2))
    with pytest.raises(DataError, match="no group data/demo_N, only observations"):
        open_dataset(path)
    with pytest.raises(DataError, match=r"holds no \*\.hdf5"):
        Hdf5Dataset(tmp_path / "nowhere")
    with pytest.raises(SpaceMismatchError, match="has actions of 7 dimensions"):
        open_dataset(write(path), space="metaworld_sawyer")


@needs_real
@pytest.mark.parametrize(
    ("name", "dim", "steps", "task"),
    [("lift", 7, 1384, "Lift"), ("wipe_panda", 6, 174, "Wipe"), ("handover_two_panda", 14, 2775, "TwoArmHandover")],
)
def test_real_teleoperation(name, dim, steps, task):
    path = REAL / "real/robosuite_human" / f"{name}.hdf5"
    dataset = open_dataset(path)
    frames, _ = dataset.all_actions()
    assert frames.shape == (steps, dim)
    assert dataset.space.rate_hz == 20
    assert dataset.space.group(dataset.space.groups[0].name).scale == 0.05
    with h5py.File(path) as file:
        demos = sorted(file["data"], key=lambda key: int(key[5:]))
        for episode, demo in zip(dataset, demos, strict=True):
            assert np.array_equal(episode.actions, file["data"][demo]["actions"][()].astype(np.float32))
            assert np.array_equal(episode.start_state["states"], file["data"][demo]["states"][0])
            assert episode.task == task
