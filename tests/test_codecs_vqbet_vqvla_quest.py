"""Laws of VQ-BeT's, MiniVLA's, VQ-VLA's and QueST's codecs: order of tokens, causality, mixed robots, any quantiser."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.core import ActionSpace, ConfigError, FitPart, build_config, find_preset, merge_settings
from actok.core.registry import load_target
from actok.nn.convolution import TimeConv
from actok.tokenizers.neural import join
from actok.tokenizers.vqvla import StepNorm
from actok.training import fit_parts

B, T, D = 5, 11, 3
NAMES = ("vqbet-tiny", "minivla-tiny", "vqvla-tiny", "quest-tiny")
QUANTIZERS = {
    "vq": {"kind": "vq", "codes": 13},
    "residual": {"kind": "residual", "levels": 2, "codes": 17},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3]},
    "lfq": {"kind": "lfq", "bits": 7},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def motions(count: int, seed: int, horizon: int = T, dim: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = np.linspace(0, 1, horizon)[None, :, None]
    size, phase = rng.normal(size=(2, count, 1, dim))
    return (size * np.sin(3 * steps + phase) + rng.normal(size=(count, 1, dim))).astype(np.float32)


def prepared(name: str, horizon: int = T, dims: tuple[int, ...] = (D,), **settings):
    """An untrained tokenizer of robots of these widths, called robot3 for 3 dimensions."""
    preset = find_preset(name)
    target = load_target(preset.target)
    config = build_config(target.config_class, merge_settings(preset.settings, settings), name)
    parts = [FitPart(actions=motions(31, d, horizon, d), space=ActionSpace.raw(d, f"robot{d}")) for d in dims]
    return target.prepare(parts, config)


@functools.cache
def started(name: str, horizon: int = T, dims: tuple[int, ...] = (D,)):
    """As `prepared`, after one pass in training mode, which gives codebooks vectors of the data."""
    tokenizer = prepared(name, horizon, dims)
    codec = tokenizer.codec.train()
    with torch.no_grad():
        codec(join([tokenizer.batch(motions(307, 7, horizon, d), f"robot{d}") for d in dims]))
    return tokenizer.with_weights(codec.state_dict())


@pytest.mark.parametrize("name", ["vqbet-tiny", "vqvla-tiny", "quest-tiny"])
def test_a_short_training_lowers_the_error(name):
    space = ActionSpace.raw(D, "robot3")
    train, test = motions(512, 1), motions(67, 2)
    quick = {"batch_size": 32, "warmup_steps": 5, "learning_rate": 2e-3}

    def error(steps: int) -> float:
        fitted = fit_parts(name, [FitPart(actions=train, space=space)], training={**quick, "steps": steps})
        return float(np.abs(fitted.decode(fitted.encode(test)).actions - test).mean())

    assert error(60) < 0.6 * error(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("horizon", [1, 5, 11])
def test_any_horizon_and_any_number_of_windows(name, horizon):
    tokenizer = started(name, horizon)
    for steps in (horizon, 2 * horizon + 1):
        actions = motions(B, 3, steps)
        tokens = tokenizer.encode(actions)
        assert tokens.ids.shape == (B, tokenizer.layout_for(steps).max_len)
        assert tokenizer.decode(tokens).actions.shape == actions.shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_any_quantiser_and_gradients_to_every_parameter(name, kind):
    tokenizer = prepared(name, quantizer=QUANTIZERS[kind])
    codec = tokenizer.codec.train().requires_grad_(True)
    batch = tokenizer.batch(motions(61, 4))
    for _ in range(2):  # the second time with codebooks from data
        codec.zero_grad()
        out = codec(batch)
        sum(out.losses.values()).backward()
    assert out.codes.shape[2] == codec.quantizer.levels
    without = [n for n, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    again = tokenizer.with_weights(codec.state_dict())
    tokens = again.encode(motions(B, 5))
    assert (tokens.ids < again.layout.vocab).all()
    assert again.decode(tokens).valid.all()


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    import actok

    tokenizer = started(name)
    again = actok.load(tokenizer.save_pretrained(tmp_path / "t"))
    assert again.config == tokenizer.config
    tokens = tokenizer.encode(motions(B, 6))
    np.testing.assert_array_equal(again.encode(motions(B, 6)).ids, tokens.ids)
    np.testing.assert_array_equal(again.decode(tokens).actions, tokenizer.decode(tokens).actions)


@pytest.mark.parametrize("name", NAMES)
def test_absent_channels_change_neither_codes_nor_losses(name):
    """A batch of two robots is what they are one by one, and what stands in absent channels of the target is ignored."""
    tokenizer = started(name, dims=(2, 9))
    codec = tokenizer.codec
    small, large = tokenizer.batch(motions(B, 8, T, 2), "robot2"), tokenizer.batch(motions(7, 9, T, 9), "robot9")
    both = join([small, large])
    out = codec(both)
    assert torch.equal(out.codes[:B], codec(small).codes)
    assert torch.equal(out.codes[B:], codec(large).codes)
    torch.testing.assert_close(out.reconstruction[:B], codec(small).reconstruction)
    assert not out.reconstruction[:B, :, 2:].any()
    numbers = {"small": B * T * 2, "large": 7 * T * 9}
    name_of_loss = next(iter(codec.reconstruction_losses(both, out.reconstruction)))
    expected = (
        codec(small).losses[name_of_loss] * numbers["small"] + codec(large).losses[name_of_loss] * numbers["large"]
    ) / sum(numbers.values())
    torch.testing.assert_close(out.losses[name_of_loss], expected)
    other = replace(both, actions=both.actions + 5.0 * ~both.present[:, None])
    assert torch.equal(
        codec.reconstruction_losses(other, out.reconstruction)[name_of_loss],
        codec.reconstruction_losses(both, out.reconstruction)[name_of_loss],
    )


@pytest.mark.parametrize("name", NAMES)
def test_padded_steps_count_in_no_loss(name):
    tokenizer = started(name)
    real = np.ones((B, T), bool)
    real[:, 7:] = False
    batch = tokenizer.batch(motions(B, 10), real=real)
    guess = torch.zeros(B, T, D)
    other = guess.clone()
    other[:, 7:] = 9.0
    assert tokenizer.codec.reconstruction_losses(batch, guess) == tokenizer.codec.reconstruction_losses(batch, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_position_of_the_sequence_is_the_code_that_its_coordinates_name(name):
    tokenizer = started(name, dims=(9,))
    codec, layout = tokenizer.codec, tokenizer.layout
    actions = motions(B, 11, T, 9)
    batch = tokenizer.batch(tokenizer.normalise(actions))
    codes = codec.quantizer.encode(codec.encode(batch)).numpy()  # [B, S, Q]
    level, time, part = layout.coords.T
    slot = time * (part.max() + 1) + part
    np.testing.assert_array_equal(tokenizer.encode(actions).ids, codes[:, slot, level])
    assert len({tuple(c) for c in layout.coords}) == layout.max_len == codes[0].size
    np.testing.assert_array_equal(layout.table, level)
    assert (np.diff(slot) >= 0).all()  # slot after slot, so that window follows window
    twice = tokenizer.encode(np.concatenate([actions, actions[::-1]], axis=1)).ids
    np.testing.assert_array_equal(twice[:, : layout.max_len], tokenizer.encode(actions).ids)
    np.testing.assert_array_equal(twice[:, layout.max_len :], tokenizer.encode(actions[::-1]).ids)


def test_one_latent_a_window_whose_levels_add_up():
    tokenizer = started("vqbet-tiny")
    assert [tuple(c) for c in tokenizer.layout.coords] == [(level, 0, 0) for level in range(8)]
    assert find_preset("minivla").settings["quantizer"] == {
        **find_preset("vqbet").settings["quantizer"],
        "levels": 7,
        "codes": 128,
    }


@pytest.mark.parametrize(("name", "stride"), [("vqvla-tiny", 8), ("quest-tiny", 4)])
def test_codes_do_not_depend_on_what_comes_after_their_time(name, stride):
    horizon = 29
    tokenizer = started(name, horizon)
    codec = tokenizer.codec
    batch = tokenizer.batch(motions(B, 12, horizon))
    latents = codec.encode(batch)
    for step in (0, 7, 8, 20, 28):
        changed = batch.actions.clone()
        changed[:, step:] += torch.randn(B, horizon - step, D, generator=torch.Generator().manual_seed(step))
        moved = (codec.encode(replace(batch, actions=changed)) - latents).abs().amax((0, 2))
        first = step // stride
        assert (moved[:first] < 1e-5).all()
        assert (moved[first:] > 1e-5).all()  # and every step is seen


def test_vqvla_decodes_a_step_from_the_codes_up_to_its_time():
    horizon = 29
    codec = started("vqvla-tiny", horizon).codec
    batch = started("vqvla-tiny", horizon).batch(motions(B, 13, horizon))
    latents = codec.encode(batch)
    before = codec.decode(latents, batch)
    for slot in range(latents.shape[1]):
        changed = latents.clone()
        changed[:, slot] += 1.0
        moved = (codec.decode(changed, batch) - before).abs().amax((0, 2))
        assert (moved[: 8 * slot] < 1e-5).all()
        assert (moved[8 * slot :] > 1e-5).all()


def test_vqvla_has_a_slot_for_each_time_and_strip_of_channels():
    assert prepared("vqvla-tiny", 5, (7,)).layout.max_len == 4  # the paper's 5 x 7
    layout = prepared("vqvla-tiny", 17, (9,)).layout
    assert layout.max_len == 3 * 2 * 4
    assert [tuple(c) for c in layout.coords[:9:4]] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]


def test_quest_knows_slots_apart():
    """The same code in another slot says something else, wherever the paper's decoder looks for it."""
    tokenizer = started("quest-tiny")
    ids = tokenizer.encode(motions(B, 14)).ids
    swapped = ids[:, [1, 0, 2]]
    assert (ids[:, 0] != ids[:, 1]).any()
    apart = np.abs(tokenizer.decode(swapped).actions - tokenizer.decode(ids).actions).max((1, 2))
    assert (apart[ids[:, 0] != ids[:, 1]] > 1e-6).all()


def test_step_norm_is_group_norm_of_each_step():
    x = torch.randn(2, 12, 5, 3)
    norm = StepNorm(4, 12)
    grouped = x.unflatten(1, (4, 3))
    mean, spread = grouped.mean((2, 4), keepdim=True), grouped.std((2, 4), keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), ((grouped - mean) / spread).flatten(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "length"), [(3, 1, 7), (3, 2, 7), (5, 2, 8), (4, 3, 11), (2, 2, 6)])
def test_causal_convolution_sees_all_of_its_own_stride_and_nothing_later(kernel, stride, length):
    conv = TimeConv(2, 3, kernel, stride=stride, causal=True)
    x = torch.randn(1, length, 2, requires_grad=True)
    out = conv(x)
    assert out.shape == (1, -(-length // stride), 3)
    for t in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        seen = np.flatnonzero(gradient[0].abs().sum(1).numpy())
        last = (t + 1) * stride - 1
        np.testing.assert_array_equal(seen, np.arange(max(0, last - kernel + 1), min(last + 1, length)))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vqbet", {"hidden": 0}, "hidden is 0"),
        ("vqvla", {"widths": [128, 200, 256, 512]}, "width 200 and 32 groups"),
        ("vqvla", {"widths": [32, 64, 64, 64]}, "width 32 and 32 groups"),
        ("vqvla", {"blocks": [1, 1]}, r"blocks is \(1, 1\) for 4 widths"),
        ("quest", {"downsample": 6}, "downsample is 6"),
        ("quest", {"heads": 5}, "256 and 5 heads"),
        ("quest", {"dropout": 1.0}, "dropout is 1.0"),
        ("quest", {"quantizer": {"kind": "residul"}}, "'residul'; did you mean 'residual'"),
        ("quest", {"quantizer": "fsq"}, r"quantizer is 'fsq'; .* quantizer\.kind=fsq"),
        ("quest", {"quantizer": {"kind": "multi_scale", "scales": [1, 3]}}, "makes 4 code slots of the 3"),
    ],
)
def test_settings_that_cannot_be_used_are_named(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        prepared(name, **settings)
