"""The byte-pair encoder against the `tokenizers` library, on random, regular and adversarial text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actok.core import ArtifactError, ConfigError
from actok.signal.bpe import FIRST_CHAR, read_bpe, train_bpe
from actok.signal.utf8 import BYTE_OF_CHAR, decode_rows
from realdata import REAL, needs_real

ZERO = 23


def streams(count: int, length: int, seed: int) -> np.ndarray:
    """Symbol rows like DCT coefficients: large and varied first, then rarer and rarer steps away from a long zero run."""
    rng = np.random.default_rng(seed)
    width = 9 * np.exp(-np.linspace(0, 6, length))
    return np.clip(np.rint(rng.normal(size=(count, length)) * width), -ZERO, ZERO).astype(np.int64) + ZERO


@pytest.fixture(scope="module")
def trained():
    return read_bpe(
        train_bpe([streams(600, 137, 0), streams(200, 61, 1)], alphabet=2 * ZERO + 1, vocab=311, max_token_length=64)
    )


def byte_level(texts: list[str], vocab: int) -> bytes:
    """A byte-level BPE behind the GPT-2 regex, as the published files are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def bytewise():
    texts = ["".join(map(chr, row)) for offset in (20, 90, 340, 2030) for row in streams(150, 83, offset) + offset]
    return read_bpe(byte_level([*texts, *(" it's we'll  they've 12345 \n\t x!! 'd" * 3 for _ in range(40))], 701))


def assert_same(bpe, points: np.ndarray) -> None:
    pytest.importorskip("numba")
    assert bpe.accelerated
    ids, offsets = bpe.encode(points)
    expected, expected_offsets = bpe.encode_with_library(points)
    np.testing.assert_array_equal(offsets, expected_offsets)
    np.testing.assert_array_equal(ids, expected)
    decoded = bpe.decode(ids, offsets)
    np.testing.assert_array_equal(decoded.flat, points.reshape(-1))
    np.testing.assert_array_equal(np.diff(decoded.offsets), np.full(len(points), points.shape[1]))
    assert decoded.readable.all()


@pytest.mark.parametrize("length", [1, 2, 41, 137, 700])
def test_compiled_encoder_equals_the_library_on_coefficient_streams(trained, length):
    assert_same(trained, streams(97, length, 7) + FIRST_CHAR)


def test_compiled_encoder_equals_the_library_on_noise_runs_and_periods(trained):
    rng = np.random.default_rng(3)
    alphabet = 2 * ZERO + 1
    rows = [rng.integers(0, alphabet, 131) for _ in range(50)]
    rows += [np.full(131, s) for s in range(alphabet)]
    rows += [np.resize(rng.integers(ZERO - 1, ZERO + 2, p), 131) for p in range(1, 60)]
    rows += [np.where(np.arange(131) < k, rng.integers(ZERO - 2, ZERO + 3, 131), ZERO) for k in range(131)]
    assert_same(trained, np.stack(rows) + FIRST_CHAR)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(ZERO - 2, ZERO + 2), min_size=1, max_size=200))
def test_compiled_encoder_equals_the_library_on_any_stream(trained, symbols):
    assert_same(trained, np.array([symbols]) + FIRST_CHAR)


@settings(max_examples=60, deadline=None)
@given(
    st.text(
        st.sampled_from("  \n\t\u00a0\u2003\x1c\x85'strevmldSTa1\u0663\u00b2!.\u0301\u0162\u017f\u4e00\ud7ff"),
        min_size=1,
    )
)
def test_byte_level_splits_as_the_regex_does(bytewise, text):
    assert_same(bytewise, np.array([[ord(c) for c in text]]))


@pytest.mark.parametrize("limit", [128, 400, 2100, 0xD800])
def test_byte_level_equals_the_library_on_random_code_points(bytewise, limit):
    assert_same(bytewise, np.random.default_rng(limit).integers(0, limit, (61, 103)))


@needs_real
def test_published_files_equal_the_library_on_text_digits_and_blanks():
    bpe = read_bpe((REAL / "fast_plus" / "tokenizer.json").read_bytes())
    rng = np.random.default_rng(5)
    assert_same(bpe, rng.integers(0, 1500, (101, 89)))
    assert_same(bpe, rng.integers(350, 359, (101, 700)))
    assert_same(bpe, rng.choice([ord(c) for c in " '\nstrevmld1a!\u0162"], (997, 47)))


def test_without_numba_the_library_gives_the_same(trained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "actok.signal.bpe_numba", None)
    plain = read_bpe(trained.source + b"\n")  # other bytes, so not the cached one
    assert not plain.accelerated
    points = streams(31, 59, 2) + FIRST_CHAR
    for mine, other in zip(plain.encode(points), trained.encode(points), strict=True):
        np.testing.assert_array_equal(mine, other)
    ids, offsets = plain.encode(points)
    np.testing.assert_array_equal(plain.decode(ids, offsets).flat, points.reshape(-1))


def test_merges_that_break_the_longest_match_fall_back_to_the_library():
    """Two merges make the same token; and a token whose own text encodes to something else."""
    for merges in ([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]], [["b", "c"], ["a", "b"], ["ab", "c"]]):
        body = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, "merges": merges}
        bpe = read_bpe(json.dumps({"model": body, "decoder": {"type": "Fuse"}, "added_tokens": []}).encode())
        assert not bpe.accelerated
        ids, _ = bpe.encode(np.array([[97, 98, 99]]))
        assert ids.tolist() == Tokenizer.from_str(bpe.source.decode()).encode("abc").ids


def test_training_gives_every_symbol_its_own_id_and_caps_the_length(trained):
    alphabet = 2 * ZERO + 1
    np.testing.assert_array_equal(trained.atoms[:alphabet], FIRST_CHAR + np.arange(alphabet))
    assert (trained.lengths[:alphabet] == 1).all()
    assert trained.vocab_size == 311
    assert 1 < trained.lengths.max() <= 64
    again = train_bpe([streams(600, 137, 0), streams(200, 61, 1)], alphabet=alphabet, vocab=311, max_token_length=64)
    assert again == trained.source
    with pytest.raises(ConfigError, match="47 symbols do not fit into a vocabulary of 43"):
        train_bpe([streams(3, 5, 0)], alphabet=47, vocab=43, max_token_length=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(added_tokens=[{"id": 0, "content": "x"}]), "added_tokens"),
        (lambda b: b["model"].update(dropout=0.1), "dropout"),
        (lambda b: b["model"].update(type="Unigram"), "Unigram"),
        (lambda b: b.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda b: b["model"]["merges"].append(["a", "zz"]), "merge of tokens that it does not list"),
        (lambda b: b["model"]["vocab"].update(q=5000), "ids of its"),
        (lambda b: b.pop("model"), "truncated"),
    ],
)
def test_files_that_are_no_fast_tokenizer_are_refused(trained, change, message):
    body = json.loads(trained.source)
    change(body)
    with pytest.raises(ArtifactError, match=message):
        read_bpe(json.dumps(body).encode())


def test_byte_characters_are_those_of_the_library():
    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=7), min_size=1, max_size=5))
def test_undecodable_bytes_stay_within_their_row(rows):
    data = np.frombuffer(b"".join(rows), np.uint8)
    starts = np.array([sum(byte & 0xC0 != 0x80 for byte in row) for row in rows])
    out = decode_rows(data, np.cumsum([0, *map(len, rows)]), starts)
    for b, row in enumerate(rows):
        points = out["flat"][out["offsets"][b] : out["offsets"][b + 1]]
        text = row.decode(errors="replace")
        try:
            row.decode()
            assert out["readable"][b]
            assert points.tolist() == [ord(c) for c in text]
        except UnicodeDecodeError:
            assert not out["readable"][b]
            assert points.tolist() == [-1 if c == "\ufffd" else ord(c) for c in text]
