"""FASTerVQ: patches, token order, masks, losses, sizes."""

import numpy as np
import pytest
from scipy.fft import dct

from actok.core import ActionGroup, ActionSpace, ConfigError, FitPart, SpaceMismatchError, build_config, find_preset

torch = pytest.importorskip("torch")

from actok.tokenizers.fastervq import FasterVqConfig, FasterVqTokenizer  # noqa: E402
from actok.tokenizers.neural import join  # noqa: E402

T = 11


def space(name: str, *groups: tuple[str, int], modes: str = "absolute") -> ActionSpace:
    """Groups whose dimensions do not stand in order: group g takes every so manieth channel."""
    total = sum(width for _, width in groups)
    free = list(np.random.default_rng(total).permutation(total))
    made = []
    for i, (kind, width) in enumerate(groups):
        dims, free = tuple(int(d) for d in free[:width]), free[width:]
        made.append(ActionGroup(name=f"{kind}_{i}", kind=kind, dims=dims, mode=modes))
    return ActionSpace(embodiment=name, dim=total, groups=tuple(made))


ARM = space("arm", ("position", 3), ("joint", 3), ("gripper", 1))
HAND = space("hand", ("joint", 2), ("hand", 11), modes="velocity")
SMALL = {"width": 16, "heads": 2, "depth": 1, "latent_dim": 5, "patch_steps": 3, "group_width": 4}


def prepared(*spaces: ActionSpace, horizon: int = T, **settings) -> FasterVqTokenizer:
    rng = np.random.default_rng(0)
    parts = [FitPart(actions=rng.normal(size=(37, horizon, s.dim)).astype(np.float32), space=s) for s in spaces]
    quantizer = {"kind": "residual", "levels": 2, "codes": 13}
    return FasterVqTokenizer.prepare(parts, FasterVqConfig(**{**SMALL, "quantizer": quantizer, **settings}))


def normal(count: int, dim: int, seed: int = 1, horizon: int = T) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, horizon, dim)).astype(np.float32)


def test_patches_hold_each_value_once_and_unpatchify_is_the_inverse():
    tokenizer = prepared(ARM, HAND)
    batch = join([tokenizer.batch(normal(3, 7), "arm"), tokenizer.batch(normal(2, 13), "hand")])
    patches = tokenizer.codec.patchify(batch)
    steps = -(-T // 3)
    assert patches.shape == (5, steps, 4, 3 * 4)  # the hand: 2 joints, and 11 as 4 + 4 + 3
    back = tokenizer.codec.unpatchify(patches, batch)
    torch.testing.assert_close(back, batch.actions, rtol=0, atol=0)
    for row, dim in ((0, 7), (4, 13)):
        whole = patches[row, : T // 3]
        expected = batch.actions[row, : T // 3 * 3, :dim]
        assert torch.equal(whole[whole != 0].sort().values, expected.flatten().sort().values)


def test_a_patch_is_one_group_in_the_order_of_its_dimensions():
    tokenizer = prepared(ARM)
    x = normal(2, 7)
    patches = tokenizer.codec.patchify(tokenizer.batch(x))
    position = list(ARM.groups[0].dims)
    gripper = list(ARM.groups[2].dims)
    np.testing.assert_array_equal(patches[1, 2, 0].reshape(3, 3), x[1, 6:9][:, position])  # the widest has 3
    np.testing.assert_array_equal(patches[1, 2, 2].reshape(3, 3)[:, :1], x[1, 6:9][:, gripper])
    assert not patches[1, 2, 2].reshape(3, 3)[:, 1:].any()


def test_tokens_run_codebook_then_horizon_then_part():
    tokenizer = prepared(ARM, latent_steps=2, latent_parts=3)
    codec, batch = tokenizer.codec, tokenizer.batch(normal(5, 7))
    ids = codec.tokenize(batch)
    codes = codec.quantizer.encode(codec.encode(batch))  # [B, C_h * C_a, N_c]
    coords = tokenizer.layout.coords
    for q in range(2):
        for h in range(2):
            for a in range(3):
                n = (q * 2 + h) * 3 + a
                assert torch.equal(ids[:, n], codes[:, h * 3 + a, q])
                assert tuple(coords[n]) == (q, h, a)
    torch.testing.assert_close(
        codec.detokenize(ids, batch), codec.decode(codec.quantizer.lookup(codes), batch), rtol=0, atol=0
    )


def test_windows_of_a_long_chunk_lie_along_the_horizon():
    tokenizer = prepared(ARM, latent_steps=2, latent_parts=3)
    layout = tokenizer.layout_for(2 * T + 1)
    assert layout.max_len == 3 * 12
    order = np.lexsort((layout.coords[:, 2], layout.coords[:, 1], layout.coords[:, 0]))
    np.testing.assert_array_equal(order, np.arange(36))
    assert len(np.unique(layout.coords, axis=0)) == 36
    # Each window is coded by itself: the first of three is the code of its steps alone.
    x = normal(2, 7, horizon=2 * T + 1)
    long, short = tokenizer.encode(x).ids, tokenizer.encode(x[:, :T]).ids
    np.testing.assert_array_equal(long[:, layout.coords[:, 1] < 2], short)


def test_blocks_are_those_of_the_paper():
    settings = find_preset("fastervq-bimanual").settings
    tokenizer = prepared(
        ARM,
        **{k: settings[k] for k in ("latent_steps", "latent_parts", "block")},
        quantizer={"kind": "residual", "levels": 3, "codes": 13},
    )
    assert tokenizer.layout.max_len == 84
    assert tokenizer.layout.passes == 12
    ragged = prepared(ARM, block=5)
    assert [len(b) for b in ragged.layout.blocks] == [5, 5, 4]


def test_embodiments_in_one_batch_do_not_see_each_other():
    tokenizer = prepared(ARM, HAND)
    arm, hand = tokenizer.batch(normal(3, 7), "arm"), tokenizer.batch(normal(2, 13), "hand")
    mixed = join([arm, hand])
    alone = torch.cat([tokenizer.codec.encode(arm), tokenizer.codec.encode(hand)])
    ids = tokenizer.codec.tokenize(mixed)
    assert torch.equal(ids, torch.cat([tokenizer.codec.tokenize(arm), tokenizer.codec.tokenize(hand)]))
    torch.testing.assert_close(tokenizer.codec.encode(mixed), alone, rtol=1e-4, atol=1e-5)
    decoded = tokenizer.codec.detokenize(ids, mixed)
    assert not decoded[:3, :, 7:].any()
    torch.testing.assert_close(decoded[:3], tokenizer.codec.detokenize(ids[:3], arm), rtol=1e-4, atol=1e-5)


def test_training_on_a_mixed_batch_computes_the_same():
    """There, rows are taken by their number of patches; elsewhere all at once."""
    tokenizer = prepared(ARM, HAND)
    codec = tokenizer.codec
    parts = [tokenizer.batch(normal(3, 7), "arm"), tokenizer.batch(normal(2, 13), "hand")]
    batch = join([parts[0], parts[1], parts[0]])
    expected = codec.encode(batch)
    latents = torch.randn(8, 7, 5)
    actions = codec.decode(latents, batch)
    codec.train()
    assert len(codec.by_size(batch)) == 2
    torch.testing.assert_close(codec.encode(batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents, batch), actions, rtol=1e-4, atol=1e-5)


def test_losses_are_equation_1_over_what_is_real_and_present():
    tokenizer = prepared(ARM, HAND, dct=0.7)
    codec, x = tokenizer.codec, normal(2, 7)
    real = np.ones((2, T), bool)
    real[1, 8:] = False
    batch = join([tokenizer.batch(x, "arm", real=real), tokenizer.batch(normal(1, 13), "hand")])
    guess = torch.from_numpy(normal(3, 13, seed=5))
    losses = codec.reconstruction_losses(batch, guess)
    error = (guess - batch.actions).numpy()
    error[:2, :, 7:] = 0
    error[1, 8:] = 0
    values = T * 7 + 8 * 7 + T * 13
    assert losses["l1"].item() == pytest.approx(np.abs(error).sum() / values, rel=1e-5)
    spectrum = dct(error.astype(np.float64), axis=1, norm="ortho")
    assert losses["dct"].item() == pytest.approx(0.7 * np.abs(spectrum).sum() / (T * (7 + 7 + 13)), rel=1e-5)


def test_every_parameter_learns():
    tokenizer = prepared(ARM, HAND, latent_depth=1)
    codec = tokenizer.codec.train().requires_grad_(True)
    batch = join([tokenizer.batch(normal(29, 7), "arm"), tokenizer.batch(normal(31, 13), "hand")])
    sum(codec(batch).losses.values()).backward()
    untouched = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched


@pytest.mark.parametrize("arch", ["cnn", "transformer"])
def test_architectures_of_the_ablation_are_of_one_size(arch):
    sizes = [sum(p.numel() for p in prepared(ARM, arch=kind, depth=2).codec.parameters()) for kind in ("taae", arch)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_convolutions_alone_mix_no_groups():
    """Up to the latents, patches of one group know nothing of another's; with attention they do."""
    found = {}
    for arch in ("cnn", "transformer"):
        tokenizer = prepared(ARM, arch=arch)
        codec, x = tokenizer.codec, normal(1, 7)
        other = x.copy()
        other[:, :, list(ARM.groups[2].dims)] += 1

        def seen(values, codec=codec, tokenizer=tokenizer):
            batch = tokenizer.batch(values)
            h = codec.patch_in(codec.patchify(batch)) + codec.describe(batch, 0)
            for block in codec.encoder:
                h = block(h, codec.seen(batch))
            return h[:, :, 0]

        found[arch] = torch.equal(seen(x), seen(other))
    assert found == {"cnn": True, "transformer": False}


@pytest.mark.parametrize(
    ("name", "millions", "tokens"),
    [("fastervq", 8, 21), ("fastervq-bimanual", 13, 84), ("fastervq-wholebody", 13, 126)],
)
def test_presets_have_the_papers_sizes(name, millions, tokens):
    config = build_config(FasterVqConfig, find_preset(name).settings, name)
    part = FitPart(actions=normal(5, 7, horizon=20), space=ARM)
    tokenizer = FasterVqTokenizer.prepare([part], config)
    assert sum(p.numel() for p in tokenizer.codec.parameters()) == pytest.approx(millions * 1e6, rel=0.06)
    assert tokenizer.layout.max_len == tokens
    assert set(tokenizer.layout.vocab.tolist()) == {4096}


def test_patches_that_could_not_be_told_apart_are_refused():
    joints = [("joint", 1)] * 16
    assert prepared(space("many", *joints)).codec.shape.channels == 16
    with pytest.raises(SpaceMismatchError, match="'many' makes 17 patches of one kind"):
        prepared(space("many", *joints, ("joint", 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "mlp"}, "arch is 'mlp'"),
        ({"width": 30, "heads": 4}, "width 30"),
        ({"latent_parts": 0}, "latent_parts is 0"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        FasterVqConfig(**settings)
