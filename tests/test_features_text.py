"""What was asked for at each frame, in words; and what data are, wherever they lie."""

import shutil

import numpy as np
import pytest

from actok.core import ConfigError, DataError
from actok.data import Episode, FrameCache, open_dataset, write_lerobot
from actok.data.fingerprint import fingerprint
from actok.data.instructions import _phase, chunk_labels, frame_texts, verb_of
from realdata import REAL, needs_real

D = 3


def episode(steps=11, **about):
    return Episode(index=0, actions=np.zeros((steps, D), np.float32), **about)


def spoken(found):
    texts, ids = found
    return [texts[i] for i in ids]


def test_an_instruction_alone_is_said_at_every_frame():
    assert spoken(frame_texts(episode(instruction=" open the door "))) == ["open the door"] * 11
    assert frame_texts(episode(task="reach-v3"))[0] == ["reach-v3"]
    assert frame_texts(episode())[0] == [""]


def test_a_subtask_follows_the_instruction_unless_it_repeats_it():
    active = np.array([-1, 0, 0, 1, 2])
    names = ("grasp it", "Open the door, phase 2", "grasp it")
    found = frame_texts(episode(5, instruction="open the door.", subtask=active, subtask_names=names))
    said = "open the door. Current step: grasp it."
    assert spoken(found) == ["open the door.", said, said, "open the door. Current step: Open the door, phase 2.", said]
    assert len(found[0]) == 3
    found = frame_texts(episode(5, instruction="open the door", subtask=active, subtask_names=names))
    assert spoken(found)[3] == "Open the door, phase 2"
    assert spoken(frame_texts(episode(5, subtask=active, subtask_names=names)))[1] == "grasp it"


def test_numbered_phases_are_worded_as_the_simulator_words_them():
    pytest.importorskip("metaworld")
    from actok.envs import make_env

    env = make_env("metaworld")
    task = "door-open-v3"
    names = env.expert(task).subtask_names
    words = env.instruction(task)
    numbers = tuple(str(i) for i in range(len(names)))
    phases = np.arange(len(names))
    found = frame_texts(episode(len(names), instruction=words, subtask=phases, subtask_names=numbers))
    assert tuple(spoken(found)) == names


@pytest.mark.parametrize("rate", [4.0, 10.0, 13.0, 20.0])
def test_resampled_frames_have_the_text_in_force_at_their_time(rate):
    rng = np.random.default_rng(0)
    active = np.sort(rng.integers(0, 5, 29))
    found = spoken(frame_texts(episode(29, instruction="go", subtask=active, subtask_names=tuple("abcde")), 10.0, rate))
    at = [min(int(k * 10 / rate + 1e-9), 28) for k in range(int(np.ceil(29 * rate / 10 - 1e-9)))]
    assert found == [f"go. Current step: {'abcde'[active[t]]}." for t in at]


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("Please pick up the cup", "pick"),
        ("pick-place-v3", "pick"),
        ("2. open_door", "open"),
        ("PLEASE, please: Öffne die Tür", "öffne"),
        ("", ""),
        ("3 1 4", ""),
    ],
)
def test_the_verb_is_the_first_word(text, verb):
    assert verb_of(text) == verb


def arrays(**more):
    lengths = np.array([7, 11, 5])
    rng = np.random.default_rng(0)
    phase = np.concatenate([np.sort(rng.integers(0, 3, n)) for n in lengths])
    return {
        "action": rng.normal(size=(23, D)).astype(np.float32),
        "episode_length": lengths,
        "instruction": np.array(["open the door", "Please close the door", "open the door"]),
        "episode_task": np.array(["door-v1", "door-v1", ""]),
        "phase": phase,
        "phase_names": np.array(["reach", "grasp", "open the door slowly"]),
        "control_hz": np.float64(10),
        **more,
    }


def test_labels_of_frames_are_those_of_their_episodes():
    dataset = open_dataset(arrays())
    labels = chunk_labels(dataset)
    assert labels.offsets.tolist() == [0, 7, 18, 23]
    assert labels.verb.names == ("open", "close")
    assert labels.task.names == ("door-v1", "open the door")
    assert _phase("Open the door", "open the door, phase 2 of 4") == "phase 2"  # of how many tells the task
    assert _phase("", "phase 3 of 4, left arm") == "phase 3 of 4, left arm"
    assert set(labels.phase.names) == {"reach", "grasp", "slowly", "open the door slowly"}
    for e, found in enumerate(dataset):
        rows = slice(labels.offsets[e], labels.offsets[e + 1])
        assert {labels.instruction.names[i] for i in labels.instruction.ids[rows]} == {found.instruction}
        assert {labels.task.names[i] for i in labels.task.ids[rows]} == {found.task or found.instruction}
        names = [labels.subtask.names[i] for i in labels.subtask.ids[rows]]
        assert names == [found.subtask_names[i] for i in found.subtask]
    halved = chunk_labels(dataset, 5.0)
    assert halved.offsets.tolist() == FrameCache.build(dataset, rate_hz=5.0).offsets.tolist()
    assert [halved.subtask.names[i] for i in halved.subtask.ids[:4]] == [
        labels.subtask.names[i] for i in labels.subtask.ids[:7:2]
    ]


def test_frames_without_a_subtask_have_no_label():
    mixed = arrays()
    del mixed["phase"], mixed["phase_names"], mixed["instruction"], mixed["episode_task"]
    labels = chunk_labels(open_dataset(mixed))
    for kind in ("task", "instruction", "subtask", "phase", "verb"):
        assert (getattr(labels, kind).ids == -1).all()
        assert getattr(labels, kind).names == ()


# -- fingerprints -----------------------------------------------------------------------------------------------------


def entries(dataset, rate=None):
    return dict(entry.split("=") for entry in fingerprint(dataset, rate).split(";"))


def differ(a, b):
    return {key for key in a if a[key] != b[key]}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "first"
    path.mkdir()
    for name in "ab":
        np.savez(path / f"{name}.npz", **arrays(big=np.random.default_rng(5).normal(size=(23, 7919))))
    return path


def test_moved_and_copied_data_are_the_same_data(folder, tmp_path):
    before = fingerprint(open_dataset(folder))
    shutil.copytree(folder, tmp_path / "deep" / "other")  # with other modification times
    assert fingerprint(open_dataset(tmp_path / "deep" / "other")) == before
    folder.rename(tmp_path / "second")
    assert fingerprint(open_dataset(tmp_path / "second", name="x")) == before


def test_a_changed_value_text_length_or_file_is_other_data(folder):
    before = entries(open_dataset(folder))
    changed = arrays(big=np.random.default_rng(5).normal(size=(23, 7919)))
    changed["big"][11, 4000] += 1  # in the middle of a large file of the same size
    np.savez(folder / "b.npz", **changed)
    assert differ(before, entries(open_dataset(folder))) == {"files"}
    (folder / "b.npz").unlink()
    assert differ(before, entries(open_dataset(folder))) == {"files", "episodes", "texts"}


def test_data_in_memory_are_known_by_their_values():
    before = entries(open_dataset(arrays()))
    assert entries(open_dataset(arrays(), name="y")) == before
    moved = arrays()
    moved["action"][3, 1] += 1e-3
    assert differ(before, entries(open_dataset(moved))) == {"files"}
    renamed = arrays(phase_names=np.array(["reach", "grasp", "open the door fast"]))
    assert differ(before, entries(open_dataset(renamed))) == {"files"}


def test_a_rate_counts_where_it_changes_the_frames():
    dataset = open_dataset(arrays())
    assert entries(dataset, 10.0) == entries(dataset)
    assert differ(entries(dataset), entries(dataset, 5.0)) == {"rate"}
    assert entries(dataset, 5.0)["rate"] == "10to5"
    timeless = arrays()
    del timeless["control_hz"]
    with pytest.raises(ConfigError, match="rate of the data is unknown"):
        fingerprint(open_dataset(timeless), 5.0)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_words_of_a_lerobot_dataset_count(tmp_path, version):
    prints = []
    for name, word in (("a", "grasp"), ("b", "grasp"), ("c", "seize")):
        about = {"instruction": "open it", "subtask": np.arange(11) // 6, "subtask_names": ("reach", word)}
        write_lerobot([episode(**about)], tmp_path / name, space=open_dataset(arrays()).space, version=version)
        prints.append(entries(open_dataset(tmp_path / name)))
    assert prints[0] == prints[1]
    assert "texts" in differ(prints[0], prints[2])


def test_a_file_that_went_away_is_named(folder):
    dataset = open_dataset(folder)
    (folder / "a.npz").unlink()
    with pytest.raises(DataError, match=r"a\.npz of dataset 'first' cannot be read"):
        fingerprint(dataset)


@needs_real
@pytest.mark.parametrize("name", ["sim/libero_state", "real/bridge_widowx"])
def test_real_data_say_what_is_done(name):
    dataset = open_dataset(REAL / name)
    labels = chunk_labels(dataset)
    assert labels.offsets[-1] == sum(dataset.lengths)
    assert (labels.verb.ids >= 0).all()
    assert {"pick", "put", "flip", "turn"} >= set(labels.verb.names)
    for e in (0, len(dataset) - 1):
        texts, ids = frame_texts(dataset.episode(e))
        assert len(ids) == dataset.lengths[e]
        assert all(texts)
