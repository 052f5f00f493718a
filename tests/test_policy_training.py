"""Training policies: what a sample is, the loop on a policy of two layers, stages, resuming to the bit, the command line."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import actok
import test_policy_backbones
from actok.backbones.policy_models import load_backbone
from actok.cli.main import main
from actok.core import (
    ActionGroup,
    ActionSpace,
    ArtifactError,
    ChunkContext,
    ConfigError,
    DataError,
    SpaceMismatchError,
)
from actok.core.registry import CONFIGS
from actok.data import open_dataset, split_dataset
from actok.data.resample import resample
from actok.policies.base import Policy, PolicyObservation
from actok.policies.load import load_policy, policy_integrity
from actok.policies.presets import find_policy_preset
from actok.signal.statistics import Statistics
from actok.training import TrainingError, TrainingStopped, policy_images
from actok.training.policy import policy_tokenizer, train_policy
from actok.training.policy_data import PolicyData
from actok.training.policy_stages import PolicyTrainConfig, policy_train_config, trained_names
from actok.training.policy_trainer import PolicyTrainer, evaluate
from actok.training.run_folder import RunFolder

D, P, T, H, W = 3, 5, 7, 4, 6
TINY = {"backbone": {"width": 16, "layers": 1, "heads": 2}, "spacing": 0}
FEW = {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 3, "eval_chunks": 17, "checkpoint_every": 0}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def frames(episodes: int = 20, seed: int = 0, **more) -> dict:
    """Arrays of a dataset: two tasks, states, images, numbered phases."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(11, 24, episodes)
    count = int(lengths.sum())
    return {
        "action": rng.normal(size=(count, D)).astype("float32"),
        "proprio": rng.normal(size=(count, P)).astype("float32"),
        "image": rng.integers(0, 256, (count, H, W, 3)).astype("uint8"),
        "episode_length": lengths,
        "episode_task": np.array(["open", "shut"])[np.arange(episodes) % 2],
        "instruction": np.array(["open the box", "shut the box"])[np.arange(episodes) % 2],
        "phase": rng.integers(0, 2, count),
        "phase_names": np.array(["reach", "pull"]),
        **more,
    }


def space_of(name: str, rate_hz: float) -> ActionSpace:
    group = ActionGroup(name="all", kind="joint", dims=tuple(range(D)), mode="absolute", unit="rad", scale=1.0)
    return ActionSpace(embodiment=name, dim=D, groups=(group,), rate_hz=rate_hz)


def without(*keys: str) -> dict:
    return {key: value for key, value in frames().items() if key not in keys}


@pytest.fixture(scope="module")
def fast():
    return actok.fit("fast", frames(), horizon=T)


@pytest.fixture(scope="module")
def bins():
    return actok.fit("bins", frames(), horizon=T, bins=11)


@pytest.fixture
def samples(bins):
    return PolicyData.build(frames(), bins, progress=False)


class Regressor(Policy):
    """States to chunks by two linear maps, a head that is not asked, and dropout."""

    def __init__(self, data: PolicyData, breaks: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.embodiment, self.horizon = data.tokenizer, data.embodiment, data.horizon
        self.views, self.proprio, self.meta, self.breaks = (), data.proprio, {}, breaks
        self.backbone = nn.Sequential(nn.Linear(P, 13), nn.Tanh(), nn.Dropout(0.1))
        self.parts = nn.ModuleDict({"flow": nn.Linear(13, T * D)})
        self.noted = 0.0

    heads = ("flow",)

    def losses(self, batch):
        hidden = self.backbone(torch.from_numpy(batch.observation.proprio))
        error = (self.parts["flow"](hidden).unflatten(1, (T, D)) - batch.actions)[batch.real]
        self.noted = float(error.detach().abs().max())
        return {"l1": error.abs().mean() * (float("nan") if self.breaks else 1.0), "noise": 0.01 * torch.rand(())}

    def report(self):
        return {"worst": self.noted}

    def act(self, observation, *, head=None, generator=None, deadline_s=None):
        raise NotImplementedError

    def save_pretrained(self, folder):
        raise NotImplementedError


def regressor(data: PolicyData, seed: int = 3, **options) -> Regressor:
    torch.manual_seed(seed)
    return Regressor(data, **options)


def weights(policy: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- samples ----------------------------------------------------------------------------------------------------------


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


# -- settings and stages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantise_after": 0}, "quantise_after is no setting of a policy"),
        ({"anneal_codebooks": True}, "anneal_codebooks is no setting of a policy"),
        ({"compile": True}, "compile is no setting of a policy"),
        ({"stages": [{"share": 0.5}]}, "shares of the stages are 0.5; let them add up to 1"),
        ({"stages": [{"share": 0.0}]}, "share of a stage is 0.0"),
        ({"stages": [{"share": 1.0, "train": ["("]}]}, "no regular expression"),
        ({"stages": [{"part": 1.0}]}, "a stage has no setting 'part'"),
        ({"stages": "expert"}, "stages are 'expert'"),
        ({"steps": 1, "stages": [{"share": 0.5}, {"share": 0.5}]}, "2 stages do not fit in 1 steps"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_training_settings_that_mean_nothing_for_a_policy(given, message):
    with pytest.raises(ConfigError, match=message):
        policy_train_config({"steps": 5}, given, "'it'")


@pytest.mark.parametrize("steps", [3, 10, 997])
@pytest.mark.parametrize("shares", [(1.0,), (0.3, 0.7), (0.001, 0.999), (0.999, 0.0005, 0.0005)])
def test_stages_cover_all_steps_in_order_each_with_one_at_least(steps, shares):
    config = PolicyTrainConfig(steps=steps, stages=tuple({"share": s} for s in shares))
    found = [config.stage_at(step) for step in range(steps)]
    assert found == sorted(found)
    assert set(found) == set(range(len(shares)))
    for number, share in enumerate(shares):
        assert abs(found.count(number) - share * steps) <= len(shares)


def test_a_stage_trains_what_it_names_and_nothing_else(samples):
    stages = [{"share": 0.5, "train": ["flow"]}, {"share": 0.5, "train": [r"backbone\.0\.weight"]}]
    config = PolicyTrainConfig(steps=10, batch_size=8, stages=stages, weight_decay=0.5)
    policy = regressor(samples)
    seen = {}
    trainer = PolicyTrainer(policy, samples, config, progress=False)
    before = trainer._begin

    def begin(step):
        seen[step] = weights(policy)
        before(step)

    trainer._begin = begin
    trainer.run()
    seen[10] = weights(policy)

    def moved(a: int, b: int) -> set[str]:
        return {name for name in seen[a] if not torch.equal(seen[a][name], seen[b][name])}

    assert moved(0, 5) == {"parts.flow.weight", "parts.flow.bias"}
    assert moved(5, 10) == {"backbone.0.weight"}
    assert all(p.requires_grad for p in policy.parameters())
    with pytest.raises(
        ConfigError, match=r"'tokens', which stands for no parameter .* groups backbone, language, expert, flow"
    ):
        trained_names(policy, PolicyTrainConfig(stages=[{"share": 1, "train": "tokens"}]).stages)


def test_groups_of_a_whole_policy(bins):
    settings = {**TINY, "heads": ["tokens", "flow"], "token_expert": 16, "flow_expert": 8, "state": "vector"}
    policy = train_policy(
        frames(), bins, settings=settings, views=["image"], training=FEW | {"steps": 1}, progress=False
    )
    groups = ("backbone", "language", "vision", "embeddings", "expert", "tokens", "flow", "state")
    found = {
        group: trained_names(policy, PolicyTrainConfig(stages=[{"share": 1, "train": group}]).stages)[0]
        for group in groups
    }
    every = {name for name, _ in policy.named_parameters()}
    assert found["backbone"] | found["expert"] == every
    assert not found["backbone"] & found["expert"]
    assert found["tokens"] | found["flow"] | found["state"] == found["expert"]
    assert not found["tokens"] & found["flow"]
    assert found["state"] == {n for n in every if n.startswith("state_in.")}
    assert found["vision"] | found["language"] == found["backbone"]
    assert found["vision"] == {n for n in every if n.startswith("backbone.stem.")}
    assert found["embeddings"] == {"backbone.table"}


@pytest.mark.parametrize("preset", [p.stem for p in (CONFIGS / "policies").glob("*.toml")])
@pytest.mark.parametrize("state", ["text", "vector"])
def test_every_presets_stages_train_all_that_is_new(bins, preset, state):
    found = find_policy_preset(preset)
    settings = {**found.policy, "spacing": 0, "state": state, "backbone": {"kind": "tiny", **TINY["backbone"]}}
    for width in ("token_expert", "flow_expert"):
        settings[width] = 8 if settings.get(width) else 0
    stages = [{**stage, "share": stage["share"]} for stage in found.training.get("stages", [])]
    policy = train_policy(
        frames(),
        bins,
        settings=settings,
        views=["image"],
        training=FEW | {"steps": 2, "stages": stages},
        progress=False,
    )
    ever = frozenset().union(*trained_names(policy, PolicyTrainConfig(stages=stages).stages))
    new = {name for name, _ in policy.named_parameters() if not name.startswith("backbone.")} | {"backbone.table"}
    assert new <= ever
    assert any(name.startswith("state_in.") for name in new) == (state == "vector")


@pytest.mark.parametrize(
    ("settings", "train", "left"),
    [
        ({"state": "vector", "token_expert": 8}, ["tokens", "language"], "no stage trains state_in.* add 'state'"),
        (
            {"heads": ["flow"], "flow_expert": 8, "state": "vector"},
            ["state"],
            "no stage trains parts.flow.* add 'flow'",
        ),
        ({"state": "vector"}, ["expert"], r"no stage trains backbone\.table.* add 'embeddings'"),
        ({"state": "text"}, [r"backbone\.blocks"], r"no stage trains backbone\.table.* add 'embeddings'"),
    ],
)
def test_stages_that_leave_something_random_are_refused(bins, settings, train, left):
    training = FEW | {"stages": [{"share": 1, "train": train}]}
    with pytest.raises(ConfigError, match=left):
        train_policy(frames(), bins, settings={**TINY, **settings}, training=training, progress=False)


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A saved policy that looks and reads a state, of a tokenizer that another robot shares."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("started") / "policy"
    space = {"first": space_of("first", 20.0), "second": space_of("second", 20.0)}
    sets = [open_dataset(frames(seed=i), space=s) for i, s in enumerate(space.values())]
    tokenizer = actok.fit("bins", sets, horizon=T, bins=11)
    settings = {**TINY, "state": "vector", "token_expert": 8}
    policy = train_policy(
        sets[0], tokenizer, settings=settings, views=["image"], training=FEW | {"steps": 2}, progress=False
    )
    policy.save_pretrained(folder)
    return folder, space


def test_training_goes_on_from_a_saved_policy_on_other_data(started, tmp_path):
    folder, space = started
    first = load_policy(folder)
    more = frames(episodes=13, seed=5, instruction=np.array(["wipe the table"] * 13))
    other = open_dataset(more, space=space["first"])
    still = train_policy(
        other, init=folder, training=FEW | {"steps": 1, "learning_rate": 1e-12, "warmup_steps": 0}, progress=False
    )
    assert all(
        torch.allclose(a, b, atol=1e-9) for a, b in zip(weights(first).values(), weights(still).values(), strict=True)
    )
    went = train_policy(other, init=folder, training=FEW | {"steps": 4}, run=tmp_path / "run", progress=False)
    assert not same(weights(first), weights(went))
    assert went.config == first.config
    assert (went.vocab, went.views, went.horizon) == (first.vocab, first.views, first.horizon)
    assert went.state.to_dict() == first.state.to_dict()
    assert went.tokenizer.weights_hash == first.tokenizer.weights_hash
    assert went.meta["started_from"] == {"name": "policy", "integrity": policy_integrity(folder)}
    assert went.meta["data"] != first.meta["data"]
    assert set(went.meta["task_steps"]) == {"open", "shut"}
    assert same(weights(load_policy(folder)), weights(first))
    with pytest.raises(ConfigError, match="init"):
        train_policy(
            other,
            first.tokenizer,
            settings=TINY,
            views=["image"],
            training=FEW | {"steps": 4},
            run=tmp_path / "run",
            resume=True,
            progress=False,
        )
    # One part alone may learn: nothing is random any more.
    part = [{"share": 1, "train": ["tokens"]}]
    alone = train_policy(other, init=folder, training=FEW | {"steps": 2, "stages": part}, progress=False)
    moved = {n for n, value in weights(alone).items() if not torch.equal(value, weights(first)[n])}
    assert moved
    assert all(name.startswith("parts.tokens.") for name in moved)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"tokenizer": "bins"}, ConfigError, "tokenizer cannot be given beside a policy"),
        ({}, {"views": ["image"], "horizon": 3}, ConfigError, "horizon, views cannot be given"),
        ({}, {"settings": {"block": 1}}, ConfigError, "settings cannot be given"),
        ({}, {"space": "second"}, SpaceMismatchError, "the policy acts as 'first', the data are of 'second'"),
        ({"proprio": np.zeros((1, 2))}, {}, DataError, "reads a state of 5 numbers, the data have 2"),
        ({"image": None}, {}, DataError, "has no view 'image'"),
        ({}, {"init": "nowhere"}, ArtifactError, "nowhere"),
        ({}, {"init": None}, ConfigError, "neither a tokenizer nor a policy to start from"),
    ],
)
def test_what_a_saved_policy_cannot_go_on_with_is_refused(started, change, options, error, message, monkeypatch):
    folder, space = started
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = frames()
    for key, value in change.items():
        if value is None:
            source.pop(key)
        else:
            source[key] = np.tile(value, (len(source["action"]), 1)).astype("float32")
    options = {"init": folder, **options}
    data = open_dataset(source, space=space[options.pop("space", "first")])
    with pytest.raises(error, match=message):
        train_policy(data, training=FEW, progress=False, **options)


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_validation_loss_and_tells_it(samples, tmp_path):
    config = PolicyTrainConfig(steps=120, batch_size=32, learning_rate=0.01, eval_every=60, log_every=20)
    policy = regressor(samples)
    before = evaluate(policy, samples.validation, most=1000, batch_size=32)
    summary = PolicyTrainer(policy, samples, config, folder=RunFolder(tmp_path / "run", {}), progress=False).run()
    after = evaluate(policy, samples.validation, most=1000, batch_size=32)
    assert after["losses"]["l1"] < before["losses"]["l1"]
    assert summary["validation"] == {"step": 120, **evaluate(policy, samples.validation, most=2048, batch_size=32)}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [60, 120]
    assert set(summary["losses"]) == {"l1", "noise"}
    assert summary["epochs"] == pytest.approx(120 * 32 / len(samples))


def test_an_evaluation_is_the_mean_over_samples_and_disturbs_nothing(samples):
    policy = regressor(samples).train()
    held_out = samples.validation
    state = torch.get_rng_state()
    whole = evaluate(policy, held_out, most=10_000, batch_size=len(held_out))
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training
    parts = [evaluate(policy, held_out, most=10_000, batch_size=b) for b in (7, 7, 1)]
    assert parts[0] == parts[1]
    assert whole["samples"] == parts[0]["samples"] == len(held_out)
    batch = held_out.batch(np.arange(len(held_out)))
    policy.eval()
    assert whole["losses"]["l1"] == pytest.approx(policy.losses(batch)["l1"].item())
    assert whole["report"]["worst"] == pytest.approx(policy.noted)
    assert parts[0]["report"]["worst"] <= whole["report"]["worst"]


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(samples, tmp_path, monkeypatch):
    stages = [{"share": 0.6, "train": ["all"]}, {"share": 0.4, "train": ["flow"]}]
    config = PolicyTrainConfig(
        steps=23, batch_size=16, learning_rate=0.02, eval_every=5, log_every=3, weight_ema=0.9, stages=stages
    )
    whole = regressor(samples)
    summary = PolicyTrainer(whole, samples, config, progress=False).run()
    for stop in (4, 14, 19):
        name = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(PolicyTrainer, "_agreed", lambda self, requested, stop=stop: self.done == stop)
            trainer = PolicyTrainer(regressor(samples), samples, config, folder=RunFolder(name, {}), progress=False)
            assert not trainer.resume()
            with pytest.raises(TrainingStopped, match=f"after step {stop} of 23, saved in {name}"):
                trainer.run()
        policy = regressor(samples, seed=99)
        folder = RunFolder(name, {}, resume=True)
        trainer = PolicyTrainer(policy, samples, config, folder=folder, progress=False)
        assert trainer.resume()
        resumed = trainer.run()
        assert same(weights(policy), weights(whole))
        assert resumed["validation"] == summary["validation"]
    trainer = PolicyTrainer(
        again := regressor(samples, seed=98), samples, config, folder=RunFolder(name, {}, resume=True), progress=False
    )
    assert trainer.resume()
    assert trainer.run()["losses"] == resumed["losses"]
    assert same(weights(again), weights(whole))


def test_what_no_stage_trains_is_in_no_checkpoint(samples, tmp_path):
    config = PolicyTrainConfig(steps=2, batch_size=4, stages=[{"share": 1, "train": "flow"}])
    trainer = PolicyTrainer(regressor(samples), samples, config, folder=RunFolder(tmp_path / "run", {}), progress=False)
    trainer.run()
    model = load_file(next(tmp_path.glob("run/checkpoints/step-*/model.safetensors")))
    assert set(model) == {"parts.flow.weight", "parts.flow.bias"}
    assert trainer.parameters == sum(v.numel() for v in model.values())


def test_the_moving_average_is_what_is_judged_and_kept(samples):
    options = {"steps": 9, "batch_size": 8, "learning_rate": 0.05, "eval_every": 3, "warmup_steps": 0}
    plain, averaged = regressor(samples), regressor(samples)
    PolicyTrainer(plain, samples, PolicyTrainConfig(**options), progress=False).run()
    trainer = PolicyTrainer(averaged, samples, PolicyTrainConfig(**options, weight_ema=0.5), progress=False)
    raw = {}
    step = trainer.optimizer.step

    def watched():
        step()
        raw[len(raw)] = weights(averaged)

    trainer.optimizer.step = watched
    summary = trainer.run()
    assert same(raw[8], weights(plain))
    mean = {name: value.clone() for name, value in weights(regressor(samples)).items()}
    for number in range(9):
        decay = min(0.5, (1 + number) / (10 + number))
        mean = {name: decay * mean[name] + (1 - decay) * raw[number][name] for name in mean}
    assert all(torch.allclose(mean[n], value, atol=1e-6) for n, value in weights(averaged).items())
    judged = evaluate(averaged, samples.validation, most=2048, batch_size=8)
    assert summary["validation"]["losses"] == judged["losses"]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_model_in_parts_is_refused(samples, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=f"configured for {name}, .* every process holds a whole one"):
        PolicyTrainer(regressor(samples), samples, PolicyTrainConfig(**FEW), progress=False)


def test_a_loss_that_is_not_finite_ends_the_run(samples):
    policy = regressor(samples, breaks=True)
    config = PolicyTrainConfig(steps=5, batch_size=4, log_every=2)
    with pytest.raises(TrainingError, match="training broke down in step 1: l1 is nan"):
        PolicyTrainer(policy, samples, config, progress=False).run()


# -- whole policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [("tokens",), ("flow", "tokens")])
def test_a_trained_policy_acts_alone_from_its_folder(fast, tmp_path, capsys, heads):
    settings = {**TINY, "heads": list(heads), "flow_expert": 8, "speaks": True, "temperature": 0.0}
    policy = train_policy(frames(), fast, settings=settings, views=["image"], training=FEW, progress=False)
    policy.save_pretrained(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    observation = PolicyData.build(frames(), fast, views=["image"], progress=False).batch([3, 1, 4]).observation
    for head in heads:
        acted = [p.act(observation, head=head, generator=torch.Generator().manual_seed(0)) for p in (policy, loaded)]
        assert acted[0].valid.all()
        assert np.array_equal(acted[0].actions, acted[1].actions)
        assert acted[0].actions.shape == (3, T, D)
    assert set(loaded.meta["task_steps"]) == {"open", "shut"}
    assert loaded.meta["training"]["steps"] == 6
    assert set(loaded.meta["training"]["losses"]) == {"tokens", "text"} | set(heads)
    lengths = PolicyData.build(frames(), fast, progress=False).train.token_lengths
    assert loaded.meta["passes"] == pytest.approx(lengths.mean())  # one code a pass; no pass for the end
    one = PolicyObservation(
        instruction=observation.instruction[:1],
        proprio=observation.proprio[:1],
        images={view: pixels[:1] for view, pixels in observation.images.items()},
    )
    emitted = loaded.act(one, head="tokens", generator=torch.Generator().manual_seed(0))
    assert emitted.passes == (emitted.codes >= 0).sum()

    assert main(["inspect", str(tmp_path / "policy")]) == 0
    text = capsys.readouterr().out
    rows = [line.split(None, 1) for line in text.splitlines() if line]
    for row in (
        ["policy", "VLA, preset actok-vla-tiny"],
        ["tokenizer", f"fast, hash {fast.weights_hash}"],
        ["horizon", f"{T} steps"],
        ["heads", ", ".join(heads)],
        ["state", f"{P} numbers, as {policy.config.state}"],
        ["parameters", f"{sum(p.numel() for p in policy.parameters()):,}"],
    ):
        assert row in rows
    assert f"{W} x {H} pixels" in next(line for line in text.splitlines() if line.startswith("view image "))
    assert "16 training episodes" in text
    assert "trained 6 steps" in text
    assert main(["inspect", str(tmp_path / "policy"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["views"], facts["meta"]["image_sizes"]) == (["image"], {"image": [H, W]})
    assert facts["settings"]["temperature"] == facts["decoding"]["temperature"] == 0.0


def test_a_resumed_run_is_the_same_policy_and_another_run_is_refused(bins, tmp_path, monkeypatch):
    options = {"settings": TINY, "training": FEW, "progress": False}
    whole = train_policy(frames(), bins, **options)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_agreed", lambda self, requested: self.done == 4)
        with pytest.raises(TrainingStopped):
            train_policy(frames(), bins, run=tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        train_policy(frames(), bins, run=tmp_path / "run", **options)
    other = {**options, "settings": TINY | {"block": 3}}
    with pytest.raises(ConfigError, match=r"settings.block was null, now 3"):
        train_policy(frames(), bins, run=tmp_path / "run", resume=True, **other)
    resumed = train_policy(frames(), bins, run=tmp_path / "run", resume=True, **options)
    assert same(weights(resumed), weights(whole))
    seeded = train_policy(frames(), bins, **{**options, "training": {**FEW, "seed": 1}})
    assert not same(weights(seeded), weights(whole))


def test_a_policy_on_a_published_backbone_trains_what_it_is_told(bins, tmp_path):
    pytest.importorskip("transformers")
    settings = {"backbone": str(test_policy_backbones.make_paligemma(tmp_path / "model")), "token_expert": 8}
    training = {**FEW, "steps": 2, "eval_chunks": 3, "learning_rate": 0.01, "batch_size": 4}
    stages = [{"share": 1.0, "train": ["expert", "language"]}]
    options = {"preset": "fastervla-paligemma", "settings": settings, "views": ["image"], "progress": False}
    policy = train_policy(frames(), bins, training={**training, "stages": stages}, **options)
    loaded = {f"backbone.{name}": p for name, p in load_backbone(settings["backbone"]).named_parameters()}
    moved = {name for name, p in policy.named_parameters() if name in loaded and not torch.equal(p, loaded[name])}
    groups = ("vision", "language", "embeddings", "expert", "backbone")
    found = {
        group: trained_names(policy, PolicyTrainConfig(stages=[{"share": 1, "train": group}]).stages)[0]
        for group in groups
    }
    assert not moved & found["vision"]
    assert found["embeddings"] < found["language"]
    assert len(moved) > len(found["language"]) / 2
    assert found["vision"] | found["language"] == found["backbone"]
    assert found["expert"] == {name for name, _ in policy.named_parameters() if name.startswith("parts.tokens.")}


def test_settings_are_refused_before_data_are_read(bins, tmp_path):
    (tmp_path / "todo.txt").write_text("remember the milk")
    for options, message in (
        ({"preset": "actok-vla-tinny"}, "did you mean 'actok-vla-tiny'"),
        ({"settings": {"blok": 3}}, "has no setting 'blok'; did you mean 'block'"),
        ({"settings": {"backbone": {"widht": 3}}}, "has no setting 'widht'; did you mean 'width'"),
        ({"settings": {"backbone": 3}}, "backbone is 3; give a table"),
        (
            {"preset": "fastervla-paligemma", "settings": {"backbone": {"width": 3}}},
            "or model = a Hub id or folder alone",
        ),
        ({"training": {"compile": True}}, "compile is no setting of a policy"),
        ({"resume": True}, "without a run folder"),
        ({"run": tmp_path}, "holds something else than a training run"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_policy("nowhere", bins, progress=False, **options)
    with pytest.raises(DataError, match="set state=none"):
        train_policy(without("proprio"), bins, views=["image"], settings=TINY, training=FEW, progress=False)


def test_a_tokenizer_by_name_is_fitted_on_the_same_episodes(bins, tmp_path):
    bins.save_pretrained(tmp_path / "bins")
    found = policy_tokenizer("bins:bins=11", frames(), horizon=T)
    assert found.weights_hash == policy_tokenizer(str(tmp_path / "bins"), frames()).weights_hash == bins.weights_hash
    with pytest.raises(ConfigError, match="trained first: actok fit fastervq-tiny --data demos --out TOKENIZER"):
        policy_tokenizer("fastervq-tiny", ["demos"])
    with pytest.raises(ConfigError, match=r"'bims' is neither a folder here nor a tokenizer .* did you mean 'bins'"):
        policy_tokenizer("bims", frames())


# -- the command line -------------------------------------------------------------------------------------------------

ARGUMENTS = ["--tokenizer", "bins:bins=11", "--horizon", str(T), "--steps", "6", "--batch-size", "8"]
MORE = ["--set", "backbone.width=16", "backbone.layers=1", "backbone.heads=2", "spacing=0"]
STAGES = 'stages=[{share=0.5,train="embeddings"},{share=0.5,train=["backbone","state"]}]'
OFTEN = ["--train", "log_every=2", "weight_decay=0.0", STAGES]


def test_the_command_line_in_one_process_and_in_two_ends_with_the_same_weights(tmp_path, capsys):
    np.savez(tmp_path / "moves.npz", **without("image"))
    arguments = ["train-policy", "--data", str(tmp_path / "moves.npz"), *ARGUMENTS, *MORE, *OFTEN]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "actok"]
    two = subprocess.Popen(
        [*torchrun, *arguments, "--out", str(tmp_path / "two")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    told = capsys.readouterr().out
    assert (
        "chunks of 7 steps are 21 tokens (at most 21) of the tokenizer bins, emitted in 7 passes; heads: tokens" in told
    )
    assert f"actok rollout --policy {tmp_path / 'one'} --env ENV --out DIR" in told
    assert "trained 6 steps" in told
    assert "the last weights are kept" in told
    output, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    assert output.count("saved in") == 1
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    first = weights(load_policy(tmp_path / "one"))
    assert one.keys() == other.keys() == first.keys()
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)


def test_the_command_line_resamples_and_goes_on_from_a_saved_policy(tmp_path, capsys):
    np.savez(tmp_path / "moves.npz", **without("image"), control_hz=20.0)
    common = ["train-policy", "--data", str(tmp_path / "moves.npz"), "--steps", "2", "--batch-size", "8"]
    first, then = str(tmp_path / "first"), str(tmp_path / "then")
    tokenizer = ["--tokenizer", "bins:bins=11", "--horizon", str(T)]
    assert main([*common, *tokenizer, *MORE, "--rate", "8", "--out", first]) == 0
    assert load_policy(first).space.rate_hz == 8.0
    assert main([*common, "--init", first, "--out", then]) == 1
    assert "resample the data (--rate 8)" in capsys.readouterr().err
    assert main([*common, "--init", first, "--rate", "8", "--out", then]) == 0
    assert load_policy(then).meta["started_from"]["name"] == "first"
    assert f"began with the weights of first (integrity {policy_integrity(first)[:16]})" in capsys.readouterr().out
    for given, message in (
        (["--init", first, *tokenizer], "tokenizer, horizon cannot be given"),
        (["--init", first, "--backbone", "some/model"], "settings cannot be given"),
        ([], "neither a tokenizer nor a policy to start from is given; name one (--tokenizer, or --init)"),
    ):
        assert main([*common, *given, "--out", str(tmp_path / "none")]) == 1
        assert message in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "moves.npz", **without("image"))
    arguments = [
        "train-policy",
        "--data",
        str(tmp_path / "moves.npz"),
        *ARGUMENTS,
        *MORE,
        "--out",
        str(tmp_path / "out"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_agreed", lambda self, requested: self.done == 2)
        assert main(arguments) == 130
    assert "after step 2 of 6" in (found := capsys.readouterr().err)
    assert "the same command with --resume goes on" in found
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--resume"]) == 0
    assert load_policy(tmp_path / "out").meta["training"]["steps"] == 6
    assert main([*arguments, "--backbone", "x", "--set", "backbone.width=16"]) == 1
    assert "given twice, by --backbone and by --set" in capsys.readouterr().err
