"""What the semantic objectives add to a training step, their features being read from memory.

    python benchmarks/alignment_speed.py [--preset xtokenizer-tiny] [--batch 256] [--steps 20] [--features 384]
        [--align width=128] [--seconds 25] [--threads 1] [--device cuda]

A step is forward, backward and AdamW, of chunks of `--steps` steps of one arm (D = 7). A plain step (the codec alone) and
steps with objectives follow one another, round by round, so that other work on the machine meets all; the ratio of a round
is that of neighbours in time, and the median of the rounds' ratios is reported, with their quartiles. On a CPU, times are
those that the process computed, not those it waited for the processor. Features are random and vary in all chunks, the
dearest case; every eighth chunk shares those of another. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from actok.alignment.features import FeatureBatch
from actok.alignment.objectives import AlignmentConfig, SemanticHeads
from actok.core import ActionGroup, ActionSpace, FitPart, build_config, find_preset, parse_assignments
from actok.core.provenance import circumstances
from actok.core.registry import load_target

D = 7
GROUPS = (
    ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta"),
    ActionGroup(name="rotation", kind="rotation", dims=(3, 4, 5), rotation="axis_angle", mode="delta"),
    ActionGroup(name="gripper", kind="gripper", dims=(6,)),
)
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "all": {},
    "masking": {"contrast": 0.0, "prediction": 0.0},
    "contrast": {"masking": 0.0, "prediction": 0.0},
    "prediction": {"masking": 0.0, "contrast": 0.0},
}


def stepper(options: argparse.Namespace, settings: dict[str, Any] | None) -> Callable[[], None]:
    """A function that takes one training step of the preset with these objectives (None: without any)."""
    found = find_preset(options.preset)
    target = load_target(found.target)
    config = build_config(target.config_class, found.settings, options.preset)
    chunks = np.random.default_rng(0).normal(size=(options.batch, options.steps, D)).cumsum(1).astype(np.float32)
    space = ActionSpace(embodiment="arm", dim=D, groups=GROUPS, rate_hz=20.0)
    tokenizer = target.prepare([FitPart(actions=chunks, space=space)], config)
    device = torch.device(options.device)
    batch = tokenizer.batch(tokenizer.normalise(chunks)).to(device)
    codec = tokenizer.codec.train().requires_grad_(True).to(device)
    parameters = list(codec.parameters())
    heads = features = None
    if settings is not None:
        heads = SemanticHeads(
            AlignmentConfig(**{**found.alignment, **parse_assignments(options.align), **settings}),
            dim=codec.quantizer.dim,
            sizes=codec.quantizer.sizes,
            feature_dim=options.features,
        ).to(device)
        parameters += heads.parameters()
        features = random_features(codec.slot_steps(options.steps), options).to(device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> None:
        output = codec(batch)
        losses = dict(output.losses)
        if heads is not None:
            losses |= heads(output, batch, features, codec)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def random_features(spans: np.ndarray | None, options: argparse.Namespace) -> FeatureBatch:
    """Features of every chunk, by slot where slots are spans of time."""
    count, width = options.batch, options.features
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(count, width, generator=draw)
    group = torch.arange(count)
    group[::8] = 0
    whole[::8] = whole[0]
    return FeatureBatch(
        whole=whole,
        slots=None if spans is None else torch.randn(count, len(spans), width, generator=draw),
        slot_known=None if spans is None else torch.ones(count, len(spans), dtype=torch.bool),
        varies=torch.ones(count, dtype=torch.bool),
        group=group,
        next=torch.randn(count, width, generator=draw),
        has_next=torch.ones(count, dtype=torch.bool),
    )


def timed(steps: dict[str, Callable[[], None]], seconds: float, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    """Milliseconds of each arm's steps, round by round, until the time is up; at least 3 rounds after 2 unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    done = 0
    while done < 5 or time.perf_counter() < end:
        for name, step in steps.items():
            started = clock()
            step()
            if done >= 2:
                times[name].append(1e3 * (clock() - started))
        done += 1
    return {name: np.array(found) for name, found in times.items()}


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xtokenizer-tiny")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="T of a chunk")
    parser.add_argument("--features", type=int, default=384, help="F of the teacher")
    parser.add_argument(
        "--align", nargs="+", default=[], metavar="KEY=VALUE", help="on top of the preset's [alignment]"
    )
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS)[1:])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    arms = ["plain", *(a for a in options.arms if a != "plain")]
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    times = timed({name: stepper(options, ARMS[name]) for name in arms}, options.seconds, clock)
    found: dict[str, Any] = {"plain": {"median_ms": round(float(np.median(times["plain"])), 2)}}
    for name in arms[1:]:
        low, middle, high = np.quantile(times[name] / times["plain"], [0.25, 0.5, 0.75])
        found[name] = {
            "median_ms": round(float(np.median(times[name])), 2),
            "ratio": round(float(middle), 3),
            "ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
            "ratio_of_fastest": round(float(times[name].min() / times["plain"].min()), 3),
        }
    report = {
        "settings": vars(options),
        "rounds": len(times["plain"]),
        "steps": found,
        "circumstances": circumstances(["torch", "numpy"]),
    }
    print(json.dumps(report, indent=2, default=str))


if __name__ == "__main__":
    main()
