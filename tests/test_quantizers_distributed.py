"""Two processes with unequal batches keep equal codebooks, and learn what one process learns from both batches."""

import os
import subprocess
import sys
import textwrap

import torch

# Each process writes its states; the test compares them. Slots differ in number, and one batch is empty of real slots.
SCRIPT = """
    import os, sys, torch
    import torch.distributed as dist
    from actok.quantizers import make_quantizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    folder = sys.argv[1]

    def batch(step, rank):
        z = torch.randn((11, 5)[rank], 7, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        mask = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(10 * step + rank + 5)) > 0.3
        return z, mask & (step != 2 or rank == 0)  # once, the second process has nothing

    def run(settings, steps):
        torch.manual_seed(0)
        quantizer = make_quantizer(settings, 5)
        torch.manual_seed(100 + rank)  # from here on the processes draw different random numbers
        for step in range(steps):
            quantizer(*batch(step, rank))
        return quantizer.state_dict()

    plain = {"kind": "residual", "levels": 2, "codes": 13, "decay": 0.5}
    result = {
        "started": run(plain, 1),
        "trained": run({**plain, "dead_below": 0.9}, 7),
        "gradient": run({**plain, "dead_below": 0.9, "update": "gradient"}, 7),
        "more codes than latents": run({**plain, "codes": 211}, 3),
        "averages": run({**plain, "kmeans_steps": 0, "dead_below": 0}, 7),
        "multi-scale": run({"kind": "multi_scale", "codes": 13, "scales": [2, 7], "dead_below": 0.9, "decay": 0.5}, 7),
    }

    # Dead codes: the codebook far away from all latents, apart from one code.
    torch.manual_seed(0)
    quantizer = make_quantizer({"kind": "vq", "codes": 13, "kmeans_steps": 0, "decay": 0.0}, 5)
    book = quantizer.codebook(0)
    with torch.no_grad():
        book.vectors.fill_(1e3)
        book.vectors[0] = 0
        book.sums.copy_(book.vectors)
    torch.manual_seed(100 + rank)
    quantizer(*batch(0, rank))
    result["revived"] = quantizer.state_dict()
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    torch.save([batch(step, rank) for step in range(7)], os.path.join(folder, f"batches-{rank}.pt"))
    dist.destroy_process_group()
"""


def test_two_processes_agree(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    batches = [torch.load(tmp_path / f"batches-{rank}.pt") for rank in (0, 1)]

    for name in first:
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), f"{name}: {key}"
            assert first[name][key].isfinite().all(), f"{name}: {key}"
    assert all(first["started"][f"codebooks.{level}.initialised"] for level in (0, 1))
    for name in ("trained", "gradient", "more codes than latents", "revived"):
        vectors = first[name]["codebooks.0.vectors"]
        assert vectors.norm(dim=1).min() > 1e-3, name  # nothing was replaced by zeros

    # One process with everything in one batch learns the same.
    from actok.quantizers import make_quantizer

    torch.manual_seed(0)
    settings = {"kind": "residual", "levels": 2, "codes": 13, "decay": 0.5, "kmeans_steps": 0, "dead_below": 0}
    quantizer = make_quantizer(settings, 5)
    for step in range(7):
        z, mask = (torch.cat([batches[rank][step][part] for rank in (0, 1)]) for part in (0, 1))
        quantizer(z, mask)
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(first["averages"][key], value, msg=key)

    # Revived codes are latents of either process's batch, all different, none masked.
    rows = torch.cat([batches[rank][0][0][batches[rank][0][1]] for rank in (0, 1)])
    owner = torch.cat([torch.full((int(batches[rank][0][1].sum()),), rank) for rank in (0, 1)])
    hits = (first["revived"]["codebooks.0.vectors"][1:, None] == rows).all(-1)
    assert (hits.sum(1) == 1).all()
    chosen = hits.int().argmax(1)
    assert len(chosen.unique()) == 12
    assert set(owner[chosen].tolist()) == {0, 1}
