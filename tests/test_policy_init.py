"""Training that goes on from a saved policy."""

import numpy as np
import pytest
import torch

import actok
from actok.core import (
    ArtifactError,
    ConfigError,
    DataError,
    SpaceMismatchError,
)
from actok.data import open_dataset
from actok.policies.load import load_policy, policy_integrity
from actok.training.policy import train_policy
from policy_demos import FEW, TINY, T, frames, same, space_of, weights


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    more["image"] = np.zeros((len(more["action"]), 9, 11, 3), np.uint8)  # rollouts show what was seen last
    other = open_dataset(more, space=space["first"])
    other.name = "more"
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
    assert went.meta["image_sizes"] == {"image": [9, 11]} != first.meta["image_sizes"]
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
    # Nor does a second going on hold out what the first training saw.
    went.save_pretrained(tmp_path / "went")
    with pytest.raises(DataError, match="give --seed 0"):
        train_policy(
            open_dataset(frames(), space=space["first"]), init=tmp_path / "went", seed=3, training=FEW, progress=False
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
        ({}, {"seed": 3}, DataError, "as seed 0 splits them, and seed 3 would hold some of them out; give --seed 0"),
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
