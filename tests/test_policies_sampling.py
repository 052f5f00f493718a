"""Whatever is drawn decodes; what is drawn, and how often, is what the logits say."""

import functools

import numpy as np
import pytest
import torch

from actok.core import ActionSpace, ConfigError, Constraint, FitPart, TokenError, TokenLayout, find_preset
from actok.core.config import build_config
from actok.core.registry import load_target
from actok.policies.blocks import plan
from actok.policies.sampling import SamplingConfig, rows_of_places, sample_block
from actok.policies.vocab import VocabularyMap

torch.set_num_threads(1)
T, D, MODEL = 8, 3, 101
FLAT = SamplingConfig(temperature=1.0, top_k=None)


def chunks(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, T, D)).cumsum(1).astype(np.float32)


@functools.cache
def fitted(name: str):
    preset = find_preset(name)
    cls = load_target(preset.target)
    few = {"vocab": 211, "scale": 4.0} if name == "fast" else {}
    config = build_config(cls.config_class, {**preset.settings, **few}, name)
    return cls.fit([FitPart(actions=chunks(200), space=ActionSpace.raw(D))], config)


@pytest.mark.parametrize("kind", ["added", "tail"])
@pytest.mark.parametrize("name", ["fast", "beast", "bins", None])
def test_logits_of_a_blocks_own_codes_are_enough(name, kind):
    tokenizer = None if name is None else fitted(name)
    layout = LAYOUT if tokenizer is None else tokenizer.layout
    steps = plan(layout, 1 if tokenizer is None else None)
    vocab = VocabularyMap.for_layouts(kind, layout, 20_000)
    j = steps.passes // 2
    places = np.arange(steps.edges[j], steps.edges[j + 1])
    rows = rows_of_places(layout, vocab, places)
    assert rows.stop - rows.start <= sum(vocab.tables[t] for t in set(layout.table[places].tolist()))
    logits = torch.randn(3, steps.sizes[j], vocab.embeddings, generator=torch.Generator().manual_seed(5))
    options = {
        "start": steps.edges[j],
        "constraint": None if layout.total or tokenizer is None else tokenizer.constraint(),
    }
    if options["constraint"] is not None:  # a state that is not the first
        options["state"] = options["constraint"].start(3)
    drawn = [
        sample_block(given, layout, vocab, first_id=first, generator=torch.Generator().manual_seed(7), **options)
        for given, first in ((logits, 0), (logits[..., rows], rows.start))
    ]
    assert torch.equal(drawn[0].codes, drawn[1].codes)
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    assert torch.equal(drawn[0].log_probs, drawn[1].log_probs)


def generate(tokenizer, vocab, *, batch, block, config, seed, constrained):
    """Sequences drawn from random logits, pass by pass, and their language-model ids [B, N]."""
    generator = torch.Generator().manual_seed(seed)
    layout, steps = tokenizer.layout, plan(tokenizer.layout, block)
    constraint = tokenizer.constraint() if constrained else None
    state, ids = None, []
    for j in range(steps.passes):
        logits = 5 * torch.randn(batch, steps.sizes[j], vocab.embeddings, generator=generator)
        found = sample_block(
            logits,
            layout,
            vocab,
            start=steps.edges[j],
            config=config,
            constraint=constraint,
            state=state,
            generator=generator,
        )
        state = found.state
        ids.append(found.ids)
        assert torch.equal(found.codes < 0, found.ids == vocab.end)
        assert (found.log_probs <= 0).all()
        if found.done.all():
            break
    else:
        raise AssertionError("sequences did not end within the layout's longest")
    return torch.cat(ids, 1)


@pytest.mark.parametrize(
    "config", [SamplingConfig(), FLAT, SamplingConfig(temperature=0)], ids=["paper", "flat", "greedy"]
)
@pytest.mark.parametrize("block", [1, 5, None])
@pytest.mark.parametrize("kind", ["added", "tail"])
def test_random_logits_never_give_a_fast_sequence_that_does_not_decode(config, block, kind):
    tokenizer = fitted("fast")
    layout = tokenizer.layout
    vocab = VocabularyMap.for_layouts(kind, layout, 997, existing={"end": 1})
    ids = generate(tokenizer, vocab, batch=7, block=block, config=config, seed=3, constrained=True)
    found = vocab.to_codes(ids, layout)
    rows = [row[mask].numpy() for row, mask in zip(found.codes, found.is_code, strict=True)]
    decoded = tokenizer.decode(rows)
    assert decoded.valid.all(), decoded.reasons
    # Nothing but the end follows the end.
    lengths = found.is_code.sum(1)
    assert torch.equal(found.is_code, torch.arange(ids.shape[1])[None] < lengths[:, None])
    assert (ids[~found.is_code] == 1).all()


@pytest.mark.parametrize("name", ["bins", "beast", "dct", "pca"])
@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("constrained", [False, True])
def test_random_logits_always_decode_where_every_sequence_does(name, block, constrained):
    tokenizer = fitted(name)
    vocab = VocabularyMap.for_layouts("added", tokenizer.layout, MODEL)
    ids = generate(tokenizer, vocab, batch=5, block=block, config=SamplingConfig(), seed=4, constrained=constrained)
    found = vocab.to_codes(ids, tokenizer.layout)
    assert found.is_code.all()
    assert tokenizer.decode(found.codes.numpy()).valid.all()


@pytest.mark.parametrize("constrained", [False, True])
def test_the_constraint_of_a_total_tokenizer_changes_nothing(constrained):
    """Greedy codes are the likeliest of each position's own table, whichever path they take."""
    tokenizer = fitted("dct")
    layout = tokenizer.layout
    vocab = VocabularyMap.for_layouts("tail", layout, 10007)
    n = layout.max_len
    logits = torch.randn(3, n, vocab.embeddings, generator=torch.Generator().manual_seed(5))
    constraint = tokenizer.constraint() if constrained else None
    found = sample_block(logits, layout, vocab, start=0, config=SamplingConfig(temperature=0), constraint=constraint)
    for p in range(n):
        ids = torch.from_numpy(vocab.ids_of(int(layout.table[p])))
        own = logits[:, p, ids]
        assert torch.equal(found.codes[:, p], own.argmax(1))
        torch.testing.assert_close(found.log_probs[:, p], own.log_softmax(1).max(1).values)
    assert found.done.all()


LAYOUT = TokenLayout.uniform(np.array([5, 3, 7]), np.zeros((3, 3)), table=np.array([0, 1, 0]))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (0.8, 1), (1.0, 50)])
def test_codes_are_drawn_as_often_as_the_softmax_says(temperature, top_k):
    """30011 draws against the softmax computed in NumPy, each frequency within five standard errors."""
    vocab = VocabularyMap.for_layouts("tail", LAYOUT, MODEL, reserved=2)
    draws = 30011
    row = torch.randn(3, vocab.embeddings, generator=torch.Generator().manual_seed(6)).bfloat16()
    found = sample_block(
        row.expand(draws, -1, -1),
        LAYOUT,
        vocab,
        start=0,
        config=SamplingConfig(temperature=temperature, top_k=top_k),
        generator=torch.Generator().manual_seed(7),
    )
    for p, count in enumerate(LAYOUT.vocab):
        own = row[p].double().numpy()[vocab.ids_of(int(LAYOUT.table[p]))[:count]]
        kept = np.argsort(-own)[:top_k]
        weights = np.zeros(count)
        weights[kept] = np.exp(own[kept] / temperature)
        expected = weights / weights.sum()
        share = np.bincount(found.codes[:, p].numpy(), minlength=count) / draws
        assert len(share) == count
        assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()
        # The log-probability is the model's own, whatever temperature and top-k.
        model = own - np.log(np.exp(own).sum())
        np.testing.assert_allclose(found.log_probs[:, p].numpy(), model[found.codes[:, p].numpy()], atol=1e-5)
    assert torch.equal(found.ids, vocab.to_lm(found.codes, LAYOUT))


def test_a_constrained_draw_follows_the_softmax_of_what_is_allowed():
    tokenizer = fitted("fast")
    layout = tokenizer.layout
    vocab = VocabularyMap.for_layouts("added", layout, MODEL)
    draws = 20011
    logits = torch.randn(1, 1, vocab.embeddings, generator=torch.Generator().manual_seed(8))
    # Before the last coefficient only tokens of one coefficient are allowed.
    constraint = tokenizer.constraint()
    state = constraint.start()
    ones = np.flatnonzero(tokenizer.bpe.lengths == 1)
    for _ in range(T * D - 1):
        state = constraint.advance(state, ones[:1])
    allowed = np.flatnonzero(constraint.allowed(state)[0])
    assert 1 < len(allowed) <= len(ones)
    found = sample_block(
        logits.expand(draws, -1, -1),
        layout,
        vocab,
        start=T * D - 1,
        config=FLAT,
        constraint=constraint,
        state=np.repeat(state, draws, 0),
        generator=torch.Generator().manual_seed(9),
    )
    own = logits[0, 0].double().numpy()[vocab.ids_of(0)[allowed]]
    expected = np.exp(own) / np.exp(own).sum()
    share = np.bincount(found.codes[:, 0].numpy(), minlength=layout.vocab[0]) / draws
    assert share[allowed].sum() == 1
    assert (np.abs(share[allowed] - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()
    assert found.done.all()


def test_a_generator_repeats_a_draw_and_the_callers_state_is_left_alone():
    tokenizer = fitted("fast")
    vocab = VocabularyMap.for_layouts("added", tokenizer.layout, MODEL)
    logits, constraint = torch.zeros(3, 5, vocab.embeddings), tokenizer.constraint()
    state = constraint.start(3)
    before = state.copy()

    def draw(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        settings = {"start": 0, "constraint": constraint, "state": state, "generator": generator}
        return sample_block(logits, tokenizer.layout, vocab, **settings).codes.tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert (state == before).all()


def test_what_would_not_decode_or_does_not_fit_is_refused():
    fast = fitted("fast")
    vocab = VocabularyMap.for_layouts("added", fast.layout, MODEL)
    logits = torch.zeros(2, 3, vocab.embeddings)
    with pytest.raises(ConfigError, match="nothing keeps them from being drawn"):
        sample_block(logits, fast.layout, vocab, start=0)
    constraint = fast.constraint()
    with pytest.raises(ConfigError, match="no state was given for position 3"):
        sample_block(logits, fast.layout, vocab, start=3, constraint=constraint)
    with pytest.raises(ConfigError, match="state is of 5 sequences, the logits of 2"):
        sample_block(logits, fast.layout, vocab, start=3, constraint=constraint, state=constraint.start(5))
    small = VocabularyMap.for_layouts("added", LAYOUT, MODEL)
    fits = torch.zeros(2, 3, small.embeddings)
    with pytest.raises(ConfigError, match="a state was given without its constraint"):
        sample_block(fits, LAYOUT, small, start=0, state=np.zeros(2, np.int64))
    with pytest.raises(TokenError, match="positions 1 to 3 were asked for, sequences of this layout have 3"):
        sample_block(fits, LAYOUT, small, start=1)
    low, high = (f(small.to_lm(codes, LAYOUT)) for f, codes in ((min, [0, 0, 0]), (max, LAYOUT.vocab - 1)))
    for cut, first in ((fits[..., :high], 0), (fits[..., low + 1 :], low + 1)):
        message = f"ids {first} to {first + cut.shape[-1] - 1}, codes at these positions have {low} to {high};"
        with pytest.raises(TokenError, match=message):
            sample_block(cut, LAYOUT, small, start=0, first_id=first)
    for value in ("nan", "inf", "-inf"):
        bad = fits.clone()
        bad[1, 2, small.ids_of(0)[4]] = float(value)
        with pytest.raises(TokenError, match=f"code 4 at position 2 of sequence 1 is {value}"):
            sample_block(bad, LAYOUT, small, start=0)
        bad = fits.clone()
        bad[1, 2, 5] = float(value)  # an id of text is not read
        assert sample_block(bad, LAYOUT, small, start=0).codes.shape == (2, 3)
    for values, message in [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            SamplingConfig(**values)


class Only(Constraint):
    """One code, forever."""

    vocab_size = 11

    def __init__(self, code: int) -> None:
        self.code = code

    def start(self, batch=1):
        return np.zeros(batch, np.int64)

    def allowed(self, state):
        return np.tile(np.arange(self.vocab_size) == self.code, (len(state), 1))

    def advance(self, state, ids):
        assert (ids == self.code).all()
        return state + 1

    def done(self, state):
        return np.zeros(len(state), bool)


def test_a_constraint_of_another_tokenizer_is_found_out():
    """Code 4 is in the tables at positions 0 and 2, and not at position 1."""
    vocab = VocabularyMap.for_layouts("added", LAYOUT, MODEL)
    logits = torch.zeros(2, 3, vocab.embeddings)
    assert sample_block(logits[:, :1], LAYOUT, vocab, start=0, constraint=Only(4)).codes.tolist() == [[4], [4]]
    with pytest.raises(ConfigError, match="nothing may stand at position 1 that both"):
        sample_block(logits, LAYOUT, vocab, start=0, constraint=Only(4))
