"""The contrast over two processes is that of one process with the chunks of both."""

import os
import subprocess
import sys
import textwrap

import torch
from torch import nn

from actok.alignment.contrast import Contrast
from actok.alignment.features import FeatureBatch

B, S, C, FEATURE, W = (5, 3), (7, 2), 5, 11, 13  # two processes with other numbers of chunks and slots


class Model(nn.Module):
    """An encoder and the contrast on its latents."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, C)
        self.contrast = Contrast(C, FEATURE, width=W, temperature=0.2)

    def forward(self, x, features):
        return self.contrast(self.encoder(x), torch.ones(x.shape[:2], dtype=torch.bool), features)


def share(rank, case):
    """Inputs and features of a process."""
    count, slots = (B[rank], S[rank]) if case != "equal" else (B[1], S[1])
    draw = torch.Generator().manual_seed(10 + rank)
    varies = torch.rand(count, generator=draw) < 0.7
    if case == "none vary":
        varies[:] = False
    elif case == "one has none that vary":
        varies[:] = rank == 0
    features = FeatureBatch(
        whole=torch.randn(count, FEATURE, generator=draw),
        slots=torch.randn(count, slots, FEATURE, generator=draw),
        slot_known=torch.rand(count, slots, generator=draw) < 0.8,
        varies=varies,
        group=torch.arange(count) * (rank + 1),  # 0, 2, ... in both
        next=torch.zeros(count, FEATURE),
        has_next=varies,
    )
    features.slots[-1, 0] = 3.0 + torch.arange(FEATURE)  # one slot's features are those of another process
    return torch.randn(count, slots, 3, generator=draw), features


CASES = ("some vary", "none vary", "one has none that vary", "equal")
SCRIPT = """
    import sys
    sys.path.insert(0, sys.argv[2])
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from test_objectives_distributed import CASES, Model, share

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, result = dist.get_rank(), {}
    for case in CASES:
        torch.manual_seed(0)
        model = DistributedDataParallel(Model())
        loss = model(*share(rank, case))
        loss.backward()
        result[case] = loss.detach(), {n: p.grad for n, p in model.module.named_parameters()}
    torch.save(result, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
"""


def joined(case):
    """The loss and gradients of one process with all chunks; slots that only the other has are unknown."""
    parts = [share(rank, case) for rank in (0, 1)]
    most = max(x.shape[1] for x, _ in parts)

    def filled(x):
        return torch.cat([x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])], 1)

    values = {}
    for name in vars(parts[0][1]):
        values[name] = torch.cat(
            [(filled if name.startswith("slot") else lambda x: x)(getattr(f, name)) for _, f in parts]
        )
    torch.manual_seed(0)
    model = Model()
    # The mean over slots of each process is over its own.
    real = torch.cat([filled(torch.ones(x.shape[:2], dtype=torch.bool)) for x, _ in parts])
    loss = model.contrast(model.encoder(torch.cat([filled(x) for x, _ in parts])), real, FeatureBatch(**values))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            script,
            tmp_path,
            os.path.dirname(__file__),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case in CASES:
        loss, gradients = joined(case)
        assert not torch.equal(ranks[0][case][0], ranks[1][case][0]), case  # each has its own chunks
        torch.testing.assert_close((ranks[0][case][0] + ranks[1][case][0]) / 2, loss, msg=case)
        moved = [name for name, gradient in gradients.items() if gradient.any()]
        assert any("slot" in name for name in moved) == (case != "none vary")
        assert "encoder.weight" in moved
        for name, gradient in gradients.items():
            for rank in ranks:
                torch.testing.assert_close(rank[case][1][name], gradient, msg=f"{case}: {name}", rtol=1e-4, atol=1e-6)
