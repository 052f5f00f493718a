"""actok collect and actok replay"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Options of environments that the command line gives otherwise, and how.
PICTURES = {
    "collect": "pictures are recorded with --images PIXELS",
    "replay": "a replay makes no pictures",
    "rollout": "the policy says through which views it looks; give their size with --images, other names with --cameras",
}

__all__ = ["collect_into", "environment_options", "run"]


def run(args: argparse.Namespace) -> int:
    """Dispatch on the verb."""
    if args.verb == "collect":
        report = collect_into(
            args.out,
            args.env,
            args.tasks,
            args.episodes,
            seed=args.seed,
            images=args.images,
            workers=args.workers,
            options=environment_options(args),
        )
        return 3 if report.short else 0
    return _replay(args)


def environment_options(args: argparse.Namespace) -> dict[str, Any]:
    """What --env-set says, without the options that the verb gives itself."""
    from actok.core import ConfigError, parse_assignments

    options = parse_assignments(args.env_set)
    for name in ("views", "image_size"):
        if name in options:
            raise ConfigError(f"--env-set {name} is not possible: {PICTURES[args.verb]}")
    return options


def collect_into(
    out: str,
    env_name: str,
    tasks: str,
    episodes: int,
    *,
    seed: int,
    workers: int,
    images: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Record into a LeRobot folder and say what was kept and what failed."""
    from actok.core import ConfigError
    from actok.envs import env_class, make_env, option_names
    from actok.evaluation.record import collect, record_lerobot

    shown: dict[str, Any] = {}
    if images:
        found = env_class(env_name)
        if not found.default_views:
            raise ConfigError(f"environment {env_name!r} has no cameras; collect without --images")
        if not {"views", "image_size"} <= set(option_names(found)):
            raise ConfigError(
                f"environment {env_name!r} takes no views and image_size: its pictures are recorded as they are; collect"
                " without --images"
            )
        shown = {"views": found.default_views, "image_size": images}
    env = make_env(env_name, **(options or {}), **shown)
    wanted = None if tasks == "all" else [task.strip() for task in tasks.split(",") if task.strip()]
    report = record_lerobot(collect(env, wanted, episodes, seed=seed, workers=workers), env, out)
    steps = sum(task.steps for task in report.tasks.values())
    print(
        f"{report.kept} episodes, {steps} steps of {len(report.tasks)} tasks written to {out} in {report.seconds:.0f} s;"
        f" {report.failed} failed attempts were dropped"
    )
    for task, missing in report.short.items():
        print(f"actok: warning: {task}: {missing} of {report.asked} episodes are missing", file=sys.stderr)
    return report


def _replay(args: argparse.Namespace) -> int:
    from actok.benchmark import replay_held_out, replay_text
    from actok.benchmark.replays import CLOSED_LOOP_FILE, FILE
    from actok.core import find_preset, split_settings

    names = [name for name in args.tokenizers.split(",") if name]
    for name in names:
        if not Path(name).exists() and "/" not in name:
            find_preset(split_settings(name)[0])  # a misspelt name is said before anything is collected
    options = environment_options(args)
    data = args.data
    if data is None:
        data = str(Path(args.out) / args.env)
        if not Path(data).exists():
            # A tenth of the episodes is held out for testing.
            collect_into(
                data, args.env, "all", 10 * args.episodes, seed=args.seed, workers=args.workers, options=options
            )
    result = replay_held_out(
        data,
        names,
        args.env,
        args.out,
        per_task=args.episodes,
        horizon=args.horizon,
        seed=args.seed,
        workers=args.workers,
        closed_loop=args.closed_loop,
        options=options,
    )
    print(replay_text(result))
    print(f"written to {Path(args.out) / (CLOSED_LOOP_FILE if args.closed_loop else FILE)}")
    return 0
