"""Frame cache and chunks: every chunk equals a loop over frames; caches are complete, fresh, or not used."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, SpaceMismatchError
from actok.data.chunks import Chunks, FrameCache
from actok.data.episodes import Episode, EpisodeDataset
from actok.data.open import open_dataset
from actok.signal.statistics import Statistics
from realdata import REAL, needs_real

SPACE = ActionSpace(
    embodiment="arm",
    dim=5,
    rate_hz=11.0,
    groups=(
        ActionGroup(name="move", kind="position", dims=(0, 3), mode="delta"),
        ActionGroup(name="turn", kind="joint", dims=(1,), mode="velocity"),
        ActionGroup(name="lift", kind="joint", dims=(2,)),
        ActionGroup(name="grip", kind="gripper", dims=(4,)),
    ),
)


class Memory(EpisodeDataset):
    """Episodes from arrays; counts how often one is read."""

    def __init__(self, actions, space=SPACE, proprio=None, tasks=None, files=()):
        self.name, self.space, self.space_origin = "memory", space, "given"
        self.lengths = np.array([len(a) for a in actions])
        self.source_files = files
        self.actions, self.proprio, self.tasks = actions, proprio, tasks
        self.reads = 0

    def episode(self, index, *, images=False):
        self.reads += 1
        return Episode(
            index=index,
            actions=self.actions[index],
            proprio=None if self.proprio is None else self.proprio[index],
            task="" if self.tasks is None else self.tasks[index],
        )


def make(lengths=(13, 3, 0, 29, 1), proprio=True, seed=0, **options):
    rng = np.random.default_rng(seed)
    actions = [rng.normal(size=(n, 5)).astype(np.float32) for n in lengths]
    states = [rng.normal(size=(n, 7)).astype(np.float32) for n in lengths] if proprio else None
    return Memory(actions, proprio=states, **options)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(any),
    horizon=st.integers(1, 31),
    stride=st.integers(1, 9),
    data=st.data(),
)
def test_chunks_equal_a_loop_over_frames(lengths, horizon, stride, data):
    dataset = make(lengths)
    chosen = data.draw(st.permutations(range(len(lengths)))) if data.draw(st.booleans()) else None
    expected = [(e, s) for e in (chosen or range(len(lengths))) for s in range(0, lengths[e], stride)]
    chunks = Chunks(FrameCache.build(dataset), horizon, episodes=chosen, stride=stride)
    order = data.draw(st.permutations(range(len(expected))))
    batch = chunks.batch(order)
    assert len(chunks) == len(expected)
    for i, row in enumerate(order):
        episode, start = expected[row]
        frames = dataset.actions[episode][start : start + horizon]
        rest = np.repeat(frames[-1:], horizon - len(frames), axis=0)
        rest[:, [0, 1, 3]] = 0  # delta and velocity stand still at 0, the others hold
        assert np.array_equal(batch.actions[i], np.concatenate([frames, rest]))
        assert np.array_equal(batch.pad_mask[i], np.arange(horizon) >= len(frames))
        assert np.array_equal(batch.anchor[i], dataset.proprio[episode][start])
        assert (batch.episode[i], batch.start[i]) == (episode, start)


def test_stride_of_a_horizon_tiles_every_frame_once():
    dataset = make()
    batch = Chunks(FrameCache.build(dataset), 5, stride=5).all()
    assert batch.actions.dtype == np.float32
    assert np.array_equal(batch.actions[~batch.pad_mask], np.concatenate(dataset.actions))


def test_a_folder_gives_what_memory_gives_and_is_read_once(tmp_path):
    dataset = make(tasks=["a", "b", "b", "c", "a"])
    memory = FrameCache.build(dataset)
    dataset.source_files = [tmp_path / "source.bin"]
    dataset.source_files[0].write_bytes(b"1234567")
    first = FrameCache.build(dataset, tmp_path / "cache")
    reads = dataset.reads
    second = FrameCache.build(dataset, tmp_path / "cache")
    opened = FrameCache.open(tmp_path / "cache")
    assert dataset.reads == reads
    for cache in (first, second, opened):
        assert np.array_equal(cache.actions, memory.actions)
        assert np.array_equal(cache.proprio, memory.proprio)
        assert np.array_equal(cache.offsets, memory.offsets)
        assert (cache.name, cache.space, cache.tasks) == ("memory", SPACE, ("a", "b", "b", "c", "a"))
        assert not cache.actions.flags.writeable
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["actions.npy", "meta.json", "proprio.npy"]


def test_a_cache_folder_named_by_the_environment_is_used_for_files(tmp_path, monkeypatch):
    """Frames of data on disk are then mapped from it, and read once; data in memory stay in memory."""
    actions = np.random.default_rng(0).normal(size=(29, 3)).astype(np.float32)
    np.savez(tmp_path / "demos.npz", action=actions, episode_length=[13, 16])
    monkeypatch.setenv("ACTOK_CACHE", str(tmp_path / "caches"))
    dataset = open_dataset(tmp_path / "demos.npz")
    first = FrameCache.build(dataset)
    (folder,) = (tmp_path / "caches").iterdir()
    np.testing.assert_array_equal(first.actions, actions)
    assert not first.actions.flags.writeable
    FrameCache.build(open_dataset([actions]))
    assert [*(tmp_path / "caches").iterdir()] == [folder]
    monkeypatch.setattr(type(dataset), "episode", None)  # a second build reads no episode
    np.testing.assert_array_equal(FrameCache.build(dataset).actions, actions)


def test_a_stale_cache_is_rebuilt(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"1")
    dataset = make(files=[source])
    FrameCache.build(dataset, tmp_path / "cache")
    dataset.actions = [a + 1 for a in dataset.actions]
    os.utime(source, ns=(1, 1))
    rebuilt = FrameCache.build(dataset, tmp_path / "cache")
    assert np.array_equal(rebuilt.actions, np.concatenate(dataset.actions))
    dataset.tasks = ["push"] * len(dataset)
    assert set(FrameCache.build(dataset, tmp_path / "cache").tasks) == {"push"}
    dataset.space = replace(SPACE, embodiment="renamed")
    assert FrameCache.build(dataset, tmp_path / "cache").space.embodiment == "renamed"
    assert FrameCache.build(dataset, tmp_path / "cache", rate_hz=22.0).space.rate_hz == 22.0


def test_data_in_memory_are_known_by_their_values(tmp_path):
    FrameCache.build(make(), tmp_path / "cache")
    other = make(seed=1)
    assert np.array_equal(FrameCache.build(other, tmp_path / "cache").actions, np.concatenate(other.actions))


@pytest.mark.parametrize("damage", ["truncate", "no meta", "half meta", "other rows", "version"])
def test_a_damaged_cache_is_refused_and_rebuilt(tmp_path, damage):
    dataset = make()
    folder = tmp_path / "cache"
    FrameCache.build(dataset, folder)
    meta = folder / "meta.json"
    if damage == "truncate":
        path = folder / "actions.npy"
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "no meta":
        meta.unlink()
    elif damage == "half meta":
        meta.write_text(meta.read_text()[:-9])
    elif damage == "other rows":
        np.save(folder / "actions.npy", np.zeros((17, 5), np.float32))
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "version": 99, "fingerprint": ""}))
    with pytest.raises(DataError, match="build it again"):
        FrameCache.open(folder)
    if damage == "no meta":  # what is in the folder may be anything now
        with pytest.raises(DataError, match="is no frame cache"):
            FrameCache.build(dataset, folder)
    else:
        assert np.array_equal(FrameCache.build(dataset, folder).actions, np.concatenate(dataset.actions))


def test_a_failed_build_leaves_the_old_cache_and_nothing_else(tmp_path):
    dataset = make()
    FrameCache.build(dataset, tmp_path / "cache")
    before = {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()}
    broken = make()
    broken.actions[3] = broken.actions[3].copy()
    broken.actions[3][2, 4] = np.inf
    with pytest.raises(DataError, match="episode 3: actions hold inf at step 2, dimension 4"):
        FrameCache.build(broken, tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="no frame cache; name a new or empty folder"):
        FrameCache.build(make(), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"x"


def test_bad_episodes_are_named():
    narrow = make()
    narrow.actions[1] = narrow.actions[1][:, :4]
    with pytest.raises(SpaceMismatchError, match=r"episode 1: actions have shape \(3, 4\)"):
        FrameCache.build(narrow)
    short = make()
    short.actions[3] = short.actions[3][:-1]
    with pytest.raises(DataError, match="28 steps are stored, 29 are stated"):
        FrameCache.build(short)
    stateless = make()
    stateless.proprio[3] = None
    with pytest.raises(DataError, match="episode 3 has no values, of episode 0 7"):
        FrameCache.build(stateless)
    with pytest.raises(DataError, match="has no frame in 2 episodes"):
        FrameCache.build(make((0, 0)))


def test_bad_chunks_are_named():
    cache = FrameCache.build(make())
    with pytest.raises(ConfigError, match="horizon is 0"):
        Chunks(cache, 0)
    with pytest.raises(ConfigError, match=r"stride is 1\.5"):
        Chunks(cache, 3, stride=1.5)
    with pytest.raises(DataError, match=r"episode 5 does not exist; 'memory' has 0\.\.4"):
        Chunks(cache, 3, episodes=[0, 5])
    for none in ([2], []):
        with pytest.raises(DataError, match="no chunk remains"):
            Chunks(cache, 3, episodes=none)
    chunks = Chunks(cache, 3)
    for index in (-1, len(chunks)):
        with pytest.raises(DataError, match=f"chunk {index} does not exist"):
            chunks.batch([0, index])
    with pytest.raises(DataError, match="give integers"):
        chunks.batch([0.0])


def test_resampling_while_building_keeps_time_and_displacement():
    dataset = make((13, 29))
    slow, fast = FrameCache.build(dataset), FrameCache.build(dataset, rate_hz=33.0)
    assert np.array_equal(fast.lengths, 3 * slow.lengths)
    assert fast.space.rate_hz == 33.0
    assert np.array_equal(fast.proprio[::3], slow.proprio)  # recorded states only, none in between
    assert np.array_equal(fast.proprio[2::3], slow.proprio)
    for e in range(2):
        a, b = (c.actions[c.offsets[e] : c.offsets[e + 1]] for c in (slow, fast))
        np.testing.assert_allclose(b[:, [0, 3]].sum(0), a[:, [0, 3]].sum(0), atol=1e-5)
        np.testing.assert_allclose(b[::3, [1, 2, 4]], a[:, [1, 2, 4]], atol=1e-6)


@pytest.mark.parametrize("episodes", [None, [0], [3, 1, 4], [4, 0, 1]])
def test_statistics_of_some_episodes(episodes, monkeypatch):
    monkeypatch.setattr("actok.data.cache.BLOCK", 7)
    dataset = make()
    got = FrameCache.build(dataset).statistics(episodes)
    frames = np.concatenate([dataset.actions[e] for e in (range(5) if episodes is None else episodes)])
    want = Statistics.from_array(frames)
    assert got.count == want.count
    for name in ("minimum", "maximum", "quantiles"):
        assert np.array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(got.std, want.std, rtol=1e-12)


@needs_real
def test_real_episodes_survive_the_cache(tmp_path):
    with np.load(REAL / "sim" / "libero_state" / "libero_object.npz") as data:
        cuts = np.cumsum(data["episode_length"])[:-1]
        actions = np.split(data["action"].astype(np.float32), cuts)
        proprio = np.split(data["proprio"].astype(np.float32), cuts)
    cache = FrameCache.build(Memory(actions, ActionSpace.raw(7, rate_hz=20.0), proprio), tmp_path / "cache")
    batch = Chunks(cache, 16, stride=16).all()
    assert np.array_equal(batch.actions[~batch.pad_mask], np.concatenate(actions))
    assert np.array_equal(batch.anchor[batch.start == 0], np.stack([p[0] for p in proprio]))
