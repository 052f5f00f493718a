"""Quantisers: laws of every kind, gradients and settings."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actok.core import ConfigError
from actok.quantizers import make_quantizer
from actok.quantizers.vq import rotate
from quantizer_kinds import (  # noqa: F401
    KINDS,
    SLOTTED,
    STILL,
    B,
    C,
    K,
    S,
    every_kind,
    latents,
    one_thread_one_seed,
    random_mask,
    same,
    state,
    trained,
)

# -- every kind -------------------------------------------------------------------------------------------------------


@every_kind
def test_codes_stand_for_what_the_decoder_got(settings):
    quantizer, z = trained(settings), latents()
    found = quantizer(z)
    codes = quantizer.encode(z)
    slots = S if quantizer.slots is None else quantizer.slots
    assert codes.shape == (B, slots, quantizer.levels)
    assert codes.dtype == torch.int64
    assert torch.equal(found.codes, codes)
    assert torch.equal(quantizer.lookup(codes), found.quantised)
    for level, size in enumerate(quantizer.sizes):
        assert codes[..., level].min() >= 0
        assert codes[..., level].max() < size


@every_kind
def test_a_sample_is_coded_alike_in_any_batch(settings):
    quantizer, z = trained(settings), latents()
    alone = torch.cat([quantizer.encode(z[b : b + 1]) for b in range(B)])
    assert (alone == quantizer.encode(z)).float().mean() > 0.99  # near-ties may fall either way


@pytest.mark.parametrize("settings", SLOTTED.values(), ids=SLOTTED)
def test_prefixes_are_partial_sums_of_level_vectors(settings):
    quantizer, z = trained(settings), latents()
    found = quantizer(z)
    assert found.level_vectors.shape == (B, S, quantizer.levels, C)
    for q in range(1, quantizer.levels + 1):
        torch.testing.assert_close(
            quantizer.lookup(found.codes[..., :q]), found.level_vectors[:, :, :q].sum(2), rtol=0, atol=1e-5
        )


@every_kind
def test_evaluation_changes_nothing(settings):
    quantizer = trained(settings)
    before = state(quantizer)
    quantizer(latents(seed=5), random_mask())
    quantizer.encode(latents(seed=6))
    assert same(before, state(quantizer))


@every_kind
def test_masked_slots_count_nowhere(settings):
    """Whatever lies in masked slots: the same losses, usage, codebooks, and the same codes elsewhere."""
    mask, z = random_mask(), latents()
    other = torch.where(mask[..., None], z, 37 * latents(seed=9))
    results = []
    for x in (z, other):
        torch.manual_seed(0)
        quantizer = make_quantizer(settings, C)
        results.append((quantizer(x, mask), quantizer))
    (a, first), (b, second) = results
    assert a.losses.keys() == b.losses.keys()
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name])
    assert torch.equal(a.usage.share, b.usage.share)
    assert torch.equal(a.usage.perplexity, b.usage.perplexity)
    assert same(state(first), state(second))
    if quantizer.slots is None:
        assert torch.equal(a.codes[mask], b.codes[mask])


@pytest.mark.parametrize("name", ["vq", "vq cosine", "residual", "vq gradient", "grouped residual", "lfq", "fsq"])
def test_a_mask_is_the_same_as_leaving_slots_out(name):
    mask, z = random_mask(), latents()
    quantizer = trained(KINDS[name]).train()
    twin = copy.deepcopy(quantizer)
    torch.manual_seed(3)
    masked = quantizer(z, mask)
    torch.manual_seed(3)
    packed = twin(z[mask][None])
    for loss, value in packed.losses.items():
        torch.testing.assert_close(masked.losses[loss], value)
    torch.testing.assert_close(masked.usage.perplexity, packed.usage.perplexity)
    for key, value in twin.state_dict().items():
        if "counts" in key:
            torch.testing.assert_close(quantizer.state_dict()[key], value)


@every_kind
def test_usage_is_numpys(settings):
    quantizer = trained(settings)
    found = quantizer(latents())
    for level, size in enumerate(quantizer.sizes):
        counts = np.bincount(found.codes[..., level].numpy().ravel(), minlength=size)
        p = counts[counts > 0] / counts.sum()
        assert found.usage.share[level].item() == pytest.approx((counts > 0).sum() / size)
        assert found.usage.perplexity[level].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


@every_kind
def test_bfloat16_autocast_leaves_the_codebooks_alone(settings):
    """Latents arrive in bfloat16; from there on everything is as without autocast."""
    results = []
    for cast in (True, False):
        torch.manual_seed(0)
        quantizer = make_quantizer(settings, C)
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                z = latents(seed=step).bfloat16()
                found = quantizer(z if cast else z.float())
        results.append((found, state(quantizer)))
    assert results[0][0].quantised.dtype == torch.float32
    assert torch.equal(results[0][0].quantised, results[1][0].quantised)
    assert same(results[0][1], results[1][1])
    assert all(v.dtype == torch.float32 for v in results[0][1].values() if v.is_floating_point())


@every_kind
def test_a_run_goes_on_from_its_state_to_the_bit(settings):
    torch.manual_seed(0)
    through = make_quantizer(settings, C)
    through(latents(seed=20))
    saved, generator = state(through), torch.get_rng_state()
    expected = [through(latents(seed=s)).quantised for s in (21, 22)]
    torch.manual_seed(99)
    resumed = make_quantizer(settings, C)
    resumed.load_state_dict(saved)
    torch.set_rng_state(generator)
    for s, quantised in zip((21, 22), expected, strict=True):
        assert torch.equal(resumed(latents(seed=s)).quantised, quantised)
    assert same(state(through), state(resumed))


@every_kind
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_values_losses_and_gradients_are_finite(settings, scale):
    quantizer, z = make_quantizer(settings, C), (scale * latents()).requires_grad_()
    for _ in range(2):
        found = quantizer(z)
        (found.quantised.sum() + sum(found.losses.values(), torch.zeros(()))).backward()
    assert found.quantised.isfinite().all()
    assert all(value.isfinite() for value in found.losses.values())
    assert z.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())


@every_kind
def test_bypassed_it_lets_latents_through_and_learns_nothing(settings):
    """Shapes are those of quantising, and what comes after is as if it had never been bypassed."""
    quantizer, mask = make_quantizer(settings, C), random_mask()
    twin, before = copy.deepcopy(quantizer), state(quantizer)
    z, weight = latents().bfloat16().requires_grad_(), latents(seed=8).bfloat16()
    quantizer.bypassed = True
    found, generator = quantizer(z, mask), torch.get_rng_state()
    assert torch.equal(found.quantised, z.float())
    (gradient,) = torch.autograd.grad((found.quantised * weight).sum(), z)
    assert torch.equal(gradient, weight)
    assert found.losses == {}
    assert same(before, state(quantizer))
    quantizer.bypassed = False
    torch.set_rng_state(generator)
    through = quantizer(latents(), mask)
    for name in ("quantised", "codes", "level_vectors"):
        bypassed, quantised = getattr(found, name), getattr(through, name)
        assert (bypassed.shape, bypassed.dtype) == (quantised.shape, quantised.dtype), name
    assert found.usage.share.shape == found.usage.perplexity.shape == through.usage.share.shape
    torch.set_rng_state(generator)
    assert torch.equal(twin(latents(), mask).quantised, through.quantised)
    assert same(state(twin), state(quantizer))


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "vq",
        "vq direction",
        "vq gradient",
        "residual",
        "grouped residual",
        "lfq without projections",
        "multi-scale plain",
    ],
)
def test_straight_through_passes_the_gradient_as_it_is(name):
    quantizer = make_quantizer(KINDS[name], C)
    z, weight = latents().requires_grad_(), latents(seed=8)
    for _ in range(2):
        found = quantizer(z)
    (found.quantised * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_level_vectors_reach_the_encoder():
    quantizer = make_quantizer(KINDS["residual"], C)
    z, weight = latents().requires_grad_(), latents(seed=8)
    for level in range(3):
        (gradient,) = torch.autograd.grad((quantizer(z).level_vectors[:, :, level] * weight).sum(), z)
        assert torch.equal(gradient, weight)


def test_rotation_is_the_published_matrix():
    """Value exact; gradient lambda * R^T with R = I - 2 r r^T + 2 q e^T, built by hand in float64."""
    z, value, weight = latents(1, 17)[0].requires_grad_(), latents(1, 17, seed=3)[0], latents(1, 17, seed=4)[0]
    out = rotate(z, value)
    assert torch.equal(out, value)
    (out * weight).sum().backward()
    for n in range(17):
        x, y, w = (t[n].detach().numpy().astype(np.float64) for t in (z, value, weight))
        e, q = x / np.linalg.norm(x), y / np.linalg.norm(y)
        r = (e + q) / np.linalg.norm(e + q)
        matrix = np.eye(C) - 2 * np.outer(r, r) + 2 * np.outer(q, e)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(C), atol=1e-12)
        scale = np.linalg.norm(y) / np.linalg.norm(x)
        np.testing.assert_allclose(scale * matrix @ x, y, atol=1e-12)
        np.testing.assert_allclose(z.grad[n].numpy(), scale * matrix.T @ w, rtol=1e-4, atol=1e-5)


def test_rotation_without_a_direction_is_straight_through():
    z = torch.zeros(3, C)
    z[1], value = 1.0, latents(1, 3)[0]
    value[1] = 0.0
    z.requires_grad_()
    out = rotate(z, value)
    assert torch.equal(out, value)
    out[:2].sum().backward()
    assert torch.equal(z.grad[:2], torch.ones(2, C))


def test_rotation_of_opposites_is_finite():
    z = latents(1, 3)[0].requires_grad_()
    out = rotate(z, -2 * z.detach())
    out.sum().backward()
    assert torch.equal(out, -2 * z)
    assert z.grad.isfinite().all()


def test_the_rotation_setting_is_used_by_forward():
    quantizer, z = trained(KINDS["vq rotation"]), latents().requires_grad_()
    found, weight = quantizer(z), latents(seed=8)
    (gradient,) = torch.autograd.grad((found.quantised * weight).sum(), z)
    flat = z.detach().flatten(0, 1).requires_grad_()
    (rotate(flat, found.quantised.detach().flatten(0, 1)) * weight.flatten(0, 1)).sum().backward()
    torch.testing.assert_close(gradient.flatten(0, 1), flat.grad)
    assert not torch.equal(gradient, weight)


def test_codes_that_learn_by_gradient_learn_from_their_latents_only():
    """The gradient of the codebook loss by hand; the decoder's passes the codebook by."""
    quantizer = make_quantizer({**KINDS["vq gradient"], **STILL}, C)
    z = latents()
    found = quantizer(z)
    parameter = quantizer.codebook(0).vectors
    (found.quantised.sum() + found.losses["codebook"]).backward()
    expected = torch.zeros(K, C)
    for x, k in zip(z.flatten(0, 1), found.codes.flatten(), strict=True):
        expected[k] += 2 * (parameter[k].detach() - x) / (B * S * C)
    torch.testing.assert_close(parameter.grad, expected)


def test_commitment_is_summed_over_levels():
    quantizer = trained({**KINDS["residual"], "commitment": 0.7})
    z = latents().requires_grad_()
    found, residual, expected = quantizer(z), z, 0.0
    for level in range(3):
        vector = found.level_vectors[:, :, level].detach()
        expected = expected + 0.7 * F.mse_loss(residual, vector)
        residual = residual - vector
    torch.testing.assert_close(found.losses["commitment"], expected)
    (a,) = torch.autograd.grad(found.losses["commitment"], z)
    (b,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(a, b)


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "residul"}, "no quantizer kind 'residul'; did you mean 'residual'"),
        ({}, "no quantizer kind None; choose one of vq, residual"),
        ({"kind": "vq", "code": 5}, "no setting 'code'; did you mean 'codes'"),
        ({"kind": "vq", "codes": 1}, "codes is 1; give a whole number of at least 2"),
        ({"kind": "vq", "codes": 2.5}, "codes is 2.5"),
        ({"kind": "vq", "distance": "angle"}, "distance is 'angle'; choose one of euclidean, cosine, direction"),
        ({"kind": "vq", "update": "sgd"}, "update is 'sgd'"),
        ({"kind": "vq", "gradient": "gumbel"}, "gradient is 'gumbel'"),
        ({"kind": "vq", "decay": 1.5}, "decay is 1.5; give a number from 0 to 1"),
        ({"kind": "vq", "dead_below": 2}, "dead_below is 2, a share of the mean count; give less than 1"),
        ({"kind": "vq", "commitment": float("nan")}, "commitment is nan"),
        ({"kind": "residual", "levels": 2, "codes": [5, 5, 5]}, "for 2 levels; give one number, or one a level"),
        ({"kind": "residual", "levels": 2, "codes": [5, 7], "shared": True}, "share a codebook have one size"),
        ({"kind": "residual", "distance": "cosine"}, "use 'direction'"),
        ({"kind": "residual", "dropout": -0.1}, "dropout is -0.1"),
        ({"kind": "grouped", "groups": 2}, "groups is 2, which does not divide 5 channels; give widths"),
        ({"kind": "grouped", "widths": [2, 2]}, "make 4 channels of 5"),
        ({"kind": "grouped", "groups": 3, "inner": [{"kind": "vq"}]}, "inner has 1 tables for 3 groups"),
        ({"kind": "grouped", "groups": 1, "inner": {"kind": "multi_scale"}}, "slots of their own"),
        ({"kind": "fsq", "levels": [8, 2]}, "levels has 2; give at least 3 a channel, or use kind='lfq'"),
        ({"kind": "fsq", "levels": [4096, 4097]}, "stay within"),
        ({"kind": "fsq", "levels": [3, 1001]}, "levels has 1001; give at most 1000 a channel"),
        ({"kind": "lfq", "bits": 40}, "give at most 20"),
        ({"kind": "multi_scale", "scales": [2, 1]}, "give rising numbers of slots"),
        ({"kind": "multi_scale", "distance": "cosine"}, "use 'direction'"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings, message):
    with pytest.raises(ConfigError) as error:
        make_quantizer(settings, C)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
