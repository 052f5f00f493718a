"""DCT and PCA scalar tokens: bits, ranges, order, prefixes, horizons."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from actok.core import ActionSpace, ChunkContext, ConfigError, FitPart, SpaceMismatchError, TokenError, find_preset
from actok.signal.scalar_quantise import UniformQuantiser, allocate_bits
from actok.signal.statistics import Statistics
from actok.tokenizers.dct import DctTokenizer, cosines
from actok.tokenizers.pca import PcaTokenizer
from actok.tokenizers.scalars import ScalarConfig
from realdata import REAL, needs_real

T, D = 17, 5
CONSTANT = 3
KINDS = [DctTokenizer, PcaTokenizer]


def chunks(count: int = 307, steps: int = T, seed: int = 0) -> np.ndarray:
    """Smooth chunks [count, steps, D] of 3 hidden movements, a constant dimension and a little noise."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(3, D))
    u = np.linspace(0, 1, steps)[None, :, None]
    phase, pace = rng.uniform(0, 3, (2, count, 1, 3))
    waves = np.sin(pace * u + phase) @ mix + 0.003 * rng.normal(size=(count, steps, D))
    waves[:, :, CONSTANT] = -4.5
    return waves.astype(np.float32)


def fit(cls, actions: np.ndarray | None = None, limit: float | None = 100.0, **options):
    actions = chunks() if actions is None else actions
    space = ActionSpace.raw(actions.shape[2], "arm")
    if limit is not None:
        space = ActionSpace.from_dict({**space.to_dict(), "low": [-limit] * space.dim, "high": [limit] * space.dim})
    return cls.fit([FitPart(actions=actions, space=space)], ScalarConfig(**options))


@pytest.fixture(scope="module", params=KINDS, ids=lambda c: c.kind)
def tokenizer(request):
    return fit(request.param, scalars=23, bits=5)


pytestmark = pytest.mark.filterwarnings("ignore:.*never changes")


# -- bits and ranges ------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    variance=st.lists(st.floats(0, 1e6), min_size=1, max_size=29).filter(lambda v: max(v) > 1e-9),
    mean=st.floats(0.1, 8),
    largest=st.integers(3, 12),
)
@example(variance=[1.0, 5e-324], mean=3.0, largest=3)
def test_bits_sum_to_the_budget_and_follow_the_variance(variance: list[float], mean: float, largest: int) -> None:
    values = np.array(variance)
    budget = max(2, round(mean * len(values)))
    bits = allocate_bits(values, budget, largest=largest)
    assert set(bits) <= {0, *range(2, largest + 1)}
    assert bits.sum() == min(budget, largest * (values > 0).sum())
    assert (np.diff(bits[np.argsort(-values, kind="stable")]) <= 0).all()
    assert (bits[values == 0] == 0).all()


def test_equal_scalars_share_and_each_fourfold_variance_earns_a_bit() -> None:
    assert allocate_bits(np.ones(7), 35).tolist() == [5] * 7
    assert allocate_bits(4.0 ** np.arange(5), 20).tolist() == [2, 3, 4, 5, 6]
    assert allocate_bits(np.array([1.0, 1e-9]), 9, largest=8).tolist() == [7, 2]


def test_a_budget_below_one_scalar_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget of 1 bits"):
        allocate_bits(np.ones(3), 1)


def test_a_uniform_scalar_gets_its_whole_range_and_a_tail_is_cut_where_that_helps() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.uniform(-2, 3, 20011), rng.standard_t(3, 20011), np.full(20011, 0.7)], axis=1)
    quantiser = UniformQuantiser.fit(values, np.array([8, 3, 4]))
    np.testing.assert_allclose(quantiser.low[0], -2, atol=0.01)
    np.testing.assert_allclose(quantiser.step[0], 5 / 256, rtol=0.01)
    codes, outside = quantiser.encode(values)
    decoded = quantiser.decode(codes)
    np.testing.assert_allclose(np.square(decoded - values)[:, 0].mean(), (5 / 256) ** 2 / 12, rtol=0.05)
    assert outside[:, 0].mean() < 0.005
    assert 0 < outside[:, 1].mean() < 0.1
    whole = (values[:, 1].max() - values[:, 1].min()) / 8
    assert quantiser.step[1] < whole / 4
    assert np.square(decoded - values)[:, 1].mean() < 0.3 * values[:, 1].var()
    np.testing.assert_array_equal(decoded[:, 2], 0.7)
    np.testing.assert_array_equal(quantiser.encode(decoded)[0], codes)


# -- the transforms against independent implementations -------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, T, 31])
def test_cosines_are_the_orthonormal_dct_in_units_of_amplitude(steps: int) -> None:
    x = chunks(3, steps)
    ours = np.matmul(cosines(np.arange(steps), steps) / steps, x.astype(np.float64))
    np.testing.assert_allclose(ours, dct(x.astype(np.float64), axis=1, norm="ortho") / np.sqrt(steps), atol=1e-10)
    np.testing.assert_allclose(np.matmul(cosines(np.arange(steps), steps).T, ours), x, atol=1e-6)


def test_dct_keeps_the_coefficients_of_most_variance() -> None:
    tokenizer = fit(DctTokenizer, scalars=19, bits=8)
    coefficients = dct(tokenizer.normalise(chunks()).astype(np.float64), axis=1, norm="ortho").var(0)
    kept = tokenizer.layout.coords[:, 1:]
    largest = np.stack(np.unravel_index(np.argsort(-coefficients, axis=None)[:19], (T, D)), axis=1)
    np.testing.assert_array_equal(kept, largest)


def test_pca_leaves_what_a_truncated_svd_leaves() -> None:
    tokenizer = fit(PcaTokenizer, scalars=11, bits=16, max_bits=16)
    flat = tokenizer.normalise(chunks()).astype(np.float64).reshape(307, -1)
    singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    error = tokenizer.normalise(tokenizer.decode(tokenizer.encode(chunks())).actions) - flat.reshape(307, T, D)
    np.testing.assert_allclose(np.square(error).sum(), np.square(singular[11:]).sum(), rtol=0.02)


# -- laws of both ---------------------------------------------------------------------------------------------------


def test_layout_states_bits_ranks_and_budget(tokenizer) -> None:
    layout = tokenizer.layout
    bits = np.log2(layout.vocab).astype(int)
    assert bits.sum() == 23 * 5
    assert (np.diff(bits) <= 0).all()
    np.testing.assert_array_equal(layout.coords[:, 0], np.arange(layout.max_len))
    np.testing.assert_array_equal(layout.table, np.arange(layout.max_len))
    assert layout.prefixes[:3] == (1, 2, 4)
    assert layout.prefixes[-1] == layout.fixed_length


def test_every_sequence_decodes_within_the_limits(tokenizer) -> None:
    rng = np.random.default_rng(1)
    tight = fit(type(tokenizer), limit=None, scalars=23, bits=5)
    for horizon in (1, 2, T, 2 * T + 3):
        layout = tight.layout_for(horizon)
        ids = rng.integers(0, layout.vocab, (29, layout.max_len))
        decoded = tight.decode(ids, horizon=horizon)
        assert decoded.valid.all()
        assert decoded.actions.shape == (29, horizon, D)
        low, high = tight.embodiment().normaliser.limits
        assert (decoded.actions >= low - 1e-6).all()
        assert (decoded.actions <= high + 1e-6).all()
        np.testing.assert_allclose(decoded.actions[:, :, CONSTANT], -4.5, atol=1e-6)


def test_codes_of_a_decoded_chunk_are_the_same_codes(tokenizer) -> None:
    ids = tokenizer.encode(chunks(31, seed=2)).ids
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids).actions).ids, ids)


def test_longer_prefixes_err_less_on_held_out_chunks(tokenizer) -> None:
    held_out = chunks(211, seed=3)
    ids = tokenizer.encode(held_out).ids
    errors = []
    for n in tokenizer.layout.prefixes:
        decoded = tokenizer.decode(ids[:, :n])
        assert decoded.valid.all()
        assert (decoded.slots_used == n).all()
        errors.append(np.square(tokenizer.normalise(decoded.actions) - tokenizer.normalise(held_out)).mean())
    assert (np.diff(errors) <= 0.01 * np.array(errors[:-1])).all()
    assert errors[-1] < errors[0] / 20


def test_a_length_that_is_no_prefix_is_flagged_beside_ones_that_are(tokenizer) -> None:
    n = tokenizer.layout.fixed_length
    decoded = tokenizer.decode([[0] * n, [0] * 3, [0] * 4, [0] * (n + 1), []])
    assert decoded.valid.tolist() == [True, False, True, False, False]
    assert np.isnan(decoded.actions[[1, 3, 4]]).all()
    assert np.isfinite(decoded.actions[[0, 2]]).all()
    assert "prefix" in decoded.reasons[1]


def test_each_position_has_its_own_vocabulary_in_prefixes_too(tokenizer) -> None:
    vocab = tokenizer.layout.vocab
    for n in tokenizer.layout.prefixes:
        top = (vocab[:n] - 1).tolist()
        assert tokenizer.decode([top]).valid.all()
        with pytest.raises(TokenError, match=f"token {vocab[n - 1]} at position {n - 1} "):
            tokenizer.decode([[*top[:-1], int(vocab[n - 1])], [0]])


@pytest.mark.parametrize("steps", [1, 3, T - 1, T + 1, 3 * T + 2])
def test_other_horizons_come_back(tokenizer, steps: int) -> None:
    actions = chunks(37, max(steps, T), seed=4)[:, :steps]
    tokens = tokenizer.encode(actions)
    assert tokens.ids.shape[1] == tokenizer.layout_for(steps).fixed_length
    decoded = tokenizer.decode(tokens).actions
    error = np.square(tokenizer.normalise(decoded) - tokenizer.normalise(actions)).mean()
    mean = np.square(tokenizer.normalise(actions) - tokenizer.normalise(chunks(1, T)).mean()).mean()
    assert error < 0.05 * mean


def test_dct_describes_the_same_movement_at_any_number_of_steps() -> None:
    tokenizer = fit(DctTokenizer, scalars=23, bits=8)
    ids = tokenizer.encode(chunks(7, seed=5)).ids
    fine = tokenizer.decode(ids, horizon=3 * T).actions
    # step t of T lies in the middle of its share of the chunk, and so at step 3 t + 1 of 3 T
    np.testing.assert_allclose(fine[:, 1::3], tokenizer.decode(ids).actions, atol=1e-5)
    assert tokenizer.layout_for(3 * T).fixed_length == tokenizer.layout.fixed_length


def test_pca_windows_are_independent_and_the_ragged_one_is_held() -> None:
    tokenizer = fit(PcaTokenizer, scalars=13, bits=8)
    actions = chunks(3, 2 * T + 5, seed=6)
    tokens = tokenizer.encode(actions)
    layout = tokenizer.layout_for(2 * T + 5)
    assert layout.blocks[1] == (3, 4, 5)
    assert layout.coords[:4].tolist() == [[0, 0, -1], [0, 1, -1], [0, 2, -1], [1, 0, -1]]
    window = tokens.ids.reshape(3, -1, 3)
    np.testing.assert_array_equal(window[:, :, 1], tokenizer.encode(actions[:, T : 2 * T]).ids)
    held = np.concatenate([actions[:, 2 * T :], np.repeat(actions[:, -1:], T - 5, axis=1)], axis=1)
    np.testing.assert_array_equal(window[:, :, 2], tokenizer.encode(held).ids)
    shortened = tokenizer.decode(tokens.ids[:, : layout.prefixes[1]], horizon=2 * T + 5)
    assert layout.prefixes[1] == 6
    assert shortened.valid.all()


def test_values_beyond_the_ranges_are_counted(tokenizer) -> None:
    actions = chunks()[:3]
    quiet = tokenizer.encode(actions).saturated
    actions[1] *= 20
    loud = tokenizer.encode(actions)
    assert loud.saturated[1] > quiet[1] + 5
    assert loud.saturated[[0, 2]].tolist() == quiet[[0, 2]].tolist()
    assert loud.out_of_range[1] > 0


def test_batch_is_a_stack_of_singles_and_torch_equals_numpy(tokenizer) -> None:
    torch = pytest.importorskip("torch")
    actions = chunks(19, seed=7)
    ids = tokenizer.encode(actions).ids
    for b in range(19):
        np.testing.assert_array_equal(tokenizer.encode(actions[b]).ids[0], ids[b])
    from_torch = tokenizer.encode(torch.from_numpy(actions))
    np.testing.assert_array_equal(from_torch.ids.numpy(), ids)
    assert isinstance(tokenizer.decode(from_torch).actions, torch.Tensor)


def test_saving_keeps_codes_and_fitting_again_gives_the_same_hash(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    loaded = type(tokenizer).from_pretrained(tmp_path / "t")
    np.testing.assert_array_equal(loaded.encode(chunks(11)).ids, tokenizer.encode(chunks(11)).ids)
    assert loaded.weights_hash == tokenizer.weights_hash
    assert fit(type(tokenizer), scalars=23, bits=5).weights_hash == tokenizer.weights_hash


def test_padded_chunks_are_left_out_of_the_fit_unless_there_are_no_others(tokenizer) -> None:
    cls, space = type(tokenizer), ActionSpace.raw(D, "arm")
    actions = chunks()
    statistics = Statistics.from_array(actions)
    pad = np.zeros(actions.shape[:2], bool)
    pad[200:, 9:] = True
    padded = np.where(pad[:, :, None], np.float32(7), actions)
    config = ScalarConfig(scalars=23, bits=5)
    with_padding = cls.fit([FitPart(actions=padded, space=space, statistics=statistics, pad_mask=pad)], config)
    without = cls.fit([FitPart(actions=actions[:200], space=space, statistics=statistics)], config)
    np.testing.assert_array_equal(with_padding.encode(actions).ids, without.encode(actions).ids)
    only = cls.fit([FitPart(actions=padded[200:], space=space, pad_mask=pad[200:])], config)
    assert only.decode(only.encode(padded[200:])).valid.all()


def test_robots_of_one_size_share_a_tokenizer_and_others_are_refused(tokenizer) -> None:
    cls = type(tokenizer)
    mine, other = ActionSpace.raw(D, "mine"), ActionSpace.raw(D, "other")
    large = 50 * chunks(101, seed=8)
    parts = [FitPart(actions=chunks(), space=mine), FitPart(actions=large, space=other)]
    both = cls.fit(parts, ScalarConfig(scalars=31))
    context = ChunkContext(embodiment="other")
    assert np.abs(both.decode(both.encode(large, context)).actions - large).max() < 10
    adapted = both.adapt(ActionSpace.raw(D, "third"), Statistics.from_array(large - 3))
    assert adapted.weights_hash == both.weights_hash
    with pytest.raises(SpaceMismatchError, match="'mine' has 5, 'bigger' 7"):
        both.adapt(ActionSpace.raw(7, "bigger"), Statistics.from_array(np.ones((5, 7)) * np.arange(7)))
    wide = FitPart(actions=np.concatenate([chunks(), chunks()], 2)[:, :, :7], space=ActionSpace.raw(7, "wide"))
    with pytest.raises(SpaceMismatchError, match="'mine' has 5, 'wide' 7"):
        cls.fit([parts[0], wide], ScalarConfig())


def test_data_that_never_move_still_give_a_tokenizer(tokenizer) -> None:
    still = np.full((13, T, D), 2.5, np.float32)
    fitted = fit(type(tokenizer), still)
    np.testing.assert_allclose(fitted.decode(fitted.encode(still)).actions, still, atol=1e-6)
    assert fitted.layout.fixed_length == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scalars": 0}, "scalars is 0"),
        ({"scalars": 1.5}, "scalars is 1.5"),
        ({"bits": 9}, r"bits is 9.*max_bits \(8\)"),
        ({"max_bits": 2}, "max_bits is 2"),
    ],
)
def test_impossible_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScalarConfig(**options)


def test_more_scalars_than_values_are_refused_and_the_default_is_an_eighth(tokenizer) -> None:
    with pytest.raises(ConfigError, match="scalars is 86, chunks of 17 steps and 5 dimensions hold 85"):
        fit(type(tokenizer), scalars=86)
    assert ScalarConfig().count(16, 7) == 14
    assert fit(type(tokenizer)).layout.vocab.tolist() == [256] * 11


@pytest.mark.parametrize("cls", KINDS, ids=lambda c: c.kind)
def test_every_step_of_the_preset_costs_more_and_errs_less(cls) -> None:
    preset = find_preset(cls.kind)
    train, held_out = chunks(), chunks(101, seed=9)
    bits, errors = [], []
    for step in preset.sweep:
        tokenizer = fit(cls, train, **{**preset.settings, **step})
        bits.append(tokenizer.layout.bits)
        errors.append(np.square(tokenizer.decode(tokenizer.encode(held_out)).actions - held_out).mean())
    assert (np.diff(bits) > 0).all()
    assert (np.diff(errors) <= 0.01 * np.array(errors[:-1])).all()
    assert errors[-1] < errors[0] / 100


@needs_real
@pytest.mark.parametrize("cls", KINDS, ids=lambda c: c.kind)
def test_prefixes_on_simulated_manipulation(cls) -> None:
    cut = []
    for file in sorted((REAL / "sim" / "libero_state").glob("*.npz")):
        with np.load(file) as data:
            episodes = np.split(data["action"].astype(np.float32), np.cumsum(data["episode_length"])[:-1])
        cut += [np.stack([e[t : t + 16] for t in range(0, len(e) - 16, 3)]) for e in episodes]
    train, held_out = np.concatenate(cut[::2]), np.concatenate(cut[1::2])
    tokenizer = fit(cls, train, limit=None, scalars=56, bits=5)
    ids = tokenizer.encode(held_out).ids
    errors = [
        np.square(tokenizer.normalise(tokenizer.decode(ids[:, :n]).actions) - tokenizer.normalise(held_out)).mean()
        for n in tokenizer.layout.prefixes
    ]
    assert (np.diff(errors) <= 0.01 * np.array(errors[:-1])).all()
    assert errors[-1] < errors[0] / 30
