"""The same policy on every family of published backbones, from tiny random configurations in their own file layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actok.backbones.policy_models import load_backbone
from actok.policies.base import PolicyObservation
from actok.policies.load import load_policy
from actok.policies.prompt import StateRange
from actok.policies.vla import VLA, VLAConfig
from policy_models import GREEDY, TASKS, P, batch, head_of, tokenizer_of
from test_policy_backbones import MAKERS, families, folders  # noqa: F401

B = 3
VIEW = "front"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def policy_of(folder, **settings) -> VLA:
    torch.manual_seed(1)
    state = StateRange(low=-np.ones(P), high=np.ones(P))
    config = VLAConfig(**{**GREEDY, "state_bins": 10, **settings})
    return VLA.create(load_backbone(folder), tokenizer_of("fastervq-tiny"), config, views=(VIEW,), state=state).eval()


def observation(count: int = B) -> PolicyObservation:
    rng = np.random.default_rng(3)
    return PolicyObservation(
        instruction=[TASKS[i % len(TASKS)] for i in range(count)],
        proprio=rng.uniform(-1, 1, (count, P)).astype(np.float32),
        images={VIEW: rng.integers(0, 256, (count, 40, 56, 3), dtype=np.uint8)},
    )


def given(policy):
    from dataclasses import replace

    return replace(batch(policy), observation=observation())


@families
def test_it_acts_and_its_passes_over_the_cache_are_one_pass(folders, name):  # noqa: F811
    policy = policy_of(folders / name)
    acted = policy.act(observation())
    assert acted.valid.all()
    assert acted.passes == 3
    head, seen = head_of(policy), policy._see(policy._look(observation()), observation())
    codes = torch.from_numpy(acted.codes)
    with torch.no_grad():
        logits = head.logits(seen, head.plan, head.vocab.to_lm(codes, head.layout))
    for n in range(codes.shape[1]):
        ids = torch.from_numpy(head.vocab.ids_of(int(head.layout.table[n]))[: head.layout.vocab[n]])
        scores = logits[:, n, ids]
        taken = scores.gather(1, codes[:, n : n + 1])[:, 0]
        assert torch.allclose(taken, scores.max(-1).values, atol=2e-4)


@families
def test_every_head_trains_and_the_codes_have_rows_of_their_own(folders, name):  # noqa: F811
    policy = policy_of(
        folders / name, heads=("tokens", "flow"), flow_expert=16, token_expert=16, state="vector", insulate=True
    ).train()
    losses = policy.losses(given(policy))
    assert set(losses) == {"tokens", "flow"}
    losses["flow"].backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in policy.backbone.parameters())
    losses["tokens"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.backbone.parameters())
    assert policy.backbone.vocab_size >= policy.vocab.embeddings
    low, _ = policy.vocab.span
    assert low >= policy.backbone.text_size
    assert not set(range(*policy.vocab.span)) & set(policy.backbone.special_ids.values())


@families
def test_saved_it_loads_alone(folders, name, tmp_path):  # noqa: F811
    policy = policy_of(folders / name)
    again = load_policy(policy.save_pretrained(tmp_path / "policy"))
    first, second = policy.act(observation()), again.act(observation())
    assert np.array_equal(first.codes, second.codes)
    assert np.allclose(first.actions, second.actions, atol=1e-5)
