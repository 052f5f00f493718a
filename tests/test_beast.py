"""BEAST: quantised control points, clamped starts, several robots."""

import numpy as np
import pytest

from actok.core import (
    ActionGroup,
    ActionSpace,
    ChunkContext,
    ConfigError,
    DataError,
    FitPart,
    SpaceMismatchError,
    TokenError,
    find_preset,
)
from actok.signal.statistics import Statistics
from actok.tokenizers.beast import BeastConfig, BeastTokenizer
from realdata import REAL, needs_real

T, D, K = 23, 7, 11
GRIPPER, CONSTANT = 6, 4


def arm(name: str = "arm", mode: str = "absolute", limit: float | None = 5.0) -> ActionSpace:
    groups = (
        ActionGroup(name="joints", kind="joint", dims=tuple(range(6)), mode=mode),  # type: ignore[arg-type]
        ActionGroup(name="gripper", kind="gripper", dims=(GRIPPER,)),
    )
    bounds = {} if limit is None else {"low": (-limit,) * D, "high": (limit,) * D}
    return ActionSpace(embodiment=name, dim=D, groups=groups, **bounds)


def chunks(count: int = 401, steps: int = T, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Waves on the joints but one that stands at 0.25; a gripper that opens or closes once."""
    rng = np.random.default_rng(seed)
    u = np.linspace(0, 1, steps)[None, :, None]
    phase, pace = rng.uniform(0, 4, (2, count, 1, D))
    waves = scale * np.sin(pace * u + phase)
    waves[:, :, CONSTANT] = 0.25
    moment = rng.uniform(-0.3, 1.3, (count, 1))
    waves[:, :, GRIPPER] = np.where(u[:, :, 0] < moment, -1.0, 1.0)
    return waves.astype(np.float32)


def fit(space: ActionSpace | None = None, actions: np.ndarray | None = None, **settings) -> BeastTokenizer:
    part = FitPart(actions=chunks() if actions is None else actions, space=space or arm())
    with pytest.warns(UserWarning, match="never changes"):
        return BeastTokenizer.fit([part], BeastConfig(**{"bases": K, **settings}))


@pytest.fixture(scope="module")
def beast() -> BeastTokenizer:
    return fit()


@pytest.fixture(scope="module")
def clamped() -> BeastTokenizer:
    return fit(clamp_start=True)


def test_layout_says_which_dimension_a_token_moves(beast: BeastTokenizer) -> None:
    layout = beast.layout
    assert layout.total
    assert layout.passes == 1
    assert layout.fixed_length == K * D
    base = np.full((1, K * D), 100)
    reference = beast.decode(base).actions
    for position in (0, 17, K * D - 1):
        _, basis, part = layout.coords[position]
        assert position == basis * D + part
        other = base.copy()
        other[0, position] = 180
        moved = np.abs(beast.decode(other).actions - reference)[0]
        assert (moved.max(0) > 1e-4).nonzero()[0].tolist() == ([part] if part != CONSTANT else [])
        # The basis acts at its own place in the chunk.
        steps = np.arange(T) / (T - 1) * (K - 1)
        assert abs(steps[moved[:, part].argmax()] - basis) < 1.5


def test_rounding_moves_the_curve_by_at_most_half_a_level(beast: BeastTokenizer) -> None:
    fine = fit(bins=65536)
    held_out = chunks(seed=1)
    tokens = beast.encode(held_out)
    inside = tokens.saturated == 0
    assert inside.mean() > 0.5
    low, high = beast.to_artifact().tensors["range.arm"]
    half = (high - low).max(0) / 255 / 2 * beast.embodiment().normaliser.half
    difference = np.abs(beast.decode(tokens).actions - fine.decode(fine.encode(held_out)).actions)[inside]
    assert (difference.max((0, 1)) <= 1.01 * half + 1e-5).all()
    # and the spline itself is close to waves that turn at most once
    assert np.abs(beast.decode(tokens).actions - held_out)[inside][:, :, :6].max() < 0.05


def test_gripper_opens_and_closes_exactly_where_the_segment_is_pure(beast: BeastTokenizer) -> None:
    actions = chunks(1)
    segment = np.minimum(np.floor(K * np.linspace(0, 1, T)), K - 1)
    actions[0, :, GRIPPER] = np.where(segment < 4, -1.0, 1.0)
    np.testing.assert_allclose(beast.decode(beast.encode(actions)).actions[0, :, GRIPPER], actions[0, :, GRIPPER])


def test_every_sequence_decodes_within_the_limits() -> None:
    for limit in (None, 0.9):
        tokenizer = fit(arm(limit=limit))
        ids = np.random.default_rng(2).integers(0, 256, (41, K * D))
        for horizon in (1, 2, T, 67):
            decoded = tokenizer.decode(ids, horizon=horizon)
            assert decoded.valid.all()
            assert decoded.actions.shape == (41, horizon, D)
            low, high = tokenizer.embodiment().normaliser.limits
            assert (decoded.actions >= low - 1e-6).all()
            assert (decoded.actions <= high + 1e-6).all()
            np.testing.assert_allclose(decoded.actions[:, :, CONSTANT], 0.25, atol=1e-7)


def test_codes_of_a_decoded_chunk_are_the_same_codes(beast: BeastTokenizer) -> None:
    ids = beast.encode(chunks(13, seed=3)).ids
    again = beast.encode(beast.decode(ids).actions).ids
    varying = beast.layout.coords[:, 2] != CONSTANT
    np.testing.assert_array_equal(again[:, varying], ids[:, varying])


def test_the_curve_is_the_same_at_every_horizon(beast: BeastTokenizer) -> None:
    ids = beast.encode(chunks(5, seed=4)).ids
    coarse, fine = beast.decode(ids).actions, beast.decode(ids, horizon=2 * T - 1).actions
    np.testing.assert_allclose(fine[:, ::2, :6], coarse[:, :, :6], atol=1e-6)
    np.testing.assert_allclose(beast.decode(ids, horizon=1).actions[:, 0], coarse[:, 0], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 61])
def test_chunks_of_other_horizons_come_back(beast: BeastTokenizer, steps: int) -> None:
    actions = chunks(7, steps, seed=5)
    tokens = beast.encode(actions)
    assert tokens.ids.shape == (7, K * D)
    decoded = beast.decode(tokens).actions
    assert decoded.shape == actions.shape
    inside = tokens.saturated == 0
    assert inside.any()
    assert np.abs(decoded - actions)[inside][:, :, :6].max() < 0.06


def test_control_points_beyond_the_range_are_counted(beast: BeastTokenizer) -> None:
    actions = chunks()[:3]
    actions[1, :, 2] *= 30
    tokens = beast.encode(actions)
    assert tokens.saturated[1] >= K - 3
    assert tokens.out_of_range[1] > 0
    assert tokens.saturated[[0, 2]].sum() == 0


def test_batch_is_a_stack_of_singles_and_torch_equals_numpy(beast: BeastTokenizer) -> None:
    torch = pytest.importorskip("torch")
    actions = chunks(17, seed=6)
    tokens = beast.encode(actions)
    for b in range(17):
        np.testing.assert_array_equal(beast.encode(actions[b]).ids[0], tokens.ids[b])
    from_torch = beast.encode(torch.from_numpy(actions))
    assert isinstance(from_torch.ids, torch.Tensor)
    np.testing.assert_array_equal(from_torch.ids.numpy(), tokens.ids)
    np.testing.assert_array_equal(beast.decode(from_torch).actions.numpy(), beast.decode(tokens).actions)


def test_saving_keeps_codes_and_hash(tmp_path, clamped: BeastTokenizer) -> None:
    clamped.save_pretrained(tmp_path / "beast")
    loaded = BeastTokenizer.from_pretrained(tmp_path / "beast")
    actions = chunks(5, seed=7)
    context = ChunkContext(anchor=actions[:, 0])
    np.testing.assert_array_equal(loaded.encode(actions, context).ids, clamped.encode(actions, context).ids)
    assert loaded.weights_hash == clamped.weights_hash


def test_a_sequence_of_another_length_is_flagged_and_a_foreign_id_refused(beast: BeastTokenizer) -> None:
    decoded = beast.decode([[1] * (K * D), [1] * (K * D - 1)])
    assert decoded.valid.tolist() == [True, False]
    assert np.isnan(decoded.actions[1]).all()
    with pytest.raises(TokenError, match="256"):
        beast.decode([[256] * (K * D)])


def test_absent_dimensions_decode_to_zero_and_do_not_touch_the_others(beast: BeastTokenizer) -> None:
    actions = chunks(3, seed=8)
    mask = np.ones((3, D), bool)
    mask[:, 1] = False
    context = ChunkContext(dof_mask=mask)
    decoded = beast.decode(beast.encode(actions, context)).actions
    assert (decoded[:, :, 1] == 0).all()
    whole = beast.decode(beast.encode(actions)).actions
    np.testing.assert_array_equal(np.delete(decoded, 1, 2), np.delete(whole, 1, 2))


# -- clamped starts -------------------------------------------------------------------------------------------------


def test_clamped_curves_start_at_the_state_and_send_one_token_less(clamped: BeastTokenizer) -> None:
    actions = chunks(13, seed=9)
    state = actions[:, 0] + np.float32(0.05)
    context = ChunkContext(anchor=state)
    tokens = clamped.encode(actions, context)
    assert tokens.ids.shape == (13, K * D - 6)
    decoded = clamped.decode(tokens).actions
    moving = [d for d in range(6) if d != CONSTANT]
    np.testing.assert_allclose(decoded[:, 0, moving], state[:, moving], atol=1e-6)
    np.testing.assert_allclose(decoded[:, 0, GRIPPER], actions[:, 0, GRIPPER], atol=1.1)
    # another state moves the start and leaves the end alone
    elsewhere = clamped.decode(tokens.ids, ChunkContext(anchor=state - 0.5)).actions
    np.testing.assert_allclose(elsewhere[:, 0, moving], state[:, moving] - 0.5, atol=1e-6)
    np.testing.assert_allclose(elsewhere[:, -1], decoded[:, -1], atol=1e-6)
    assert 0 not in clamped.layout.coords[clamped.layout.coords[:, 2] != GRIPPER, 1]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "needs the robot's state"),
        (ChunkContext(anchor=np.zeros((2, D + 2))), r"anchor has shape \(2, 9\)"),
        (ChunkContext(anchor=np.zeros((3, D))), r"anchor has shape \(3, 7\)"),
        (ChunkContext(anchor=np.full((2, D), np.nan)), "non-finite"),
    ],
)
def test_a_missing_or_wrong_anchor_is_named(clamped: BeastTokenizer, context, message: str) -> None:
    with pytest.raises(DataError, match=message):
        clamped.encode(chunks(2), context)


def test_delta_spaces_cannot_be_clamped(clamped: BeastTokenizer) -> None:
    part = FitPart(actions=chunks(), space=arm(mode="delta"))
    with (
        pytest.warns(UserWarning, match="never changes"),
        pytest.raises(SpaceMismatchError, match="'joints' holds delta"),
    ):
        BeastTokenizer.fit([part], BeastConfig(clamp_start=True))
    with pytest.raises(SpaceMismatchError, match="clamp_start=False"):
        clamped.adapt(arm("other", "velocity"), Statistics.from_array(chunks()))


def test_relative_spaces_start_without_displacement_and_need_no_anchor() -> None:
    rotation = ActionGroup(name="turn", kind="rotation", rotation="quaternion_xyzw", dims=(0, 1, 2, 3), mode="relative")
    place = ActionGroup(name="place", kind="position", dims=(4,), mode="relative")
    space = ActionSpace(embodiment="hand", dim=5, groups=(rotation, place))
    rng = np.random.default_rng(10)
    actions = np.cumsum(rng.normal(size=(53, T, 5)), 1).astype(np.float32) * np.float32(0.05)
    actions[:, :, 3] += 1
    tokenizer = BeastTokenizer.fit([FitPart(actions=actions, space=space)], BeastConfig(bases=K, clamp_start=True))
    start = tokenizer.decode(tokenizer.encode(actions)).actions[:, 0]
    np.testing.assert_allclose(start, np.tile([0, 0, 0, 1, 0], (53, 1)), atol=1e-6)


# -- several robots -------------------------------------------------------------------------------------------------


def test_robots_of_different_size_share_one_tokenizer_and_another_joins() -> None:
    pair = ActionSpace.raw(3, "stage")
    stage = 100 * chunks(31, seed=11)[:, :, :3]
    with pytest.warns(UserWarning, match="never changes"):
        both = BeastTokenizer.fit(
            [FitPart(actions=chunks(), space=arm()), FitPart(actions=stage, space=pair)], BeastConfig(bases=K)
        )
    context = ChunkContext(embodiment="stage")
    assert both.layout_for(embodiment="stage").fixed_length == 3 * K
    assert np.abs(both.decode(both.encode(stage, context)).actions - stage).max() < 3
    new = chunks(29, seed=12)[:, :, :5] - 7
    with pytest.warns(UserWarning, match="never changes"):
        adapted = both.adapt(ActionSpace.raw(5, "new"), Statistics.from_array(new))
    assert adapted.weights_hash == both.weights_hash
    context = ChunkContext(embodiment="new")
    assert np.abs(adapted.decode(adapted.encode(new, context)).actions - new).max() < 0.1
    np.testing.assert_array_equal(adapted.encode(chunks(3)).ids, both.encode(chunks(3)).ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bases": 4}, "bases is 4"),
        ({"degree": -1}, "degree is -1"),
        ({"bins": 1}, "bins is 1"),
        ({"bases": 1, "degree": 0, "clamp_start": True}, "1 base"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeastConfig(**settings)


def test_every_step_of_the_preset_costs_more_and_errs_less() -> None:
    preset = find_preset("beast")
    train, held_out = chunks(211), chunks(97, seed=13)
    bits, errors = [], []
    for step in preset.sweep:
        tokenizer = fit(actions=train, **{**preset.settings, **step})
        bits.append(tokenizer.layout.bits)
        errors.append(np.square(tokenizer.decode(tokenizer.encode(held_out)).actions - held_out).mean())
    assert (np.diff(bits) > 0).all()
    assert (np.diff(errors) <= 0.01 * np.array(errors[:-1]) + 1e-6).all()
    assert errors[-1] < errors[0] / 50


@needs_real
def test_bimanual_joint_targets_are_kept_to_a_hundredth_of_their_range() -> None:
    files = sorted((REAL / "sim" / "aloha_sim").glob("*.npz"))
    episodes = []
    for file in files:
        with np.load(file) as data:
            episodes += np.split(data["action"].astype(np.float32), np.cumsum(data["episode_length"])[:-1])
    cut = [np.stack([e[t : t + 50] for t in range(0, len(e) - 50, 7)]) for e in episodes]
    train, held_out = np.concatenate(cut[::2]), np.concatenate(cut[1::2])
    joints = tuple(d for d in range(14) if d not in (6, 13))
    space = ActionSpace(
        embodiment="aloha",
        dim=14,
        groups=(
            ActionGroup(name="joints", kind="joint", dims=joints),
            ActionGroup(name="grippers", kind="gripper", dims=(6, 13)),
        ),
    )
    tokenizer = BeastTokenizer.fit([FitPart(actions=train, space=space)], BeastConfig())
    tokens = tokenizer.encode(held_out)
    error = tokenizer.normalise(tokenizer.decode(tokens).actions) - tokenizer.normalise(held_out)
    assert np.sqrt(np.square(error).mean()) < 0.02
    assert tokens.saturated.sum() < 0.02 * tokens.flat.size
