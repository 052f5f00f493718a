"""actok bench"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Benchmark, print the table, name the files."""
    from actok.benchmark import run_benchmark, text_table
    from actok.core import ConfigError

    replay = None
    if args.replay:
        try:
            replay = json.loads(Path(args.replay).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--replay {args.replay} cannot be read ({error}); write one with: actok replay"
            ) from None
    names = [name for name in args.tokenizers.split(",") if name]
    results = run_benchmark(
        args.data,
        names,
        args.out,
        horizon=args.horizon,
        seed=args.seed,
        sweep=args.sweep,
        spaces=args.space,
        replay=replay,
        semantics=args.semantics,
        features=args.features,
        fresh=args.fresh,
    )
    print(text_table(results))
    pictures = results["settings"]["semantics"] and " (pictures of the codes: semantics/)"
    print(f"written to {args.out}: results.json, table.md, report.html{pictures or ''}")
    failed = [r for r in results["results"] if r["error"] and not r["sweep"]]
    for row in failed:
        print(f"actok: warning: {row['tokenizer']} on {row['dataset']} failed: {row['error']}", file=sys.stderr)
    parts = [*results["semantics"], *(r["semantics"] for r in results["results"] if "semantics" in r)]
    return 3 if failed or any(part["error"] for part in parts) else 0
