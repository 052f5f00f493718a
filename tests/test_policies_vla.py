"""Policies over any tokenizer: what is emitted decodes, passes over a cache are one pass, nothing sees its own targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import (
    ConfigError,
)
from actok.policies.base import PolicyObservation
from policy_models import (
    LAYOUTS,
    B,
    D,
    T,
    batch,
    chunks,
    head_of,
    observation,
    policy_of,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


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
