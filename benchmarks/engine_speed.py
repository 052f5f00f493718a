"""What the training engine adds to a step, on one thread: its loop against the bare one of torch, with the same codec.

    python benchmarks/engine_speed.py [--steps 300] [--batch 256] [--repeats 5]

The preset is vqbet-tiny made small, so that the engine's share shows. The bare loop has batches made beforehand and does
forward, backward, clipping, AdamW and nothing else. The engine draws, cuts, normalises and sends its batches (in a
thread), writes log lines and a run folder with checkpoints. Figures are milliseconds of processor time, which other
work on the machine disturbs less than the clock; the best of several runs that alternate. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from actok.core import ActionSpace, CodecBatch, FitPart, build_config, find_preset
from actok.core.provenance import cpu_model
from actok.core.registry import load_target
from actok.data.mixtures import MixtureSampler
from actok.training.config import TrainConfig
from actok.training.engine import Trainer
from actok.training.model import parameter_groups
from actok.training.run_folder import RunFolder
from actok.training.sources import Batches, Source

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SETTINGS = {"hidden": 16, "latent_dim": 8, "quantizer": {"kind": "residual", "levels": 2, "codes": 16}}


def bare(tokenizer: object, batches: list[CodecBatch], config: TrainConfig) -> float:
    """Processor milliseconds of a step without the engine."""
    codec = load_target(find_preset("vqbet-tiny").target).codec_class(tokenizer.config, tokenizer.shape).train()
    optimizer = torch.optim.AdamW(parameter_groups(codec, 0.1), lr=1e-3, fused=True)
    before = time.process_time()
    for step in range(config.steps):
        output = codec(batches[step % len(batches)])
        torch.stack(list(output.losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - before) / config.steps * 1e3


def engine(tokenizer: object, sources: list[Source], config: TrainConfig) -> float:
    """Processor milliseconds of a step of the engine, the thread that makes batches included."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(tokenizer, sources, config, folder=RunFolder(Path(folder) / "run", {}), progress=False)
        before = time.process_time()
        trainer.run()
        return (time.process_time() - before) / config.steps * 1e3


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # libraries read these when they load
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, "1")})
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(5003, 50, 7)).cumsum(1).astype(np.float32)
    part = FitPart(actions=chunks, space=ActionSpace.raw(7, "arm"))
    target = load_target(find_preset("vqbet-tiny").target)
    tokenizer = target.prepare([part], build_config(target.config_class, SETTINGS, "vqbet-tiny"))
    config = TrainConfig(steps=options.steps, batch_size=options.batch, checkpoint_every=100)
    sources = [Source.of_part(part)]
    sampler = MixtureSampler([len(chunks)], ratios="size", batch_size=options.batch)
    making = Batches(tokenizer, sources, sampler)
    before = time.process_time()
    batches = [making.at(step).chunks for step in range(50)]
    make = (time.process_time() - before) / len(batches) * 1e3
    times = {"bare": [], "engine": []}
    for _ in range(options.repeats):
        times["bare"].append(bare(tokenizer, batches, config))
        times["engine"].append(engine(tokenizer, sources, config))
    best = {name: round(min(found), 3) for name, found in times.items()}
    result = {
        "chunks": [options.batch, 50, 7],
        "steps": options.steps,
        "step_milliseconds": best,
        "making_a_batch_milliseconds": round(make, 3),
        "engine_adds_milliseconds": round(best["engine"] - best["bare"], 3),
        "machine": {"cpu": cpu_model(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
