"""FAST's constraint is exact: brute force on tiny vocabularies, random walks, real chunks, and a language model."""

import functools
import itertools
import json
import time

import numpy as np
import pytest

import actok
from actok.core import ActionSpace, ChunkContext, ConfigError, FitPart, TokenError
from actok.signal.automaton import SpellingConstraint, SpellingTables
from actok.signal.bpe import Bpe, read_bpe
from actok.signal.utf8 import BYTE_OF_CHAR
from actok.tokenizers.fast import FastConfig, FastTokenizer
from actok.tokenizers.logits import ActionLogitsProcessor
from realdata import REAL, needs_real

T, D = 7, 3
CHAR_OF_BYTE = {b: c for c, b in BYTE_OF_CHAR.items()}


def tiny(tokens: list[str], *, byte_level: bool) -> Bpe:
    """A BPE without merges, for the automaton alone."""
    body = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False} if byte_level else None,
    }
    return read_bpe(json.dumps(body).encode())


CHARACTERS = tiny(["a", "b", "c", "ab", "aab", "bc", "aaaa"], byte_level=False)
# Lead and continuation bytes of U+00E9, U+00EA (2 bytes) and U+4E00 (3), "x", and tokens that cut characters apart.
BYTES = tiny(
    ["".join(CHAR_OF_BYTE[b] for b in raw) for raw in (
        b"x", b"\xc3", b"\xa9", b"\xaa", b"\xe4", b"\xb8", b"\x80",
        b"\xa9\xc3", b"xx", b"\xc3\xa9x", b"\xb8\x80\xe4", b"\x80\xc3\xaa", b"\xaa\xa9", b"\xe4\xb8",
    )],
    byte_level=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("bpe", "alphabet", "length", "longest"),
    [
        (CHARACTERS, "abc", 5, 5),
        (CHARACTERS, "ab", 5, 5),
        (BYTES, "x\u00e9\u00ea\u4e00", 2, 6),
        (BYTES, "x\u00e9", 3, 6),
        (BYTES, "\u4e00", 1, 5),
    ],
)
def test_the_mask_is_exact_by_brute_force(bpe, alphabet, length, longest):
    """Every sequence over the vocabulary is tried; the mask must allow what is a prefix of a decodable one, no more."""
    points = np.array(sorted(map(ord, alphabet)))
    raw = [tuple(bpe.atoms[bpe.starts[v] : bpe.starts[v + 1]]) for v in range(bpe.vocab_size)]

    @functools.cache
    def decodable(sequence: tuple[int, ...]) -> bool:
        atoms = [a for v in sequence for a in raw[v]]
        try:
            text = bytes(atoms).decode() if bpe.byte_level else "".join(map(chr, atoms))
        except UnicodeDecodeError:
            return False
        return len(text) == length and set(text) <= set(alphabet)

    # A decodable sequence has at most `longest` tokens: one an atom, so this enumeration is complete.
    assert max(len(c.encode()) if bpe.byte_level else 1 for c in alphabet) * length <= longest
    prefixes = set()
    sizes = np.array([len(r) for r in raw])
    frontier: list[tuple[int, ...]] = [()]
    complete = set()
    while frontier:
        grown = []
        for sequence in frontier:
            if decodable(sequence):
                complete.add(sequence)
            elif sizes[list(sequence)].sum() < longest:
                grown += [(*sequence, v) for v in range(len(raw))]
        frontier = grown
    for sequence in complete:
        prefixes |= {sequence[:i] for i in range(len(sequence) + 1)}
    assert complete

    constraint = SpellingConstraint(SpellingTables.build(bpe, points), length)
    reached = {(): constraint.start()}
    seen = set()
    while reached:
        (sequence, state), reached = next(iter(reached.items())), dict(itertools.islice(reached.items(), 1, None))
        seen.add(sequence)
        expected = [(*sequence, v) in prefixes for v in range(len(raw))]
        assert constraint.allowed(state)[0].tolist() == expected, sequence
        assert bool(constraint.done(state)[0]) == (sequence in complete)
        for v in np.flatnonzero(expected):
            reached[(*sequence, int(v))] = constraint.advance(state, np.array([v]))
    assert seen == prefixes


def walk(constraint, count: int, seed: int) -> list[list[int]]:
    """Random admissible sequences, a batch whose rows end at different times."""
    rng = np.random.default_rng(seed)
    state = constraint.start(count)
    sequences: list[list[int]] = [[] for _ in range(count)]
    while not (done := constraint.done(state)).all():
        allowed = constraint.allowed(state)
        assert not allowed[done].any()
        assert allowed[~done].any(1).all()
        active = np.flatnonzero(~done)
        ids = np.array([rng.choice(np.flatnonzero(allowed[b])) for b in active])
        state[active] = constraint.advance(state[active], ids)
        for b, token in zip(active, ids, strict=True):
            sequences[b].append(int(token))
    return sequences


@pytest.fixture(scope="module")
def fast():
    chunks = np.random.default_rng(0).normal(size=(400, T, D)).cumsum(1).astype(np.float32)
    return FastTokenizer.fit([FitPart(actions=chunks, space=ActionSpace.raw(D))], FastConfig(vocab=211, scale=4.0))


@pytest.mark.parametrize("horizon", [1, T, 23])
def test_every_walk_decodes_and_no_longer_or_shorter_one_does(fast, horizon):
    sequences = walk(fast.constraint(ChunkContext(horizon=horizon)), 61, horizon)
    assert fast.decode(sequences, horizon=horizon).valid.all()
    assert not fast.decode([s[:-1] for s in sequences], horizon=horizon).valid.any()


def test_a_token_that_does_not_fit_is_refused_and_named(fast):
    constraint = fast.constraint(ChunkContext(horizon=1))
    long = int(np.argmax(fast.bpe.lengths))
    assert fast.bpe.lengths[long] > D
    for token in (long, -1, fast.vocab_size):
        with pytest.raises(TokenError, match=f"token {token} of sequence 0"):
            constraint.advance(constraint.start(), np.array([token]))


@needs_real
def test_published_vocabulary_walks_decode_and_real_chunks_are_accepted():
    plus = actok.load(REAL / "fast_plus")
    golden = np.load(REAL / "fast_plus" / "golden.npz")
    for shape in ("10x7", "5x1", "1x7"):
        horizon, dim = map(int, shape.split("x"))
        context = ChunkContext(embodiment=f"normalised-{dim}", horizon=horizon)
        constraint = plus.constraint(context)
        assert plus.decode(walk(constraint, 37, horizon), context).valid.all()
        for row in plus.encode(golden[f"chunks_{shape}"], context):
            state = constraint.start()
            for token in row:
                assert not constraint.done(state)[0]
                assert constraint.allowed(state)[0, token]
                state = constraint.advance(state, np.array([token]))
            assert constraint.done(state)[0]


@needs_real
def test_the_mask_of_a_batch_takes_well_under_a_millisecond():
    plus = actok.load(REAL / "fast_plus")
    constraint = plus.constraint(ChunkContext(embodiment="normalised-14", horizon=50))
    state = constraint.start(64)
    best = min(_timed(constraint.allowed, state) for _ in range(20))
    assert constraint.allowed(state).shape == (64, 2048)
    assert best < 1e-3


def _timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


# -- generation ---------------------------------------------------------------------------------------------------

EOS, PAD, BEGIN, WORDS = 1, 0, 4, 5


@pytest.fixture(scope="module")
def model(fast):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    size = fast.vocab_size + WORDS + 2
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=BEGIN, eos_token_id=EOS
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def lm_ids(fast):
    return np.random.default_rng(1).permutation(fast.vocab_size) + WORDS


def codes_of(row: np.ndarray, lm_ids: np.ndarray) -> list[int]:
    """Codes of a generated row up to its end marker, which must be there."""
    end = int(np.flatnonzero(row == EOS)[0])
    return [int(np.flatnonzero(lm_ids == i)[0]) for i in row[:end]]


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "num_return_sequences": 7},
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 31, "num_return_sequences": 5},
    ],
)
@pytest.mark.parametrize("marker", ["prompt_length", "begin_id"])
def test_whatever_is_generated_decodes(fast, model, lm_ids, how, marker):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    prompt = torch.tensor([[2, 3, BEGIN], [PAD, 2, BEGIN]])
    where = {"prompt_length": 3} if marker == "prompt_length" else {"begin_id": BEGIN}
    processor = ActionLogitsProcessor(fast.constraint(), lm_ids, eos_id=EOS, **where)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=[processor],
        max_new_tokens=fast.layout.max_len + 1,
        pad_token_id=PAD,
        eos_token_id=EOS,
        **how,
    )
    rows = [codes_of(row, lm_ids) for row in out.numpy()[:, 3:]]
    decoded = fast.decode(rows)
    assert decoded.valid.all(), decoded.reasons


def test_states_follow_prefixes_not_rows(fast, lm_ids):
    """Rows swapped, dropped and repeated between steps get the masks of a processor that never saw another step."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    sequences = walk(fast.constraint(), 5, 3)
    size = fast.vocab_size + WORDS
    kept = ActionLogitsProcessor(fast.constraint(), lm_ids, eos_id=EOS, prompt_length=1)
    for step in range(min(map(len, sequences)) + 1):
        rows = rng.integers(0, 5, 4)
        ids = torch.tensor([[BEGIN, *(int(lm_ids[c]) for c in sequences[r][:step])] for r in rows])
        scores = torch.from_numpy(rng.normal(size=(4, size)).astype(np.float32))
        fresh = ActionLogitsProcessor(fast.constraint(), lm_ids, eos_id=EOS, prompt_length=1)
        got = kept(ids, scores)
        assert torch.equal(got, fresh(ids, scores))
        finite = torch.isfinite(got)
        assert torch.equal(got[finite], scores[finite])
        assert finite.any(1).all()


def test_rows_before_their_marker_are_free_and_finished_rows_only_end(fast, lm_ids):
    torch = pytest.importorskip("torch")
    scores = torch.zeros(3, fast.vocab_size + WORDS)
    processor = ActionLogitsProcessor(fast.constraint(), lm_ids, eos_id=EOS, begin_id=BEGIN)
    whole = [int(lm_ids[c]) for c in walk(fast.constraint(), 1, 4)[0]]
    width = len(whole) + 1
    rows = [[2] * width, [BEGIN, *whole], [*[2] * (width - 1), BEGIN]]
    out = torch.isfinite(processor(torch.tensor(rows), scores))
    assert out[0].all()
    assert out[1].nonzero().flatten().tolist() == [EOS]
    assert not out[2, EOS]
    assert out[2, torch.from_numpy(lm_ids)].sum() == fast.constraint().allowed(fast.constraint().start()).sum()


def test_what_does_not_fit_together_is_refused(fast, lm_ids):
    torch = pytest.importorskip("torch")
    constraint = fast.constraint()
    with pytest.raises(ConfigError, match="one language-model id"):
        ActionLogitsProcessor(constraint, lm_ids[:-1], eos_id=EOS, prompt_length=0)
    with pytest.raises(ConfigError, match="also the id of a code"):
        ActionLogitsProcessor(constraint, lm_ids, eos_id=int(lm_ids[3]), prompt_length=0)
    with pytest.raises(ConfigError, match="either prompt_length or begin_id"):
        ActionLogitsProcessor(constraint, lm_ids, eos_id=EOS)
    processor = ActionLogitsProcessor(constraint, lm_ids, eos_id=EOS, prompt_length=0)
    with pytest.raises(TokenError, match="resize its embeddings"):
        processor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 7))
    with pytest.raises(TokenError, match="check prompt_length"):
        processor(torch.tensor([[2, 3]]), torch.zeros(1, fast.vocab_size + WORDS))
