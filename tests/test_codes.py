"""Length, bits, code use and n-gram predictability, against hand computation and a plain implementation."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import DataError, TokenLayout, Tokens
from actok.evaluation.codes import CodeSequences, code_use, ngram_fit, rate


def sequences(rows, *, vocab=7, tables=None, fixed=True) -> CodeSequences:
    """Rows of codes; `tables` gives (table, vocabulary) of each position of a fixed layout."""
    lengths = np.array([len(r) for r in rows])
    longest = int(lengths.max())
    if fixed:
        coords = np.zeros((longest, 3), int)
        table = np.array([t for t, _ in tables]) if tables else None
        layout = TokenLayout.uniform(np.array([v for _, v in tables]) if tables else vocab, coords, table=table)
    else:
        layout = TokenLayout.variable(vocab, 0, longest)
    flat = np.concatenate([np.asarray(r, np.int64) for r in rows])
    zeros = np.zeros(len(rows), int)
    tokens = Tokens(
        flat=flat,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        horizon=3,
        fixed_length=longest if fixed else None,
        out_of_range=zeros,
        saturated=zeros,
    )
    return CodeSequences.of(tokens, layout)


def test_rate_of_variable_lengths():
    rows = [[0] * n for n in (2, 3, 7)]
    found = rate(sequences(rows, vocab=8, fixed=False), sequences(rows, vocab=8, fixed=False), values=15)
    assert (found.tokens_mean, found.tokens_p50) == (4, 3)
    assert found.tokens_p99 == pytest.approx(np.quantile([2, 3, 7], 0.99))
    assert found.bits_fixed == pytest.approx(4 * 3)
    assert found.over_bins == pytest.approx(15 * 8 / 12)
    assert found.over_float32 == pytest.approx(15 * 32 / 12)


def test_rate_of_mixed_vocabularies_and_the_order_0_code():
    tables = [(0, 4), (1, 32), (0, 4)]
    train = sequences([[0, 5, 1], [0, 5, 0], [2, 6, 0]], tables=tables)
    test = sequences([[0, 5, 3]], tables=tables)
    found = rate(train, test, values=10)
    assert found.bits_fixed == pytest.approx(2 + 5 + 2)
    # Table 0: counts 4, 1, 1, 0 of 6, plus 1/2 each over 8; table 1: code 5 twice of 3, plus 1/2 each over 19.
    expected = -np.log2(4.5 / 8) - np.log2(0.5 / 8) - np.log2(2.5 / 19)
    assert found.bits_entropy == pytest.approx(expected)


def test_entropy_coding_never_beats_the_entropy_of_its_own_data_and_nears_it():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    rows = rng.choice(4, size=(3000, 11), p=p)
    codes = sequences(rows, vocab=4)
    counts = np.bincount(rows.reshape(-1)) / rows.size
    entropy = -(counts * np.log2(counts)).sum() * 11
    found = rate(codes, codes, values=11)
    assert entropy <= found.bits_entropy <= entropy * 1.001
    assert found.bits_entropy <= found.bits_fixed


def test_code_use():
    (found,) = code_use(sequences([[0, 0, 1], [0, 3, 1]], vocab=5))
    assert (found.size, found.drawn, found.used, found.f_max) == (5, 6, 3 / 5, 0.5)
    assert found.used_if_uniform == pytest.approx(1 - (4 / 5) ** 6)
    p = np.array([3, 2, 1]) / 6
    assert found.entropy == pytest.approx(-(p * np.log2(p)).sum() / np.log2(5))
    assert found.frequencies == pytest.approx([0.5, 0.3333, 0.1667])
    assert found.ranks == (1, 2, 3)
    assert (found.above_1e3, found.above_2e2) == (3, 3)


def test_code_use_of_several_tables():
    use = code_use(sequences([[0, 2], [0, 1], [0, 2]], tables=[(0, 1), (4, 3)]))
    assert [(u.table, u.size, u.drawn) for u in use] == [(0, 1, 3), (4, 3, 3)]
    assert (use[0].used, use[0].entropy, use[0].f_max) == (1, 0, 1)
    assert use[1].used == pytest.approx(2 / 3)


@given(st.integers(2, 60), st.integers(1, 400), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_entropy_is_at_most_that_of_uniform_codes(size, drawn, seed):
    rng = np.random.default_rng(seed)
    codes = np.minimum(rng.geometric(rng.uniform(0.01, 0.9), (1, drawn)) - 1, size - 1)
    (found,) = code_use(sequences(codes, vocab=size))
    assert 0 <= found.entropy <= 1 + 1e-12
    assert 1 / size <= found.used <= 1
    assert found.f_max >= 1 / size


def test_thresholds_of_frequency():
    counts = {0: 9700, 1: 250, 2: 40, 3: 10}
    rows = [[c] * n for c, n in counts.items()]
    (found,) = code_use(sequences([np.concatenate(rows)], vocab=6))
    assert (found.above_1e3, found.above_2e2) == (3, 2)  # 1e-3 itself is not above


def witten_bell(train, test, order, vocab, *, end):
    """The model of `ngram_fit` in plain Python for one table: bits of the test set and its number of symbols."""
    follows = defaultdict(lambda: defaultdict(int))

    def symbols(row):
        return [*row, "end"] if end else list(row)

    def history(row, i, n):
        return tuple((["start"] * order + row)[i + order - n : i + order])

    for row in train:
        row = symbols(row)
        for i, w in enumerate(row):
            for n in range(order):
                follows[history(row, i, n)][w] += 1

    def p(w, h):
        lower = p(w, h[1:]) if h else 1 / (vocab + end)
        seen = follows.get(h)
        if not seen:
            return lower
        return (seen.get(w, 0) + len(seen) * lower) / (sum(seen.values()) + len(seen))

    total, count = 0.0, 0
    for row in test:
        row = symbols(row)
        for i, w in enumerate(row):
            total -= np.log2(p(w, history(row, i, order - 1)))
            count += 1
    return total, count


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_ngram_equals_a_plain_implementation(seed, order, fixed):
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(1, 6))

    def draw(n):
        lengths = np.full(n, 5) if fixed else np.append(rng.integers(0, 6, n - 1), 5)
        return [list(map(int, rng.integers(0, vocab, k))) for k in lengths]

    train, test = draw(int(rng.integers(1, 12))), draw(3)
    bits, count = witten_bell(train, test, order, vocab, end=not fixed)
    found = ngram_fit(sequences(train, vocab=vocab, fixed=fixed), sequences(test, vocab=vocab, fixed=fixed), order)
    assert found.bits_per_chunk == pytest.approx(bits / len(test))
    assert found.perplexity == pytest.approx(2 ** (bits / count))


def test_ngram_keeps_tables_apart():
    # Table 0 always says 2, table 1 always says 0: each is certain by itself, a pooled model would be unsure.
    tables = [(0, 3), (1, 3)]
    train = sequences([[2, 0]] * 500, tables=tables)
    for order in (1, 2, 3):
        assert ngram_fit(train, train, order).perplexity == pytest.approx(1, abs=0.01)


def test_ngram_of_uniform_codes_is_their_number_and_of_a_cycle_is_one():
    rng = np.random.default_rng(2)
    train, test = (sequences(rng.integers(0, 13, (2000, 17)), vocab=13) for _ in range(2))
    assert ngram_fit(train, test, 1).perplexity == pytest.approx(13, rel=0.01)
    cycle = sequences([[(i + s) % 5 for i in range(11)] for s in range(5)] * 200, vocab=5)
    assert ngram_fit(cycle, cycle, 1).perplexity == pytest.approx(5, rel=0.01)
    # Beyond the first code of a chunk nothing is left to learn.
    assert ngram_fit(cycle, cycle, 2).bits_per_chunk == pytest.approx(np.log2(5), rel=0.05)


def test_ngram_gives_unseen_codes_and_histories_a_finite_price():
    train = sequences([[0, 0, 0]], vocab=11)
    test = sequences([[10, 9, 8]], vocab=11)
    for order in (1, 2, 3):
        assert np.isfinite(ngram_fit(train, test, order).perplexity)


def test_bad_input_is_named():
    codes = sequences([[0, 1]], vocab=3)
    with pytest.raises(DataError, match="order is 0"):
        ngram_fit(codes, codes, 0)
    huge = sequences([[0, 1]], vocab=2**22)
    with pytest.raises(DataError, match="does not fit in 64-bit"):
        ngram_fit(huge, huge, 3)
    zeros = np.zeros(1, int)
    tokens = Tokens(
        flat=np.zeros(4, int),
        offsets=np.array([0, 4]),
        horizon=1,
        fixed_length=None,
        out_of_range=zeros,
        saturated=zeros,
    )
    with pytest.raises(DataError, match="4 tokens exceeds the layout's 3"):
        CodeSequences.of(tokens, TokenLayout.variable(5, 1, 3))
