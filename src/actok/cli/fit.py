"""actok fit"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# Arguments of `fit` that are no settings, and how the command line takes them.
OPTIONS = {
    "name": "NAME",
    "data": "--data",
    **{k: f"--{k}" for k in ("tolerance", "horizon", "space", "seed")},
    "rate_hz": "--rate",
}

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Fit on the training episodes, save, and say what was made."""
    from actok.core import ConfigError, parse_assignments
    from actok.data import list_mixtures, load_mixture
    from actok.training import fit

    settings = parse_assignments(args.set)
    if taken := [key for key in settings if key in OPTIONS]:
        raise ConfigError(f"--set {taken[0]} is no setting of a tokenizer; give {OPTIONS[taken[0]]}")
    data: Any = list(args.data)
    if len(data) == 1 and (data[0].endswith(".toml") or (data[0] in list_mixtures() and not Path(data[0]).exists())):
        data = load_mixture(data[0])
    tokenizer = fit(
        args.name,
        data,
        tolerance=args.tolerance,
        horizon=args.horizon,
        space=args.space,
        rate_hz=args.rate,
        seed=args.seed,
        **settings,
    )
    folder = tokenizer.save_pretrained(args.out)
    for facts in tokenizer.meta["data"]:
        print(
            f"{facts['name']}: {facts['episodes']} episodes, {facts['frames']} frames; fitted on {facts['train_chunks']}"
            f" chunks of {facts['horizon']} steps; action space {facts['space_origin']}"
        )
    if report := tokenizer.meta.get("tolerance"):
        print(report["summary"])
    print(
        f"{args.name} saved in {folder} (hash {tokenizer.weights_hash[:12]}); look at it with: actok inspect {args.out}"
    )
    return 0
