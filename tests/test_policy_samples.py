"""What a policy is trained on: every step as cut by hand, resampled data, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

import actok
from actok.core import (
    ChunkContext,
    ConfigError,
    DataError,
    SpaceMismatchError,
)
from actok.data import open_dataset, split_dataset
from actok.data.resample import resample
from actok.signal.statistics import Statistics
from actok.training import policy_images
from actok.training.policy import train_policy
from actok.training.policy_data import PolicyData
from policy_demos import FEW, TINY, D, H, P, T, frames, space_of, without


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def fast():
    return actok.fit("fast", frames(), horizon=T)


@pytest.fixture(scope="module")
def bins():
    return actok.fit("bins", frames(), horizon=T, bins=11)


@pytest.fixture
def samples(bins):
    return PolicyData.build(frames(), bins, progress=False)


def test_every_step_of_every_training_episode_is_a_sample_once_as_cut_by_hand(fast):
    sources = [frames(), frames(12, seed=1)]
    data = PolicyData.build(sources, fast, views=["image"], seed=4, text="subtask", progress=False)
    wanted = []
    for source in sources:
        dataset = open_dataset(source)
        for e in split_dataset(dataset, seed=4).train:
            episode = dataset.episode(int(e), images=True)
            wanted += [(episode, t) for t in range(len(episode))]
    assert len(data) == len(wanted) > 300
    assert len(data.validation) < len(data)
    picked = np.random.default_rng(0).permutation(len(data))[:41]
    batch = data.batch(picked)
    context = ChunkContext(embodiment=data.embodiment)
    longest = 0
    for row, index in enumerate(picked):
        episode, t = wanted[index]
        real = episode.actions[t : t + T]
        chunk = np.concatenate([real, np.repeat(real[-1:], T - len(real), 0)])
        pad = np.arange(T) >= len(real)
        assert batch.real[row].tolist() == (~pad).tolist()
        assert np.array_equal(batch.actions[row], fast.normalise(chunk[None], context)[0])
        codes = fast.encode(chunk[None], ChunkContext(pad_mask=pad[None])).flat
        longest = max(longest, len(codes))
        assert batch.codes[row, : len(codes)].tolist() == codes.tolist()
        assert (batch.codes[row, len(codes) :] == -1).all()
        assert np.array_equal(batch.observation.proprio[row], episode.proprio[t])
        assert np.array_equal(batch.observation.images["image"][row], episode.images["image"][t])
        assert batch.observation.instruction[row] == episode.instruction
        assert batch.text[row] == episode.subtask_names[episode.subtask[t]]
    assert batch.codes.shape[1] == longest
    assert set(data.instructions) == {"open the box", "shut the box"}
    assert set(data.said) == {"reach", "pull"}


def test_facts_are_of_the_training_episodes_alone(bins):
    source = frames()
    split = split_dataset(open_dataset(source), seed=2)
    ends = np.cumsum(source["episode_length"])
    rows = np.concatenate([np.arange(ends[e] - source["episode_length"][e], ends[e]) for e in split.train])
    expected = Statistics.from_array(source["proprio"][rows])
    others = np.setdiff1d(np.arange(ends[-1]), rows)
    source["proprio"][others] += 1000
    data = PolicyData.build(source, bins, seed=2, progress=False)
    assert np.allclose(data.proprio_statistics.quantiles, expected.quantiles)
    assert np.allclose(data.proprio_statistics.std, expected.std)
    assert data.proprio == P
    for task in ("open", "shut"):
        lengths = [source["episode_length"][e] for e in split.train if source["episode_task"][e] == task]
        assert data.task_steps[task] == pytest.approx(np.mean(lengths))
    assert data.batch([0, 1]).text is None
    assert data.batch([0, 1]).observation.images == {}


def test_a_chunk_may_be_longer_or_shorter_than_the_tokenizer_was_fitted_for(bins):
    for steps in (2, 13):
        data = PolicyData.build(frames(), bins, horizon=steps, progress=False)
        batch = data.batch([0, len(data) - 1])
        assert batch.actions.shape == (2, steps, D)
        assert batch.codes.shape == (2, bins.layout_for(steps).fixed_length)
        assert batch.real[1].tolist() == [True] + [False] * (steps - 1)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (without("proprio"), {}, DataError, "has no state and no views are named, so the policy would see nothing"),
        (frames(), {"views": ["wrist"]}, DataError, "has no view 'wrist'; it has image"),
        (without("image"), {"views": ["image"]}, DataError, "has no view 'image'; it has no images at all"),
        (frames(), {"views": ["image", "image"]}, ConfigError, "name each once"),
        (without("instruction", "episode_task"), {}, DataError, "neither instruction nor task"),
        (without("phase", "phase_names"), {"text": "subtask"}, DataError, "names no sub-tasks"),
        (frames(), {"text": "all"}, ConfigError, "text is 'all'; choose one of none, subtask"),
        (frames(), {"horizon": 0}, ConfigError, "horizon is 0"),
        (
            [frames(), without("proprio")],
            {"views": ["image"]},
            DataError,
            r"states have different sizes: 5 \(arrays\), 0 \(arrays\)",
        ),
        (
            [frames(), frames(image=np.zeros((len(frames()["image"]), H, H, 3), "uint8"))],
            {"views": ["image"]},
            DataError,
            "view 'image' is 6 x 4 in 'arrays', 4 x 4",
        ),
    ],
)
def test_what_cannot_train_a_policy_is_refused(bins, source, options, error, message):
    with pytest.raises(error, match=message):
        PolicyData.build(source, bins, progress=False, **options)


def test_data_of_another_space_or_rate_are_refused_with_the_difference(bins):
    wide = frames()
    wide["action"] = np.concatenate([wide["action"], wide["action"]], 1)
    with pytest.raises(SpaceMismatchError, match="dimensions: 3 against 6"):
        PolicyData.build(wide, bins, progress=False)
    slow = actok.fit("bins", frames(control_hz=10.0), horizon=T)
    with pytest.raises(SpaceMismatchError, match="has 20 actions a second, the tokenizer was fitted at 10"):
        PolicyData.build(frames(control_hz=20.0), slow, progress=False)


def test_resampled_data_train_with_what_was_seen_at_each_new_step():
    space = space_of("arm", 20.0)
    source = open_dataset(frames(), space=space)
    slow = actok.fit("bins", source, horizon=T, bins=11, rate_hz=8.0)
    with pytest.raises(SpaceMismatchError, match=r"resample the data \(--rate 8\)"):
        PolicyData.build(source, slow, progress=False)
    data = PolicyData.build(source, slow, rate_hz=8.0, views=["image"], text="subtask", progress=False)
    train = split_dataset(source, fractions=(0.8, 0.1, 0.1), seed=0).train
    at = 0
    for e in train:
        episode = source.episode(int(e), images=True)
        steps = int(np.ceil(len(episode) * 8 / 20))
        seen = [int(np.floor(k * 20 / 8 + 1e-9)) for k in range(steps)]
        batch = data.batch(np.arange(at, at + steps))
        np.testing.assert_array_equal(batch.observation.images["image"], episode.images["image"][seen])
        np.testing.assert_array_equal(batch.observation.proprio, episode.proprio[seen])
        phases = [("reach", "pull")[episode.subtask[i]] for i in seen]
        assert all(phase in text for phase, text in zip(phases, batch.text, strict=True))
        whole = resample(episode.actions, space, 20.0, 8.0)
        np.testing.assert_allclose(
            slow.denormalise(batch.actions[0].numpy()[None], ChunkContext(embodiment="arm"))[0, :steps][:T],
            whole[:T],
            atol=1e-5,
        )
        at += steps
    assert at == len(data)
    assert data.origin[0]["resampled"] == {"from_hz": 20.0, "to_hz": 8.0}
    assert data.space.rate_hz == 8.0


def test_images_beyond_the_memory_for_them_are_refused_before_they_are_read(bins, monkeypatch):
    monkeypatch.setattr(policy_images, "MOST_BYTES", 20_000)
    with pytest.raises(DataError, match=r"frames of image \(6 x 4\) take 0.0 GB, more than the 0 GB"):
        PolicyData.build(frames(), bins, views=["image"], progress=False)
    assert len(PolicyData.build(frames(), bins, progress=False))


def test_a_view_goes_by_the_last_part_of_its_name(bins, monkeypatch):
    plain = open_dataset(frames())
    original = type(plain).episode

    def with_two_cameras(self, index, *, images=False):
        episode = original(self, index, images=images)
        shown = {f"observation.images.{c}": episode.images["image"] for c in ("top", "wrist")} if images else {}
        return dataclasses.replace(episode, images=shown)

    monkeypatch.setattr(type(plain), "episode", with_two_cameras)
    for camera in ("top", "wrist"):
        found = PolicyData.build(frames(), bins, views=[camera], progress=False)
        assert found.views == (f"observation.images.{camera}",)
        assert set(found.batch([0]).observation.images) == set(found.views)
    with pytest.raises(ConfigError, match="name each once"):
        PolicyData.build(frames(), bins, views=["top", "observation.images.top"], progress=False)
    with pytest.raises(DataError, match=r"no view 'side'; it has observation\.images\.top"):
        PolicyData.build(frames(), bins, views=["side"], progress=False)


def test_the_text_after_a_chunk_is_the_subtask_in_force_when_it_is_over(bins):
    built = PolicyData.build(frames(), bins, text="subtask", after="subtask", progress=False)
    given = frames()
    split = split_dataset(open_dataset(given), seed=0)
    offsets = np.concatenate([[0], np.cumsum(given["episode_length"])])
    names = np.array(["reach", "pull"])
    row = 0
    for e in split.train:
        first, last = offsets[e], offsets[e + 1] - 1
        frame = np.arange(first, last + 1)
        batch = built.batch(np.arange(row, row + len(frame)))
        assert list(batch.text) == list(names[given["phase"][frame]])
        assert list(batch.after) == list(names[given["phase"][np.minimum(frame + T, last)]])
        row += len(frame)
    assert row == len(built)
    assert set(built.said) == {"reach", "pull"}
    assert PolicyData.build(frames(), bins, progress=False).batch([0]).after is None


def test_a_policy_that_concludes_is_trained_to_from_data(bins):
    settings = {**TINY, "concludes": True}
    policy = train_policy(frames(), bins, settings=settings, training=FEW, progress=False)
    assert set(policy.meta["training"]["losses"]) == {"tokens", "text_after"}


def test_a_policy_without_a_state_is_trained_on_codes_made_without_one():
    """A tokenizer that starts its curves at the state would decode elsewhere, so it is refused before training."""
    clamped = actok.fit("beast", frames(), horizon=T, clamp_start=True)
    still = {**without("proprio"), "proprio": np.zeros((len(frames()["action"]), D), np.float32)}
    options = {"views": ["image"], "training": FEW, "progress": False}
    with pytest.raises(DataError, match="anchor"):
        train_policy(still, clamped, settings={**TINY, "state": "none"}, **options)
    assert train_policy(still, clamped, settings={**TINY, "state": "vector"}, **options).proprio == D


def test_a_sample_that_does_not_exist(samples):
    with pytest.raises(DataError, match=f"sample {len(samples)} does not exist"):
        samples.batch([0, len(samples)])
    with pytest.raises(DataError, match="give integers"):
        samples.batch([0.5])
