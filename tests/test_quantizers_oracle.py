"""Quantisers against vector-quantize-pytorch, compiled and exported."""

import subprocess
import sys
import textwrap

import pytest
import torch

from actok.quantizers import make_quantizer
from quantizer_kinds import KINDS, STILL, B, C, K, latents, one_thread_one_seed, set_codes  # noqa: F401

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
