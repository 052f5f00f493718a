"""The residual quantiser's speed and memory against vector-quantize-pytorch's, on one thread, with the same codes.

    python benchmarks/quantizer_speed.py [--batch 256] [--slots 16] [--repeats 5]

3 levels of 4096 codes of 128 channels, FASTerVQ's setting. A training step is forward, backward to the latents, moving
averages and replacement of dead codes; encoding is at inference. Both start from the same codebooks and must give the
same codes. Times are the best of several runs that alternate between the two. Peak memory is that of a fresh process
for each, above what it held before its first step (Linux only). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LEVELS, CODES, DIM = 3, 4096, 128
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def make(which: str) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """A quantiser in training mode, its codebooks drawn from seed 0, and the function that encodes with it."""
    torch.manual_seed(0)
    codebooks = torch.randn(LEVELS, CODES, DIM) * (0.5 ** torch.arange(LEVELS))[:, None, None]
    if which == "actok":
        from actok.quantizers import make_quantizer

        settings = {"kind": "residual", "levels": LEVELS, "codes": CODES, "kmeans_steps": 0}
        quantizer = make_quantizer(settings, DIM)
        for level, vectors in enumerate(codebooks):
            book = quantizer.codebook(level)
            book.vectors.copy_(vectors)
            book.sums.copy_(vectors)
        return quantizer, quantizer.encode
    from vector_quantize_pytorch import ResidualVQ

    reference = ResidualVQ(
        dim=DIM,
        num_quantizers=LEVELS,
        codebook_size=CODES,
        decay=0.99,
        threshold_ema_dead_code=0.1,
        commitment_weight=0.25,
    )
    for layer, vectors in zip(reference.layers, codebooks, strict=True):
        layer._codebook.embed.copy_(vectors[None])
        layer._codebook.embed_avg.copy_(vectors[None])
    return reference, lambda z: reference(z)[1]


def train_step(which: str, quantizer: torch.nn.Module, z: torch.Tensor) -> None:
    """Forward, backward, update."""
    z = z.clone().requires_grad_()
    if which == "actok":
        found = quantizer(z)
        loss = found.quantised.square().mean() + sum(found.losses.values())
    else:
        quantised, _, losses = quantizer(z)
        loss = quantised.square().mean() + losses.sum()
    loss.backward()


def peak_mebibytes() -> float:
    """The most memory this process has held. (getrusage would tell the parent's peak where that was higher.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory(which: str, job: str, options: argparse.Namespace) -> float:
    """Peak memory of a job in a fresh process, above the start, in MiB."""
    command = [sys.executable, __file__, "--batch", str(options.batch), "--slots", str(options.slots)]
    done = subprocess.run([*command, "--measure", which, job], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(which: str, job: str, z: torch.Tensor) -> float:
    """What `memory` runs: two rounds of one job."""
    quantizer, encode = make(which)
    if job == "train":
        train_step(which, quantizer, z[:1, :1])  # what a first step loads is not the quantiser's
    before = peak_mebibytes()
    for _ in range(2):
        if job == "train":
            train_step(which, quantizer, z)
        else:
            with torch.no_grad():
                encode_in(quantizer, encode, z)
    return peak_mebibytes() - before


def encode_in(
    quantizer: torch.nn.Module, encode: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor
) -> torch.Tensor:
    """Codes at inference."""
    quantizer.eval()
    with torch.no_grad():
        return encode(z)


def best(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest run of each, the runs taken in turns so that a busy machine hits all alike."""
    times: dict[str, float] = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name] = min(times[name], (time.perf_counter() - started) * 1e3)
    return {name: round(value, 2) for name, value in times.items()}


def processor_name() -> str:
    """The CPU's model name where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("WHICH", "JOB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # libraries read these when they load
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, "1")})
    torch.set_num_threads(1)
    z = torch.randn(options.batch, options.slots, DIM, generator=torch.Generator().manual_seed(1))
    if options.measure:
        print(measure(*options.measure, z))
        return

    names = ("actok", "reference")
    made = {name: make(name) for name in names}
    codes = {name: encode_in(*made[name], z) for name in names}
    assert torch.equal(codes["actok"], codes["reference"]), "codes differ"
    encoding = best({name: lambda name=name: encode_in(*made[name], z) for name in names}, options.repeats)
    for quantizer, _ in made.values():
        quantizer.train()
    training = best({name: lambda name=name: train_step(name, made[name][0], z) for name in names}, options.repeats)
    peak = {job: {name: round(memory(name, job, options), 1) for name in names} for job in ("train", "encode")}
    result = {
        "latents": [options.batch, options.slots, DIM],
        "levels": LEVELS,
        "codes": CODES,
        "identical_codes": True,
        "train_step_milliseconds": training,
        "encode_milliseconds": encoding,
        "faster": {
            "train_step": round(training["reference"] / training["actok"], 2),
            "encode": round(encoding["reference"] / encoding["actok"], 2),
        },
        "peak_memory_mebibytes": peak,
        "machine": {
            "cpu": processor_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
