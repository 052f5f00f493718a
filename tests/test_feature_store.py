"""Features on disk: what a chunk's batch holds, and when a folder is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from actok.alignment.store import FeatureStore
from actok.alignment.store_write import as_stored, merge_parts, write_part
from actok.core import DataError

LENGTHS = [13, 7, 29, 1]
F, U = 5, 17
PRINT = "files=a;episodes=b;texts=c;rate=own"
TEACHER = {"model": "some/model", "layer": -3}


def write(folder, name, index, features, fingerprint=PRINT, parts=1, **meta):
    """Features [u, F] of frames index [N] in a folder of features, written as `parts` files."""
    paths = []
    for i, frames in enumerate(np.array_split(index, parts)):
        paths.append(folder / f"{name}-{i}.npz")
        write_part(paths[-1], as_stored(features[frames], "x", str))
    facts = {"dataset": name, "fingerprint": fingerprint, "lengths": LENGTHS, "teacher": TEACHER, **meta}
    return merge_parts(paths, folder / "store" / name, facts, None)


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    # Runs of equal rows, as texts make them, and in the long episode a new row at every frame, as images do.
    index = np.concatenate([rng.integers(0, 3, 13).repeat(1), np.full(7, 4), rng.permutation(29) % U, [2]])
    index[:5] = 1
    write(tmp_path, "d", index, rng.normal(size=(U, F)), parts=3)
    return FeatureStore.open(tmp_path / "store", "d", PRINT)


def expected(store, episode, start, steps, spans, real):
    """The same, frame by frame."""
    rows = store.rows.astype(np.float64)
    whole, slots, known, following = [], [], [], []
    for b, (e, s) in enumerate(zip(episode, start, strict=True)):
        frames = [t for t in range(steps) if s + t < LENGTHS[e] and real[b, t]]
        at = {t: rows[store.frame_rows[store.offsets[e] + s + t]] for t in frames}
        whole.append(np.mean([at[t] for t in frames], axis=0))
        inside = [[at[t] for t in frames if a <= t < z] for a, z in spans]
        slots.append([np.mean(i, axis=0) if i else np.zeros(F) for i in inside])
        known.append([bool(i) for i in inside])
        after = s + frames[-1] + 1
        following.append(rows[store.frame_rows[store.offsets[e] + after]] if after < LENGTHS[e] else None)
    return np.array(whole), np.array(slots), np.array(known), following


@pytest.mark.parametrize("steps", [1, 5, 11, 31])
@pytest.mark.parametrize("spans", ["even", "ragged, overlapping, empty"])
def test_chunks_are_means_over_their_frames(store, steps, spans):
    rng = np.random.default_rng(steps)
    episode = rng.integers(0, len(LENGTHS), 43)
    start = rng.integers(0, np.array(LENGTHS)[episode])
    real = rng.random((43, steps)) < 0.7
    real[:, 0] = True
    spans = (
        np.array([[s, min(s + 4, steps)] for s in range(0, steps, 4)])
        if spans == "even"
        else np.array([[0, steps], [steps // 2, steps + 3], [steps, steps + 2], [0, 1]])
    )
    batch = store.chunk(episode, start, steps, spans, real)
    whole, slots, known, following = expected(store, episode, start, steps, spans, real)
    np.testing.assert_allclose(batch.whole, whole, atol=1e-6)
    np.testing.assert_allclose(batch.slots, slots, atol=1e-6)
    np.testing.assert_array_equal(batch.slot_known, known)
    assert batch.has_next.tolist() == [f is not None for f in following]
    np.testing.assert_allclose(batch.next, [np.zeros(F) if f is None else f for f in following], atol=1e-6)
    assert batch.whole.dtype == batch.slots.dtype == batch.next.dtype == torch.float32
    plain = store.chunk(episode, start, steps, None, real)
    assert plain.slots is None
    assert plain.slot_known is None
    torch.testing.assert_close(plain.whole, batch.whole, atol=0, rtol=0)


def test_groups_are_equal_exactly_where_features_are(store):
    rng = np.random.default_rng(3)
    episode = rng.integers(0, 3, 211)
    start = rng.integers(0, np.array(LENGTHS)[episode])
    real = np.arange(9) < rng.integers(1, 10, 211)[:, None]
    batch = store.chunk(episode, start, 9, None, real)
    same = (batch.whole[:, None] == batch.whole[None]).all(dim=-1)
    assert torch.equal(batch.group[:, None] == batch.group[None], same)
    assert 2 < len(batch.group.unique()) < 211
    rows = [
        set(store.frame_rows[store.offsets[e] + s + np.flatnonzero(r[: LENGTHS[e] - s])])
        for e, s, r in zip(episode, start, real, strict=True)
    ]
    assert batch.varies.tolist() == [len(r) > 1 for r in rows]


def test_the_same_shares_of_the_same_features_are_one_group_whatever_their_order(tmp_path):
    features = np.random.default_rng(0).normal(size=(3, F))
    write(tmp_path, "d", np.array([0, 1, 2, 1, 0, 2, 1] + [0] * 43), features)
    store = FeatureStore.open(tmp_path / "store", "d", PRINT)
    # [0 1], [1 0] and [2 1 0 2 ... cut], then [0 1 2 1 0 2] whose shares are those of [0 1 2].
    batch = store.chunk(
        np.zeros(4, int),
        np.array([0, 3, 0, 0]),
        6,
        None,
        np.array([[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0, 0], [1] * 6], bool),
    )
    assert batch.group[0] == batch.group[1]
    assert batch.group[2] == batch.group[3]
    assert batch.group[0] != batch.group[2]
    assert torch.equal(batch.whole[2], batch.whole[3])


def test_groups_of_two_datasets_agree_on_equal_features(tmp_path):
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(1, F)), rng.normal(size=(2, F))
    write(tmp_path, "a", np.zeros(50, int), shared)
    write(tmp_path, "b", np.array([0] * 13 + [1] * 37), np.concatenate([own[:1], shared]), "files=b;rate=own")
    a = FeatureStore.open(tmp_path / "store", "a", PRINT).chunk(np.array([0]), np.array([3]), 5)
    b = FeatureStore.open(tmp_path / "store", "b", "files=b;rate=own").chunk(np.array([0, 1]), np.array([3, 1]), 5)
    assert a.group[0] == b.group[1] != b.group[0]


def test_a_row_is_stored_once_in_the_order_of_frames_whatever_the_parts(tmp_path):
    features = np.random.default_rng(0).normal(size=(U, F))
    features[3] = features[7]
    features[:, 0], features[5, 0] = 0.0, -0.0
    index = np.random.default_rng(1).integers(0, U, 50)
    names = [f"parts{n}" for n in (1, 4, 50)]
    written = [write(tmp_path, name, index, features, parts=n) for name, n in zip(names, (1, 4, 50), strict=True)]
    assert len({json.dumps(w["files"]) for w in written}) == 1
    rows = np.load(tmp_path / "store" / names[0] / "rows.npy")
    frames = np.load(tmp_path / "store" / names[0] / "index.npy")
    assert len(np.unique(rows, axis=0)) == len(rows) == len(np.unique(features[index], axis=0))
    np.testing.assert_array_equal(rows[frames], features[index].astype(np.float16))
    first = [int(np.flatnonzero(frames == i)[0]) for i in range(len(rows))]
    assert first == sorted(first)


def test_parts_that_are_not_of_this_dataset_are_not_merged(tmp_path):
    features = np.random.default_rng(0).normal(size=(U, F))
    frames = sum(LENGTHS)
    with pytest.raises(DataError, match=rf"hold {frames - 1} frames, the dataset {frames}; delete that folder"):
        write(tmp_path, "few", np.zeros(frames - 1, np.int64), features)
    assert not (tmp_path / "store" / "few").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 65536.0, -1e9])
def test_a_feature_that_float16_cannot_hold_names_teacher_and_frame(bad):
    values = np.ones((3, F), np.float32)
    values[2, 1] = bad
    with pytest.raises(DataError, match=r"teacher big/model gives .* entry 1 .* frame 2.*65504"):
        as_stored(values, "big/model", lambda i: f"frame {i}")
    values[2, 1] = 65504
    assert as_stored(values, "big/model", str)[2, 1] == 65504


def test_chunks_that_were_cut_from_other_data_are_refused(store):
    with pytest.raises(DataError, match=r"episode 4 does not exist; .* 0\.\.3"):
        store.chunk(np.array([4]), np.array([0]), 5)
    with pytest.raises(DataError, match=r"frame 7 of episode 1, which has 7"):
        store.chunk(np.array([0, 1]), np.array([0, 7]), 5)
    with pytest.raises(DataError, match="chunk 1 of the batch has no real frame"):
        store.chunk(np.array([0, 1]), np.array([0, 0]), 2, None, np.array([[True, True], [False, False]]))


def test_missing_and_stale_features_name_the_command(tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(
        DataError,
        match=rf"no features of dataset 'd': {folder} does not exist.*actok features --data d --teacher HUB_ID_OR_FOLDER --out {folder}$",
    ):
        FeatureStore.open(folder, "d", PRINT)
    arguments = {"data": "my data", "teacher": "/models/x", "views": "a,b", "stride": 5, "rate": None, "space": "arm"}
    write(tmp_path, "d", np.zeros(50, int), np.ones((1, F)), arguments=arguments)
    with pytest.raises(
        DataError, match=r"holds features of d; .*--data other --teacher /models/x --views a,b --stride 5 --out"
    ):
        FeatureStore.open(folder, "other", "files=z;rate=own")
    with pytest.raises(
        DataError, match=r"of other data: files and texts differ; .*--data 'my data' --teacher /models/x .*--space arm "
    ):
        FeatureStore.open(folder, "d", PRINT.replace("=a", "=A").replace("=c", "=C"))
    with pytest.raises(DataError, match=r"rate \(own, now 80to20\) differ; .*--data elsewhere .*--rate 20 "):
        FeatureStore.open(folder, "d", PRINT.replace("own", "80to20"), data="elsewhere")
    assert FeatureStore.open(folder, "renamed", PRINT).meta["dataset"] == "d"


def test_features_of_another_teacher_are_refused(tmp_path):
    write(tmp_path, "d", np.zeros(50, int), np.ones((1, F)))
    assert FeatureStore.open(tmp_path / "store", "d", PRINT, teacher=dict(reversed(TEACHER.items()))).dim == F
    with pytest.raises(DataError, match=r"features of the teacher .*some/model.*--teacher other/model --out"):
        FeatureStore.open(tmp_path / "store", "d", PRINT, teacher={**TEACHER, "model": "other/model"})


@pytest.mark.parametrize("name", ["rows.npy", "index.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_folder_says_how_to_make_it_again(store, name, damage):
    path = store.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"actok features"):
        FeatureStore.open(store.folder.parent, "d", PRINT)


def test_a_changed_value_is_found_on_request(store):
    store.verify()
    path = store.folder / "rows.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    changed = FeatureStore.open(store.folder.parent, "d", PRINT)
    with pytest.raises(DataError, match=r"rows.npy was changed after it was written.*actok features --data d"):
        changed.verify()


def test_features_can_be_moved(store, tmp_path):
    shutil.move(store.folder.parent, tmp_path / "elsewhere")
    moved = FeatureStore.open(tmp_path / "elsewhere", "d", PRINT)
    moved.verify()
    np.testing.assert_array_equal(moved.rows[moved.frame_rows], store.rows[store.frame_rows])
