"""OAT, block-compatible OAT and ActionCodec: who depends on whom, prefixes, prompts, order of tokens, losses.

The weights in tests/weights/oat and tests/weights/boat were made by: python tests/test_codecs_oat_actioncodec.py
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import actok
from actok.core import ActionSpace, ChunkContext, ConfigError, FitPart, find_preset
from actok.signal.statistics import Statistics
from actok.training import fit_parts

torch = pytest.importorskip("torch")

from actok.tokenizers.actioncodec import ActionCodecConfig, ActionCodecTokenizer  # noqa: E402
from actok.tokenizers.neural import join  # noqa: E402
from actok.tokenizers.oat import OatConfig, OatTokenizer  # noqa: E402

T, D = 13, 5
WEIGHTS = Path(__file__).parent / "weights"
ARM = ActionSpace.raw(D, "arm", rate_hz=20.0)
HAND = ActionSpace.raw(3, "hand", rate_hz=5.0)
OAT = {"registers": 7, "latent_dim": 6, "width": 24, "heads": 2, "encoder_depth": 2, "decoder_depth": 2}
ACTIONCODEC = {"tokens": 11, "latent_dim": 6, "width": 24, "heads": 2, "depth": 2, "prompts": 2}
RESIDUAL = {"kind": "residual", "levels": 3, "codes": 17}
QUANTIZERS = [
    {"kind": "vq", "codes": 17},
    {**RESIDUAL, "dropout": 0.5},
    {"kind": "fsq", "levels": [5, 4, 3]},
    {"kind": "lfq", "bits": 5},
]


def smooth(count: int, seed: int, horizon: int = T, dim: int = D) -> np.ndarray:
    """Offsets and one slow oscillation a dimension."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, horizon)[None, :, None]
    phase, speed, size, offset = rng.uniform(size=(4, count, 1, dim))
    return (2 * offset + size * np.sin(2 * np.pi * (phase + speed * t))).astype(np.float32)


def oat(*spaces: ActionSpace, horizon: int = T, seed: int = 0, **settings) -> OatTokenizer:
    parts = [FitPart(actions=smooth(37, i, horizon, s.dim), space=s) for i, s in enumerate(spaces or (ARM,))]
    return OatTokenizer.prepare(parts, OatConfig(**{**OAT, **settings}), seed=seed)


def actioncodec(*spaces: ActionSpace, horizon: int = T, **settings) -> ActionCodecTokenizer:
    parts = [FitPart(actions=smooth(37, i, horizon, s.dim), space=s) for i, s in enumerate(spaces or (ARM,))]
    return ActionCodecTokenizer.prepare(parts, ActionCodecConfig(**{**ACTIONCODEC, "quantizer": RESIDUAL, **settings}))


MAKERS = pytest.mark.parametrize("make", [oat, actioncodec])


def mixed(tokenizer, seed: int = 5):
    """Two chunks of the wide embodiment and three of the narrow one."""
    return join([tokenizer.batch(smooth(2, seed), "arm"), tokenizer.batch(smooth(3, seed, dim=3), "hand")])


def changed(before, after) -> list[int]:
    """Slots [B, S, C] whose values differ."""
    return torch.nonzero((before != after).any(2).any(0)).flatten().tolist()


# -- OAT: order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(), (1, 1, 2, 3), (3, 4), (7,)])
def test_a_register_depends_on_no_later_block(blocks):
    tokenizer = oat(blocks=blocks)
    codec, batch = tokenizer.codec, tokenizer.batch(smooth(4, 1))
    before = codec.encode(batch)
    ends = tokenizer.config.ends
    for register in range(7):
        kept = codec.registers.clone()
        codec.registers[register] += 1.0
        start = max((end for end in ends if end <= register), default=0)
        assert changed(before, codec.encode(batch)) == list(range(start, 7))
        codec.registers.copy_(kept)


def test_every_step_reaches_every_register():
    tokenizer = oat()
    x = smooth(4, 1)
    before = tokenizer.codec.encode(tokenizer.batch(x))
    for step in range(T):
        other = x.copy()
        other[:, step] += 0.5
        assert changed(before, tokenizer.codec.encode(tokenizer.batch(other))) == list(range(7))


@pytest.mark.parametrize("kept", [1, 2, 4, 7])
def test_a_prefix_decodes_as_training_saw_it(kept):
    """Training masks what follows a prefix; inference is not given it. Both are the same, whatever the masked were."""
    tokenizer = oat()
    codec, batch = tokenizer.codec, tokenizer.batch(smooth(4, 2))
    z = codec.quantizer(codec.encode(batch)).quantised
    expected = codec.decode(z[:, :kept], batch)
    codec.kept.fill_(kept)
    codec.train()
    torch.testing.assert_close(codec.decode(z, batch), expected, rtol=0, atol=1e-6)
    other = torch.cat([z[:, :kept], z[:, kept:] + 3.0], 1)
    torch.testing.assert_close(codec.decode(other, batch), expected, rtol=0, atol=1e-6)
    codec.eval()
    whole = codec.decode(z, batch)
    assert torch.equal(codec.decode(other, batch), whole) == torch.equal(expected, whole) == (kept == 7)


def test_training_draws_every_prefix_and_nothing_else():
    tokenizer = oat(prefixes=(1, 3, 7))
    codec, batch = tokenizer.codec, tokenizer.batch(np.repeat(smooth(1, 3), 301, 0))
    z = codec.quantizer(codec.encode(batch)).quantised
    candidates = torch.stack([codec.decode(z[:1, :n], tokenizer.batch(smooth(1, 3)))[0] for n in (1, 3, 7)])
    codec.train()
    distance = (codec.decode(z, batch)[:, None] - candidates).abs().amax((2, 3))
    assert (distance.min(1).values < 1e-5).all()
    counts = torch.bincount(distance.argmin(1), minlength=3)
    assert (counts > 60).all(), counts  # expected: 100 each, standard deviation 8


@pytest.mark.parametrize("levels", [1, 3])
def test_prefixes_of_several_windows_are_prefixes_of_each(levels):
    quantizer = {"kind": "residual", "levels": levels, "codes": 17}
    tokenizer = oat(blocks=(1, 2, 4), quantizer=quantizer)
    horizon = 2 * T + 3
    actions = smooth(3, 4, horizon)
    ids = tokenizer.encode(actions).ids
    layout = tokenizer.layout_for(horizon)
    assert layout.prefixes == tuple(3 * levels * n for n in (1, 3, 7))
    assert [len(b) for b in layout.blocks] == [3 * levels * n for n in (1, 2, 4)]
    np.testing.assert_array_equal(layout.coords[:, 0], np.repeat(np.arange(7), 3 * levels))
    np.testing.assert_array_equal(layout.coords[:, 1], np.tile(np.repeat(np.arange(3), levels), 7))
    np.testing.assert_array_equal(layout.coords[:, 2], np.tile(np.arange(levels), 21))
    np.testing.assert_array_equal(layout.table, layout.coords[:, 2])
    whole = np.concatenate([actions, np.repeat(actions[:, -1:], 3 * T - horizon, 1)], 1)
    windows = [tokenizer.encode(whole[:, i * T : (i + 1) * T]).ids for i in range(3)]
    for n in (1, 3, 7):
        alone = [tokenizer.decode(w[:, : n * levels]).actions for w in windows]
        together = tokenizer.decode(ids[:, : 3 * n * levels], horizon=horizon)
        assert together.valid.all()
        np.testing.assert_allclose(together.actions, np.concatenate(alone, 1)[:, :horizon], atol=1e-5)
    between = tokenizer.decode(ids[:, : 3 * 2 * levels], horizon=horizon)
    assert not between.valid.any()
    assert "21" in between.reasons[0] or str(21 * levels) in between.reasons[0]


@pytest.mark.parametrize("name", ["oat", "boat"])
def test_held_out_error_does_not_grow_over_the_trained_prefixes(name):
    tokenizer = actok.load(WEIGHTS / name)
    held_out = smooth(997, 1234)
    ids = tokenizer.encode(held_out).ids
    ruler = tokenizer.normalise(held_out)
    prefixes = tokenizer.layout.prefixes
    errors = [((tokenizer.normalise(tokenizer.decode(ids[:, :n]).actions) - ruler) ** 2).mean() for n in prefixes]
    assert all(b <= 1.01 * a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.5 * errors[0]
    assert prefixes == (1, 2, 4, 8)
    assert [len(b) for b in tokenizer.layout.blocks] == ([1] * 8 if name == "oat" else [1, 1, 2, 4])


def test_defaults_of_prefixes():
    assert OatConfig(registers=8).kept == (1, 2, 4, 8)
    assert OatConfig(registers=6).kept == (1, 2, 4, 6)
    assert OatConfig(registers=1).kept == (1,)
    assert OatConfig(registers=16, blocks=(1, 1, 2, 4, 8)).kept == (1, 2, 4, 8, 16)
    assert OatConfig(registers=7, blocks=(3, 4)).kept == (3, 7)
    assert OatConfig(registers=7, blocks=(3, 4), prefixes=(7,)).kept == (7,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"registers": 0}, "registers is 0"),
        ({"width": 30, "heads": 4}, "width 30"),
        ({"blocks": (1, 2)}, "hold 3 registers, registers is 8"),
        ({"blocks": (0, 8)}, "blocks is 0"),
        ({"blocks": 8}, "blocks is 8"),
        ({"prefixes": (1, 4)}, "end with 8"),
        ({"prefixes": (4, 2, 8)}, "ascending"),
        ({"blocks": (3, 5), "prefixes": (4, 8)}, "out of 3, 8"),
    ],
)
def test_oat_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OatConfig(**settings)


def test_oat_refuses_codes_that_mix_registers():
    with pytest.raises(ConfigError, match="'multi_scale' mixes all registers"):
        oat(quantizer={"kind": "multi_scale", "scales": [1, 3, 7], "codes": 17})


# -- ActionCodec: independence, time, prompts ---------------------------------------------------------------------------


def test_a_token_depends_on_no_other_token():
    tokenizer = actioncodec()
    codec, batch = tokenizer.codec, tokenizer.batch(smooth(4, 1))
    before = codec.encode(batch)
    for token in range(11):
        kept = codec.queries.clone()
        codec.queries[token] += 1.0
        assert changed(before, codec.encode(batch)) == [token]
        codec.queries.copy_(kept)


def test_steps_are_known_by_their_times_alone():
    """Shuffling steps together with their times leaves the latents alone and shuffles the decoded steps."""
    tokenizer = actioncodec()
    codec, batch = tokenizer.codec, tokenizer.batch(smooth(4, 2))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        batch, actions=batch.actions[:, order], structure={"seconds": batch.structure["seconds"][:, order]}
    )
    z = codec.encode(batch)
    torch.testing.assert_close(codec.encode(shuffled), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(z, shuffled), codec.decode(z, batch)[:, order], rtol=0, atol=1e-5)
    assert not torch.allclose(codec.encode(replace(batch, actions=batch.actions[:, order])), z, atol=1e-3)


def test_times_follow_the_control_rate_also_of_an_embodiment_that_is_added_later():
    unknown = ActionSpace.raw(2, "unknown_rate")
    tokenizer = actioncodec(ARM, HAND, unknown, rate_hz=8.0)
    late = ActionSpace.raw(4, "late", rate_hz=50.0)
    tokenizer = tokenizer.adapt(late, Statistics.from_array(smooth(37, 9, dim=4)))
    for name, rate in (("arm", 20), ("hand", 5), ("unknown_rate", 8), ("late", 50)):
        dim = tokenizer.spaces[name].dim
        batch = tokenizer.batch(smooth(2, 3, dim=dim), name)
        np.testing.assert_allclose(batch.structure["seconds"][1], np.arange(T) / rate, rtol=1e-6)
        context = ChunkContext(embodiment=name)
        assert tokenizer.decode(tokenizer.encode(smooth(2, 3, dim=dim), context)).valid.all()
    assert tokenizer.batch(smooth(2, 3, dim=4), "late").embodiment.tolist() == [0, 0]


def test_prompts_are_those_of_the_embodiment_or_of_none():
    tokenizer = actioncodec(ARM, HAND, prompt_dropout=1.0)
    codec, batch = tokenizer.codec, mixed(tokenizer)
    assert batch.embodiment.tolist() == [1, 1, 2, 2, 2]
    before = codec.encode(batch), codec.decode(codec.encode(batch), batch)
    codec.prompts.weight[2] += 1.0
    after = codec.encode(batch), codec.decode(before[0], batch)
    for a, b in zip(before, after, strict=True):
        assert (a != b).flatten(1).any(1).tolist() == [False, False, True, True, True]
    none = replace(batch, embodiment=torch.zeros(5, dtype=torch.int64))
    codec.requires_grad_(True).train()
    torch.testing.assert_close(codec(batch).latents, codec(none).latents)
    sum(codec(batch).losses.values()).backward()
    assert (codec.prompts.weight.grad != 0).any(1).tolist() == [True, False, False]
    codec.eval()
    torch.testing.assert_close(codec(batch).latents, after[0])


def test_all_tokens_of_a_level_stand_before_those_of_the_next():
    tokenizer = actioncodec(block=11)
    layout = tokenizer.layout
    level, token = np.divmod(np.arange(33), 11)
    np.testing.assert_array_equal(layout.coords, np.stack([level, 0 * token, token], 1))
    np.testing.assert_array_equal(layout.table, level)
    assert [len(b) for b in layout.blocks] == [11, 11, 11]
    codec, batch = tokenizer.codec, tokenizer.batch(smooth(4, 6))
    codes = codec.quantizer.encode(codec.encode(batch))
    np.testing.assert_array_equal(codec.tokenize(batch), codes.permute(0, 2, 1).reshape(4, 33))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"width": 30, "heads": 4}, "width is 30"),
        ({"prompt_dropout": 1.5}, "prompt_dropout is 1.5"),
        ({"rate_hz": 0}, "rate_hz is 0"),
    ],
)
def test_actioncodec_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ActionCodecConfig(**settings)


# -- both ---------------------------------------------------------------------------------------------------------------


@MAKERS
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q["kind"])
def test_gradients_reach_every_parameter_with_every_quantiser(make, quantizer):
    tokenizer = make(ARM, HAND, quantizer=quantizer)
    torch.manual_seed(0)
    codec = tokenizer.codec.requires_grad_(True).train()
    batch = mixed(tokenizer)
    total = sum(sum(codec(batch).losses.values()) for _ in range(7))  # several draws of what is dropped
    total.backward()
    silent = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    codec.eval()
    ids = codec.tokenize(batch)
    levels, slots = codec.quantizer.levels, ids.shape[1] // codec.quantizer.levels
    assert slots == (7 if make is oat else 11)
    assert codec.detokenize(ids, batch).shape == (5, T, D)
    assert tokenizer.layout.max_len == levels * slots
    assert (ids.numpy() < tokenizer.layout.vocab).all()


@MAKERS
def test_one_code_changes_the_value_of_its_slot_and_level_only(make):
    tokenizer = make(quantizer=RESIDUAL)
    quantizer, batch = tokenizer.codec.quantizer, tokenizer.batch(smooth(2, 7))
    for codebook in quantizer.codebooks:  # as after training: codes that differ
        codebook.start(torch.randn(61, quantizer.width), None)
    ids = tokenizer.codec.tokenize(batch)
    seen = []
    tokenizer.codec.decode = lambda latents, batch: (seen.append(latents), batch.actions)[1]
    tokenizer.codec.detokenize(ids, batch)
    slot_of = {"oat": lambda n: divmod(n, 3), "actioncodec": lambda n: divmod(n, 11)[::-1]}[tokenizer.kind]
    for n in range(ids.shape[1]):
        slot, level = slot_of(n)
        other = ids.clone()
        other[:, n] = (ids[:, n] + 1) % 17
        tokenizer.codec.detokenize(other, batch)
        assert changed(seen[0], seen[-1]) == [slot]
        table = quantizer.codebook(level).table()
        expected = table[other[:, n]] - table[ids[:, n]]
        torch.testing.assert_close(seen[-1][:, slot] - seen[0][:, slot], expected, rtol=0, atol=1e-5)
        coords = tokenizer.layout.coords[n]
        assert (slot, level) == ((coords[0], coords[2]) if make is oat else (coords[2], coords[0]))


@MAKERS
def test_embodiments_of_different_width_share_a_batch_without_noticing(make):
    tokenizer = make(ARM, HAND)
    codec, batch = tokenizer.codec, mixed(tokenizer)
    ids, out = codec.tokenize(batch), codec(batch)
    for rows, name, dim in ((slice(0, 2), "arm", 5), (slice(2, 5), "hand", 3)):
        alone = tokenizer.batch(smooth(rows.stop - rows.start, 5, dim=dim), name)
        np.testing.assert_array_equal(codec.tokenize(alone), ids[rows])
        torch.testing.assert_close(codec(alone).reconstruction, out.reconstruction[rows], rtol=0, atol=1e-5)
    assert not out.reconstruction[2:, :, 3:].any()
    absent = smooth(2, 8)
    absent[:, :, 1] = 77.0
    context = ChunkContext(dof_mask=np.array([[True, False, True, True, True]] * 2))
    np.testing.assert_array_equal(tokenizer.encode(absent, context).ids, tokenizer.encode(smooth(2, 8), context).ids)


@MAKERS
def test_losses_count_real_steps_and_present_channels_only(make):
    tokenizer = make(ARM, HAND)
    real = np.ones((5, T), bool)
    real[1, 4:] = real[3, 9:] = False
    batch = replace(mixed(tokenizer), real=torch.from_numpy(real))
    out = tokenizer.codec(batch)
    error = (out.reconstruction - batch.actions).numpy()
    where = real[:, :, None] & batch.present.numpy()[:, None]
    name, power = ("mse", 2) if make is oat else ("l1", 1)
    np.testing.assert_allclose(out.losses[name], (np.abs(error[where]) ** power).mean(), rtol=1e-5)


@MAKERS
def test_saved_and_loaded_it_gives_the_same_codes(make, tmp_path):
    tokenizer = make(ARM, HAND)
    again = actok.load(tokenizer.save_pretrained(tmp_path / "saved"))
    assert again.weights_hash == tokenizer.weights_hash
    assert again.config == tokenizer.config
    context = ChunkContext(embodiment="hand")
    x = smooth(4, 11, dim=3)
    tokens = tokenizer.encode(x, context)
    np.testing.assert_array_equal(again.encode(x, context).flat, tokens.flat)
    np.testing.assert_array_equal(again.decode(tokens).actions, tokenizer.decode(tokens).actions)


@MAKERS
def test_windows_of_one_step(make):
    tokenizer = make(horizon=1)
    x = smooth(3, 12, horizon=1)
    assert tokenizer.decode(tokenizer.encode(x)).actions.shape == (3, 1, D)
    tokenizer.codec.train()
    losses = tokenizer.codec(tokenizer.batch(x)).losses
    assert all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("name", ["oat", "boat", "actioncodec"])
def test_presets_have_the_published_sizes(name):
    preset = find_preset(name)
    tokenizer_class = {"oat": OatTokenizer, "boat": OatTokenizer, "actioncodec": ActionCodecTokenizer}[name]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in preset.settings.items()}
    tokenizer = tokenizer_class.prepare(
        [FitPart(actions=smooth(19, 0, 32), space=ARM)], tokenizer_class.config_class(**settings)
    )
    layout = tokenizer.layout
    expected = {"oat": (8, 1000, 8), "boat": (16, 1000, 5), "actioncodec": (16, 2048, 16)}[name]
    assert (layout.max_len, tokenizer.vocab_size, layout.passes) == expected


def make_weights() -> None:
    """Train and write the committed weights."""
    settings = {"registers": 8, "latent_dim": 8, "width": 24, "heads": 2, "encoder_depth": 2, "decoder_depth": 1}
    training = {"steps": 1500, "batch_size": 128, "learning_rate": 5e-3, "warmup_steps": 50}
    for name, preset in (("oat", "oat-tiny"), ("boat", "boat-tiny")):
        part = FitPart(actions=smooth(4096, 0), space=ARM)
        tokenizer = fit_parts(preset, [part], training=training, **settings)
        tokenizer.save_pretrained(WEIGHTS / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_weights()
