"""Quantisers: laws of every kind, and equality with independent implementations."""

import copy
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2

from actok.core import ConfigError, TokenError
from actok.quantizers import codebook as codebook_module
from actok.quantizers import make_quantizer
from actok.quantizers.codebook import draw, k_means, nearest
from actok.quantizers.vq import rotate

B, S, C, K = 11, 7, 5, 13
STILL = {"kmeans_steps": 0, "dead_below": 0}  # nothing but moving averages
KINDS = {
    "vq": {"kind": "vq", "codes": K},
    "vq narrow": {"kind": "vq", "codes": K, "code_dim": 3},
    "vq cosine": {"kind": "vq", "codes": K, "distance": "cosine"},
    "vq direction": {"kind": "vq", "codes": K, "distance": "direction"},
    "vq gradient": {"kind": "vq", "codes": K, "update": "gradient"},
    "vq rotation": {"kind": "vq", "codes": K, "gradient": "rotation"},
    "residual": {"kind": "residual", "levels": 3, "codes": K},
    "residual of three sizes": {"kind": "residual", "levels": 3, "codes": [K, 17, 19], "code_dim": 2},
    "residual shared": {"kind": "residual", "levels": 3, "codes": K, "shared": True},
    "residual gradient": {"kind": "residual", "levels": 3, "codes": K, "update": "gradient"},
    "grouped": {"kind": "grouped", "groups": 2, "widths": [2, 3], "inner": {"kind": "vq", "codes": K}},
    "grouped residual": {
        "kind": "grouped",
        "widths": [2, 3],
        "inner": [{"kind": "residual", "levels": 3, "codes": K}, {"kind": "residual", "levels": 3, "codes": 17}],
    },
    "fsq": {"kind": "fsq", "levels": [8, 5, 3]},
    "fsq without projections": {"kind": "fsq", "levels": [8, 5, 3, 4, 7]},
    "lfq": {"kind": "lfq", "bits": 3},
    "lfq without projections": {"kind": "lfq", "bits": 5},
    "multi-scale": {"kind": "multi_scale", "scales": [1, 2, 4, S], "codes": K},
    "multi-scale narrow": {
        "kind": "multi_scale",
        "scales": [2, 3, S],
        "codes": K,
        "code_dim": 3,
        "distance": "direction",
    },
    "multi-scale plain": {"kind": "multi_scale", "scales": [1, 3, S], "codes": K, "smoothing": 0, "update": "gradient"},
}
SLOTTED = {name: s for name, s in KINDS.items() if s["kind"] != "multi_scale"}  # codes for every slot of the latents
every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def latents(batch=B, slots=S, dim=C, seed=1):
    return torch.randn(batch, slots, dim, generator=torch.Generator().manual_seed(seed))


def random_mask(seed=2):
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0] = True
    return mask


def trained(settings, steps=3, dim=C):
    """A quantiser after a few batches, in evaluation mode."""
    quantizer = make_quantizer(settings, dim)
    for step in range(steps):
        quantizer(latents(seed=100 + step))
    return quantizer.eval()


def set_codes(codebook, vectors):
    """Put vectors into a codebook as if they had been there from the start."""
    with torch.no_grad():
        codebook.vectors.copy_(vectors)
        if hasattr(codebook, "sums"):
            codebook.sums.copy_(vectors)


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


# -- codebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["euclidean", "direction"])
def test_nearest_is_brute_force(distance):
    z, table = latents(1, 211)[0], latents(1, K, seed=3)[0]
    x, c = z.double().numpy(), table.double().numpy()
    if distance == "euclidean":
        expected = ((x[:, None] - c) ** 2).sum(-1).argmin(1)
    else:
        expected = (x @ (c / np.linalg.norm(c, axis=1, keepdims=True)).T).argmax(1)
    assert np.array_equal(nearest(z, table, distance).numpy(), expected)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_tie_goes_to_the_lowest_index(distance):
    table = torch.cat([latents(1, 16)[0]] * 4)
    assert torch.equal(nearest(table, table, distance), torch.arange(16).repeat(4))


def test_scores_are_held_in_blocks(monkeypatch):
    z, table = latents(1, 211)[0], latents(1, K, seed=3)[0]
    whole, sizes, product = nearest(z, table, "euclidean"), [], torch.addmm

    def watched(*args, **kwargs):
        scores = product(*args, **kwargs)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(codebook_module, "BLOCK_CPU", 10 * K)
    monkeypatch.setattr(torch, "addmm", watched)
    assert torch.equal(nearest(z, table, "euclidean"), whole)
    assert len(sizes) == 22
    assert max(sizes) == 10 * K


def test_moving_averages_by_hand():
    quantizer = make_quantizer({**KINDS["vq"], **STILL, "decay": 0.9}, C)
    book = quantizer.codebook(0)
    counts, sums = np.ones(K), book.sums.double().numpy().copy()
    for step in range(3):
        z, vectors = latents(seed=step), book.vectors.double().numpy().copy()
        codes = quantizer(z).codes.numpy().ravel()
        x = z.double().numpy().reshape(-1, C)
        assert np.array_equal(codes, ((x[:, None] - vectors) ** 2).sum(-1).argmin(1))  # coded before the update
        for k in range(K):
            counts[k] = 0.9 * counts[k] + 0.1 * (codes == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * x[codes == k].sum(0)
        np.testing.assert_allclose(book.counts.numpy(), counts, rtol=1e-5)
        np.testing.assert_allclose(book.sums.numpy(), sums, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(book.vectors.numpy(), sums / counts[:, None], rtol=1e-4, atol=1e-5)


def test_a_code_nothing_falls_to_keeps_its_vector():
    quantizer = make_quantizer({**KINDS["vq"], **STILL, "decay": 0.01}, C)
    book = quantizer.codebook(0)
    vectors = book.vectors.clone()
    vectors[-1] = 1e3
    set_codes(book, vectors)
    for step in range(40):  # its count underflows on the way
        quantizer(latents(seed=step))
    assert book.counts[-1] < 1e-37
    torch.testing.assert_close(book.vectors[-1], vectors[-1])


def test_a_shared_codebook_learns_from_all_levels():
    settings = {**KINDS["residual shared"], **STILL}
    quantizer = make_quantizer(settings, C)
    book, z = quantizer.codebook(0), latents()
    assert all(quantizer.codebook(level) is book for level in range(3))
    vectors, sums, counts = book.vectors.clone(), torch.zeros(K, C), torch.zeros(K)
    before = book.sums.clone()
    codes, residual = quantizer(z).codes.flatten(0, 1), z.flatten(0, 1)
    for level in range(3):
        sums.index_add_(0, codes[:, level], residual)
        counts += torch.bincount(codes[:, level], minlength=K)
        residual = residual - vectors[codes[:, level]]
    torch.testing.assert_close(book.counts, 0.99 + 0.01 * counts)
    torch.testing.assert_close(book.sums, 0.99 * before + 0.01 * sums)


def test_k_means_is_scipys():
    z = latents(1, 211)[0]
    torch.manual_seed(4)
    start = draw(z, None, K)
    torch.manual_seed(4)
    means, counts = k_means(z, None, K, 7, "euclidean")
    expected, labels = kmeans2(z.double().numpy(), start.double().numpy(), iter=7, minit="matrix")
    np.testing.assert_allclose(means.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(counts.numpy(), np.bincount(labels, minlength=K))


def test_the_first_batch_starts_the_codes_in_its_clusters():
    """Five far clusters, masked slots elsewhere: codes lie in the clusters, all are hit, and only once does it happen."""
    centres = 100 * torch.eye(C)
    z = (centres[torch.arange(B * S) % 5] + 0.1 * latents().flatten(0, 1)).view(B, S, C)
    mask = random_mask()
    z[~mask] = -500.0
    quantizer = make_quantizer(KINDS["vq"] | {"codes": 23}, C)
    book = quantizer.codebook(0)
    assert not book.initialised
    quantizer(z, mask)
    assert book.initialised
    distances = torch.cdist(book.vectors, centres)
    assert distances.min(1).values.max() < 1
    assert distances.min(0).values.max() < 1
    quantizer(z + 1e3, mask)
    assert book.vectors.max() < 500  # a moving average, not a new start


def test_a_batch_without_slots_starts_nothing():
    quantizer = make_quantizer(KINDS["vq"], C)
    before = state(quantizer)
    found = quantizer(latents(), torch.zeros(B, S, dtype=torch.bool))
    assert found.losses["commitment"] == 0
    book = quantizer.codebook(0)
    assert not book.initialised
    torch.testing.assert_close(book.vectors, before["codebooks.0.vectors"])
    quantizer(latents())
    assert book.initialised


def test_loaded_flags_are_heeded():
    fresh, started = make_quantizer(KINDS["vq"], C), make_quantizer(KINDS["vq"], C)
    untouched = state(fresh)
    started(latents())
    vectors = started.codebook(0).vectors.clone()
    fresh.load_state_dict(started.state_dict())
    fresh(1e3 + latents())
    assert (fresh.codebook(0).vectors - vectors).abs().max() < 100
    started.load_state_dict(untouched)
    started(1e3 + latents())
    assert (started.codebook(0).vectors - 1e3).abs().max() < 10


def dying(settings, dead):
    """A started quantiser some of whose codes are about to die, and what it was."""
    quantizer = make_quantizer({**settings, "kmeans_steps": 0, "decay": 1.0}, C)  # decay 1: only deaths change anything
    book = quantizer.codebook(0)
    book.counts[:] = 5.0
    book.counts[dead] = 0.01
    set_codes(book, 0.1 * latents(1, K, seed=3)[0])
    if hasattr(book, "sums"):
        book.sums.copy_(book.vectors * book.counts[:, None])
    return quantizer, book, state(quantizer)


@pytest.mark.parametrize("name", ["vq", "vq gradient"])
def test_dead_codes_become_latents_of_the_batch(name):
    dead = torch.tensor([2, 3, 7, 12])
    quantizer, book, before = dying(KINDS[name], dead)
    mask, z = random_mask(), latents()
    quantizer(z, mask)
    rows = z[mask]
    hits = (book.vectors[dead][:, None] == rows).all(-1)
    assert (hits.sum(1) == 1).all()  # each is a latent, to the bit
    assert len(set(hits.int().argmax(1).tolist())) == len(dead)  # each another one
    alive = [k for k in range(K) if k not in dead]
    torch.testing.assert_close(book.vectors[alive], before["codebooks.0.vectors"][alive])
    mean = before["codebooks.0.counts"].mean()
    assert torch.equal(book.counts[dead], mean.expand(4))
    if name == "vq":
        assert torch.equal(book.sums[dead], book.vectors[dead] * mean)


def test_more_dead_codes_than_latents():
    """Two latents for twelve codes: every code is next to one of them, none is zero, no two are the same."""
    quantizer, book, _ = dying(KINDS["vq"], torch.arange(12))
    z, mask = latents(), torch.zeros(B, S, dtype=torch.bool)
    mask[3, 2] = mask[5, 1] = True
    quantizer(z, mask)
    distance = torch.cdist(book.vectors[:12], z[mask])
    assert distance.min(1).values.max() < 0.01
    assert set(distance.argmin(1).tolist()) == {0, 1}
    assert len(book.vectors.unique(dim=0)) == K


def test_no_latents_no_revival():
    quantizer, book, before = dying(KINDS["vq"], torch.arange(12))
    quantizer(latents(), torch.zeros(B, S, dtype=torch.bool))
    torch.testing.assert_close(book.vectors, before["codebooks.0.vectors"])


def test_few_latents_a_batch_do_not_wear_the_codebook_out():
    """With half a latent a code and batch, an absolute threshold would replace codes at every step."""
    quantizer = make_quantizer({"kind": "vq", "codes": 2 * B * S}, C)
    z = latents()
    quantizer(z)
    before = quantizer.codebook(0).vectors.clone()
    for _ in range(5):
        quantizer(z)
    assert (quantizer.codebook(0).vectors - before).norm(dim=1).max() < 0.01


def test_all_codes_come_into_use():
    """From a start where one code takes everything, revival spreads the codes over the data."""
    quantizer = make_quantizer({**KINDS["vq"], "kmeans_steps": 0, "decay": 0.8}, C)
    vectors = torch.full((K, C), 50.0)
    vectors[0] = 0
    set_codes(quantizer.codebook(0), vectors)
    assert quantizer(latents()).usage.share == pytest.approx(1 / K)
    for step in range(40):
        found = quantizer(latents(seed=step))
    assert found.usage.share == 1


# -- residual ---------------------------------------------------------------------------------------------------------


def test_quantiser_dropout_drops_trailing_levels_of_samples():
    quantizer = trained({**KINDS["residual"], **STILL, "dropout": 0.6}).train()
    batch = 1009
    z = latents(batch)
    before = [quantizer.codebook(q).counts.clone() for q in range(3)]
    found = quantizer(z)
    present = (found.level_vectors != 0).any(-1)
    depth = present.sum(-1)
    assert torch.equal(present, torch.arange(3) < depth[..., None])  # trailing ones, never the first
    assert (depth == depth[:, :1]).all()  # a sample as a whole
    share = [(depth[:, 0] == d).float().mean().item() for d in (1, 2, 3)]
    assert share == pytest.approx([0.2, 0.2, 0.6], abs=0.05)
    torch.testing.assert_close(found.quantised, found.level_vectors.sum(2))
    expected = torch.zeros(())
    residual = z
    for level in range(3):
        kept = depth > level
        moved = (quantizer.codebook(level).counts - 0.99 * before[level]).sum() / 0.01
        assert moved.item() == pytest.approx(kept.sum().item(), rel=1e-3)
        vector = found.level_vectors[:, :, level]
        expected = expected + 0.25 * (residual - vector)[kept].square().mean()
        residual = residual - vector
    torch.testing.assert_close(found.losses["commitment"], expected)


def test_dropout_is_off_at_inference():
    quantizer = trained({**KINDS["residual"], "dropout": 1.0})
    assert (quantizer(latents()).level_vectors != 0).any(-1).all()


def test_each_level_brings_the_value_nearer():
    quantizer = trained(KINDS["residual"])
    z, codes = latents(), quantizer.encode(latents())
    errors = [F.mse_loss(quantizer.lookup(codes[..., :q]), z).item() for q in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


# -- grouped, finite scalar, lookup-free, multi-scale ---------------------------------------------------------------------


def test_groups_are_quantisers_of_their_own():
    quantizer, z = trained(KINDS["grouped residual"]), latents()
    found = quantizer(z)
    parts = [q(x) for q, x in zip(quantizer.inner, z.split([2, 3], -1), strict=True)]
    assert torch.equal(found.quantised, torch.cat([p.quantised for p in parts], -1))
    for level in range(3):
        for group in range(2):
            assert torch.equal(found.codes[..., 2 * level + group], parts[group].codes[..., level])
    assert quantizer.sizes == (K, 17) * 3
    expected = (2 * parts[0].losses["commitment"] + 3 * parts[1].losses["commitment"]) / C
    torch.testing.assert_close(found.losses["commitment"], expected)


def test_fsq_rounds_to_every_value_and_passes_the_bounds_gradient():
    quantizer = make_quantizer({"kind": "fsq", "levels": [8, 5, 3]}, 3)
    z = torch.linspace(-9, 9, 3001)[None, :, None].expand(1, 3001, 3).clone().requires_grad_()
    found = quantizer(z)
    assert [len(found.quantised[..., i].unique()) for i in range(3)] == [8, 5, 3]
    assert found.quantised.min() == -1
    found.quantised.sum().backward()
    for i, count in enumerate((8, 5, 3)):
        reach, offset = (count - 1) * 1.001 / 2, 0.5 * (count % 2 == 0)
        x = z[0, :, i].detach().double()
        slope = (1 - torch.tanh(x + np.arctanh(offset / reach)) ** 2) * reach / (count // 2)
        torch.testing.assert_close(z.grad[0, :, i].double(), slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [999, 1000])
def test_fsq_stays_among_its_codes_however_far_the_latents_are(count):
    quantizer = make_quantizer({"kind": "fsq", "levels": [count, 3]}, 2)
    codes = quantizer.encode(torch.tensor([[[-1e4, 0.0], [1e4, 0.0]]])).flatten()
    assert (codes % count).tolist() == [0, count - 1]
    assert (codes // count).tolist() == [1, 1]


def test_every_fsq_code_has_its_own_value():
    quantizer = make_quantizer({"kind": "fsq", "levels": [8, 5, 3]}, 3)
    codes = torch.arange(120)[None, :, None]
    values = quantizer.lookup(codes)
    assert len(values[0].unique(dim=0)) == 120
    assert torch.equal(quantizer.encode(torch.atanh(values.clamp(-0.9, 0.9)) * 0 + reach(values)), codes)


def reach(values):
    """Latents whose bound is the given values of levels (8, 5, 3): the bound's inverse."""
    counts = torch.tensor([8.0, 5.0, 3.0])
    half, width = counts // 2, (counts - 1) * 1.001 / 2
    offset = torch.tensor([0.5, 0.0, 0.0])
    return torch.atanh((values * half + offset) / width) - torch.atanh(offset / width)


def test_lookup_free_losses_are_those_of_all_codes():
    """Against softmax(-|x - c|^2 / temperature) over every code, in float64."""
    settings = {"kind": "lfq", "bits": 5, "entropy": 0.3, "diversity": 0.7, "temperature": 0.9, "commitment": 0.2}
    quantizer, z, mask = make_quantizer(settings, 5), latents(), random_mask()
    found = quantizer(z, mask)
    x = z[mask].double()
    codes = quantizer.lookup(torch.arange(32)[None, :, None])[0].double()
    p = torch.softmax(-torch.cdist(x, codes).square() / 0.9, 1)
    single = torch.special.entr(p).sum(1).mean()
    spread = torch.special.entr(p.mean(0)).sum()
    assert found.losses["entropy"].item() == pytest.approx(0.3 * (single - 0.7 * spread).item(), rel=1e-4)
    assert found.losses["commitment"].item() == pytest.approx(0.2 * (x.abs() - 1).square().mean().item(), rel=1e-5)


def test_multi_scale_by_hand():
    """Against torch's interpolation; every prefix of scales is what was reached after them."""
    quantizer, z = trained(KINDS["multi-scale"]), latents()
    scales, codes, found = (1, 2, 4, S), quantizer.encode(latents()), quantizer(latents())
    book, rest, value, at, commitment = quantizer.codebook, z.transpose(1, 2), 0.0, 0, 0.0
    assert quantizer.slots == 14
    assert quantizer.prefixes == (1, 3, 7, 14)
    for i, slots in enumerate(scales):
        pooled = F.interpolate(rest, size=slots, mode="area").transpose(1, 2)
        expected = torch.cdist(pooled.flatten(0, 1), book.vectors).argmin(1).view(B, slots)
        assert torch.equal(codes[:, at : at + slots, 0], expected)
        wide = F.interpolate(book.vectors[expected].transpose(1, 2), size=S, mode="linear")
        wide = 0.5 * wide + 0.5 * quantizer.smooth[i](wide)
        rest, value, at = rest - wide, value + wide, at + slots
        torch.testing.assert_close(quantizer.lookup(codes[:, :at]), value.transpose(1, 2), rtol=0, atol=1e-5)
        commitment = commitment + 0.25 * F.mse_loss(value.transpose(1, 2), z) / 4
    torch.testing.assert_close(found.losses["commitment"], commitment)
    torch.testing.assert_close(found.losses["codebook"], 4 * commitment)
    assert torch.equal(found.level_vectors[:, :, 0], book.vectors[codes[..., 0]])


def test_multi_scale_smoothing_learns():
    quantizer = make_quantizer(KINDS["multi-scale"], C)
    quantizer(latents()).losses["codebook"].backward()
    assert all(p.grad.abs().max() > 0 for p in quantizer.smooth.parameters())


def test_multi_scale_of_one_scale_is_vector_quantisation():
    plain = {"codes": K, "kmeans_steps": 0}
    quantizer = make_quantizer({"kind": "multi_scale", "scales": [S], "smoothing": 0, **plain}, C).eval()
    vq = make_quantizer({"kind": "vq", **plain}, C).eval()
    set_codes(vq.codebook(0), quantizer.codebook.vectors)
    torch.testing.assert_close(quantizer(latents()).quantised, vq(latents()).quantised)


def test_multi_scale_codes_do_not_depend_on_masked_slots():
    quantizer, mask, z = trained(KINDS["multi-scale"]), random_mask(), latents()
    other = torch.where(mask[..., None], z, 1e3)
    codes, others = quantizer.encode(z, mask)[..., 0], quantizer.encode(other, mask)[..., 0]
    assert torch.equal(codes[:, :7], others[:, :7])
    assert torch.equal(codes[:, 7:][mask], others[:, 7:][mask])


def test_multi_scale_refuses_other_lengths():
    quantizer = trained(KINDS["multi-scale"])
    with pytest.raises(ConfigError, match="scales end at 7 but there are 6 slots"):
        quantizer(latents(slots=6))
    with pytest.raises(TokenError, match="5 codes end within a scale; give 1, 3, 7, 14"):
        quantizer.lookup(torch.zeros(2, 5, 1, dtype=torch.long))


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


# -- vector-quantize-pytorch ----------------------------------------------------------------------------------------------

oracle = pytest.importorskip("vector_quantize_pytorch", reason="the independent implementation")


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_training_equals_the_oracle(distance):
    """Codes, value, loss and codebook over several steps of moving averages."""
    ours = make_quantizer({**KINDS["vq"], **STILL, "distance": distance, "decay": 0.8, "commitment": 0.7}, C)
    theirs = oracle.VectorQuantize(
        dim=C, codebook_size=K, decay=0.8, eps=0.0, commitment_weight=0.7, use_cosine_sim=distance == "cosine"
    )
    set_codes(ours.codebook(0), theirs._codebook.embed[0])
    for step in range(5):
        z = latents(seed=step)
        found = ours(z)
        quantised, codes, loss = theirs(z)
        assert torch.equal(found.codes[..., 0], codes)
        torch.testing.assert_close(found.quantised, quantised)
        torch.testing.assert_close(found.losses["commitment"], loss)
        torch.testing.assert_close(ours.codebook(0).table(), theirs._codebook.embed[0])
        torch.testing.assert_close(ours.codebook(0).counts, theirs._codebook.cluster_size[0])
    ours.eval()
    theirs.eval()
    assert torch.equal(ours.encode(latents(seed=9))[..., 0], theirs(latents(seed=9))[1])


def test_residual_training_equals_the_oracle():
    ours = make_quantizer({**KINDS["residual"], **STILL, "decay": 0.8, "commitment": 0.7}, C)
    theirs = oracle.ResidualVQ(dim=C, num_quantizers=3, codebook_size=K, decay=0.8, eps=0.0, commitment_weight=0.7)
    for level in range(3):
        set_codes(ours.codebook(level), theirs.layers[level]._codebook.embed[0])
    for step in range(5):
        z = latents(seed=step)
        found = ours(z)
        quantised, codes, losses = theirs(z)
        assert torch.equal(found.codes, codes)
        torch.testing.assert_close(found.quantised, quantised)
        torch.testing.assert_close(found.losses["commitment"], losses.sum())
    for level in range(3):
        torch.testing.assert_close(ours.codebook(level).vectors, theirs.layers[level]._codebook.embed[0])
    codes = ours.encode(latents(seed=9))
    theirs.quantize_dropout = True  # without it the oracle decodes no prefixes
    for q in (1, 2, 3):
        torch.testing.assert_close(ours.lookup(codes[..., :q]), theirs.get_output_from_indices(codes[..., :q]))


def test_fsq_equals_the_oracle():
    for levels in ([8, 5, 5, 5], [7, 4, 3]):
        ours, theirs = make_quantizer({"kind": "fsq", "levels": levels}, C), oracle.FSQ(levels, dim=C)
        ours.load_state_dict(theirs.state_dict())
        z = 3 * latents(B, 101)
        found = ours(z)
        quantised, codes = theirs(z)
        assert torch.equal(found.codes[..., 0], codes.long())
        torch.testing.assert_close(found.quantised, quantised)
        torch.testing.assert_close(ours.lookup(found.codes), theirs.indices_to_codes(codes))


def test_lfq_equals_the_oracle():
    """Whose first channel is the highest bit."""
    ours = make_quantizer({"kind": "lfq", "bits": 5, "entropy": 1.0, "commitment": 0.0, "temperature": 0.1}, C)
    theirs = oracle.LFQ(dim=C, codebook_size=32, entropy_loss_weight=1.0, diversity_gamma=1.0)
    found = ours(latents())
    quantised, codes, loss = theirs(latents(), inv_temperature=10.0)
    reversed_bits = sum((codes >> (4 - bit) & 1) << bit for bit in range(5))
    assert torch.equal(found.codes[..., 0], reversed_bits)
    torch.testing.assert_close(found.quantised, quantised)
    torch.testing.assert_close(sum(found.losses.values()), loss, rtol=1e-3, atol=1e-4)


# -- compiled and exported ----------------------------------------------------------------------------------------------


def test_compiled_and_exported_equal_eager():
    """In a process without the shape checks: one whole graph for forward and backward, updates included, and dynamic
    batches of `encode` and `lookup`."""
    script = """
        import copy, torch
        from actok.quantizers import make_quantizer
        torch.set_num_threads(1)
        class Call(torch.nn.Module):
            def __init__(self, module, name):
                super().__init__()
                self.module, self.name = module, name
            def forward(self, x):
                return getattr(self.module, self.name)(x)
        residual = {"kind": "residual", "levels": 2, "codes": 13, "code_dim": 3, "dropout": 0.5, "gradient": "rotation"}
        for settings in (residual, {"kind": "vq", "codes": 13, "update": "gradient", "distance": "cosine"}):
            torch.manual_seed(0)
            eager = make_quantizer(settings, 5)
            eager(torch.randn(11, 7, 5))  # k-means
            compiled = copy.deepcopy(eager)
            run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
            for step in range(3):
                outcome = []
                for module, call in ((eager, eager), (compiled, run)):
                    torch.manual_seed(step)
                    z = torch.randn(11, 7, 5).requires_grad_()
                    found = call(z, torch.rand(11, 7) > 0.3)
                    (found.quantised.square().sum() + sum(found.losses.values())).backward()
                    outcome.append((found, z.grad, module.state_dict()))
                (a, grad_a, state_a), (b, grad_b, state_b) = outcome
                assert torch.equal(a.codes, b.codes), settings
                torch.testing.assert_close(a.quantised, b.quantised)
                torch.testing.assert_close(grad_a, grad_b)
                for name in state_a:
                    torch.testing.assert_close(state_a[name], state_b[name], msg=f"{settings} {name}")
        batch = ({0: torch.export.Dim("batch", min=2)},)
        for settings in (residual, {"kind": "multi_scale", "codes": 13, "scales": [2, 7]}):
            quantizer, z = make_quantizer(settings, 5).eval(), torch.randn(11, 7, 5)
            for name, x in (("encode", z), ("lookup", quantizer.encode(z))):
                exported = torch.export.export(Call(quantizer, name), (x,), dynamic_shapes=batch).module()
                for part in (x, x[:3]):
                    assert torch.equal(exported(part), getattr(quantizer, name)(part)), (settings, name)
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
