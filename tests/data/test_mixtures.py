"""Mixtures: ratios are kept exactly, epochs are permutations, steps are pure functions, files say what is missing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ConfigError
from actok.data.mixtures import Mixture, MixtureEntry, MixtureSampler, _permute, list_mixtures, load_mixture


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 50))
def test_a_keyed_permutation_is_one(size, seed, epoch):
    images = _permute(np.arange(size), size, (seed, epoch))
    assert np.array_equal(np.sort(images), np.arange(size))
    some = np.random.default_rng(0).integers(0, size, 7)
    assert np.array_equal(_permute(some, size, (seed, epoch)), images[some])


def test_a_keyed_permutation_looks_random():
    size = 10_007
    images = _permute(np.arange(size), size, (1, 0, 0))
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05
    steps = np.diff(images) % size  # of a shuffled order, each step is uniform
    counts, _ = np.histogram(steps, bins=20, range=(0, size))
    assert ((counts - size / 20) ** 2 / (size / 20)).sum() < 60
    other = _permute(np.arange(size), size, (1, 0, 1))
    assert (images == other).mean() < 0.01


def test_ratios_hold_in_every_cycle_and_epochs_repeat_nothing():
    sampler = MixtureSampler([101, 37, 5], ratios=(5, 1, 0.5), batch_size=7, seed=3)
    assert sampler.quotas == (10, 2, 1)
    batches = [sampler.at(step) for step in range(13 * 40)]
    for cycle in range(40):
        drawn = Counter(b.dataset for b in batches[13 * cycle : 13 * (cycle + 1)])
        assert drawn == {0: 10, 1: 2, 2: 1}
    orders = {tuple(b.dataset for b in batches[13 * c : 13 * (c + 1)]) for c in range(40)}
    assert len(orders) > 30
    for dataset, size in enumerate((101, 37, 5)):
        seen = np.concatenate([b.indices for b in batches if b.dataset == dataset])
        epochs = [seen[i : i + size] for i in range(0, len(seen) - size + 1, size)]
        assert all(np.array_equal(np.sort(e), np.arange(size)) for e in epochs)
        assert not np.array_equal(epochs[0], epochs[1])
        firsts = [b.epoch for b in batches if b.dataset == dataset]
        assert firsts == [7 * k // size for k in range(len(firsts))]


def test_a_step_depends_on_seed_and_step_alone():
    one, two = (MixtureSampler([1009, 503], ratios=(2, 1), batch_size=11, seed=5) for _ in range(2))
    forward = [one.at(step) for step in range(30)]
    for step in (29, 3, 17, 3):
        again = two.at(step)
        assert again.dataset == forward[step].dataset
        assert np.array_equal(again.indices, forward[step].indices)
    other = MixtureSampler([1009, 503], ratios=(2, 1), batch_size=11, seed=6)
    assert any(not np.array_equal(other.at(s).indices, forward[s].indices) for s in range(3))
    far = one.at(10**12)
    assert far.indices.min() >= 0
    assert far.indices.max() < [1009, 503][far.dataset]


def test_ranks_together_see_what_one_process_sees():
    sampler = MixtureSampler([97, 31], batch_size=3)
    single = [sampler.at(step).indices.tolist() for step in range(24)]
    ranks = [[sampler.at(step).indices.tolist() for step in range(rank, 24, 4)] for rank in range(4)]
    assert [ranks[i % 4][i // 4] for i in range(24)] == single


def test_samples_keep_ratios_in_every_cycle_and_epochs_repeat_nothing():
    sizes = (101, 37, 5)
    sampler = MixtureSampler(sizes, ratios=(5, 1, 0.5), batch_size=11, seed=3)
    drawn = [sampler.samples(step) for step in range(13 * 60)]
    dataset = np.concatenate([d.dataset for d in drawn])
    indices = np.concatenate([d.indices for d in drawn])
    cycles = dataset.reshape(-1, 13)
    assert (np.stack([(cycles == d).sum(1) for d in range(3)], 1) == (10, 2, 1)).all()
    assert len({tuple(c) for c in cycles.tolist()}) > 100
    for d, size in enumerate(sizes):
        epochs = indices[dataset == d]
        epochs = epochs[: len(epochs) // size * size].reshape(-1, size)
        assert len(epochs) > 10
        assert (np.sort(epochs, 1) == np.arange(size)).all()
        assert not np.array_equal(epochs[0], epochs[1])


def test_samples_by_size_go_through_everything_once_an_epoch():
    sizes = (101, 37, 5)
    sampler = MixtureSampler(sizes, ratios="size", batch_size=11, seed=3)
    drawn = [sampler.samples(step) for step in range(143 * 3)]
    pairs = np.stack([np.concatenate([getattr(d, f) for d in drawn]) for f in ("dataset", "indices")], 1)
    everything = sorted((d, i) for d, size in enumerate(sizes) for i in range(size))
    epochs = pairs[: len(pairs) // 143 * 143].reshape(-1, 143, 2)
    assert len(epochs) > 20
    assert all(sorted(map(tuple, epoch.tolist())) == everything for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    with pytest.raises(ConfigError, match="use samples"):
        sampler.at(0)


@pytest.mark.parametrize("ratios", ["size", (5, 1, 0.5), None])
def test_samples_depend_on_seed_and_step_alone_and_ranks_share_them_out(ratios):
    one, two = (MixtureSampler([1009, 503, 7], ratios=ratios, batch_size=30, seed=5) for _ in range(2))
    other = MixtureSampler([1009, 503, 7], ratios=ratios, batch_size=30, seed=6)
    for step in (29, 3, 10**12, 3, 0):
        whole = one.samples(step)
        parts = [two.samples(step, rank=rank, ranks=5) for rank in range(5)]
        for name in ("dataset", "indices"):
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
        assert not np.array_equal(whole.indices, other.samples(step).indices)
        assert (whole.indices < np.array([1009, 503, 7])[whole.dataset]).all()
    with pytest.raises(ConfigError, match="a batch of 30 cannot be divided among 4 processes"):
        one.samples(0, rank=1, ranks=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [3, 5], "batch_size": 3, "ratios": "equal"}, "ratios are 'equal'"),
        ({"sizes": [], "batch_size": 3}, "give at least one"),
        ({"sizes": [5, 0], "batch_size": 3}, "none empty"),
        ({"sizes": [5], "batch_size": 3, "ratios": [1, 2]}, "a ratio for each"),
        ({"sizes": [5], "batch_size": 0}, "batch_size is 0"),
        ({"sizes": [5], "batch_size": 1, "seed": -2}, "seed is -2"),
        ({"sizes": [5, 5], "batch_size": 1, "ratios": [1, 0]}, "ratio 0 cannot be used"),
        ({"sizes": [5, 5], "batch_size": 1, "ratios": [1, 0.12345678]}, "round them"),
    ],
)
def test_bad_samplers(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MixtureSampler(**arguments)


def test_packaged_mixtures_are_those_of_the_paper():
    # FASTer (arXiv 2512.04952), Table 3.
    everything = {name: f"/data/{name}" for name in ("droid_ee", "droid_joint_velocity", "galaxea")}
    expected = {
        "galaxea": {"galaxea": 1.0},
        "droid": {"droid_joint_velocity": 1.0},
        "faster_s": {"libero": 5.0, "bridge": 1.0},
        "faster_l": {"libero": 5.0, "bridge": 1.0, "kuka": 1.0, "fractal": 1.0, "droid_ee": 1.0},
        "faster_xl": {
            "libero": 5.0,
            "bridge": 1.0,
            "kuka": 1.0,
            "fractal": 1.0,
            "droid_ee": 1.0,
            "droid_joint_velocity": 1.0,
            "galaxea": 1.0,
        },
    }
    assert list_mixtures() == sorted(expected)
    for name, ratios in expected.items():
        mixture = load_mixture(name, {k: v for k, v in everything.items() if k in ratios})
        assert {e.name: e.ratio for e in mixture.entries} == ratios
        assert "Table 3" in mixture.paper
        assert all(e.space for e in mixture.entries)


def test_packaged_spaces_exist():
    from actok.data.spaces import find_space

    for name in list_mixtures():
        locations = {"droid_ee": "x", "droid_joint_velocity": "x", "galaxea": "x"}
        names = {"galaxea": ["galaxea"], "droid": ["droid_joint_velocity"], "faster_l": ["droid_ee"], "faster_s": []}
        mixture = load_mixture(name, {k: locations[k] for k in names.get(name, locations)})
        for entry in mixture.entries:
            assert find_space(entry.space).dim >= 7


def test_a_missing_location_is_named_with_the_remedy():
    with pytest.raises(
        ConfigError,
        match=r'droid_ee is; give source in a TOML file of your own, or pass locations=\{"droid_ee": "/path/to/it"\}',
    ):
        load_mixture("faster_l")
    with pytest.raises(ConfigError, match="droid_joint_velocity and galaxea are"):
        load_mixture("faster_xl", {"droid_ee": "/x"})
    with pytest.raises(ConfigError, match=r"no dataset 'bridgee'; did you mean 'bridge'\?"):
        load_mixture("faster_s", {"bridgee": "/x"})
    with pytest.raises(ConfigError, match=r"no mixture is called 'faster_m'; did you mean"):
        load_mixture("faster_m")


def test_a_location_wins_over_the_hub():
    mixture = load_mixture("faster_s", {"bridge": "/data/bridge"})
    assert [e.source for e in mixture.entries] == ["physical-intelligence/libero", "/data/bridge"]
    assert mixture.ratios == (5.0, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets = []", "has no datasets"),
        ("datasets = 3", r"a table \[\[datasets\]\] with a name"),
        ("[[datasets]]\nratio = 1.0", r"a table \[\[datasets\]\] with a name"),
        ('[[datasets]]\nname = "a"\nsource = "u/a"\nrate = 3', "unexpected keyword argument 'rate'"),
        ('[[datasets]]\nname = "a"\nsource = "u/a"\nratio = -1.0', "ratio -1.0"),
        ('[[datasets]]\nname = "a"\nsource = "u/a"\nratio = "big"', "ratio 'big'"),
        ('weights = 1\n[[datasets]]\nname = "a"\nsource = "u/a"', "the key 'weights'"),
        ('[[datasets]]\nname = "a"\nsource = "u/a"\n[[datasets]]\nname = "a"\nsource = "u/b"', "names a dataset twice"),
        ("[[datasets", "cannot be read as TOML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_mixture(path)


def test_datasets_of_different_width_are_opened_and_sampled(tmp_path):
    from actok.data.chunks import Chunks, FrameCache

    rng = np.random.default_rng(0)
    for name, dim in (("narrow", 5), ("wide", 11)):
        np.savez(
            tmp_path / f"{name}.npz",
            action=rng.normal(size=(47, dim)).astype(np.float32),
            episode_length=np.array([29, 18]),
        )
    mixture = Mixture(
        name="mine",
        entries=(
            MixtureEntry(name="narrow", source=str(tmp_path / "narrow.npz"), ratio=3),
            MixtureEntry(name="wide", source=str(tmp_path / "wide.npz")),
        ),
    )
    chunks = [Chunks(FrameCache.build(d, tmp_path / f"cache_{d.name}"), 13) for d in mixture.open()]
    sampler = MixtureSampler(chunks, ratios=mixture.ratios, batch_size=17)
    drawn = Counter()
    for step in range(8):
        batch = sampler.at(step)
        drawn[batch.dataset] += 1
        assert chunks[batch.dataset].batch(batch.indices).actions.shape == (17, 13, (5, 11)[batch.dataset])
    assert drawn == {0: 6, 1: 2}
