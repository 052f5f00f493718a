"""Every tokenizer of the registry, packaged or third-party, can be what a policy acts through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import ChunkContext, tokenizer_presets
from actok.policies.base import PolicyBatch, PolicyObservation
from actok.policies.load import load_policy
from actok.policies.prompt import StateRange
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.vla import VLA, VLAConfig
from test_contract import chunks, fit_here, part_of

B = 3
TASKS = ("open the drawer", "press the red button", "push")


@pytest.mark.parametrize("name", sorted(tokenizer_presets()))
def test_a_policy_trains_acts_and_loads_through_every_tokenizer(name, tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = fit_here(name, part_of(chunks(128, 0)))
    actions = chunks(B, 1)
    state = actions[:, 0]
    context = ChunkContext(anchor=state)
    rows = [np.asarray(row) for row in tokenizer.encode(actions, context)]
    codes = np.full((B, max(map(len, rows))), -1)
    for row, ids in zip(codes, rows, strict=True):
        row[: len(ids)] = ids
    observation = PolicyObservation(instruction=TASKS, proprio=state)
    given = PolicyBatch(
        observation=observation,
        actions=torch.from_numpy(np.asarray(tokenizer.normalise(actions, context), np.float32)),
        real=torch.ones(actions.shape[:2], dtype=torch.bool),
        codes=torch.from_numpy(codes),
    )
    backbone = TinyVLM.create(TinyConfig(width=16, layers=1, heads=2), TASKS)
    policy = VLA.create(backbone, tokenizer, VLAConfig(), state=StateRange(low=state.min(0), high=state.max(0)))
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = policy.losses(given)["tokens"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    acted = policy.act(observation, generator=torch.Generator().manual_seed(0))
    assert acted.valid.all(), acted.reasons
    assert acted.actions.shape == actions.shape
    assert np.isfinite(acted.actions).all()
    layout = tokenizer.layout
    wanted = len(layout.blocks) if layout.fixed_length is not None else layout.max_len
    assert acted.passes <= wanted
    again = load_policy(policy.save_pretrained(tmp_path / "policy"))
    same = again.act(observation, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(same.codes, acted.codes)
    if layout.total and layout.fixed_length is not None:  # token-wise, the other way to emit the same codes
        wise = VLA.create(policy.backbone, tokenizer, replace(policy.config, block=1), state=policy.state)
        assert wise.act(observation, generator=torch.Generator().manual_seed(0)).passes == layout.max_len
