"""Codebooks: search, moving averages, k-means, dead codes; what levels, groups and scales make of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2

from actok.core import ConfigError, TokenError
from actok.quantizers import codebook as codebook_module
from actok.quantizers import make_quantizer
from actok.quantizers.codebook import draw, k_means, nearest
from quantizer_kinds import (  # noqa: F401
    KINDS,
    STILL,
    B,
    C,
    K,
    S,
    latents,
    one_thread_one_seed,
    random_mask,
    same,
    set_codes,
    state,
    trained,
)

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
