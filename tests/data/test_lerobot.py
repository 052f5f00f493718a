"""LeRobot: what is written is read back, in both layouts; damaged and contradictory datasets are refused by name."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ActionGroup, ActionSpace, ActokError, ConfigError, DataError, SpaceMismatchError
from actok.data import Episode, open_dataset, write_lerobot
from actok.data.chunks import FrameCache
from actok.data.lerobot_meta import to_matrix
from actok.data.lerobot_read import LeRobotFolder
from actok.data.lerobot_tables import SPOKEN
from realdata import REAL, needs_real

RATE, D, P, LENGTHS = 11.0, 3, 5, (7, 13, 2)
SPACE = ActionSpace(
    embodiment="arm",
    dim=D,
    rate_hz=RATE,
    groups=(
        ActionGroup(name="move", kind="position", dims=(0, 2), mode="delta", unit="m", scale=0.05),
        ActionGroup(name="grip", kind="gripper", dims=(1,)),
    ),
)
NAMES = ("reach", "grasp", "lift")


def make_episodes(images: bool = False, seed: int = 0) -> list[Episode]:
    rng = np.random.default_rng(seed)
    episodes = []
    for index, length in enumerate(LENGTHS):
        subtask = np.sort(rng.integers(-1, 3, length))
        if index == 1:
            subtask[4:6] = -1  # none is active for a while, in the middle
        episodes.append(
            Episode(
                index=index,
                actions=rng.standard_normal((length, D)).astype(np.float32),
                proprio=rng.standard_normal((length, P)).astype(np.float32),
                instruction=("pick up the cup", "", "close the drawer\nslowly")[index],
                task=("cup", "", "drawer")[index],
                subtask=subtask,
                subtask_names=NAMES,
                timestamps=None if index == 0 else np.arange(length) / RATE + rng.uniform(0, 1e-3, length),
                success=(True, None, False)[index],
                start_state={
                    "qpos": rng.standard_normal((2, 17)),
                    "time": np.float64(np.pi),
                    "seed": np.arange(3, dtype=np.int8),
                }
                if index != 1
                else {},
                images={"front": rng.integers(0, 256, (length, 12, 20, 3), np.uint8)} if images else {},
            )
        )
    return episodes


def spoken(episode: Episode) -> list[str] | None:
    if episode.subtask is None:
        return None
    return [episode.subtask_names[i] if i >= 0 else "" for i in episode.subtask]


def assert_same(written: Episode, read: Episode) -> None:
    assert read.actions.dtype == np.float32
    assert np.array_equal(written.actions, read.actions)
    assert np.array_equal(written.proprio, read.proprio)
    assert (written.instruction, written.task, written.success) == (read.instruction, read.task, read.success)
    assert spoken(written) == spoken(read)
    if written.timestamps is not None:
        assert np.array_equal(written.timestamps, read.timestamps)
    assert written.start_state.keys() == read.start_state.keys()
    for key, value in written.start_state.items():
        array = np.asarray(value)
        assert read.start_state[key].dtype == array.dtype
        assert read.start_state[key].shape == array.shape
        assert read.start_state[key].tobytes() == array.tobytes()


@pytest.fixture(params=["v2.1", "v3.0"])
def version(request):
    return request.param


@pytest.fixture
def folder(tmp_path, version):
    return write_lerobot(make_episodes(), tmp_path / "set", space=SPACE, version=version)


@pytest.mark.parametrize("layout", ["column", "language_persistent"])
def test_round_trip_is_exact(tmp_path, version, layout):
    episodes = make_episodes(images=True)
    folder = write_lerobot(
        iter(episodes), tmp_path / "set", space=SPACE, version=version, subtask_layout=layout, images="image"
    )
    dataset = open_dataset(folder)
    assert dataset.space == SPACE
    assert dataset.space_origin == "stored with the dataset"
    assert dataset.lengths.tolist() == list(LENGTHS)
    for written, read in zip(episodes, dataset, strict=True):
        assert_same(written, read)
        assert read.images == {}
    assert np.allclose(dataset.episode(0).timestamps, np.arange(LENGTHS[0]) / RATE, atol=1e-6)
    for index in (2, 0, 1):
        images = dataset.episode(index, images=True).images
        assert np.array_equal(images["observation.images.front"], episodes[index].images["front"])
    frames, offsets = open_dataset(folder).all_actions()
    assert np.array_equal(frames, np.concatenate([e.actions for e in episodes]))
    assert offsets.tolist() == [0, 7, 20, 22]


def test_written_again_from_what_was_read(tmp_path, folder, version):
    """A dataset read and written in the other layout holds the same."""
    other = {"v2.1": "v3.0", "v3.0": "v2.1"}[version]
    source = open_dataset(folder)
    again = open_dataset(write_lerobot(source, tmp_path / "again", space=source.space, version=other))
    for a, b in zip(source, again, strict=True):
        assert_same(a, b)


def test_video_frames_belong_to_their_step(tmp_path, version):
    """Brightness tells episode and step; in v3.0 all episodes share one file."""
    episodes = []
    for index, episode in enumerate(make_episodes()):
        shade = 60 * index + 4 * np.arange(len(episode)) + 20
        frames = np.broadcast_to(shade[:, None, None, None], (len(episode), 32, 48, 3)).astype(np.uint8)
        episodes.append(replace(episode, images={"wrist": frames}))
    folder = write_lerobot(episodes, tmp_path / "set", space=SPACE, version=version, images="video")
    assert len(list(folder.rglob("*.mp4"))) == (len(LENGTHS) if version == "v2.1" else 1)
    dataset = open_dataset(folder)
    for index in (1, 2, 0):
        frames = dataset.episode(index, images=True).images["observation.images.wrist"]
        assert frames.shape == (LENGTHS[index], 32, 48, 3)
        assert np.abs(frames.astype(int) - episodes[index].images["wrist"]).max() <= 3
    shutil.rmtree(folder / "videos")
    with pytest.raises(DataError, match="videos, or read it without images"):
        dataset.episode(0, images=True)


def test_statistics_are_those_of_all_frames(tmp_path):
    episodes = make_episodes(images=True)
    v3 = write_lerobot(episodes, tmp_path / "v3", space=SPACE, images="image")
    stats = json.loads((v3 / "meta/stats.json").read_text())
    frames = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    for name, value in (
        ("min", frames.min(0)),
        ("max", frames.max(0)),
        ("mean", frames.mean(0)),
        ("std", frames.std(0)),
    ):
        assert np.allclose(stats["action"][name], value, rtol=1e-12)
    assert stats["action"]["count"] == [22]
    weighted = sum(np.quantile(e.actions.astype(float), 0.1, axis=0) * len(e) for e in episodes) / 22
    assert np.allclose(stats["action"]["q10"], weighted)
    pixels = np.concatenate([e.images["front"] for e in episodes]) / 255
    assert np.allclose(np.ravel(stats["observation.images.front"]["mean"]), pixels.mean((0, 1, 2)))
    assert np.shape(stats["observation.images.front"]["std"]) == (3, 1, 1)
    rows = pq.read_table(v3 / "meta/episodes").to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"]) for r in rows] == [(0, 7), (7, 20), (20, 22)]
    assert np.allclose(rows[1]["stats/action/max"], episodes[1].actions.max(0))


def test_info_and_tables_are_what_lerobot_expects(folder, version):
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == version
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 22, 3)
    assert info["fps"] == 11
    assert isinstance(info["fps"], int)
    assert info["features"]["action"] == {"dtype": "float32", "shape": [D], "names": list(SPACE.names)}
    table = pq.read_table(sorted((folder / "data").rglob("*.parquet"))[0])
    hugging = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert hugging["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": D, "_type": "Sequence"}
    assert list(hugging) == table.column_names
    assert set(table.column_names) == set(info["features"])
    if version == "v3.0":
        pandas = json.loads(pq.read_schema(folder / "meta/tasks.parquet").metadata[b"pandas"])
        assert pandas["index_columns"] == ["task"]


@pytest.mark.parametrize("kind", ["one row group", "several files", "unnamed task index", "selection of a live object"])
def test_other_writers_of_v3(tmp_path, kind):
    episodes = make_episodes()
    folder = write_lerobot(episodes, tmp_path / "set", space=SPACE)
    data = folder / "data/chunk-000/file-000.parquet"
    source, expected = folder, [0, 1, 2]
    if kind == "one row group":
        pq.write_table(pq.read_table(data), data, row_group_size=1000)
    elif kind == "several files":
        table = pq.read_table(data)
        pq.write_table(table.slice(0, 20), data)
        pq.write_table(table.slice(20), data.with_name("file-001.parquet"))
        path = folder / "meta/episodes/chunk-000/file-000.parquet"
        rows = pq.read_table(path)
        column = rows.column_names.index("data/file_index")
        pq.write_table(rows.set_column(column, "data/file_index", pa.array([0, 0, 1])), path)
    elif kind == "unnamed task index":
        path = folder / "meta/tasks.parquet"
        pq.write_table(pq.read_table(path).rename_columns(["task_index", "__index_level_0__"]), path)
    else:
        expected = [2, 0]
        source = SimpleNamespace(root=str(folder), meta=object(), episodes=expected, repo_id="me/set")
    dataset = open_dataset(source)
    assert len(dataset) == len(expected)
    for read, number in zip(dataset, expected, strict=True):
        assert_same(episodes[number], read)
    frames, _ = dataset.all_actions()
    assert np.array_equal(frames, np.concatenate([episodes[i].actions for i in expected]))


def test_several_data_files_and_metadata_blocks_when_limits_are_met(tmp_path, monkeypatch):
    monkeypatch.setattr("actok.data.lerobot_write.DATA_FILE_MB", 0)
    monkeypatch.setattr("actok.data.lerobot_write.CHUNK_SIZE", 2)
    monkeypatch.setattr("actok.data.lerobot_write.METADATA_ROWS", 2)
    episodes = make_episodes()
    folder = write_lerobot(episodes, tmp_path / "set", space=SPACE)
    files = [p.relative_to(folder).as_posix() for p in sorted((folder / "data").rglob("*.parquet"))]
    assert files == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    ]
    for written, read in zip(episodes, open_dataset(folder), strict=True):
        assert_same(written, read)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
        pa.array([[[1.0], [2.0]], [[3.0], [4.0]]], pa.large_list(pa.list_(pa.float32()))),
        pa.array([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)).slice(1),
    ],
)
def test_matrix_of_any_column(column):
    for chunked in (pa.chunked_array([column]), pa.chunked_array([column.slice(0, 1), column.slice(1)])):
        assert to_matrix(chunked, "x").tolist() == [[1, 2], [3, 4]]


def test_one_dimensional_actions_are_scalars(tmp_path, version):
    actions = np.arange(5, dtype=np.float32)[:, None]
    folder = write_lerobot([Episode(index=0, actions=actions)], tmp_path / "s", space=ActionSpace.raw(1, rate_hz=2.0), version=version)  # fmt: skip
    data = next((folder / "data").rglob("*.parquet"))
    assert pq.read_schema(data).field("action").type == pa.float32()
    assert np.array_equal(open_dataset(folder).episode(0).actions, actions)


@settings(max_examples=25, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 29), st.sampled_from(["a", "b", ""])), max_size=6),
    offset=st.floats(-0.4, 0),
)
def test_persistent_language_is_active_until_superseded(tmp_path_factory, changes, offset):
    """Against a loop over frames and rows, for rows at any time, in any order."""
    root = tmp_path_factory.mktemp("language")
    length = 17
    episode = Episode(index=0, actions=np.zeros((length, D), np.float32), subtask=np.zeros(length, int), subtask_names=("x",))  # fmt: skip
    folder = write_lerobot([episode], root / "set", space=SPACE, subtask_layout="language_persistent")
    data = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    rows = [
        {"role": "assistant", "content": text, "style": "subtask", "timestamp": max(0.0, (frame + offset) / RATE)}
        for frame, text in dict(changes).items()
    ]
    other = {"role": "user", "content": "no sub-task", "style": "plan", "timestamp": 0.0}
    column = pa.array([[*rows, other]] * length, SPOKEN)
    pq.write_table(
        table.set_column(table.column_names.index("language_persistent"), "language_persistent", column), data
    )
    expected = []
    for t in pq.read_table(data)["timestamp"].to_pylist():
        before = [r for r in rows if np.float32(r["timestamp"]) <= t]
        expected.append(max(before, key=lambda r: np.float32(r["timestamp"]))["content"] if before else "")
    assert (spoken(open_dataset(folder).episode(0)) or [""] * length) == expected
    shutil.rmtree(root)


# -- writing is all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(tmp_path, version, error):
    def stream():
        yield from make_episodes(images=True)[:2]
        raise error

    with pytest.raises(error):
        write_lerobot(stream(), tmp_path / "set", space=SPACE, version=version)
    assert list(tmp_path.iterdir()) == []


def test_writing_refuses(tmp_path, version):
    first, second, _ = make_episodes(images=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    cases = [
        (DataError, "not an empty folder", [first], full, {}),
        (DataError, "no episode to write", [], None, {}),
        (SpaceMismatchError, "4 dimensions", [first], None, {"space": ActionSpace.raw(4)}),
        (ConfigError, "version 'v1' is unknown", [first], None, {"version": "v1"}),
        (ConfigError, "rate is None", [first], None, {"space": ActionSpace.raw(D)}),
        (DataError, "episode 1 has no proprioception", [first, replace(second, proprio=None)], None, {}),
        (DataError, "episode 1 has no sub-tasks, other than", [first, replace(second, subtask=None)], None, {}),
        (
            DataError,
            r"episode 1 has the views \[\], episode 0 \['front'\]",
            [first, replace(second, images={})],
            None,
            {},
        ),
        (DataError, "view 'front' is uint8", [first, replace(second, images=first.images)], None, {}),
        (DataError, "episode 1 has sub-tasks, other than", [replace(first, subtask=None), second], None, {}),
        (DataError, "timestamps has 13 values for 7", [replace(first, timestamps=second.timestamps)], None, {}),
        (DataError, "has no name", [replace(first, subtask_names=("one",))], None, {}),
        (DataError, "holds nan in episode 0, step 3, dimension 2", [nan_at(first, 3, 2)], None, {}),
    ]
    for error, words, episodes, target, options in cases:
        options = {"space": SPACE, "version": version, **options}
        if error is not ConfigError and "space" in options and options["space"].rate_hz is None:
            options["rate_hz"] = RATE
        with pytest.raises(error, match=words):
            write_lerobot(episodes, target or tmp_path / "set", images="image", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    assert (full / "mine.txt").read_text() == "keep"
    odd = replace(first, images={"front": np.zeros((len(first), 5, 7, 3), np.uint8)})
    with pytest.raises(DataError, match="make no video"):
        write_lerobot([odd], tmp_path / "set", space=SPACE, version=version, images="video")


def nan_at(episode: Episode, step: int, dim: int) -> Episode:
    actions = episode.actions.copy()
    actions[step, dim] = np.nan
    return replace(episode, actions=actions)


# -- damage -------------------------------------------------------------------------------------------------------------


def edit_info(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    for path in (folder / "data").rglob("*.parquet"):
        pq.write_table(change(pq.read_table(path)), path)


def test_non_finite_actions_are_named(folder):
    def poison(table):
        values = [list(v) for v in table["action"].to_pylist()]
        rows = [i for i, e in enumerate(table["episode_index"].to_pylist()) if e == 1]
        if rows:
            values[rows[5]][2] = float("inf")
        return table.set_column(0, "action", pa.array(values, pa.list_(pa.float32(), D)))

    rewrite(folder, poison)
    dataset = open_dataset(folder)
    assert len(dataset.episode(0)) == 7
    for read in (lambda: dataset.episode(1), dataset.all_actions):
        with pytest.raises(DataError, match=r"'set' holds inf in episode 1, step 5, dimension 2"):
            read()


def test_damaged_parquet(folder):
    for path in (folder / "data").rglob("*.parquet"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
    dataset = open_dataset(folder)
    for read in (lambda: dataset.episode(0), dataset.all_actions):
        with pytest.raises(DataError, match="cannot be read as parquet"):
            read()
    for path in (folder / "data").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(DataError, match="is missing, though the metadata name it"):
        dataset.episode(0)


def test_data_files_without_rows_or_with_odd_indices(folder):
    path = min((folder / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="holds 0 rows of episode 0"):
        open_dataset(folder).episode(0)
    place = table.column_names.index("episode_index")
    for odd in (pa.array(["x"] * len(table)), pa.nulls(len(table), pa.int64())):
        pq.write_table(table.set_column(place, "episode_index", odd), path)
        with pytest.raises(DataError, match="episode_index must be whole numbers"):
            open_dataset(folder).episode(0)


def test_missing_metadata(folder, version):
    files = {
        "v2.1": ["meta/tasks.jsonl", "meta/episodes.jsonl", "meta/info.json"],
        "v3.0": ["meta/tasks.parquet", "meta/episodes", "meta/info.json"],
    }[version]
    for name in files:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(DataError, match=r"missing|holds no parquet file") as caught:
            open_dataset(folder)
        assert path.name in str(caught.value)


def test_lengths_that_disagree(folder):
    rewrite(folder, lambda table: table.slice(0, len(table) - 1))
    dataset = open_dataset(folder)
    with pytest.raises(DataError, match="holds 1 rows of episode 2, the metadata state 2"):
        dataset.episode(2)


def test_contradictory_info(folder):
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    wide = features | {"action": features["action"] | {"shape": [D + 1], "names": None}}
    lost = {k: v for k, v in features.items() if k != "action"} | {"action.arm": features["action"]}
    for changes, error, words in (
        ({"features": lost}, DataError, "candidates are action.arm"),
        ({"codebase_version": "v1.6"}, DataError, "states version 'v1.6'"),
        ({"fps": 0}, DataError, "fps 0"),
        ({"features": wide}, SpaceMismatchError, "has actions of 4 dimensions"),
    ):
        before = (folder / "meta/info.json").read_text()
        edit_info(folder, **changes)
        with pytest.raises(error, match=words):
            open_dataset(folder)
        (folder / "meta/info.json").write_text(before)
    edit_info(folder, features=wide)
    (folder / "meta/actok/space.json").unlink()
    with pytest.raises(DataError, match="actions have 3 dimensions"):
        open_dataset(folder).episode(0)


@pytest.mark.parametrize(
    "names", [["a", "b", "c"], [["a", "b", "c"]], {"motors": ["a", "b", "c"]}, {"c": 2, "a": 0, "b": 1}]
)
def test_names_of_dimensions_in_every_nesting(folder, names):
    (folder / "meta/actok/space.json").unlink()
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    edit_info(folder, features=features | {"action": features["action"] | {"names": names}})
    assert open_dataset(folder).space.names == ("a", "b", "c")


def test_an_index_beyond_its_table(tmp_path):
    folder = write_lerobot(make_episodes(), tmp_path / "set", space=SPACE)
    rewrite(folder, lambda t: t.set_column(t.column_names.index("task_index"), "task_index", pa.array([8] * len(t))))
    with pytest.raises(DataError, match="names task 8"):
        open_dataset(folder).episode(0)
    rewrite(folder, lambda t: t.drop_columns(["task_index"]))
    assert [e.instruction for e in open_dataset(folder)] == [e.instruction for e in make_episodes()]
    rewrite(
        folder, lambda t: t.set_column(t.column_names.index("subtask_index"), "subtask_index", pa.array([9] * len(t)))
    )
    with pytest.raises(DataError, match="names sub-task 9"):
        open_dataset(folder).episode(0)


def test_empty_dataset(tmp_path):
    folder = write_lerobot(make_episodes(), tmp_path / "set", space=SPACE, version="v2.1")
    (folder / "meta/episodes.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        open_dataset(folder)


def test_damaged_json_is_an_actok_error(folder):
    path = folder / "meta/info.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ActokError, match=r"info\.json cannot be read"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), []),
        (("features", "action"), []),
        (("features", "action", "shape"), ["x"]),
        (("data_path",), 7),
    ],
)
def test_metadata_of_the_wrong_form_name_their_folder(folder, path, value):
    info = json.loads((folder / "meta/info.json").read_text())
    if path:
        node = info
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    else:
        info = value
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"meta are not as LeRobot writes them .* download") as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value)


def test_a_cache_tells_selections_apart(tmp_path):
    actions = np.random.default_rng(0).normal(size=(4, 7, 3)).astype(np.float32)
    folder = write_lerobot([Episode(index=i, actions=a) for i, a in enumerate(actions)], tmp_path / "set", space=SPACE)
    for chosen in ([0, 1], [2, 3], [1, 0]):
        dataset = LeRobotFolder(folder, episodes=chosen)
        found = FrameCache.build(dataset, tmp_path / "cache").actions
        np.testing.assert_array_equal(found, actions[chosen].reshape(-1, 3))


# -- real data ----------------------------------------------------------------------------------------------------------


@needs_real
def test_real_unitree_equals_a_plain_reading():
    root = REAL / "real/unitree_g1_inspire"
    dataset = open_dataset(root)
    assert (len(dataset), int(dataset.lengths.sum()), dataset.space.dim, dataset.space.rate_hz) == (100, 35965, 26, 30)
    frames, offsets = dataset.all_actions()
    for index in (0, 57, 99):
        table = pq.read_table(root / f"data/chunk-000/episode_{index:06d}.parquet")
        assert np.array_equal(frames[offsets[index] : offsets[index + 1]], np.array(table["action"].to_pylist(), "f4"))
        episode = dataset.episode(index)
        assert np.array_equal(episode.proprio, np.array(table["observation.state"].to_pylist(), "f4"))
        assert episode.instruction == "Pick up the yellow bottle on the table."
    with pytest.raises(DataError, match="videos, or read it without images"):
        dataset.episode(0, images=True)


@needs_real
@pytest.mark.parametrize("name", ["libero_state", "aloha_sim"])
def test_real_demonstrations_survive(tmp_path, version, name):
    source = open_dataset(REAL / "sim" / name)
    folder = write_lerobot(source, tmp_path / "set", space=source.space, version=version)
    again = open_dataset(folder)
    assert again.space == source.space
    for index in range(0, len(source), 7):
        assert_same(source.episode(index), again.episode(index))
    assert np.array_equal(source.all_actions()[0], again.all_actions()[0])
