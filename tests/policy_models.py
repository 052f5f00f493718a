"""Small policies of every kind of layout, and what they are shown, for tests."""

from __future__ import annotations

import functools

import numpy as np
import torch

from actok.core import (
    ActionGroup,
    ActionSpace,
    FitPart,
    tokenizer_presets,
)
from actok.core.registry import load_target
from actok.policies.base import PolicyBatch, PolicyObservation
from actok.policies.prompt import StateRange
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.token_head import TokenHead
from actok.policies.vla import VLA, VLAConfig
from actok.training import fit_parts

B, T, D, P = 3, 7, 4, 5
GROUPS = (
    ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta"),
    ActionGroup(name="gripper", kind="gripper", dims=(3,)),
)
SPACE = ActionSpace(embodiment="arm", dim=D, groups=GROUPS, rate_hz=20.0, low=(-2.0,) * D, high=(2.0,) * D)
TASKS = ("open the drawer", "press the red button", "push")
GREEDY = {"temperature": 0.0, "top_k": 0}
STATE = StateRange(low=-np.ones(P), high=np.ones(P))
# One of each kind of layout: token-wise, variable, parallel, prefixes, growing scales, levels by blocks.
LAYOUTS = ("bins", "fast", "beast", "oat-tiny", "boat-tiny", "carp-tiny", "fastervq-tiny")


def chunks(count: int, seed: int = 0, steps: int = T) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, steps)[None, :, None]
    return (np.sin(6 * time * rng.uniform(0.2, 1, (count, 1, D)) + rng.uniform(0, 6, (count, 1, D)))).astype(np.float32)


@functools.cache
def tokenizer_of(name: str, steps: int = T):
    part = FitPart(actions=chunks(256, steps=steps), space=SPACE, anchor=chunks(256, steps=steps)[:, 0])
    if not load_target(tokenizer_presets()[name].target).learned:
        return fit_parts(name, [part])
    short = {"steps": 2, "batch_size": 16, "warmup_steps": 1, "quantise_after": 0, "weight_ema": 0.0, "precision": "no"}
    return fit_parts(name, [part], training=short)


def policy_of(name: str = "bins", *, views: tuple[str, ...] = (), steps: int = T, **settings) -> VLA:
    torch.manual_seed(1)
    config = TinyConfig(width=24, layers=2, heads=3, image_size=16, image_channels=(4, 8))
    backbone = TinyVLM.create(config, TASKS, views=views)
    return VLA.create(
        backbone, tokenizer_of(name, steps), VLAConfig(**{**GREEDY, **settings}), views=views, state=STATE
    ).eval()


def observation(count: int = B, seed: int = 3, views: tuple[str, ...] = ()) -> PolicyObservation:
    rng = np.random.default_rng(seed)
    return PolicyObservation(
        instruction=[TASKS[i % len(TASKS)] for i in range(count)],
        proprio=rng.uniform(-1, 1, (count, P)).astype(np.float32),
        images={view: rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8) for view in views},
    )


def batch(policy: VLA, count: int = B, **rest) -> PolicyBatch:
    actions = chunks(count, 5, policy.horizon)
    tokens = policy.tokenizer.encode(actions)
    longest = max(len(row) for row in tokens)
    codes = torch.full((count, longest), -1)
    for b, row in enumerate(tokens):
        codes[b, : len(row)] = torch.from_numpy(np.asarray(row))
    return PolicyBatch(
        observation=observation(count, views=policy.views),
        actions=torch.from_numpy(np.asarray(policy.tokenizer.normalise(actions), np.float32)),
        real=torch.ones(count, policy.horizon, dtype=torch.bool),
        codes=codes,
        **rest,
    )


def head_of(policy: VLA) -> TokenHead:
    head = policy.parts["tokens"]
    assert isinstance(head, TokenHead)
    return head
