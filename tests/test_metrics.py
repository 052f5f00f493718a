"""Errors in normalised units, valid reconstruction rate, jerk and range, against hand computation and laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actok.core import ActionGroup, ActionSpace, ChunkContext, DataError, FitPart
from actok.evaluation.comparison import Comparison
from actok.evaluation.metrics import jerk, normalised_error, range_use, valid_reconstruction
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics
from actok.tokenizers.bins import BinsConfig, BinsTokenizer

B, T, D = 7, 11, 5


def arm(mode: str = "absolute") -> ActionSpace:
    return ActionSpace(
        embodiment="arm",
        dim=D,
        rate_hz=13.0,
        groups=(
            ActionGroup(name="tip", kind="position", dims=(0, 1, 2), mode=mode, unit="m", scale=0.05),
            ActionGroup(name="wrist", kind="joint", dims=(3,), mode=mode, unit="rad", scale=0.5),
            ActionGroup(name="grip", kind="gripper", dims=(4,), unit="fraction", scale=1.0),
        ),
    )


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(B, T, D))
    pad = np.arange(T) >= rng.integers(4, T + 1, B)[:, None]
    return Comparison(
        reference=reference,
        reconstruction=reference + 0.05 * rng.normal(size=reference.shape),
        space=arm(),
        normaliser=Normaliser.make("quantile", Statistics.from_array(reference)),
        pad_mask=pad,
        dof_mask=np.arange(D) != (np.arange(B) % D)[:, None],
    )


def with_(c: Comparison, **changes) -> Comparison:
    fields = {k: getattr(c, k) for k in c.__dataclass_fields__}
    return Comparison(**{**fields, **changes})


def test_normalised_error_is_the_mean_over_what_is_real_and_present(comparison):
    errors, by_dim = [], [[] for _ in range(D)]
    for b in range(B):
        for t in range(T):
            for d in range(D):
                if not comparison.pad_mask[b, t] and comparison.dof_mask[b, d]:
                    e = comparison.reconstruction[b, t, d] - comparison.reference[b, t, d]
                    errors.append(abs(e / comparison.normaliser.half[d]))
                    by_dim[d].append(errors[-1])
    found = normalised_error(comparison)
    assert found.l1 == pytest.approx(np.mean(errors))
    assert found.mse == pytest.approx(np.mean(np.square(errors)))
    assert found.maximum == pytest.approx(max(errors))
    assert found.l1_by_dim == pytest.approx([np.mean(v) for v in by_dim])
    assert found.undecodable == 0


def test_the_identity_has_no_error(comparison):
    same = with_(comparison, reconstruction=comparison.reference)
    assert (normalised_error(same).l1, normalised_error(same).maximum) == (0, 0)
    vrr = valid_reconstruction(same, (1e-9, 1.0))
    assert vrr.literal == vrr.position == vrr.angle == (1.0, 1.0)
    assert jerk(same).ratio == pytest.approx(1)


def test_what_lies_in_padding_or_an_absent_dimension_does_not_count(comparison):
    broken = comparison.reconstruction.copy()
    broken[comparison.pad_mask] += 1e6
    broken[np.broadcast_to(~comparison.dof_mask[:, None], broken.shape)] -= 1e6
    changed = with_(comparison, reconstruction=broken)
    assert normalised_error(changed) == normalised_error(comparison)
    assert valid_reconstruction(changed).literal == valid_reconstruction(comparison).literal
    assert jerk(changed).reconstruction == pytest.approx(jerk(comparison).reconstruction)


def test_an_undecodable_chunk_is_counted_but_not_averaged(comparison):
    broken = comparison.reconstruction.copy()
    broken[2] = np.nan
    found = normalised_error(with_(comparison, reconstruction=broken))
    keep = np.arange(B) != 2
    rest = Comparison(
        reference=comparison.reference[keep],
        reconstruction=comparison.reconstruction[keep],
        space=comparison.space,
        normaliser=comparison.normaliser,
        pad_mask=comparison.pad_mask[keep],
        dof_mask=comparison.dof_mask[keep],
    )
    assert found.l1 == pytest.approx(normalised_error(rest).l1)
    assert found.undecodable == pytest.approx(1 / B)
    # ... and its steps are never valid, whatever the tolerance.
    lost = (~comparison.pad_mask[2]).sum() / (~comparison.pad_mask).sum()
    vrr = valid_reconstruction(with_(comparison, reconstruction=broken), (1e9,))
    assert vrr.literal[0] == pytest.approx(1 - lost)
    assert vrr.angle is not None
    assert vrr.angle[0] < 1


def test_nothing_decodes(comparison):
    nothing = with_(comparison, reconstruction=np.full((B, T, D), np.nan))
    found = normalised_error(nothing)
    assert (found.l1, found.mse, found.maximum, found.undecodable) == (None, None, None, 1.0)
    assert set(valid_reconstruction(nothing).literal) == {0.0}
    assert jerk(nothing).ratio is None


def test_a_constant_dimension_has_no_normalised_unit():
    reference = np.random.default_rng(0).normal(size=(B, T, D))
    reference[:, :, 3] = 0.7
    normaliser = Normaliser.make("quantile", Statistics.from_array(reference))
    off = reference.copy()
    off[:, :, 3] += 5.0
    found = normalised_error(Comparison(reference=reference, reconstruction=off, space=arm(), normaliser=normaliser))
    assert found.l1 == 0
    assert found.l1_by_dim[3] is None


def test_vrr_counts_steps_strictly_below_the_tolerance():
    reference = np.zeros((1, 4, D))
    off = reference.copy()
    # l1 norms 0, 0.5, 0.5 + 0.25, 2 with a normaliser of half width 1
    off[0, 1, 0], off[0, 2, 0], off[0, 2, 4], off[0, 3, 3] = 0.5, -0.5, 0.25, 2.0
    c = Comparison(reference=reference, reconstruction=off, space=arm(), normaliser=Normaliser.identity(D))
    vrr = valid_reconstruction(c, (0.0, 0.5, 0.50001, 0.75, 1.0, 3.0))
    assert vrr.literal == (0.0, 0.25, 0.5, 0.5, 0.75, 1.0)
    # Positions: 0.05 m a unit, errors 0, 0.025, 0.025, 0. Joint: 0.5 rad a unit, errors 0, 0, 0, 1.
    assert valid_reconstruction(c, (0.024, 0.026)).position == (0.5, 1.0)
    assert valid_reconstruction(c, (0.99, 1.01)).angle == (0.75, 1.0)


def test_vrr_has_no_physical_column_without_physical_units():
    reference = np.zeros((2, 3, D))
    raw = ActionSpace.raw(D)
    c = Comparison(reference=reference, reconstruction=reference, space=raw, normaliser=Normaliser.identity(D))
    vrr = valid_reconstruction(c)
    assert vrr.position is None
    assert vrr.angle is None


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_vrr_never_falls_with_the_tolerance_and_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(3, 5, D))
    off = reference + rng.normal(size=reference.shape) * rng.choice([0.001, 0.1, 1])
    half = rng.uniform(0.2, 3, D)
    normaliser = Normaliser(
        kind="min_max",
        centre=np.zeros(D),
        half=half,
        lower=-np.ones(D),
        upper=np.ones(D),
        statistics=None,
        limits=None,
    )
    tolerances = tuple(np.sort(rng.uniform(0, 4, 6)))
    c = Comparison(reference=reference, reconstruction=off, space=arm(), normaliser=normaliser)
    vrr = valid_reconstruction(c, tolerances)
    for column in (vrr.literal, vrr.position, vrr.angle):
        assert column is not None
        assert list(column) == sorted(column)
    steps = [(b, t) for b in range(3) for t in range(5)]
    expected = [np.mean([sum(abs(off[i] - reference[i]) / half) < s for i in steps]) for s in tolerances]
    assert vrr.literal == pytest.approx(expected)


def test_jerk_of_steps_is_jerk_of_their_path():
    rng = np.random.default_rng(1)
    path = np.cumsum(rng.normal(size=(B, T + 1, D)), axis=1)
    rough = path + 0.1 * rng.normal(size=path.shape)
    space = arm("delta")
    absolute = ActionSpace.raw(D)
    ruler = Normaliser.identity(D)

    def steps(x):
        out = np.diff(x, axis=1)
        out[:, :, 4] = x[:, 1:, 4]  # the gripper stays absolute
        return out

    a = jerk(Comparison(reference=path, reconstruction=rough, space=absolute, normaliser=ruler))
    b = jerk(Comparison(reference=steps(path), reconstruction=steps(rough), space=space, normaliser=ruler))
    third = [np.abs(np.diff(x, n=3, axis=1)) for x in (path, rough)]
    assert a.reference == pytest.approx(third[0].mean())
    assert a.reconstruction == pytest.approx(third[1].mean())
    # The gripper, absolute in both, loses its first window in `steps`.
    tail = [np.concatenate([x[:, :, :4].reshape(-1), x[:, 1:, 4].reshape(-1)]) for x in third]
    assert b.reference == pytest.approx(tail[0].mean())
    assert b.ratio == pytest.approx(tail[1].mean() / tail[0].mean())


def test_jerk_skips_windows_with_padding_and_short_chunks():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, T, D))
    pad = np.arange(T)[None] >= 6
    space, ruler = ActionSpace.raw(D), Normaliser.identity(D)
    found = jerk(Comparison(reference=x, reconstruction=x, space=space, normaliser=ruler, pad_mask=pad))
    assert found.reference == pytest.approx(np.abs(np.diff(x[:, :6], n=3, axis=1)).mean())
    short = Comparison(reference=x[:, :3], reconstruction=x[:, :3], space=space, normaliser=ruler)
    assert jerk(short).reference is None


def test_range_use_counts_what_encode_and_decode_report():
    rng = np.random.default_rng(5)
    train = rng.uniform(-1, 1, (20, T, D)).astype(np.float32)
    space = ActionSpace.raw(D)
    tokenizer = BinsTokenizer.fit([FitPart(actions=train, space=space)], BinsConfig(bins=17, normaliser="min_max"))
    test = rng.uniform(-0.5, 0.5, (B, T, D)).astype(np.float32)
    pad = np.zeros((B, T), bool)
    pad[0, 4:] = True
    test[0, 4:] = test[0, 3]
    test[1, 2, 0] = test[3, 5, 4] = 9.0
    tokens = tokenizer.encode(test, ChunkContext(pad_mask=pad))
    decoded = tokenizer.decode(tokens)
    c = Comparison(
        reference=test, reconstruction=decoded.actions, space=space, normaliser=Normaliser.identity(D), pad_mask=pad
    )
    found = range_use(tokens, decoded, c)
    assert found.out_of_range == pytest.approx(2 / ((B * T - (T - 4)) * D))
    assert found.saturated == pytest.approx(2 / (B * T * D))
    assert found.clipped == 0


def test_bad_input_is_named(comparison):
    with pytest.raises(DataError, match="disagree"):
        with_(comparison, reconstruction=comparison.reconstruction[:, :-1])
    with pytest.raises(DataError, match="pad_mask has dtype"):
        with_(comparison, pad_mask=comparison.pad_mask.astype(int))
    with pytest.raises(DataError, match="non-finite"):
        with_(comparison, reference=np.full((B, T, D), np.inf))
    half = comparison.reconstruction.copy()
    half[1, 0] = np.nan
    with pytest.raises(DataError, match="chunk 1 is non-finite in places"):
        with_(comparison, reconstruction=half)
    with pytest.raises(DataError, match="every step is padding"):
        with_(comparison, pad_mask=np.ones((B, T), bool))
    with pytest.raises(DataError, match="5 dimensions, the space 3"):
        with_(comparison, space=ActionSpace.raw(3))
