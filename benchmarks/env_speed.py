"""What a step of a simulator costs, without pictures and for each picture, in processor time.

    python benchmarks/env_speed.py [--envs metaworld aloha ...] [--steps 200] [--pixels 64 128] [--out FILE.json]

Milliseconds of processor time (`time.process_time`: all threads of the process, a software renderer's too), median over
the steps of the first task from seed 0 on, after some that warm up. The scripted expert acts, so that the robot touches
things; its own time is left out. Where there is none (LIBERO), small random actions. An episode that reaches the
environment's limit begins anew with the next seed.

step      observation included, in an environment without views
picture   the same steps with the first of its default views, at each size, less `step`

Each is measured in a process of its own: how MuJoCo renders is decided once a process. Environments that cannot be made
here (not installed, no meshes, no OpenGL) are listed with the reason. Prints a table, and writes JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actok.core.errors import ActokError, ConfigError
from actok.core.files import write_bytes
from actok.core.provenance import circumstances
from actok.envs import env_class, make_env

ENVS = ("metaworld", "aloha", "robosuite-panda", "robosuite-ur5e", "robosuite-iiwa", "robosuite-kinova3", "libero")
PACKAGES = ("numpy", "mujoco", "metaworld", "gym-aloha", "robosuite", "hf-libero")
WARM_UP = 20


def measured(name: str, pixels: int, steps: int) -> dict[str, Any]:
    """Milliseconds of each step, in this process. `pixels` 0: without pictures."""
    shown = {"views": env_class(name).default_views[:1], "image_size": pixels} if pixels else {}
    env = make_env(name, **shown)
    task = env.tasks[0]
    rng = np.random.default_rng(0)
    try:
        expert = env.expert(task)
    except ConfigError:
        expert = None
    found: list[float] = []
    seed = at = 0
    observation = env.reset(task, seed=seed)
    for number in range(-WARM_UP, steps):
        if at == env.max_steps:
            seed, at = seed + 1, 0
            observation = env.reset(task, seed=seed)
        action = rng.uniform(-0.1, 0.1, env.space.dim) if expert is None else expert(observation).action
        begin = time.process_time()
        observation = env.step(action)
        took = time.process_time() - begin
        at += 1
        if number >= 0:
            found.append(1e3 * took)
    env.close()
    return {"task": task, "ms": found, "opengl": os.environ.get("MUJOCO_GL") if pixels else None}


def in_a_process(name: str, pixels: int, steps: int) -> dict[str, Any]:
    """`measured` in a fresh one. Raises ActokError with its last line where it failed."""
    command = [sys.executable, __file__, "--measure", name, str(pixels), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ActokError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(name: str, steps: int, pixels: Sequence[int]) -> dict[str, Any]:
    """One environment's figures. Raises ActokError where it cannot be made."""
    plain = in_a_process(name, 0, steps)
    step = float(np.median(plain["ms"]))
    seen = {size: in_a_process(name, size, steps) for size in pixels}
    return {
        "env": name,
        "task": plain["task"],
        "view": env_class(name).default_views[0],
        "opengl": next((each["opengl"] for each in seen.values()), None),
        "step_ms": {"p50": step, "p95": float(np.quantile(plain["ms"], 0.95))},
        "picture_ms": {str(size): float(np.median(each["ms"])) - step for size, each in seen.items()},
    }


def table(rows: Sequence[dict[str, Any]], pixels: Sequence[int]) -> list[str]:
    """Markdown."""
    lines = [
        "| environment, task | step (95 %) | view | " + " | ".join(f"{size} px" for size in pixels) + " |",
        "|---" * (3 + len(pixels)) + "|",
    ]
    for each in rows:
        pictures = " | ".join(f"{each['picture_ms'][str(size)]:.1f}" for size in pixels)
        step = each["step_ms"]
        lines.append(
            f"| `{each['env']}`, {each['task']} | {step['p50']:.2f} ({step['p95']:.2f}) | {each['view']} | {pictures} |"
        )
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(ENVS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("ENV", "PIXELS", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, size, steps = options.measure
        try:
            print(json.dumps(measured(name, int(size), int(steps))))
        except ActokError as error:
            sys.exit(" ".join(str(error).split()))
        return
    rows, missing = [], {}
    for name in options.envs:
        try:
            rows.append(row(name, options.steps, options.pixels))
        except ActokError as error:
            missing[name] = str(error)
    print("\n".join([*table(rows, options.pixels), *(f"{name}: not measured: {why}" for name, why in missing.items())]))
    if options.out is not None:
        result = {**circumstances(PACKAGES), "steps": options.steps, "rows": rows, "missing": missing}
        write_bytes(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
