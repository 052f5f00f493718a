"""actok rollout"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Roll out, write, print; 3 where a chunk was not valid."""
    from actok.benchmark.rollouts import roll_out, rollout_text
    from actok.cli.simulate import environment_options
    from actok.core import parse_assignments

    result, folder = roll_out(
        args.policy,
        args.env,
        args.out,
        episodes=args.episodes,
        seed=args.seed,
        head=args.head,
        execute=args.execute,
        ensemble=args.ensemble,
        limit=args.limit,
        deadline_ms=args.deadline,
        image_size=args.images,
        cameras=_cameras(args.cameras),
        options=environment_options(args),
        batch=args.batch,
        device=args.device,
        precision=args.precision,
        workers=args.workers,
        decoding=parse_assignments(args.set),
        record=args.record,
    )
    print(rollout_text(result))
    print(f"written to {folder / 'rollout.json'} and {folder / 'rollout.html'}")
    return 3 if result["invalid"] else 0


def _cameras(pairs: Sequence[str]) -> dict[str, str]:
    """View of the policy -> view of the environment, from VIEW=CAMERA."""
    from actok.core import ConfigError

    found: dict[str, str] = {}
    for pair in pairs:
        view, _, camera = (part.strip() for part in pair.partition("="))
        if not view or not camera:
            raise ConfigError(f"--cameras {pair!r} is not VIEW=CAMERA; write e.g. image=agentview")
        if view in found:
            raise ConfigError(f"--cameras names the view {view!r} twice; name it once")
        found[view] = camera
    return found
