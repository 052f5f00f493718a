"""FAST: against the definition, against the published files, and where it must refuse."""

import json
import math

import numpy as np
import pytest
import scipy.fft
from tokenizers import Tokenizer

import actok
from actok.core import ActionSpace, ArtifactError, ChunkContext, ConfigError, FitPart, SpaceMismatchError
from actok.signal.statistics import Statistics
from actok.tokenizers.fast import FastConfig, FastTokenizer, quantise
from actok.tokenizers.fast_plus import is_published_folder
from realdata import REAL, needs_real

B, T, D = 13, 17, 5
GOLDEN = ("10x7", "20x7", "50x14", "32x26", "1x7", "5x1")


def chunks(count: int, seed: int, horizon: int = T, dim: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, horizon)[None, :, None]
    waves = np.sin(2 * np.pi * (rng.uniform(0.1, 1.5, (count, 1, dim)) * t + rng.random((count, 1, dim))))
    return (rng.normal(size=(count, 1, dim)) * 0.4 + 0.5 * waves).astype(np.float32) * np.arange(1, dim + 1, dtype="f4")


def part(actions: np.ndarray, name: str = "arm") -> FitPart:
    return FitPart(actions=actions, space=ActionSpace.raw(actions.shape[2], name))


@pytest.fixture(scope="module")
def fast():
    return FastTokenizer.fit([part(chunks(700, 0))], FastConfig(vocab=409))


def coefficients_by_hand(tokenizer, actions):
    """The definition in numpy: an explicit orthonormal DCT-II matrix."""
    horizon = actions.shape[1]
    k, t = np.meshgrid(np.arange(horizon), np.arange(horizon), indexing="ij")
    basis = np.sqrt(2 / horizon) * np.cos(np.pi * (t + 0.5) * k / horizon)
    basis[0] /= np.sqrt(2)
    normalised = tokenizer.normalise(actions).astype(np.float64)
    return np.einsum("kt,btd->bkd", basis, normalised) * tokenizer.config.scale


def test_ids_spell_the_rounded_coefficients_by_frequency_then_dimension(fast):
    actions = chunks(B, 1)
    tokens = fast.encode(actions)
    exact = coefficients_by_hand(fast, actions).reshape(B, -1)
    for row, expected in zip(tokens, exact, strict=True):
        spelled = np.array([ord(c) for c in fast.bpe.library.decode(row.tolist())]) + fast.min_token
        assert np.abs(spelled - expected).max() <= 0.5 + 1e-4  # rounded, up to float32 at a tie
    assert (tokens.lengths < T * D / 2).all()


def test_error_is_what_rounding_leaves(fast):
    """Parseval: the squared error of a chunk is that of its coefficients, at most (1 / 2 scale)^2 each."""
    actions = chunks(B, 2)
    out = fast.decode(fast.encode(actions))
    assert out.valid.all()
    error = fast.normalise(out.actions) - fast.normalise(actions)
    inside = out.clipped == 0
    assert inside.any()
    assert (np.square(error[inside]).mean((1, 2)) <= (0.5 / fast.config.scale) ** 2).all()


def test_coefficients_never_exceed_the_bound():
    for horizon in (1, 2, 7, 50):
        signs = np.sign(np.cos(np.pi * (np.arange(horizon) + 0.5)[None] * np.arange(horizon)[:, None] / horizon))
        worst = np.abs(scipy.fft.dct(signs, axis=1, norm="ortho")).max()
        assert worst == pytest.approx(math.sqrt(horizon))


def test_what_lies_outside_the_alphabet_is_saturated_and_counted():
    tokenizer = FastTokenizer.fit([part(chunks(300, 3))], FastConfig(vocab=409, range_limit=1.5))
    actions = chunks(B, 4)
    assert tokenizer.encode(actions * 0.1).saturated.sum() == 0
    far = actions.copy()
    far[6, :, 2] = 1e4
    tokens = tokenizer.encode(far)
    assert tokens.saturated[6] >= 1
    assert tokens.out_of_range[6] >= T
    out = tokenizer.decode(tokens)
    assert out.valid.all()
    assert np.isfinite(out.actions).all()
    high = tokenizer.alphabet(T).high + tokenizer.min_token
    assert high <= round(10 * math.sqrt(T) * 1.5)


@pytest.mark.parametrize("value", [1e9, -1e9, 3e37, -3e37])
def test_values_beyond_any_integer_keep_their_sign(fast, value):
    mean = quantise(np.full((1, T, 1), value, np.float32), 10.0)[0, 0, 0]
    assert mean == np.sign(value) * 2**30
    assert fast.encode(np.full((1, T, D), value, np.float32)).saturated[0] >= D


def test_alphabet_larger_than_the_vocabulary_names_the_remedies():
    with pytest.raises(ConfigError, match=r"the vocabulary has 61; give a lower scale \(now 40\), a larger vocab"):
        FastTokenizer.fit([part(chunks(100, 0))], FastConfig(scale=40.0, vocab=61))


@pytest.mark.parametrize(
    "wrong", [{"scale": 0}, {"vocab": 1}, {"max_chunks": 0}, {"range_limit": -1.0}, {"max_token_length": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FastConfig(**wrong)


def test_finer_scales_have_less_error_and_more_tokens():
    actions, errors, lengths = chunks(200, 5), [], []
    for scale in (2.0, 8.0, 32.0):
        tokenizer = FastTokenizer.fit([part(chunks(700, 0))], FastConfig(scale=scale, vocab=1024))
        tokens = tokenizer.encode(actions)
        errors.append(np.abs(tokenizer.decode(tokens).actions - actions).mean())
        lengths.append(tokens.lengths.mean())
    assert errors == sorted(errors, reverse=True)
    assert lengths == sorted(lengths)


def test_padded_data_do_not_spend_the_vocabulary_on_zeros():
    actions = np.concatenate([chunks(200, 6, 97), np.zeros((2000, 97, D), np.float32)])
    actions[:, 41:] = 0
    tokenizer = FastTokenizer.fit([part(actions)], FastConfig(vocab=701, max_token_length=64))
    assert tokenizer.bpe.lengths.max() <= 64
    uncapped = FastTokenizer.fit([part(actions)], FastConfig(vocab=701))
    zero = -uncapped.min_token
    runs = [
        bool((uncapped.bpe.atoms[a:b] == zero).all())
        for a, b in zip(uncapped.bpe.starts[:-1], uncapped.bpe.starts[1:], strict=True)
    ]
    assert sum(runs) < 0.1 * uncapped.vocab_size


def test_one_vocabulary_serves_robots_of_different_dimensions():
    arms = [part(chunks(300, 7), "five"), part(chunks(300, 8, dim=3), "three")]
    tokenizer = FastTokenizer.fit(arms, FastConfig(vocab=409))
    for name, dim in (("five", 5), ("three", 3)):
        context = ChunkContext(embodiment=name)
        tokens = tokenizer.encode(chunks(B, 9, dim=dim), context)
        assert tokenizer.decode(tokens).actions.shape == (B, T, dim)


def test_training_draws_at_most_max_chunks_and_says_so():
    settings = FastConfig(vocab=409, max_chunks=89)
    one, two = (FastTokenizer.fit([part(chunks(700, 0))], settings) for _ in range(2))
    assert one.weights_hash == two.weights_hash
    assert one.to_artifact().meta == {"fitted_on_chunks": 700, "bpe_trained_on_chunks": 89}
    other = FastTokenizer.fit([part(chunks(700, 0))], FastConfig(vocab=409, max_chunks=89, seed=1))
    assert other.weights_hash != one.weights_hash


@pytest.fixture
def sequence(fast):
    return next(iter(fast.encode(chunks(1, 10)))).tolist()


def test_wrong_lengths_and_coefficients_are_invalid_with_the_reason(fast, sequence):
    longest = int(np.argmax(fast.bpe.lengths))
    n = T * D
    out = fast.decode([sequence[:-1], [*sequence, longest], [], [0] * n, sequence])
    assert out.valid.tolist() == [False, False, False, True, True]
    assert np.isnan(out.actions[:3]).all()
    assert np.isfinite(out.actions[3:]).all()
    assert f"expected {n}" in out.reasons[0]
    assert f"{n + fast.bpe.lengths[longest]} coefficients" in out.reasons[1]
    assert "0 coefficients" in out.reasons[2]
    assert out.slots_used[1] == len(sequence)
    assert out.slots_used[4] == len(sequence)


def test_a_coefficient_beyond_the_bound_of_a_short_horizon_is_invalid(fast):
    low = int(np.flatnonzero(fast.bpe.atoms[:409] == fast.alphabet(T).low)[0])
    ids = [[low] * D]
    assert fast.alphabet(1).low > fast.alphabet(T).low
    out = fast.decode(ids, horizon=1)
    assert not out.valid[0]
    assert "beyond what the tokenizer represents" in out.reasons[0]
    repaired = fast.decode(ids, horizon=1, repair="truncate_pad")
    assert repaired.repaired[0]
    assert np.isfinite(repaired.actions).all()


def test_repair_cuts_the_surplus_and_fills_zeros_and_says_so(fast, sequence):
    whole = fast.decode([sequence])
    out = fast.decode([[*sequence, 5, 7], sequence[:3], sequence], repair="truncate_pad")
    assert out.repaired.tolist() == [True, True, False]
    assert out.valid.tolist() == [False, False, True]
    np.testing.assert_array_equal(out.actions[0], whole.actions[0])
    kept = int(fast.bpe.lengths[sequence[:3]].sum())
    spectrum = scipy.fft.dct(fast.normalise(out.actions)[1], axis=0, norm="ortho") * fast.config.scale
    expected = scipy.fft.dct(fast.normalise(whole.actions)[0], axis=0, norm="ortho") * fast.config.scale
    if out.clipped[1] == 0 and whole.clipped[0] == 0:
        np.testing.assert_allclose(spectrum.reshape(-1)[:kept], expected.reshape(-1)[:kept], atol=1e-3)
        np.testing.assert_allclose(spectrum.reshape(-1)[kept:], 0, atol=1e-3)


# -- published files ----------------------------------------------------------------------------------------------


def published_decode(folder, ids, horizon, dim):
    """The published processor's algorithm, word for word in numpy."""
    settings = json.loads((folder / "processor_config.json").read_text())
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids))
    coefficients = (np.array([ord(c) for c in text]) + settings["min_token"]).reshape(horizon, dim)
    return scipy.fft.idct(coefficients / settings["scale"], axis=0, norm="ortho")


def test_an_own_fit_is_readable_by_the_published_algorithm_and_back(fast, tmp_path):
    folder = fast.to_published(tmp_path / "published")
    assert is_published_folder(folder)
    actions = chunks(B, 11)
    tokens = fast.encode(actions)
    out = fast.decode(tokens)
    for b in np.flatnonzero(out.clipped == 0):
        theirs = published_decode(folder, tokens.ids[b], T, D)
        np.testing.assert_allclose(theirs, fast.normalise(out.actions)[b], atol=1e-4)
    again = actok.load(folder)
    assert again.horizon == T
    np.testing.assert_array_equal(again.encode(fast.normalise(actions)).flat, tokens.flat)
    assert fast.to_published(folder) == folder  # over itself


def test_published_folder_loads_in_transformers(fast, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = fast.to_published(tmp_path / "published")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    row = fast.encode(chunks(1, 12)).ids[0]
    text = theirs.decode(row.tolist())
    assert theirs(text)["input_ids"] == row.tolist()


@pytest.fixture(scope="module")
def plus():
    return actok.load(REAL / "fast_plus")


@needs_real
@pytest.mark.parametrize("shape", GOLDEN)
def test_published_files_give_the_published_ids_and_actions(plus, shape):
    golden = np.load(REAL / "fast_plus" / "golden.npz")
    actions = golden[f"chunks_{shape}"]
    tokens = plus.encode(actions)
    np.testing.assert_array_equal(tokens.flat, golden[f"ids_{shape}"])
    np.testing.assert_array_equal(tokens.offsets, golden[f"offsets_{shape}"])
    out = plus.decode(tokens)
    assert out.valid.all()
    for b in range(len(actions)):
        theirs = published_decode(REAL / "fast_plus", tokens.ids[b], *actions.shape[1:])
        np.testing.assert_allclose(out.actions[b], theirs, atol=1e-5)


@needs_real
def test_published_files_serve_any_dimensions_and_adapt_to_raw_units(plus, tmp_path):
    assert dict(plus.spaces) == {}
    with pytest.raises(SpaceMismatchError, match="no action space of its own"):
        plus.decode([[1, 2, 3]], horizon=T)
    actions = chunks(300, 13) * 40 + 7
    adapted = plus.adapt(ActionSpace.raw(D, "arm"), Statistics.from_array(actions))
    out = adapted.decode(adapted.encode(actions))
    assert out.valid.all()
    assert np.abs(out.actions - actions).mean() < 0.05 * actions.std((0, 1)).mean()
    again = actok.load(adapted.save_pretrained(tmp_path / "plus"))
    np.testing.assert_array_equal(again.encode(actions).flat, adapted.encode(actions).flat)
    folder = FastTokenizer.from_published(REAL / "fast_plus", dim=D, horizon=T).to_published(tmp_path / "again")
    assert (folder / "tokenizer.json").read_bytes() == (REAL / "fast_plus" / "tokenizer.json").read_bytes()
    settings = json.loads((folder / "processor_config.json").read_text())
    assert (settings["min_token"], settings["scale"]) == (-354, 10)
    assert (settings["action_dim"], settings["time_horizon"]) == (D, T)


def test_the_first_robot_added_to_published_files_is_the_default(fast, tmp_path):
    actions = chunks(50, 17)[..., :D] * 40 + 7
    fast.to_published(tmp_path / "files")
    plus = FastTokenizer.from_published(tmp_path / "files", horizon=T)
    assert list(plus.spaces) == [f"normalised-{D}"]
    with pytest.raises(SpaceMismatchError, match="'unknown' are in raw units; add the robot with adapt"):
        plus.embodiment_for(ActionSpace.raw(D))
    assert plus.embodiment_for(ActionSpace.raw(D, f"normalised-{D}")) == f"normalised-{D}"
    robot = plus.adapt(ActionSpace.raw(D, "arm"), Statistics.from_array(actions))
    assert list(robot.spaces) == ["arm"]
    assert robot.embodiment_for(ActionSpace.raw(D)) == "arm"
    out = robot.decode(robot.encode(actions))
    assert np.abs(out.actions - actions).mean() < 0.05 * actions.std((0, 1)).mean()
    unit, there = robot.normalise(actions), ChunkContext(embodiment=f"normalised-{D}")
    np.testing.assert_array_equal(robot.encode(unit, there).flat, robot.encode(actions).flat)
    both = robot.adapt(ActionSpace.raw(5, "other"), Statistics.from_array(np.zeros((9, 3, 5)) + np.arange(3)[:, None]))
    assert list(both.spaces) == ["arm", "other"]
    assert list(actok.load(robot.save_pretrained(tmp_path / "own")).spaces) == ["arm"]


@needs_real
def test_undecodable_bytes_are_invalid_and_repaired_only_on_request(plus):
    lone = int(np.flatnonzero((plus.bpe.lengths == 1) & (plus.bpe.atoms[plus.bpe.starts[:-1]] == 0xC5))[0])
    context = ChunkContext(embodiment="normalised-7", horizon=10)
    out = plus.decode([[lone, lone, lone]], context)
    assert not out.valid[0]
    assert "not UTF-8" in out.reasons[0]
    assert np.isnan(out.actions).all()
    repaired = plus.decode([[lone, lone, lone]], context, repair="truncate_pad")
    assert repaired.repaired[0]
    assert (repaired.actions == 0).all()


@needs_real
def test_random_sequences_never_pass_for_actions(plus):
    rng = np.random.default_rng(0)
    out = plus.decode(
        [rng.integers(0, 2048, 60) for _ in range(50)], ChunkContext(embodiment="normalised-7", horizon=10)
    )
    assert not out.valid.any()
    assert np.isnan(out.actions).all()


def test_missing_or_wrong_published_files_are_named(fast, tmp_path):
    folder = fast.to_published(tmp_path / "published")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**settings, "min_token": 5}))
    with pytest.raises(ArtifactError, match="cannot write the coefficient 0"):
        FastTokenizer.from_published(folder, dim=D, horizon=T).encode(np.zeros((1, T, D), np.float32))
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a FAST processor config"):
        FastTokenizer.from_published(folder)
    (folder / "processor_config.json").unlink()
    with pytest.raises(ArtifactError, match="has no processor_config"):
        FastTokenizer.from_published(folder)
    with pytest.raises(ArtifactError, match="does not exist"):
        FastTokenizer.from_published(tmp_path / "nowhere")


@needs_real
def test_real_bimanual_motions_decode_within_the_step_of_a_coefficient():
    episodes = (
        np.load(REAL / "sim" / "aloha_sim" / "transfer_cube.npz")["action"].astype(np.float32).reshape(-1, 50, 14)
    )
    tokenizer = FastTokenizer.fit([part(episodes[:120])], FastConfig())
    held = episodes[120:]
    tokens = tokenizer.encode(held)
    out = tokenizer.decode(tokens)
    assert out.valid.all()
    error = tokenizer.normalise(out.actions) - tokenizer.normalise(held)
    fine = (tokens.saturated == 0) & (tokens.out_of_range == 0)
    assert fine.any()
    assert (np.sqrt(np.square(error[fine]).mean((1, 2))) <= 0.5 / 10).all()
