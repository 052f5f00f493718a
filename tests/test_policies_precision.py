"""Acting under bfloat16 autocast: what is rounded, what is not, and that it is what training computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actok.core import ConfigError
from actok.policies.load import load_policy
from actok.policies.precision import PRECISIONS
from test_policies_families import observation, policy_of
from test_policy_backbones import families, folders  # noqa: F401
from test_rollout import Scripted

BOTH = {"heads": ("tokens", "flow"), "flow_expert": 16, "state": "vector"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def drawn(policy, head: str):
    return policy.act(observation(), head=head, generator=torch.Generator().manual_seed(7))


@families
def test_matrices_that_are_rounded_once_act_as_autocast_over_float32(folders, name):  # noqa: F811
    policy, rounded = policy_of(folders / name, **BOTH), policy_of(folders / name, **BOTH).with_precision("bf16")
    held = {id(m.weight): m.weight.dtype for m in rounded.modules() if isinstance(m, torch.nn.Linear)}
    assert set(held.values()) == ({torch.float32, torch.bfloat16} if rounded.backbone.tied else {torch.bfloat16})
    assert sum(dtype == torch.float32 for dtype in held.values()) == rounded.backbone.tied
    for head in policy.heads:
        exact = drawn(policy, head)
        with torch.autocast("cpu", torch.bfloat16):
            cast = drawn(policy, head)
        acted = drawn(rounded, head)
        assert np.array_equal(acted.actions, cast.actions)
        assert acted.valid.all()
        assert acted.actions.dtype == np.float32
        assert not np.array_equal(acted.actions, exact.actions) or head == "tokens"
        if head == "flow":
            span = exact.actions.max() - exact.actions.min()
            assert np.abs(acted.actions - exact.actions).max() < 0.05 * span
        again = drawn(policy, head)
        assert np.array_equal(again.actions, exact.actions), "autocast left nothing behind"


@pytest.fixture(scope="module")
def paligemma(folders):  # noqa: F811
    return folders / "paligemma"


def test_codes_are_decoded_in_float32(paligemma):
    policy = policy_of(paligemma, temperature=0.8, top_k=0).with_precision("bf16")
    acted = drawn(policy, "tokens")
    assert acted.valid.all()
    assert np.array_equal(acted.actions, policy.tokenizer.decode(acted.codes).actions)
    with torch.autocast("cpu", torch.bfloat16):
        assert not np.array_equal(acted.actions, policy.tokenizer.decode(acted.codes).actions), "else nothing is shown"


def test_float32_is_what_it_was_and_does_not_come_back(paligemma, tmp_path):
    policy = policy_of(paligemma, **BOTH)
    expected = {head: drawn(policy, head).actions for head in policy.heads}
    assert policy.with_precision("float32") is policy
    weights = {name: p.clone() for name, p in policy.named_parameters()}
    for head, actions in expected.items():
        assert np.array_equal(drawn(policy, head).actions, actions)
    policy.save_pretrained(tmp_path / "p")
    policy.with_precision("bf16").with_precision("bf16")
    assert policy.precision == "bf16"
    for name, p in policy.named_parameters():
        assert torch.equal(p.float(), weights[name].to(p.dtype).float())
    with pytest.raises(ConfigError, match="load it again for float32"):
        policy.with_precision("float32")
    again = load_policy(tmp_path / "p")
    assert again.precision == "float32"
    assert np.array_equal(drawn(again, "flow").actions, expected["flow"])


def test_the_table_that_codes_are_read_from_keeps_its_digits(paligemma):
    policy = policy_of(paligemma).with_precision("bf16")
    assert policy.backbone.tied
    assert policy.backbone._table.weight.dtype == policy.backbone._head.weight.dtype == torch.float32


def test_what_a_policy_cannot_act_in_is_refused(paligemma):
    with pytest.raises(ConfigError, match=f"precision is 'half'; choose one of {', '.join(PRECISIONS)}"):
        policy_of(paligemma).with_precision("half")
    assert Scripted().with_precision("float32").precision == "float32"
    with pytest.raises(ConfigError, match="acts in float32 only, not in bf16"):
        Scripted().with_precision("bf16")
