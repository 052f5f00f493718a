"""Noise, wrong tokens, edits and timing, on tokenizers whose answers are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ActionSpace, ChunkContext, DataError, Decoded, FitPart, TokenLayout, Tokens
from actok.evaluation.comparison import Comparison
from actok.evaluation.latency import measure_latency
from actok.evaluation.robustness import edit_distance, noise_stability, valid_share, wrong_token
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics
from actok.tokenizers.bins import BinsConfig, BinsTokenizer

B, T, D, K = 13, 5, 3, 32


@pytest.fixture(scope="module")
def chunks() -> np.ndarray:
    return np.random.default_rng(0).uniform(-2, 2, (B, T, D)).astype(np.float32)


@pytest.fixture(scope="module")
def bins(chunks) -> BinsTokenizer:
    part = FitPart(actions=chunks, space=ActionSpace.raw(D))
    return BinsTokenizer.fit([part], BinsConfig(bins=K, normaliser="min_max"))


class Picky(BinsTokenizer):
    """Bins whose sequences decode only where no code is odd, of lengths up to N: not total, not fixed."""

    def layout_for(self, horizon=None, embodiment=None) -> TokenLayout:
        return TokenLayout.variable(self.config.bins, 1, T * D)

    def decode(self, ids, context=None, *, horizon=None, repair=None) -> Decoded:
        rows = [np.asarray(r) for r in (ids if not isinstance(ids, Tokens) else list(ids))]
        valid = np.array([len(r) == T * D and not (r % 2).any() for r in rows])
        actions = np.full((len(rows), T, D), np.nan, np.float32)
        for i in np.flatnonzero(valid):
            actions[i] = rows[i].reshape(T, D)
        zeros = np.zeros(len(rows), int)
        return Decoded(actions=actions, valid=valid, slots_used=zeros, clipped=zeros, repaired=zeros > 0)


def levenshtein(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=7)), max_size=5)
)
@settings(max_examples=60, deadline=None)
def test_edit_distance_equals_the_textbook(pairs):
    found = edit_distance([np.array(a, int) for a, _ in pairs], [np.array(b, int) for _, b in pairs])
    assert found.tolist() == [levenshtein(a, b) for a, b in pairs]


def test_edit_distance_takes_pairs():
    with pytest.raises(DataError, match="1 sequences against 2"):
        edit_distance([np.array([1])], [np.array([1]), np.array([2])])


def test_noise_rate_counts_changed_positions_and_grows(bins, chunks):
    normaliser = Normaliser.make("min_max", Statistics.from_array(chunks))
    sigma = (0.0, 0.004, 0.05, 0.5)
    found = noise_stability(bins, chunks, normaliser, ChunkContext(), sigma=sigma, seed=3)
    assert found.token_error_rate[0] == 0
    assert list(found.token_error_rate) == sorted(found.token_error_rate)
    draw = np.random.default_rng(3).standard_normal(chunks.shape)
    codes, noisy = (
        np.clip(np.floor((normaliser(x) + 1) / 2 * K), 0, K - 1)
        for x in (chunks.astype(float), chunks + 0.05 * draw * normaliser.half)
    )
    assert found.token_error_rate[2] == pytest.approx((codes != noisy).mean(), abs=2 / codes.size)
    assert found == noise_stability(bins, chunks, normaliser, ChunkContext(), sigma=sigma, seed=3)


def test_a_constant_dimension_gets_no_noise(chunks):
    still = chunks.copy()
    still[:, :, 1] = 7.0
    with pytest.warns(UserWarning, match="never changes"):
        tokenizer = BinsTokenizer.fit([FitPart(actions=still, space=ActionSpace.raw(D))], BinsConfig(bins=K))
    seen = []

    class Watched:
        def encode(self, actions, context):
            seen.append(actions[:, :, 1])
            return tokenizer.encode(actions, context)

    normaliser = Normaliser.make("quantile", Statistics.from_array(still))
    noise_stability(Watched(), still, normaliser, ChunkContext(), sigma=(0.5,))
    assert len(seen) == 2
    assert all((x == 7.0).all() for x in seen)


def compare(tokenizer, chunks) -> tuple[Tokens, Comparison]:
    tokens = tokenizer.encode(chunks)
    clean = Comparison(
        reference=chunks,
        reconstruction=tokenizer.decode(tokens).actions,
        space=ActionSpace.raw(D),
        normaliser=Normaliser.make("min_max", Statistics.from_array(chunks)),
    )
    return tokens, clean


def test_one_wrong_bin_moves_one_value(bins, chunks):
    found = []
    for seed in range(200):
        tokens, clean = compare(bins, chunks)
        damage = wrong_token(bins, tokens, clean, ChunkContext(), seed=seed)
        assert damage.undecodable == 0
        found.append(damage.l1)
    # A code is replaced by another one, uniformly: |i - j| bins of width 2 / K on average, in one of T D values.
    flat = bins.encode(chunks).flat
    expected = np.mean([np.abs(np.delete(np.arange(K), c) - c).mean() for c in flat]) * (2 / K) / (T * D)
    assert np.mean(found) == pytest.approx(expected, rel=0.05)


def test_total_tokenizers_decode_anything_of_the_right_length(bins, chunks):
    found = valid_share(bins, bins.encode(chunks), ChunkContext())
    assert (found.encoded, found.random, found.substituted, found.deleted, found.inserted) == (1, 1, 1, 0, 0)


def test_a_picky_tokenizer_is_found_out(bins, chunks):
    picky = Picky(bins.config, bins._embodiments, T)
    even = np.zeros((B, T * D), np.int64)
    tokens = Tokens(
        flat=even.reshape(-1),
        offsets=np.arange(B + 1) * T * D,
        horizon=T,
        fixed_length=None,
        out_of_range=np.zeros(B, int),
        saturated=np.zeros(B, int),
    )
    shares = [valid_share(picky, tokens, ChunkContext(), seed=s) for s in range(40)]
    assert {s.encoded for s in shares} == {1.0}
    assert {s.random for s in shares} == {0.0}  # 15 even codes by chance: 2^-15 a sequence
    assert {s.deleted for s in shares} == {s.inserted for s in shares} == {0.0}
    # Another code than 0 is odd 16 times out of 31.
    assert np.mean([s.substituted for s in shares]) == pytest.approx(15 / 31, abs=0.06)
    clean = Comparison(
        reference=chunks,
        reconstruction=picky.decode(tokens).actions,
        space=ActionSpace.raw(D),
        normaliser=Normaliser.identity(D),
    )
    damage = [wrong_token(picky, tokens, clean, ChunkContext(), seed=s) for s in range(40)]
    assert np.mean([d.undecodable for d in damage]) == pytest.approx(16 / 31, abs=0.06)
    # What still decodes has one even code c > 0 in T D values: 16 on average.
    assert np.mean([d.l1 for d in damage]) == pytest.approx(16 / (T * D), rel=0.1)


def test_an_undecodable_original_is_not_damaged(bins, chunks):
    tokens, clean = compare(bins, chunks)
    lost = Comparison(
        reference=clean.reference,
        reconstruction=np.full_like(clean.reference, np.nan),
        space=clean.space,
        normaliser=clean.normaliser,
    )
    assert wrong_token(bins, tokens, lost, ChunkContext()).l1 is None


def test_latency_is_positive_and_bounded_in_time(bins, chunks):
    found = measure_latency(bins, chunks, ChunkContext(), budget_s=0.1)
    assert found.batch == B
    for timing in (found.encode, found.decode):
        assert timing.chunks_per_second > 0
        assert 0 < timing.p50_ms <= timing.p99_ms
        assert timing.runs >= 3
    with pytest.raises(DataError, match="no chunk to time"):
        measure_latency(bins, chunks[:0], ChunkContext())
