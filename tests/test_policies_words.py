"""How actions are drawn, where codes live among the ids, and words before and behind them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import (
    ConfigError,
)
from actok.policies.base import PolicyObservation
from actok.policies.load import load_policy
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.token_head import read_on, say
from policy_models import (
    TASKS,
    B,
    batch,
    head_of,
    observation,
    policy_of,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


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
