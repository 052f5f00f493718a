"""actok demo"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["POLICY", "PolicyDemo", "run"]

TOKENIZERS = ("bins", "fast", "beast", "dct", "pca")
ENV = "metaworld"
EPISODES = 40


@dataclass(frozen=True, kw_only=True)
class PolicyDemo:
    """The demo's policy: what it learns from, and how it is tried.

    Attributes:
        env: an environment whose proprioception tells where the objects are, so that no camera is needed.
        tasks: of the environment.
        demonstrations: of each task.
        tokenizer: of `actok list`, closed-form.
        horizon: steps of a chunk.
        preset: of `actok list policies`.
        settings, training: over the preset's.
        episodes: rolled out of each task.
        execute: steps of each chunk before the policy looks again.
    """

    env: str
    tasks: tuple[str, ...]
    demonstrations: int
    tokenizer: str
    horizon: int
    preset: str = "actok-vla-tiny"
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    episodes: int
    execute: int


POLICY = PolicyDemo(
    env="metaworld-state",
    tasks=("reach-v3", "drawer-close-v3", "window-open-v3", "button-press-topdown-v3"),
    demonstrations=50,
    tokenizer="beast:bases=5",
    horizon=20,
    # What a few hundred steps learn soonest: the state as one embedding, positions without jitter, the likeliest codes.
    settings={"state": "vector", "spacing": 0, "temperature": 0.0},
    training={"steps": 600},
    episodes=10,
    execute=10,
)


def run(args: argparse.Namespace) -> int:
    """Collect (or take the user's data), fit, compare, replay, report; without the user's data, a policy that acts."""
    from actok.benchmark import run_benchmark, text_table
    from actok.cli.inspect import _spaces
    from actok.core import MissingExtraError
    from actok.data import open_dataset

    begin = time.perf_counter()
    out = Path(args.out)
    data, replay = args.data, None
    if data is None:
        for package in ("torch", "accelerate"):
            if find_spec(package) is None:  # said before anything is collected
                raise MissingExtraError(package, "torch", "the demo's policy (with --data there is none)")
        data, replay = _collected(out, ENV, "all", EPISODES, args), ENV
    dataset = open_dataset(data, space=args.space)
    print(f"{dataset.name}: {len(dataset)} episodes, {int(dataset.lengths.sum())} steps")
    _spaces([(dataset.space, dataset.space_origin)])
    print()
    results = run_benchmark([data], TOKENIZERS, out, spaces=args.space, seed=args.seed, sweep=True, replay=replay)
    print(text_table(results))
    failed = any(r["error"] and not r["sweep"] for r in results["results"])
    pages = [out / "report.html"]
    if args.data is None:
        acted = act(POLICY, out, args)
        failed = failed or bool(acted["invalid"])
        pages.append(out / "rollout" / "rollout.html")
    print(f"\n{time.perf_counter() - begin:.0f} s in all. Open {' and '.join(map(str, pages))}")
    return 3 if failed else 0


def act(chosen: PolicyDemo, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train the policy and let it act: writes `out`/policy, and rollout.json, rollout.html and films in `out`/rollout.

    Returns what `roll_out` measured; whatever runs can be repeated by the commands that are printed.
    """
    from actok.benchmark.rollouts import roll_out, rollout_text
    from actok.cli.policy import training_text
    from actok.training.policy import policy_tokenizer, train_policy

    folder, seed = out / "policy", args.seed
    print(f"\nA policy that acts through tokens ({chosen.preset}, {chosen.tokenizer}, {len(chosen.tasks)} tasks)\n")
    data = _collected(out, chosen.env, ",".join(chosen.tasks), chosen.demonstrations, args)
    tokenizer = policy_tokenizer(chosen.tokenizer, data, horizon=chosen.horizon, seed=seed)
    policy = train_policy(
        data, tokenizer, preset=chosen.preset, seed=seed, settings=chosen.settings, training=chosen.training
    )
    policy.save_pretrained(folder)
    print(training_text(policy))
    print()
    result, _ = roll_out(
        folder,
        chosen.env,
        out / "rollout",
        episodes=chosen.episodes,
        seed=seed,
        execute=chosen.execute,
        workers=args.workers,
    )
    print(rollout_text(result))
    for film in result.get("recordings", []):
        print(f"{'success' if film['success'] else 'failure'}: {out / 'rollout' / film['sheet']}")
    return result


def _collected(out: Path, env: str, tasks: str, episodes: int, args: argparse.Namespace) -> str:
    """The folder of an environment's demonstrations, which an earlier demo may have left there."""
    from actok.cli.simulate import collect_into

    folder = out / env
    if folder.exists():
        print(f"using the demonstrations in {folder}")
    else:
        print(f"collecting {episodes} demonstrations of each task of {env} (scripted experts, no rendering)")
        collect_into(str(folder), env, tasks, episodes, seed=args.seed, workers=args.workers)
    return str(folder)
