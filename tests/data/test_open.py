"""One door: the format is found, the space is said in words, and what is no dataset is refused with what was looked for."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from actok.core import ActionSpace, ConfigError, DataError, MissingExtraError, SpaceMismatchError
from actok.data import Episode, open_dataset, write_lerobot

ACTIONS = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)


def lerobot(folder):
    episodes = [Episode(index=i, actions=a) for i, a in enumerate(ACTIONS)]
    return write_lerobot(episodes, folder, space=ActionSpace.raw(4, "arm", 10.0))


def test_explicit_space_wins_and_is_named(tmp_path):
    folder = lerobot(tmp_path / "set")
    assert open_dataset(folder).space_origin == "stored with the dataset"
    named = open_dataset(folder, space="metaworld_sawyer")
    assert named.space.embodiment == "metaworld_sawyer"
    assert named.space_origin == "metaworld_sawyer, named by the caller; rate 10 Hz from the data instead of 80 Hz"
    assert named.space.rate_hz == 10
    given = ActionSpace.raw(4, "mine")
    assert open_dataset(ACTIONS, space=given).space == given
    assert open_dataset(ACTIONS, space=given).space_origin == "given by the caller"
    for source in (folder, ACTIONS):
        with pytest.raises(SpaceMismatchError, match="has actions of 4 dimensions, action space 'bridge_widowx'"):
            open_dataset(source, space="bridge_widowx")
    with pytest.raises(ConfigError, match="no action space is called 'metaworld_swayer'"):
        open_dataset(folder, space="metaworld_swayer")


def test_an_open_dataset_passes_through(tmp_path):
    dataset = open_dataset(ACTIONS)
    assert open_dataset(dataset) is dataset
    other = open_dataset(dataset, space=ActionSpace.raw(4, "mine"), name="again")
    assert (other.name, other.space.embodiment) == ("again", "mine")
    assert (dataset.name, dataset.space.embodiment) == ("arrays", "arrays")
    assert np.array_equal(other.episode(2).actions, ACTIONS[2])


def test_hub_id_downloads_actions_without_videos(tmp_path, monkeypatch):
    folder = lerobot(tmp_path / "cached")
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    dataset = open_dataset("someone/some_set")
    assert dataset.name == "someone/some_set"
    assert np.array_equal(dataset.episode(1).actions, ACTIONS[1])
    assert asked == {"repo_id": "someone/some_set", "repo_type": "dataset", "allow_patterns": ["meta/**", "data/**"]}
    asked.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    folder.rename(tmp_path / "someone/some_set")
    assert open_dataset("someone/some_set").name == "some_set"
    assert not asked


def test_hub_id_that_cannot_be_had(monkeypatch):
    def refuse(repo_id, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(DataError, match=r"'someone/some_set' is no local path .*\(no route\); check") as caught:
        open_dataset("someone/some_set")
    assert "\n" not in str(caught.value)


def test_live_lerobot_dataset(tmp_path):
    live = SimpleNamespace(root=lerobot(tmp_path / "set"), meta=object(), episodes=[2], repo_id="me/set")
    dataset = open_dataset(live)
    assert (dataset.name, len(dataset)) == ("me/set", 1)
    assert np.array_equal(dataset.episode(0).actions, ACTIONS[2])
    live.episodes = [3]
    with pytest.raises(DataError, match="has no episode 3"):
        open_dataset(live)


def test_what_is_no_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "half" / "data").mkdir(parents=True)
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / "rlds" / version).mkdir(parents=True)
        (tmp_path / "rlds" / version / "dataset_info.json").write_text("{}")
    for source, words in (
        (tmp_path / "empty", r"holds no known dataset; looked for meta/info\.json .*\.hdf5.*\.npz"),
        (tmp_path / "notes.txt", "is of no known format; looked for"),
        (tmp_path / "half", r"meta/info\.json is missing"),
        (tmp_path / "rlds", r"holds the versions 1\.0\.0, 2\.0\.0; name one"),
        (tmp_path / "nowhere", "does not exist"),
        (str(tmp_path / "*.tfrecord-*"), "matches no file"),
        (3.5, "a float is no dataset"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(source)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.hdf5").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"needs h5py; install it with: pip install 'actok\[hdf5\]'"):
        open_dataset(tmp_path / "x.hdf5")
    frames = np.zeros((7, 8, 10, 3), np.uint8)
    episode = Episode(index=0, actions=ACTIONS[0], images={"front": frames})
    with pytest.raises(MissingExtraError, match=r"needs PyAV; install it with: pip install 'actok\[video\]'"):
        write_lerobot([episode], tmp_path / "set", space=ActionSpace.raw(4), rate_hz=10, images="video")
    assert not (tmp_path / "set").exists()
    # PNG is written without it.
    write_lerobot([episode], tmp_path / "set", space=ActionSpace.raw(4), rate_hz=10, images="image")


def test_readers_are_loaded_when_needed():
    code = (
        "import sys, actok.data, actok.data.open; print(sorted({'pyarrow', 'h5py', 'av', 'torch'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
