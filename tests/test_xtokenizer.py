"""X-Tokenizer: slots, windows, state, losses, robots added later."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from actok.core import (  # noqa: E402
    ChunkContext,
    ConfigError,
    DataError,
    FitPart,
    SpaceMismatchError,
    build_config,
    find_preset,
)
from actok.data import find_space  # noqa: E402
from actok.signal.rotations import geodesic_distance, to_matrix  # noqa: E402
from actok.signal.statistics import Statistics  # noqa: E402
from actok.tokenizers.export import ExportError, export_onnx  # noqa: E402
from actok.tokenizers.xtokenizer import XTokenizer, XTokenizerConfig  # noqa: E402
from actok.tokenizers.xtokenizer_codec import angle_between, slots_of  # noqa: E402

torch.set_num_threads(1)

P = 11
SMALL = {
    "width": 24,
    "heads": 3,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "latent_dim": 10,
    "dropout": 0.0,
    "quantizer": {"kind": "residual", "levels": 3, "codes": 17, "kmeans_steps": 2},
}


def part(name: str, horizon: int = 64, count: int = 37, *, anchor: int | None = None, seed: int = 0) -> FitPart:
    rng = np.random.default_rng(seed)
    space = find_space(name)
    actions = rng.uniform(-0.3, 0.3, (count, horizon, space.dim)).astype(np.float32)
    state = None if anchor is None else rng.normal(3, 2, (count, anchor)).astype(np.float32)
    return FitPart(actions=actions, space=space, anchor=state)


def prepared(*parts: FitPart, **settings) -> XTokenizer:
    """Untrained but for codebooks that hold something."""
    tokenizer = XTokenizer.prepare(parts, build_config(XTokenizerConfig, {**SMALL, **settings}, "test"), seed=1)
    state = tokenizer.codec.state_dict()
    rng = torch.Generator().manual_seed(2)
    for name, value in state.items():  # a network whose output hangs on all of its input
        if value.is_floating_point() and value.ndim >= 2 and "codebook" not in name:
            state[name] = value + 0.3 * torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5
    return tokenizer.with_weights(state)


@pytest.fixture(scope="module")
def tokenizer() -> XTokenizer:
    return prepared(part("libero_franka", anchor=P), part("unitree_g1_inspire", seed=1))


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 13, 29, 41, 64])
def test_any_length_has_a_slot_for_every_four_frames(tokenizer, steps):
    actions = part("libero_franka", steps, 5, seed=3).actions
    tokens = tokenizer.encode(actions)
    slots = -(-steps // 4)
    assert tokens.ids.shape == (5, 3 * slots)
    layout = tokenizer.layout_for(steps)
    assert layout.coords[:, 1].tolist() == np.repeat(np.arange(slots), 3).tolist()
    assert layout.coords[:, 0].tolist() == [0, 1, 2] * slots
    spans = tokenizer.codec.slot_steps(steps)
    assert np.concatenate([np.arange(a, b) for a, b in spans]).tolist() == list(range(steps))
    assert tokenizer.decode(tokens).actions.shape == (5, steps, 7)


def test_training_draws_lengths_of_8_to_the_horizon(tokenizer):
    drawn = {tokenizer.training_steps(int(d)) for d in np.random.default_rng(0).integers(0, 2**32, 999)}
    assert drawn == set(range(8, 65))
    assert {prepared(part("aloha", 7)).training_steps(d) for d in range(29)} == {7}


@pytest.mark.parametrize("name", ["libero_franka", "unitree_g1_inspire"])
def test_a_long_chunk_is_its_windows_one_after_another(tokenizer, name):
    """Of 64 steps and the rest, each a chunk by itself, without the state after the first."""
    actions = part(name, 101, 5, seed=4).actions
    state = np.random.default_rng(5).normal(size=(5, P))
    whole = tokenizer.encode(actions, ChunkContext(embodiment=name, anchor=state))
    first = tokenizer.encode(actions[:, :64], ChunkContext(embodiment=name, anchor=state))
    second = tokenizer.encode(actions[:, 64:], ChunkContext(embodiment=name))
    np.testing.assert_array_equal(whole.ids, np.concatenate([first.ids, second.ids], 1))
    back = tokenizer.decode(whole).actions
    parts = [tokenizer.decode(tokens).actions for tokens in (first, second)]
    np.testing.assert_allclose(back, np.concatenate(parts, 1), atol=1e-6)


def test_windows_are_whole_slots_so_that_slots_stay_those_of_the_chunk():
    short = prepared(part("aloha", 19))
    assert [short.layout_for(t).max_len // 3 for t in (19, 20, 23, 61)] == [slots_of(t) for t in (19, 20, 23, 61)]
    actions = part("aloha", 23, 5, seed=6).actions
    ids = [short.encode(actions[:, a:b]).ids for a, b in ((0, 16), (16, 23))]
    np.testing.assert_array_equal(short.encode(actions).ids, np.concatenate(ids, 1))


def test_padding_does_not_reach_the_codes_of_real_steps(tokenizer):
    """Codes are those of the padded chunk, whatever the padding holds; a chunk is encoded as if it ended there."""
    actions = part("libero_franka", 29, 7, seed=7).actions
    pad = np.zeros((7, 29), bool)
    pad[:, 17:] = True
    other = actions.copy()
    other[:, 17:] = 5.0
    first, second = (tokenizer.encode(x, ChunkContext(pad_mask=pad)).ids for x in (actions, other))
    np.testing.assert_array_equal(first, second)
    batch = tokenizer.batch(tokenizer.normalise(actions), real=~pad)
    noisy = replace(batch, actions=torch.where(batch.real[:, :, None], batch.actions, torch.tensor(9.0)))
    with torch.no_grad():
        np.testing.assert_allclose(tokenizer.codec.encode(batch), tokenizer.codec.encode(noisy), atol=1e-5)


def test_the_state_is_read_and_may_be_missing(tokenizer):
    ids = np.random.default_rng(8).integers(0, 17, (5, 3 * 16))
    state = np.random.default_rng(9).normal(3, 2, (5, P))
    without, one = tokenizer.decode(ids).actions, tokenizer.decode(ids, ChunkContext(anchor=state)).actions
    other = tokenizer.decode(ids, ChunkContext(anchor=state + 1)).actions
    assert np.isfinite(without).all()
    assert np.abs(one - without).max() > 1e-3
    assert np.abs(one - other).max() > 1e-3
    # A number that lies anywhere is one that lies far away, not one that drowns the others.
    far, farther = (np.where(np.arange(P) == 3, value, state) for value in (1e4, 1e8))
    np.testing.assert_array_equal(
        tokenizer.decode(ids, ChunkContext(anchor=far)).actions,
        tokenizer.decode(ids, ChunkContext(anchor=farther)).actions,
    )
    with pytest.raises(DataError, match=f"anchor has 4 numbers, embodiment 'libero_franka' was trained with {P}"):
        tokenizer.decode(ids, ChunkContext(anchor=state[:, :4]))
    with pytest.raises(DataError, match=r"give the proprioception at the chunks' starts, floats \[5, P\]"):
        tokenizer.decode(ids, ChunkContext(anchor=state[:3]))
    state[2, 3] = np.nan
    with pytest.raises(DataError, match="anchor of chunk 2"):
        tokenizer.decode(ids, ChunkContext(anchor=state))


def test_who_reads_the_state_is_a_setting():
    actions, state = part("libero_franka", 13, 5, seed=3).actions, np.random.default_rng(9).normal(3, 2, (5, P))
    for setting, readers in (("both", 2), ("decoder", 1), ("none", 0)):
        tok = prepared(part("libero_franka", 13, anchor=P), state=setting)
        batch = tok.batch(tok.normalise(actions), anchor=state)
        blank = replace(batch, has_state=torch.zeros(5, dtype=torch.bool))
        with torch.no_grad():
            latents = tok.codec.encode(batch)
            moved = [
                not torch.equal(latents, tok.codec.encode(blank)),
                not torch.equal(tok.codec.decode(latents, batch), tok.codec.decode(latents, blank)),
            ]
        assert moved == [readers == 2, readers >= 1]


def test_an_anchor_far_from_all_actions_is_refused_and_one_of_another_rotation_is_not():
    """Positions in millimetres beside actions in metres, when encoding, decoding and fitting."""
    rng = np.random.default_rng(5)
    actions = rng.uniform(-0.3, 0.3, (23, 16, 7)).astype(np.float32)
    anchor = actions[:, 0] + 0.25
    data = FitPart(actions=actions, space=find_space("droid_ee"), anchor=anchor)
    tok = prepared(data)
    ids = tok.encode(actions, ChunkContext(anchor=anchor)).ids
    turned = np.where(np.arange(7) == 4, 1.2, anchor)
    assert np.isfinite(tok.decode(ids, ChunkContext(anchor=turned)).actions).all()
    wrong = anchor.copy()
    wrong[11, 1] = 250.0
    for call in (tok.encode, tok.decode):
        values = actions if call == tok.encode else ids
        with pytest.raises(DataError, match=r"anchor of chunk 11 has 250 in y, where .* -0\.\d+ and 0\.\d+"):
            call(values, ChunkContext(anchor=wrong))
    prepared(replace(data, anchor=wrong))  # a single broken frame is no reason to refuse the data
    with pytest.raises(DataError, match="in the frame and unit of the actions"):
        prepared(replace(data, anchor=1000 * np.abs(anchor) + 50))


def test_absolute_poses_come_back_about_the_anchor():
    data = part("droid_ee", 16, anchor=7)
    data = replace(data, anchor=data.actions[:, 0])
    tok = prepared(data)
    ids = np.random.default_rng(1).integers(0, 17, (3, 12))
    states = np.zeros((2, 3, 7))
    states[1, :, :3] = 0.01  # small, so that no limit binds
    blank = replace(
        tok._described(3, 16, tok.embodiment(), None, states[0]), has_state=torch.zeros(3, dtype=torch.bool)
    )
    channels = tok.codec.detokenize(torch.from_numpy(ids), blank).numpy()
    first, second = (tok._shared["droid_ee"].back(channels, s) for s in states)
    np.testing.assert_allclose(second[:, :, :3] - first[:, :, :3], 0.01, atol=1e-12)
    with pytest.raises(DataError, match="commands absolute position, rotation"):
        tok.decode(ids)
    with pytest.raises(DataError, match="commands absolute position, rotation"):
        prepared(part("droid_ee", 16))


def test_the_way_back_is_exact_whatever_is_masked_padded_or_beyond_half_a_turn(monkeypatch):
    """With codes that hold everything: windows, absent dimensions, padding, and a roll recorded as 2.9 to 3.5 rad."""
    rng = np.random.default_rng(0)
    actions, anchor = rng.uniform(-0.3, 0.3, (37, 16, 7)), rng.uniform(-0.3, 0.3, (37, 7)).astype(np.float32)
    actions[:, :, 3], anchor[:, 3] = rng.uniform(2.9, 3.5, (37, 16)), 3.0
    actions = actions.astype(np.float32)
    tok = prepared(FitPart(actions=actions, space=find_space("droid_ee"), anchor=anchor))
    held, tokenize = [], tok.codec.tokenize
    monkeypatch.setattr(tok.codec, "tokenize", lambda batch: (held.append(batch.actions), tokenize(batch))[1])
    monkeypatch.setattr(tok.codec, "detokenize", lambda ids, batch: held.pop(0) * batch.present[:, None])
    long = np.concatenate([actions, actions[:, :7]], 1)  # two windows
    present, pad = np.ones((37, 7), bool), np.zeros((37, 23), bool)
    present[:11, 3:6] = present[5:17, 6] = present[3:7, 0] = False
    pad[:, 19:] = True
    decoded = tok.decode(tok.encode(long, ChunkContext(anchor=anchor, dof_mask=present, pad_mask=pad)))
    assert not held
    assert not decoded.clipped.any()
    wanted = np.where(present[:, None], long, 0)
    np.testing.assert_allclose(decoded.actions[:, :19], wanted[:, :19], atol=1e-5)


def test_ranges_are_the_quantiles_of_the_shared_channels(tokenizer):
    data = part("libero_franka", anchor=P)
    shared = tokenizer._shared["libero_franka"]
    path = np.cumsum(data.actions[:, :, :3].astype(np.float64), 1).reshape(-1, 3)
    low, high = np.quantile(path, [0.001, 0.999], axis=0)
    np.testing.assert_allclose(shared.ranges.centre[:3], (low + high) / 2, atol=1e-9)
    np.testing.assert_allclose(shared.ranges.half[:3], (high - low) / 2, atol=1e-9)
    np.testing.assert_allclose(shared.mean, data.anchor.mean(0, dtype=np.float64), rtol=1e-6)
    beyond = shared.there(10 * data.actions, None)
    assert np.abs(beyond[:, :, 3:6]).max() > 5  # nothing is clipped
    np.testing.assert_allclose(shared.back(beyond, None)[:, :, :3], 10 * data.actions[:, :, :3], atol=1e-4)


def test_absent_channels_are_zero(tokenizer):
    batch = tokenizer.batch(np.ones((3, 8, 26), np.float32), "unitree_g1_inspire")
    assert batch.present.sum().item() == 3 * 26
    assert not batch.actions[~batch.present[:, None].expand_as(batch.actions)].any()
    output = tokenizer.codec(batch)
    assert not output.reconstruction[~batch.present[:, None].expand_as(batch.actions)].any()


def test_angles_are_those_of_the_signal_package():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 97, 6))
    wanted = geodesic_distance(to_matrix(a, "rot6d"), to_matrix(b, "rot6d"))
    np.testing.assert_allclose(angle_between(torch.from_numpy(a), torch.from_numpy(b)), wanted, atol=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 90.0, 180.0])
def test_angles_have_finite_gradients(degrees):
    turn = np.deg2rad(degrees)
    six = torch.tensor([[1.0, 0, 0, 0, 1, 0], [0.0, 0, 0, 0, 0, 0]], requires_grad=True)
    other = torch.tensor([[np.cos(turn), np.sin(turn), 0, -np.sin(turn), np.cos(turn), 0], [0.0] * 6]).float()
    angle = angle_between(six, other)
    angle.sum().backward()
    assert abs(float(angle[0].detach()) - turn) < 1e-3
    assert torch.isfinite(six.grad).all()


def test_losses_are_what_they_say(tokenizer):
    """Against NumPy, on a chunk that is padded from step 9 on."""
    data = part("libero_franka", 13, 3, seed=5)
    real = np.ones((3, 13), bool)
    real[:, 9:] = False
    batch = tokenizer.batch(tokenizer.normalise(data.actions), real=real)
    guess = (batch.actions + 0.1 * torch.randn(batch.actions.shape, generator=torch.manual_seed(0))) * batch.present[
        :, None
    ]
    found = {k: float(v) for k, v in tokenizer.codec.reconstruction_losses(batch, guess).items()}
    own = tokenizer._shared["libero_franka"].union.channels
    x, y = batch.actions.numpy()[:, :9, own], guess.numpy()[:, :9, own]
    assert found["l1"] == pytest.approx(np.abs(x - y).mean(), rel=1e-4)
    assert found["velocity"] == pytest.approx(0.3 * np.abs(np.diff(x - y, axis=1)).mean(), rel=1e-4)
    from scipy.fft import dct

    held = np.concatenate([x - y, np.repeat((x - y)[:, -1:], 4, 1)], 1)
    assert found["dct"] == pytest.approx(0.5 * np.abs(dct(held, axis=1, norm="ortho")).mean(), rel=1e-4)
    shared = tokenizer._shared["libero_franka"]
    at = np.searchsorted(own, range(12, 18))
    six = [(v[:, :, at] * shared.ranges.half[at] + shared.ranges.centre[at]) for v in (x, y)]
    angle = geodesic_distance(*(to_matrix(v.astype(np.float64), "rot6d") for v in six))
    assert found["rotation"] == pytest.approx(0.2 * angle.mean(), rel=1e-3)
    assert set(tokenizer.codec.reconstruction_losses(batch, batch.actions)) == {"l1", "dct", "velocity", "rotation"}


def test_gradients_are_finite_and_reach_every_weight(tokenizer):
    codec = prepared(part("libero_franka", anchor=P), part("unitree_g1_inspire", seed=1)).codec
    codec.train().requires_grad_(True)
    data = part("libero_franka", 29, 19, anchor=P, seed=8)
    batch = tokenizer.batch(tokenizer.normalise(data.actions), anchor=data.anchor)
    torch.manual_seed(0)
    sum(codec(batch).losses.values()).backward()
    for name, weight in codec.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert weight.grad.any(), name


def test_training_forgets_state_and_robot_at_the_stated_rates(tokenizer, monkeypatch):
    codec = tokenizer.codec
    seen = []
    monkeypatch.setattr(codec.__class__.__base__, "forward", lambda self, batch: seen.append(batch))
    data = part("libero_franka", 8, 4001, anchor=P)
    batch = tokenizer.batch(tokenizer.normalise(data.actions), anchor=data.anchor)
    torch.manual_seed(0)
    codec.train()
    try:
        codec(batch)
    finally:
        codec.eval()
    codec(batch)
    state, robot = ~seen[0].has_state, seen[0].embodiment == 0
    shares = [float(x.float().mean()) for x in (state & ~robot, robot & ~state, state & robot)]
    np.testing.assert_allclose(shares, [0.2, 0.2, 0.1], atol=0.02)
    assert seen[1].has_state.all()
    assert (seen[1].embodiment == 1).all()


def test_a_robot_added_by_statistics_gets_the_measured_ratio_of_path_and_step(tokenizer):
    """Twice the steps, twice the range; what stays as it is has its own quantiles."""
    data = part("libero_franka")
    space = data.space.renamed("bigger")
    bigger = data.actions.copy()
    bigger[:, :, :3] *= 2
    bigger[:, :, 6] = 5 + 3 * bigger[:, :, 6]
    added = tokenizer.adapt(space, Statistics.from_array(bigger))
    assert added.weights_hash == tokenizer.weights_hash
    old, new = (added._shared[n].ranges for n in ("libero_franka", "bigger"))
    far = np.abs(old.centre[:3]) + old.half[:3]
    np.testing.assert_allclose(new.half[:3], 2 * far, rtol=1e-6)
    np.testing.assert_allclose(new.centre[3:9] - new.half[3:9], old.centre[3:9] - old.half[3:9], atol=1e-9)
    np.testing.assert_allclose([new.centre[-1], new.half[-1]], [5 + 3 * old.centre[-1], 3 * old.half[-1]], rtol=1e-5)
    exact = tokenizer.adapt_to(FitPart(actions=bigger, space=space))
    np.testing.assert_allclose(exact._shared["bigger"].ranges.half[:3], 2 * old.half[:3], rtol=1e-5)
    with pytest.raises(DataError, match="give chunks of the fitted 64"):
        tokenizer.adapt_to(FitPart(actions=bigger[:, :9], space=space))
    with pytest.raises(SpaceMismatchError, match=r"left_arm.* would take channels that no training embodiment"):
        prepared(part("libero_franka", 8)).adapt(find_space("aloha"), Statistics.from_array(part("aloha", 8).actions))


@pytest.mark.parametrize("name", ["xtokenizer", "xtokenizer-base", "xtokenizer-small", "xtokenizer-tiny"])
def test_presets_have_the_papers_weights(name):
    from actok.alignment.config import AlignmentConfig

    preset = find_preset(name)
    config = build_config(XTokenizerConfig, preset.settings, name)
    assert (config.rotation_weight, config.dct_weight, config.velocity_weight) == (0.2, 0.5, 0.3)
    assert config.quantizer["levels"] == 4
    align = build_config(AlignmentConfig, preset.alignment, name)
    assert (align.masking, align.contrast, align.prediction, align.temperature) == (0.1, 0.5, 0.2, 0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "27"}, "layout is '27'"),
        ({"frame": "world"}, "frame is 'world'"),
        ({"state": "encoder"}, "state is 'encoder'"),
        ({"width": 20, "heads": 4}, "width is 20 with 4 heads"),
        ({"state_dropout": 0.8}, "add up to 1.1"),
        ({"rotation_weight": -1.0}, "rotation_weight"),
        ({"quantizer": {"kind": "multi_scale", "scales": [1, 2], "codes": 5}}, "fixed number of slots"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        prepared(part("aloha", 8), **settings)


@pytest.mark.parametrize("steps", [3, 65])
def test_horizons_that_cannot_be_trained_are_named(steps):
    with pytest.raises(ConfigError, match=f"chunks to train on have {steps} steps; give a horizon of 4 to 64"):
        prepared(part("aloha", steps))


def test_it_has_no_onnx_form(tokenizer, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match="reads the robot's state"):
        export_onnx(tokenizer, tmp_path)
