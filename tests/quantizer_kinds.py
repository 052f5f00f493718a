"""Kinds of quantisers, and helpers of their tests."""

import pytest
import torch

from actok.quantizers import make_quantizer

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
