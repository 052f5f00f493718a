"""Policies over any tokenizer: what is emitted decodes, passes over a cache are one pass, nothing sees its own targets."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import (
    ActionGroup,
    ActionSpace,
    ArtifactError,
    ConfigError,
    DataError,
    FitPart,
    SpaceMismatchError,
    tokenizer_presets,
)
from actok.core.registry import load_target
from actok.policies.base import PolicyBatch, PolicyObservation
from actok.policies.load import is_policy, load_policy
from actok.policies.presets import find_policy_preset, policy_presets
from actok.policies.prompt import StateRange, prompts
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.token_head import TokenHead, read_on, say
from actok.policies.vla import VLA, VLAConfig, integrity
from actok.training import fit_parts, load
from actok.training.policy_stages import policy_train_config

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


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


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


# -- acting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_whatever_an_untrained_policy_emits_decodes(name, temperature):
    policy = policy_of(name, temperature=temperature)
    acted = policy.act(observation(), generator=torch.Generator().manual_seed(0))
    assert acted.valid.all(), acted.reasons
    assert acted.actions.shape == (B, T, D)
    assert np.isfinite(acted.actions).all()
    assert (np.abs(acted.actions) <= 2).all()
    layout = policy.tokenizer.layout
    assert acted.passes <= head_of(policy).plan.passes
    if layout.fixed_length is not None:
        assert acted.passes == len(layout.blocks)
    else:  # no pass once the last one of the batch is whole
        assert acted.passes == (acted.codes >= 0).sum(1).max() == acted.codes.shape[1]


@pytest.mark.parametrize("expert", [0, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_of_the_cached_passes_are_the_likeliest_of_one_pass_over_all(name, expert):
    policy = policy_of(name, token_expert=expert)
    head = head_of(policy)
    seen = policy._see(policy._look(observation()), observation())
    codes, _ = head.emit(seen, None, None, None) if head.layout.total else head.emit(seen, _context(policy), None, None)
    known = codes >= 0
    chosen = head._plan_of(codes.shape[1])
    padded = torch.nn.functional.pad(codes, (0, max(0, chosen.tokens - codes.shape[1])), value=-1)[:, : chosen.tokens]
    ids = torch.where(padded >= 0, head.vocab.to_lm(padded.clamp(min=0), head.layout), head.vocab.end)
    logits = head.logits(seen, chosen, ids)[:, : codes.shape[1]]
    constraint = None if head.layout.total else policy.tokenizer.constraint(_context(policy))
    state = None if constraint is None else constraint.start(B)
    for n in range(codes.shape[1]):
        rows = np.flatnonzero(known[:, n].numpy())
        table = torch.from_numpy(head.vocab.ids_of(int(head.layout.table[n]))[: head.layout.vocab[n]])
        scores = logits[rows, n][:, table]
        if constraint is not None:
            allowed = torch.from_numpy(constraint.allowed(state[rows])[:, : scores.shape[1]])
            scores = scores.masked_fill(~allowed, -torch.inf)
            state[rows] = constraint.advance(state[rows], codes[rows, n].numpy())
        best = scores.max(-1).values
        taken = scores.gather(1, codes[rows, n][:, None])[:, 0]
        assert torch.allclose(taken, best, atol=1e-4)  # near-ties may go either way


def _context(policy):
    from actok.core import ChunkContext

    return ChunkContext(horizon=policy.horizon, embodiment=policy.embodiment)


def test_blocks_of_one_are_next_token_prediction():
    """The same weights, run by hand: each code is fed behind the prompt, and the last position says the next one."""
    policy = policy_of("bins", block=1, spacing=0)
    head = head_of(policy)
    assert head.plan.passes == T * D
    seen = policy._see(policy._look(observation()), observation())
    codes, _ = head.emit(seen, None, None, None)
    ids = head.vocab.to_lm(codes, head.layout)
    fed = torch.cat([torch.full((B, 1), head.vocab.boblk), ids[:, :-1]], 1)
    hidden, _ = seen.read(fed, torch.ones_like(fed, dtype=torch.bool))  # an ordinary causal pass
    scores = policy.backbone.logits(hidden)[..., torch.from_numpy(head.vocab.ids_of(0))]
    assert torch.equal(scores.argmax(-1), codes)


@pytest.mark.parametrize("block", [3, 5, 28])
def test_any_block_size_gives_whole_chunks_in_ceil_n_over_b_passes(block):
    acted = policy_of("bins", block=block).act(observation())
    assert acted.passes == -(-T * D // block)
    assert acted.codes.shape == (B, T * D)
    assert acted.valid.all()


@pytest.mark.parametrize("spacing", [0, 2])
def test_training_draws_the_places_of_codes_and_an_evaluation_does_not(spacing, monkeypatch):
    policy = policy_of("bins", block=3, spacing=spacing)
    head, given, places = head_of(policy), batch(policy), []
    monkeypatch.setattr(head, "_coder", lambda seen: Watching(seen.backbone, places))
    for mode in (True, False):
        for _ in range(2):
            policy.train(mode).losses(given)
    trained, steady = places[:2], places[2:]
    steps = torch.cat(trained).diff(dim=1)
    assert set(steps.unique().tolist()) == set(range(1, 2 + spacing))
    assert torch.equal(*trained) is (spacing == 0)
    assert torch.equal(*steady)
    assert (steady[0].diff(dim=1) == 1 + spacing // 2).all()


class Watching:
    """A backbone that notes at which places it is run."""

    def __init__(self, backbone, places):
        self._backbone, self._places = backbone, places

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def run(self, embeds, positions, mask, cache):
        self._places.append(positions)
        return self._backbone.run(embeds, positions, mask, cache)


@pytest.mark.parametrize("expert", [0, 16])
@pytest.mark.parametrize("name", ["bins", "fastervq-tiny", "boat-tiny", "carp-tiny"])
def test_the_loss_of_a_block_does_not_depend_on_its_own_codes_or_later_ones(name, expert):
    policy = policy_of(name, token_expert=expert, **({"block": 5} if name == "bins" else {}))
    head = head_of(policy)
    seen = policy._see(policy._look(observation()), observation())
    codes = batch(policy).codes
    base = head.logits(seen, head.plan, head.vocab.to_lm(codes, head.layout))
    for first, last in zip(head.plan.edges[:-1], head.plan.edges[1:], strict=True):
        other = codes.clone()
        other[:, first:] = (other[:, first:] + 1) % torch.from_numpy(head.layout.vocab[first:])
        changed = head.logits(seen, head.plan, head.vocab.to_lm(other, head.layout))
        assert torch.allclose(changed[:, :last], base[:, :last], atol=1e-5)
        if last < head.plan.tokens:
            assert not torch.allclose(changed[:, last:], base[:, last:], atol=1e-3)


@pytest.mark.parametrize("expert", [0, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_is_the_mean_over_all_codes_each_among_those_of_its_own_table(name, expert):
    policy = policy_of(name, token_expert=expert)
    head, given = head_of(policy), batch(policy)
    seen = policy._see(policy._look(given.observation), given.observation)
    chosen = head._plan_of(given.codes.shape[1])
    codes = torch.nn.functional.pad(given.codes, (0, chosen.tokens - given.codes.shape[1]), value=-1)
    ids = torch.where(codes >= 0, head.vocab.to_lm(codes.clamp(min=0), head.layout), head.vocab.end)
    logits, expected = head.logits(seen, chosen, ids), []
    for b, n in (codes >= 0).nonzero().tolist():
        table = torch.from_numpy(head.vocab.ids_of(int(head.layout.table[n])))
        expected.append(-logits[b, n, table].log_softmax(-1)[codes[b, n]])
    assert torch.allclose(policy.losses(given)["tokens"], torch.stack(expected).mean(), rtol=1e-5)


@pytest.mark.parametrize("expert", [0, 16])
@pytest.mark.parametrize(("name", "block"), [*((n, None) for n in LAYOUTS), ("bins", 5), ("fast", 3), ("oat-tiny", 3)])
def test_the_loss_of_a_block_has_no_gradient_to_the_embeddings_of_its_own_codes(name, block, expert, monkeypatch):
    """Nor to those of later ones, and one to those of the block before: ragged blocks and varying lengths too."""
    policy = policy_of(name, token_expert=expert, **({} if block is None else {"block": block}))
    head = head_of(policy)
    seen = policy._see(policy._look(observation()), observation())
    given = batch(policy)
    chosen = head._plan_of(int((given.codes >= 0).sum(1).max()))
    codes = torch.nn.functional.pad(given.codes, (0, max(0, chosen.tokens - given.codes.shape[1])), value=-1)
    codes = codes[:, : chosen.tokens]
    known = codes >= 0
    ids = torch.where(known, head.vocab.to_lm(codes.clamp(min=0), head.layout), head.vocab.end)
    coder, fed = head._coder(seen), []
    embed = coder.embed

    def watched(given_ids):
        fed.append(embed(given_ids).detach().requires_grad_())
        return fed[-1]

    monkeypatch.setattr(coder, "embed", watched)
    scores = head.logits(seen, chosen, ids).log_softmax(-1).gather(2, ids[..., None])[..., 0] * known
    for first, last in zip(chosen.edges[:-1], chosen.edges[1:], strict=True):
        if not known[:, first:last].any():
            continue
        (gradient,) = torch.autograd.grad(scores[:, first:last].sum(), fed[0], retain_graph=True)
        own = torch.from_numpy(chosen.source >= first)
        assert not gradient[:, own].any()
        before = torch.from_numpy((chosen.source >= 0) & (chosen.source < first))
        assert bool(gradient[:, before].any()) == (first > 0)


def test_a_deadline_ends_at_a_prefix_that_decodes():
    policy = policy_of("oat-tiny")
    assert len(head_of(policy).plan.stops) > 1
    late = policy.act(observation(), deadline_s=0.0)
    assert late.passes < head_of(policy).plan.passes
    assert late.codes.shape[1] in policy.tokenizer.layout.prefixes
    assert late.valid.all()
    whole = policy_of("bins").act(observation(), deadline_s=0.0)  # no prefix of bins decodes
    assert whole.passes == T
    assert whole.valid.all()


def test_drawing_is_repeatable_and_batches_do_not_mix_observations():
    policy = policy_of("fastervq-tiny")
    whole = policy.act(observation())
    for b in range(B):
        o = observation()
        single = policy.act(PolicyObservation(instruction=o.instruction[b : b + 1], proprio=o.proprio[b : b + 1]))
        assert np.allclose(single.actions[0], whole.actions[b], atol=1e-4)
    hot = policy_of("fastervq-tiny", temperature=2.0)
    twice = [hot.act(observation(), generator=torch.Generator().manual_seed(7)).codes for _ in range(2)]
    other = hot.act(observation(), generator=torch.Generator().manual_seed(8)).codes
    assert np.array_equal(*twice)
    assert not np.array_equal(twice[0], other)


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bins", "fast", "boat-tiny"])
@pytest.mark.parametrize("expert", [0, 16])
def test_a_policy_learns_its_batch_by_heart(name, expert):
    policy = policy_of(name, token_expert=expert, steps=5, spacing=0).train()
    given = batch(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(250 if name == "bins" else 120):
        loss = torch.stack(list(policy.losses(given).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    policy.losses(given)
    assert min(policy.report().values()) == 1
    acted = policy.act(given.observation)
    target = policy.tokenizer.decode(policy.tokenizer.encode(chunks(B, 5, 5))).actions
    assert np.abs(acted.actions - target).mean() < 1e-6


def test_every_part_gets_a_gradient_and_insulation_keeps_the_flow_out_of_the_backbone():
    for insulate in (False, True):
        policy = policy_of(
            "bins", views=("front",), heads=("flow", "tokens"), flow_expert=16, insulate=insulate, state="vector"
        ).train()
        flow = policy.losses(batch(policy))["flow"]
        flow.backward()
        into = [p.grad for p in policy.backbone.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert bool(into) is not insulate
        assert all(p.grad is not None for p in policy.parts["flow"].expert.parameters())
        policy.zero_grad()
        policy.losses(batch(policy))["tokens"].backward()
        assert policy.backbone.stem is not None
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.backbone.stem.parameters())
        assert all(p.grad.abs().max() > 0 for p in policy.state_in.parameters())


def test_padded_steps_do_not_train_the_flow():
    policy = policy_of("bins", heads=("flow",), flow_expert=16).eval()
    given = batch(policy)
    real = given.real.clone()
    real[:, 4:] = False
    noisy = given.actions.clone()
    noisy[:, 4:] = 0.3

    def loss(actions, mask):
        torch.manual_seed(0)
        value = policy.losses(replace(given, actions=actions, real=mask))["flow"]
        policy.zero_grad()
        value.backward()
        return policy.parts["flow"].out.bias.grad.clone()

    whole = loss(given.actions, given.real)
    assert not torch.allclose(loss(given.actions, real), whole)
    # Only what is padded is left out of the error: of one real step, the gradient is that step's.
    one = torch.zeros_like(real)
    one[:, :1] = True
    rest = ~one
    both = (loss(given.actions, one) * one.sum() + loss(given.actions, rest) * rest.sum()) / real.numel()
    assert torch.allclose(both, whole, atol=1e-5)


def test_the_exact_velocity_of_one_chunk_has_no_loss_and_leads_to_it(monkeypatch):
    """(a - x) / (1 - t): what is regressed and what is integrated agree on direction, moments and step."""
    policy = policy_of("bins", heads=("flow",), flow_expert=16, flow_steps=7)
    given = batch(policy)
    moments = []

    def exact(seen, mixed, moment):
        moments.append(moment)
        return (given.actions - mixed) / (1 - moment)[:, None, None]

    monkeypatch.setattr(policy.parts["flow"], "velocity", exact)
    assert policy.losses(given)["flow"] < 1e-6
    acted = policy.act(given.observation)
    assert torch.allclose(torch.stack(moments[1:])[:, 0], torch.arange(7) / 7)
    assert np.allclose(policy.tokenizer.normalise(acted.actions), given.actions.numpy(), atol=1e-4)


def test_a_flow_beyond_the_limits_is_moved_to_them_and_counted(monkeypatch):
    policy = policy_of("bins", heads=("flow",), flow_expert=16)
    push = torch.zeros(B, T, D)
    push[1, :, 2], push[2, 0, 0] = 99.0, -99.0

    def towards(seen, mixed, moment):
        return (push - mixed) / (1 - moment)[:, None, None]

    monkeypatch.setattr(policy.parts["flow"], "velocity", towards)
    acted = policy.act(observation())
    assert acted.valid.all()
    assert acted.clipped.tolist() == [0, T, 1]
    assert (acted.actions[1, :, 2] == 2).all()
    assert acted.actions[2, 0, 0] == -2


def test_the_steps_of_a_flowing_chunk_see_each_other_and_the_prompt():
    policy = policy_of("bins", heads=("flow",), flow_expert=16)
    head, moment = policy.parts["flow"], torch.full((B,), 0.3)

    def velocity(mixed, seed):
        return head.velocity(policy._see(policy._look(observation(seed=seed)), observation(seed=seed)), mixed, moment)

    mixed = torch.randn(B, T, D)
    base = velocity(mixed, 3)
    for changed in (0, T - 1):
        other = mixed.clone()
        other[:, changed] += 1
        assert ((velocity(other, 3) - base).abs().amax((0, 2)) > 1e-6).all()
    assert ((velocity(mixed, 4) - base).abs().amax((0, 2)) > 1e-6).all()


def test_flow_learns_a_constant_chunk():
    policy = policy_of("bins", heads=("flow",), flow_expert=16, steps=3).train()
    given = batch(policy)
    target = chunks(1, 9, 3).repeat(B, 0)
    given = replace(given, actions=torch.from_numpy(np.asarray(policy.tokenizer.normalise(target), np.float32)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(400):
        loss = policy.losses(given)["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    acted = policy.act(given.observation, generator=torch.Generator().manual_seed(0))
    assert acted.valid.all()
    assert acted.codes is None
    assert np.abs(acted.actions - target).mean() < 0.25


def test_the_head_that_is_not_asked_for_does_not_run():
    policy = policy_of("bins", heads=("tokens", "flow"), flow_expert=16)
    assert policy.heads == ("tokens", "flow")
    policy.parts["tokens"].act = None
    assert policy.act(observation(), head="flow").passes == 10
    with pytest.raises(ConfigError, match="no head 'diffusion'; it has tokens, flow"):
        policy.act(observation(), head="diffusion")


# -- words around the blocks --------------------------------------------------------------------------------------


def test_how_actions_are_drawn_can_be_set_when_they_are():
    policy = policy_of(heads=("tokens", "flow"), flow_expert=8, temperature=3.0)

    def codes(seed: int) -> np.ndarray:
        return policy.act(observation(), generator=torch.Generator().manual_seed(seed)).codes

    greedy = policy_of(heads=("tokens", "flow"), flow_expert=8).act(observation()).codes
    assert not np.array_equal(codes(0), codes(1))
    assert policy.with_decoding(temperature=0, flow_steps=3) is policy
    assert np.array_equal(codes(0), codes(1))
    assert np.array_equal(codes(0), greedy)
    assert policy.act(observation(), head="flow").passes == 3
    assert policy.decoding == {"temperature": 0, "top_k": 0, "flow_steps": 3}
    policy.with_decoding(temperature=9.0, top_k=1)
    assert np.array_equal(codes(2), greedy), "the likeliest of one is drawn, however hot"


def test_a_policy_is_saved_with_how_its_actions_are_drawn(tmp_path):
    policy_of().with_decoding(temperature=0.25).save_pretrained(tmp_path / "p")
    assert load_policy(tmp_path / "p").decoding == {"temperature": 0.25, "top_k": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacing": 4}, "spacing is not to be set when this policy acts, only temperature, top_k;"),
        ({"flow_steps": 4}, "flow_steps is not to be set"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
    ],
)
def test_what_would_need_other_weights_is_not_set_when_acting(settings, message):
    policy = policy_of()
    with pytest.raises(ConfigError, match=message):
        policy.with_decoding(**settings)
    assert policy.config == policy_of().config


def test_a_policy_that_speaks_says_the_subtask_then_acts():
    policy = policy_of("bins", speaks=True, steps=2, state="vector").train()
    words = ("grasp it", "lift", "move to the left")
    given = batch(policy, text=words)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(80):
        losses = policy.losses(given)
        assert set(losses) == {"text", "tokens"}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    acted = policy.act(given.observation)
    assert tuple(acted.text) == words
    assert acted.valid.all()


def test_said_text_holds_no_codes_and_ends(monkeypatch):
    """Also where the model would rather say a code, a control token or a special one than any word."""
    policy = policy_of("bins", speaks=True)
    seen = policy._see(policy._look(observation()), observation())
    plain = policy.backbone.logits
    low, high = policy.vocab.span
    unsayable = [*(i for i in range(low, high) if i != policy.vocab.boblk), *policy.backbone.special_ids.values()]

    def tempted(hidden, rows=None):
        found = plain(hidden, rows).clone()
        found[..., unsayable] += 1e4
        found[..., policy.vocab.boblk] -= 1e4
        return found

    monkeypatch.setattr(policy.backbone, "logits", tempted)
    texts, further = say(seen, policy.vocab, policy.vocab.boblk, limit=5)
    assert further.cache.length == seen.cache.length + 5  # nothing ended it but the limit
    for text in texts:
        ids = policy.backbone.text_ids([text])[0]
        assert ids
        assert not set(ids) & set(unsayable)


def test_no_code_is_said_where_codes_are_the_tail_of_the_text_ids(monkeypatch):
    policy = policy_of("bins", speaks=True, vocabulary="tail", reserved=20)
    low, high = policy.vocab.span
    assert high < policy.backbone.text_size
    with torch.no_grad():
        seen = policy._see(policy._look(observation(1)), observation(1))
        policy.backbone.output.weight.copy_(torch.eye(policy.backbone.width))
        policy.backbone.table[low] = 100 * seen.last[0]
    assert policy.backbone.logits(seen.last[:, None]).argmax() == low
    said: list[int] = []
    monkeypatch.setattr(policy.backbone, "text_of", lambda ids: said.extend(ids) or "")
    say(seen, policy.vocab, policy.vocab.boblk, limit=1)
    assert len(said) == 1
    assert not low <= said[0] < high


@pytest.mark.parametrize(
    "settings",
    [
        {"vocabulary": "added"},
        {"vocabulary": "tail", "reserved": 20},
        {"vocabulary": "range", "id_range": [40, 320]},
        {"vocabulary": "range", "id_range": [900, 1201]},
        {"vocabulary": "range", "id_range": [900, 1201], "token_expert": 8, "concludes": True},
    ],
)
def test_codes_have_the_ids_that_the_settings_say(settings, tmp_path):
    policy = policy_of("bins", **settings)
    rows = TinyVLM.create(
        TinyConfig(width=24, layers=2, heads=3, image_size=16, image_channels=(4, 8)), TASKS
    ).vocab_size
    layout = policy.tokenizer.layout_for(policy.horizon, policy.embodiment)
    first, second = policy.vocab.to_lm([0, 1], layout)
    start = {"added": rows, "tail": rows - 1 - 20, "range": settings.get("id_range", [0])[0]}[settings["vocabulary"]]
    assert (first, second - first) == (start, -1 if settings["vocabulary"] == "tail" else 1)
    assert policy.backbone.vocab_size == max(rows, policy.vocab.span[1])
    acted = policy.act(observation())
    assert acted.valid.all()
    policy.save_pretrained(tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    assert again.config == policy.config
    np.testing.assert_array_equal(again.act(observation()).actions, acted.actions)
    if not policy.config.token_expert:  # nothing but these rows is read as codes, and asked for them
        with torch.no_grad():
            policy.backbone.table[slice(*policy.vocab.span)] += 1
        assert not torch.equal(
            head_of(policy).losses(policy._see(policy._look(observation()), observation()), batch(policy))["tokens"],
            head_of(again).losses(again._see(again._look(observation()), observation()), batch(again))["tokens"],
        )


@pytest.mark.parametrize("expert", [0, 16])
@pytest.mark.parametrize("name", ["bins", "fast"])
def test_what_is_said_after_the_blocks_depends_on_the_codes(name, expert):
    """The observations are one and the same, so only the codes tell which sentence follows."""
    policy = policy_of(name, concludes=True, token_expert=expert, steps=2, state="vector").train()
    sentences = ("now lift it", "done", "move on to the left door")
    given = batch(policy, after=sentences)
    same = replace(
        given.observation,
        instruction=[TASKS[0]] * B,
        proprio=np.repeat(given.observation.proprio[:1], B, 0),
    )
    given = replace(given, observation=same)
    assert len({tuple(row) for row in given.codes.tolist()}) == B
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(80):
        losses = policy.losses(given)
        assert set(losses) == {"tokens", "text_after"}
        optimizer.zero_grad()
        losses["text_after"].backward()
        optimizer.step()
    policy.eval()
    with torch.no_grad():
        seen = policy._see(policy._look(same), same)
        behind = read_on(seen, policy._codes_in_text(given.codes.numpy()))
        assert tuple(say(behind, policy.vocab, policy.vocab.end)[0]) == sentences
        # Said token by token over the cache = the likeliest of one pass over prompt, codes, <EoBlk> and words.
        for b, words in enumerate(policy.backbone.text_ids(sentences)):
            one = PolicyObservation(instruction=[TASKS[0]], proprio=same.proprio[:1])
            codes = policy._codes_in_text(given.codes[b : b + 1].numpy())[0]
            assert codes[-1] == policy.vocab.eoblk
            row = torch.tensor([[*codes, *words]])
            hidden, _ = policy._see(policy._look(one), one).read(row, torch.ones_like(row, dtype=torch.bool))
            scores = policy.backbone.logits(hidden[:, len(codes) - 1 :])[0]
            assert scores.argmax(-1).tolist() == [*words, policy.vocab.end]


def test_a_policy_says_before_and_after_what_it_has_learnt_around_its_codes():
    policy = policy_of("bins", speaks=True, concludes=True, steps=2, state="vector").train()
    before, after = ("grasp it", "lift", ""), ("then lift", "", "done with the drawer")
    given = batch(policy, text=before, after=after)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(100):
        losses = policy.losses(given)
        assert set(losses) == {"text", "tokens", "text_after"}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    acted = policy.act(given.observation)
    assert (tuple(acted.text), tuple(acted.text_after)) == (before, after)
    assert acted.valid.all()
    assert acted.seconds["text_after"] > 0
    late = policy.act(given.observation, deadline_s=10.0)  # actions are due: nothing is said after them
    assert tuple(late.text_after) == ("",) * B
    assert np.array_equal(late.codes, acted.codes)


@pytest.mark.parametrize("name", ["bins", "fast"])
def test_a_policy_that_may_conclude_acts_as_one_that_may_not(name):
    quiet, may = policy_of(name), policy_of(name, concludes=True)
    given = batch(quiet, after=["a", "b", "c"])
    assert set(quiet.losses(given)) == {"tokens"}
    assert torch.equal(quiet.losses(given)["tokens"], may.losses(given)["tokens"])
    first, second = quiet.act(given.observation), may.act(given.observation)
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.actions, second.actions)
    assert tuple(first.text_after) == ("",) * B
    assert "text_after" not in first.seconds


def test_text_read_piece_by_piece_is_text_read_at_once():
    policy = policy_of("bins")
    seen = policy._see(policy._look(observation()), observation())
    ids = torch.tensor([[5, 6, 7], [8, 9, 0], [4, 0, 0]])
    real = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    at_once, whole = seen.read(ids, real)
    piece = seen
    for n in range(3):
        _, piece = piece.read(ids[:, n : n + 1], real[:, n : n + 1])
    assert torch.allclose(piece.last, whole.last, atol=1e-5)
    assert torch.equal(piece.next_position, whole.next_position)
    assert torch.allclose(at_once[0, 2], whole.last[0], atol=1e-6)


# -- keeping it ---------------------------------------------------------------------------------------------------


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


# -- refusals -----------------------------------------------------------------------------------------------------


def test_what_the_policy_was_not_trained_on_is_refused():
    policy = policy_of("bins", views=("front",))
    seen = observation(views=("front",))
    with pytest.raises(DataError, match="state of 5 numbers"):
        policy.act(replace(seen, proprio=None))
    with pytest.raises(DataError, match="state of 5 numbers"):
        policy.act(replace(seen, proprio=np.zeros((B, 4), np.float32)))
    broken = seen.proprio.copy()
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match="observation 1 holds nan at 2"):
        policy.act(replace(seen, proprio=broken))
    with pytest.raises(DataError, match="looks through front; the images given are: side"):
        policy.act(replace(seen, images={"side": seen.images["front"]}))
    with pytest.raises(DataError, match="no instruction"):
        policy.act(replace(seen, instruction=["a", " ", "b"]))
    with pytest.raises(DataError, match="instructions are 'push'; give a list"):
        policy.act(replace(seen, instruction="push"))
    with pytest.raises(DataError, match="instructions are none"):
        policy.act(PolicyObservation(instruction=[], proprio=seen.proprio[:0]))
    other = replace(SPACE, groups=(replace(GROUPS[0], mode="absolute"), GROUPS[1]))
    with pytest.raises(SpaceMismatchError, match="absolute"):
        policy.check(other)
    with pytest.raises(SpaceMismatchError, match="20 Hz, not at 5"):
        policy.check(SPACE, rate_hz=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ("flow",)}, "flow_expert"),
        ({"heads": ("tokens", "diffusion")}, "diffusion"),
        ({"state": "pixels"}, "pixels"),
        ({"spacing": 3}, "spacing is 3"),
        ({"block": 0}, "block is 0"),
        ({"speaks": True, "heads": ("flow",), "flow_expert": 8}, "speaks"),
        ({"concludes": True, "heads": ("flow",), "flow_expert": 8}, "concludes"),
        ({"concludes": "yes"}, "concludes is 'yes'"),
        ({"temperature": -1.0}, "temperature"),
        ({"vocabulary": "text"}, "vocabulary is 'text'; choose one of added, tail, range"),
        ({"vocabulary": "range"}, "give both vocabulary=range and id_range"),
        ({"id_range": (5, 90)}, "give both vocabulary=range and id_range"),
        ({"vocabulary": "range", "id_range": (5, 9.5)}, "two whole numbers"),
        ({"vocabulary": "range", "id_range": (5,)}, "two whole numbers"),
        ({"vocabulary": "range", "id_range": (5, 9)}, "the range from 5 to before 9 is too small"),
        ({"reserved": 4}, "reserved is 4 and vocabulary 'added'"),
        ({"vocabulary": "tail", "reserved": 20, "token_expert": 8}, "set token_expert=0"),
        ({"vocabulary": "tail"}, r"leave them above it \(reserved=\d+\)"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        policy_of("bins", **settings)


@pytest.mark.parametrize("state", ["text", "vector"])
def test_states_beyond_the_range_of_the_training_are_counted(state):
    policy = policy_of("bins", state=state)
    seen = observation()
    far = seen.proprio.copy()
    far[1, :3] = (1.5, -2.0, 7.0)
    assert policy.act(seen).state_beyond.tolist() == [0, 0, 0]
    assert policy.act(replace(seen, proprio=far)).state_beyond.tolist() == [0, 3, 0]


@pytest.mark.parametrize("state", ["text", "vector"])
def test_the_state_is_read_by_its_range(state):
    """In other units with the range in the same units, all is as before; in other units alone, not."""
    policy, seen = policy_of("bins", state=state), observation()
    see = policy._look(seen).embeds
    other = replace(seen, proprio=4 * seen.proprio + np.arange(P, dtype=np.float32))
    assert not torch.allclose(policy._look(other).embeds, see, atol=1e-3)
    policy.state = StateRange(low=np.arange(P) - 4.0, high=np.arange(P) + 4.0)
    assert torch.allclose(policy._look(other).embeds, see, atol=1e-5)


def test_views_are_shown_in_the_policys_order_whatever_that_of_the_images():
    policy = policy_of("bins", views=("front", "side"))
    seen = observation(views=("front", "side"))
    see = policy._look(seen).embeds
    front, side = seen.images["front"], seen.images["side"]
    assert torch.equal(policy._look(replace(seen, images={"side": side, "front": front, "top": side})).embeds, see)
    direct = policy.backbone.prefix(prompts(seen.instruction, seen.proprio, policy.state, 256), [front, side])
    assert torch.equal(see, direct.embeds)
    swapped = policy._look(replace(seen, images={"front": side, "side": front})).embeds
    assert not torch.allclose(swapped, see, atol=1e-3)


def test_a_blind_policy_is_refused():
    backbone = TinyVLM.create(TinyConfig(width=24, layers=1, heads=3), TASKS)
    with pytest.raises(ConfigError, match="would see nothing"):
        VLA.create(backbone, tokenizer_of("bins"), VLAConfig(state="none"))
    with pytest.raises(ConfigError, match="no range of proprioception"):
        VLA.create(backbone, tokenizer_of("bins"), VLAConfig())


# -- the prompt ---------------------------------------------------------------------------------------------------


def test_the_state_is_written_in_bins_of_its_range():
    state = StateRange(low=np.array([0.0, -1.0, 2.0]), high=np.array([10.0, 1.0, 2.0]))
    given = np.array([[0.0, 1.0, 2.0], [4.999, -5.0, 3.0], [10.0, 0.0, 2.0]])
    found = prompts(["a", " b  c", "d"], given, state, 4)
    assert found[0] == "Task: a, State: 0 3 2;"
    assert found[1] == "Task: b c, State: 1 0 3;"  # beyond the range: the last bin
    assert found[2] == "Task: d, State: 3 2 2;"
    assert np.allclose(state.unit(given)[:, 0], [-1, -0.0002, 1])


@pytest.mark.parametrize("name", sorted(policy_presets()))
def test_presets_are_what_their_classes_take(name):
    from actok.core import build_config

    preset = find_policy_preset(name)
    config = build_config(VLAConfig, preset.policy, name)
    assert config.heads
    assert preset.summary
    trained = policy_train_config(preset.training, {}, name)
    if name.startswith("fastervla-"):
        assert [stage.train for stage in trained.stages] == [("expert",), ("expert", "language")]
        assert (trained.learning_rate, trained.weight_decay, trained.warmup_steps) == (2.5e-5, 1e-10, 1000)
        assert (config.spacing, config.temperature, config.top_k, config.state) == (2, 0.8, 50, "text")
        assert config.token_expert
    if "flow" in config.heads:
        assert config.insulate
        assert config.heads == ("flow", "tokens")
    if preset.backbone.get("kind") == "tiny":
        sizes = {k: v for k, v in preset.backbone.items() if k != "kind"}
        assert build_config(TinyConfig, sizes, name).width > 0
