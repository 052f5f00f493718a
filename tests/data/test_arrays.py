"""Arrays in memory and npz files: episodes are cut where they end, and nothing that disagrees passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import DataError, SpaceMismatchError
from actok.data import open_dataset
from realdata import REAL, needs_real

D, P, LENGTHS = 5, 3, (7, 2, 11)
N = sum(LENGTHS)


def make(seed=0, **more):
    rng = np.random.default_rng(seed)
    return {
        "action": rng.standard_normal((N, D)).astype(np.float32),
        "episode_index": np.repeat([4, 5, 9], LENGTHS),
        "episode_length": np.array(LENGTHS),
        "proprio": rng.standard_normal((N, P)),
        "phase": rng.integers(0, 3, N).astype(np.int8),
        "phase_names": np.array(["reach", "grasp", "lift"]),
        "instruction": np.array("open the box"),
        "control_hz": np.float64(13),
        "robot": np.array("toy"),
        "task": np.array("box"),
        "success": np.array([True, False, True]),
        "image": rng.integers(0, 256, (N, 6, 4, 3), np.uint8),
        "rand_vec": rng.standard_normal((3, 6)),
        "seeds": np.array([2, 3, 5]),
        "obs": rng.standard_normal((N, 17)),
        "expert_success_rate": np.float64(1),
    } | more


def test_every_key_of_an_npz(tmp_path):
    stored = make()
    np.savez_compressed(tmp_path / "box.npz", **stored)
    dataset = open_dataset(tmp_path / "box.npz")
    assert (dataset.name, dataset.space.rate_hz, dataset.space.dim) == ("box", 13, D)
    assert dataset.source_files == [tmp_path / "box.npz"]
    start = 0
    for episode, length in zip(dataset, LENGTHS, strict=True):
        rows, i = slice(start, start + length), episode.index
        start += length
        assert np.array_equal(episode.actions, stored["action"][rows])
        assert np.array_equal(episode.proprio, stored["proprio"][rows].astype(np.float32))
        assert np.array_equal(episode.subtask, stored["phase"][rows])
        assert episode.subtask_names == ("reach", "grasp", "lift")
        assert (episode.instruction, episode.task, episode.success) == ("open the box", "box", stored["success"][i])
        assert set(episode.start_state) == {"rand_vec", "seeds"}
        assert episode.start_state["rand_vec"].tobytes() == stored["rand_vec"][i].tobytes()
        assert episode.start_state["seeds"] == stored["seeds"][i]
        assert episode.images == {}
        assert np.array_equal(dataset.episode(i, images=True).images["image"], stored["image"][rows])
    frames, offsets = dataset.all_actions()
    assert np.array_equal(frames, stored["action"])
    assert offsets.tolist() == [0, 7, 9, 20]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), form=st.sampled_from(["list", "index", "length"]))
def test_cutting_is_the_inverse_of_joining(lengths, form):
    rng = np.random.default_rng(sum(lengths))
    episodes = [rng.standard_normal((n, D)).astype(np.float32) for n in lengths]
    source = {
        "list": episodes,
        "index": {"action": np.concatenate(episodes), "episode_index": np.repeat(np.arange(len(lengths)), lengths)},
        "length": {"actions": np.concatenate(episodes), "episode_lengths": lengths},
    }[form]
    for given_, read in zip(episodes, open_dataset(source), strict=True):
        assert np.array_equal(given_, read.actions)


def test_arrays_of_one_length_and_torch():
    import torch

    array = np.random.default_rng(0).standard_normal((3, 7, D)).astype(np.float32)
    for source in (array, torch.from_numpy(array), {"action": array, "proprio": array[:, :, :2]}):
        dataset = open_dataset(source)
        assert dataset.lengths.tolist() == [7, 7, 7]
        assert np.array_equal(dataset.episode(2).actions, array[2])
    assert np.array_equal(dataset.episode(1).proprio, array[1, :, :2])
    assert len(open_dataset(array[0])) == 1


def test_folder_joins_tasks(tmp_path):
    np.savez(tmp_path / "a.npz", **make())
    second = make(seed=1, instruction=np.array(["one", "two", "three"]))
    del second["task"]
    np.savez(tmp_path / "b.npz", **second)
    (tmp_path / "summary.json").write_text("{}")
    dataset = open_dataset(tmp_path, name="both")
    assert [e.task for e in dataset] == ["box"] * 3 + ["b"] * 3
    assert [e.instruction for e in dataset] == ["open the box"] * 3 + ["one", "two", "three"]
    assert [e.index for e in dataset] == list(range(6))
    assert np.array_equal(dataset.all_actions()[0], np.concatenate([make()["action"], second["action"]]))
    np.savez(tmp_path / "c.npz", **make(control_hz=np.float64(7)))
    with pytest.raises(DataError, match=r"'both' mixes control rates: .*a\.npz has 13 Hz, .*c\.npz has 7 Hz"):
        open_dataset(tmp_path, name="both")
    np.savez(tmp_path / "c.npz", **make(action=np.zeros((N, 2), np.float32)))
    with pytest.raises(SpaceMismatchError, match=r"a\.npz has 5 dimensions, .*c\.npz has 2"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"episode_length": np.array([7, 3, 10])}, "episode_index and episode_length disagree"),
        ({"episode_index": None, "episode_length": np.array([7, 3])}, "add up to 10 steps, but there are 20 actions"),
        ({"episode_index": np.repeat([1, 2, 1], LENGTHS), "episode_length": None}, "not in one piece"),
        ({"episode_index": None, "episode_length": None}, "neither episode_length nor episode_index"),
        ({"episode_index": None, "episode_length": np.array([7.0, 2, 11])}, "give whole numbers"),
        ({"episode_index": None, "episode_length": np.array([9, 0, 11])}, "episode 1 has 0 steps"),
        ({"action": None}, "no array 'action'"),
        ({"action": np.zeros((N, D), np.int64)}, "actions have dtype int64"),
        ({"action": np.zeros((0, D)), "episode_index": None, "episode_length": np.zeros(0, int)}, "is empty"),
        ({"proprio": np.zeros((N - 1, P))}, "proprio of shape .* for 20 actions; give one row per step"),
        ({"proprio": np.float64(3)}, "proprio of shape .* for 20 actions"),
        ({"control_hz": np.zeros(2)}, "control_hz has float64 .* give one number"),
        ({"control_hz": "fast"}, "control_hz has <U4 .* give one number"),
        ({"phase": np.zeros((N, 2), int)}, "phase has int64 .* give whole numbers"),
        ({"success": np.ones(2, bool)}, r"success has shape \(2,\)"),
        ({"instruction": np.array(["a", "b"])}, "instruction has 2 entries for 3 episodes"),
        ({"phase_names": np.array(["only"])}, "has no name"),
        ({"control_hz": np.float64(0)}, r"control rate of 0\.0 Hz"),
    ],
)
def test_contradictions(tmp_path, change, words):
    arrays = {k: v for k, v in make(**change).items() if v is not None}
    with pytest.raises(DataError, match=words):
        open_dataset(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path / "x.npz")


def test_damage_and_values(tmp_path):
    poisoned = make()
    poisoned["action"][8, 1] = -np.inf
    dataset = open_dataset(poisoned, name="toy")
    assert len(dataset.episode(0)) == 7
    for read in (lambda: dataset.episode(1), dataset.all_actions):
        with pytest.raises(DataError, match="'toy' holds -inf in episode 1, step 1, dimension 1"):
            read()
    with pytest.raises(DataError, match="episode 1 of the list has shape"):
        open_dataset([np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)])
    with pytest.raises(DataError, match="list of episodes is empty"):
        open_dataset([])
    with pytest.raises(DataError, match=r"episodes 0\.\.2, not 3"):
        open_dataset(make()).episode(3)
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **make())
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read as npz"):
        open_dataset(path)
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(path)


@needs_real
@pytest.mark.parametrize(
    ("name", "episodes", "frames", "rate"),
    [
        ("sim/metaworld_state", 1000, 85_697, 80),
        ("sim/metaworld_img64", 100, None, 80),
        ("sim/robosuite_state", 300, 29_983, 20),
        ("sim/robosuite_img64", 10, None, 20),
        ("sim/aloha_sim", 40, 16_000, 50),
        ("sim/libero_state", 93, 12_677, 20),
        ("real/adroit_door_human", 25, 6_729, 25),
    ],
)
def test_real_sets(name, episodes, frames, rate):
    dataset = open_dataset(REAL / name)
    actions, offsets = dataset.all_actions()
    assert (len(dataset), dataset.space.rate_hz) == (episodes, rate)
    assert frames is None or len(actions) == frames
    assert "raw" not in {g.kind for g in dataset.space.groups}
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        episode = dataset.episode(index, images=True)
        assert np.array_equal(episode.actions, actions[offsets[index] : offsets[index + 1]])
        assert episode.instruction
        assert bool(episode.images) == name.endswith("img64")
    if name == "sim/metaworld_state":
        stored = np.load(REAL / name / "reach-v3.npz")
        reach = [e for e in dataset if e.task == "reach-v3"]
        assert np.array_equal(np.stack([e.start_state["rand_vec"] for e in reach]), stored["rand_vec"])
