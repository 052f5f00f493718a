"""A saved policy acts alone as it did; what is damaged or exchanged is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from actok.core import (
    ArtifactError,
)
from actok.policies.load import is_policy, load_policy
from actok.policies.vla import integrity
from actok.training import load
from policy_models import (
    P,
    T,
    observation,
    policy_of,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "settings", [{}, {"token_expert": 16}, {"heads": ("flow", "tokens"), "flow_expert": 8, "state": "vector"}]
)
def test_a_saved_policy_acts_alone_as_it_did(settings, tmp_path):
    policy = policy_of("fastervq-tiny", views=("front",), **settings)
    policy.with_meta({"task_steps": {"push": 12.0}})
    folder = policy.save_pretrained(tmp_path / "policy")
    policy.save_pretrained(folder)  # over itself
    again = load_policy(folder)
    assert is_policy(folder)
    seen = observation(views=("front",))
    for head in policy.heads:
        first, second = (p.act(seen, head=head, generator=torch.Generator().manual_seed(0)) for p in (policy, again))
        assert np.array_equal(first.actions, second.actions)
    assert again.meta["task_steps"] == {"push": 12.0}
    assert again.tokenizer.weights_hash == policy.tokenizer.weights_hash
    assert (again.views, again.proprio, again.horizon) == (("front",), P, T)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer/config.json", "backbone/tokenizer.json"]
)
def test_a_damaged_policy_is_refused(name, tmp_path):
    folder = policy_of().save_pretrained(tmp_path / "policy")
    path = folder / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError):
        load_policy(folder)
    path.unlink()
    with pytest.raises(ArtifactError):
        load_policy(folder)


def test_an_edited_description_is_refused_and_one_laid_out_anew_is_not(tmp_path):
    folder = policy_of().save_pretrained(tmp_path / "policy")
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body, sort_keys=True))
    assert load_policy(folder).horizon == T
    body["horizon"] = T - 2
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=r"edited after saving .integrity hash differs"):
        load_policy(folder)
    del body["integrity"]
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=r"edited after saving .integrity hash is gone"):
        load_policy(folder)


def signed(body: dict) -> None:
    """As if it had been saved so."""
    body.pop("integrity")
    body["integrity"] = integrity(body)


def test_a_policy_in_place_of_its_tokenizer_is_named(tmp_path):
    folder = policy_of().save_pretrained(tmp_path / "policy")
    with pytest.raises(ArtifactError, match="holds a policy, not a tokenizer"):
        load(folder)
    assert load(folder / "tokenizer").kind == "bins"


def test_a_policy_and_a_tokenizer_do_not_replace_each_other(tmp_path):
    policy = policy_of()
    policy.save_pretrained(tmp_path / "policy")
    policy.tokenizer.save_pretrained(tmp_path / "tok")
    with pytest.raises(ArtifactError, match="tok holds a tokenizer, which would be lost"):
        policy.save_pretrained(tmp_path / "tok")
    with pytest.raises(ArtifactError, match="policy holds a policy, which would be lost"):
        policy.tokenizer.save_pretrained(tmp_path / "policy")
    assert load(policy.tokenizer.save_pretrained(tmp_path / "tok")).kind == "bins"
    assert load_policy(policy.save_pretrained(tmp_path / "policy")).horizon == T


def test_a_policy_with_another_tokenizer_in_its_folder_is_refused(tmp_path):
    folder = policy_of("bins").save_pretrained(tmp_path / "policy")
    body = json.loads((folder / "config.json").read_text())
    body["tokenizer"] = "0" * 64
    signed(body)
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="another tokenizer"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("schema_version", "version None"),
        ("files", r"no 'tokenizer\.json'"),
        ("vocabulary", "does not describe a whole policy"),
        ("state", "does not describe a whole policy"),
    ],
)
def test_a_description_that_lacks_something_is_refused(key, message, tmp_path):
    folder = policy_of("bins").save_pretrained(tmp_path / "policy")
    body = json.loads((folder / "config.json").read_text())
    del body[key]
    signed(body)
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=message):
        load_policy(folder)
