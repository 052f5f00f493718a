"""Where the time of a training step goes.

    python benchmarks/training_speed.py [--preset fastervq-tiny] [--batch 256] [--steps 40] [--threads 1] [--device cuda]

Steps of the preset on chunks of T = 20 steps, once with D = 4 (position, gripper) and once with D = 7 (position, rotation,
gripper), as `actok fit` takes them, without its data loading, log and evaluation. Milliseconds are medians over steps:

    batch        tensors from normalised chunks
    forward      the codec and its losses, of which `quantiser` is one part
    backward     gradients
    optimiser    clipping and AdamW

`first_step` holds the k-means start of the codebooks. `operations` are shares of the time that torch.profiler sees. Prints
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from actok.core import ActionGroup, ActionSpace, FitPart, build_config, find_preset
from actok.core.provenance import circumstances
from actok.core.registry import load_target
from actok.training.config import train_config
from actok.training.model import parameter_groups

T = 20
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
POSITION = ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta")
SPACES = {
    4: ActionSpace(embodiment="arm", dim=4, groups=(POSITION, ActionGroup(name="gripper", kind="gripper", dims=(3,)))),
    7: ActionSpace(
        embodiment="arm",
        dim=7,
        groups=(
            POSITION,
            ActionGroup(name="rotation", kind="rotation", dims=(3, 4, 5), rotation="axis_angle", mode="delta"),
            ActionGroup(name="gripper", kind="gripper", dims=(6,)),
        ),
    ),
}


class Clock:
    """Milliseconds by name, of the device where it is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}

    def now(self) -> float:
        """Milliseconds, everything asked for being done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    def add(self, name: str, since: float) -> float:
        """Book the time since then; returns now."""
        now = self.now()
        self.times.setdefault(name, []).append(now - since)
        return now


def chunks_of(count: int, dim: int) -> np.ndarray:
    """Slow oscillations and a little noise, float32 [B, T, D]."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, T)[None, :, None]
    phase, rate = rng.uniform(0, 6, (2, count, 1, dim))
    return (np.sin(rate * t + phase) + 0.02 * rng.normal(size=(count, T, dim))).astype(np.float32)


def measure(preset: str, dim: int, batch_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Times of one preset on one action space."""
    found = find_preset(preset)
    target = load_target(found.target)
    config, training = (
        build_config(target.config_class, found.settings, preset),
        train_config(found.training, {}, preset),
    )
    chunks = chunks_of(16 * batch_size, dim)
    tokenizer = target.prepare([FitPart(actions=chunks, space=SPACES[dim])], config)
    normalised = tokenizer.normalise(chunks)
    codec = tokenizer.codec.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameter_groups(codec, training.weight_decay), lr=training.learning_rate, betas=training.betas, fused=True
    )
    clock, rng = Clock(device), np.random.default_rng(1)
    entered = [0.0]
    codec.quantizer.register_forward_pre_hook(lambda *_: entered.__setitem__(0, clock.now()))
    codec.quantizer.register_forward_hook(lambda *_: clock.add("quantiser", entered[0]) and None)

    def step() -> None:
        started = now = clock.now()
        batch = tokenizer.batch(normalised[rng.integers(0, len(normalised), batch_size)]).to(device)
        now = clock.add("batch", now)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            output = codec(batch)
        loss = torch.stack([value.float() for value in output.losses.values()]).sum()
        now = clock.add("forward", now)
        loss.backward()
        now = clock.add("backward", now)
        torch.nn.utils.clip_grad_norm_(codec.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.add("optimiser", now)
        clock.add("step", started)

    step()
    first = clock.times["step"][0]
    for _ in range(3):
        step()
    clock.times.clear()
    for _ in range(steps):
        step()
    medians = {name: statistics.median(times) for name, times in clock.times.items()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    shares = {row.key: getattr(row, key) for row in profile.key_averages()}
    whole = sum(shares.values())
    top = sorted(shares, key=shares.__getitem__, reverse=True)[:10]
    return {
        "milliseconds": {name: round(medians[name], 2) for name in ("batch", "forward", "quantiser", "backward", "optimiser", "step")},
        "fastest_step": round(min(clock.times["step"]), 2),
        "first_step": round(first, 1),
        "samples_per_second": round(batch_size / medians["step"] * 1e3),
        "minutes_of_the_presets_steps": round(training.steps * medians["step"] / 60e3, 1),
        "operations": {name: round(shares[name] / whole, 3) for name in top},
    }  # fmt: skip


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="fastervq-tiny")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    threads = str(options.threads)
    if any(os.environ.get(name) != threads for name in THREADS):  # libraries read these when they load
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, threads)})
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    batch = options.batch or train_config(find_preset(options.preset).training, {}, options.preset).batch_size
    load = os.getloadavg()[0]
    results = {f"D={dim}": measure(options.preset, dim, batch, options.steps, device) for dim in SPACES}
    conditions = {
        **circumstances(["torch", "accelerate", "numpy"]),
        "preset": options.preset,
        "batch": batch,
        "T": T,
        "steps": options.steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} threads",
        "load_average": load,
    }
    print(json.dumps({"conditions": conditions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
