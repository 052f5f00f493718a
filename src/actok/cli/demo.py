"""actok demo"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

__all__ = ["run"]

TOKENIZERS = ("bins", "fast", "beast", "dct", "pca")
ENV = "metaworld"
EPISODES = 40


def run(args: argparse.Namespace) -> int:
    """Collect (or take the user's data), fit, compare, replay, report."""
    from actok.benchmark import run_benchmark, text_table
    from actok.cli.inspect import _spaces
    from actok.cli.simulate import collect_into
    from actok.data import open_dataset

    begin = time.perf_counter()
    out = Path(args.out)
    data, replay = args.data, None
    if data is None:
        data, replay = str(out / ENV), ENV
        if Path(data).exists():
            print(f"using the demonstrations in {data}")
        else:
            print(f"collecting {EPISODES} demonstrations of each Meta-World task (scripted experts, no rendering)")
            collect_into(data, ENV, "all", EPISODES, seed=args.seed, workers=args.workers)
    dataset = open_dataset(data, space=args.space)
    print(f"{dataset.name}: {len(dataset)} episodes, {int(dataset.lengths.sum())} steps")
    _spaces([(dataset.space, dataset.space_origin)])
    print()
    results = run_benchmark([data], TOKENIZERS, out, spaces=args.space, seed=args.seed, sweep=True, replay=replay)
    print(text_table(results))
    print(f"\n{time.perf_counter() - begin:.0f} s in all. Open {out / 'report.html'}")
    return 3 if any(r["error"] and not r["sweep"] for r in results["results"]) else 0
