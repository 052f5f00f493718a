"""actok rollout"""

from __future__ import annotations

import argparse

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Roll out, write, print; 3 where a chunk was not valid."""
    from actok.benchmark.rollouts import roll_out, rollout_text

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
        batch=args.batch,
        device=args.device,
        workers=args.workers,
        record=args.record,
    )
    print(rollout_text(result))
    print(f"written to {folder / 'rollout.json'} and {folder / 'rollout.html'}")
    return 3 if result["invalid"] else 0
