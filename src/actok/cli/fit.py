"""actok fit"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Arguments of `fit` that are no settings, and how the command line takes them.
OPTIONS = {
    "name": "NAME",
    "data": "--data",
    **{k: f"--{k}" for k in ("tolerance", "horizon", "space", "seed", "run", "resume")},
    "rate_hz": "--rate",
    "training": "--train",
    "features": "--features",
    "alignment": "--align",
}

__all__ = ["check_out", "first_process", "leave_processes", "run", "training_settings"]


def run(args: argparse.Namespace) -> int:
    """Fit or train on the training episodes, save, and say what was made."""
    from actok.core import ConfigError, parse_assignments
    from actok.data import list_mixtures, load_mixture
    from actok.training import fit

    check_out(args, policy=False)
    settings = parse_assignments(args.set)
    if taken := [key for key in settings if key in OPTIONS]:
        raise ConfigError(f"--set {taken[0]} is no setting of a tokenizer; give {OPTIONS[taken[0]]}")
    data: Any = list(args.data)
    if len(data) == 1 and (data[0].endswith(".toml") or (data[0] in list_mixtures() and not Path(data[0]).exists())):
        data = load_mixture(data[0])
    try:
        tokenizer = fit(
            args.name,
            data,
            tolerance=args.tolerance,
            horizon=args.horizon,
            space=args.space,
            rate_hz=args.rate,
            seed=args.seed,
            **_training_options(args),
            **settings,
        )
    except KeyboardInterrupt as stopped:
        if str(stopped) and first_process():
            remedy = "; the same command with --resume goes on" if "saved in" in str(stopped) else ""
            print(f"actok: interrupted: {stopped}{remedy}", file=sys.stderr)
            return 130
        raise
    if first_process():
        _tell(args, tokenizer)
    leave_processes()
    return 0


def _training_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `fit` takes of learned tokenizers: nothing is passed on where nothing was given for a closed-form one."""
    from actok.core import find_preset, parse_assignments
    from actok.core.registry import load_target

    training = training_settings(args)
    learned = load_target(find_preset(args.name).target).learned and args.tolerance is None
    folder = args.run
    if folder is None and learned:
        folder = f"{args.out.rstrip(os.sep)}-run"
    return {
        "training": training,
        "features": args.features,
        "alignment": parse_assignments(args.align) or None,
        "run": folder,
        "resume": args.resume,
    }


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What --train and the options beside it say."""
    from actok.core import ConfigError, parse_assignments

    training = parse_assignments(args.train)
    for key, option, value in (
        ("steps", "--steps", args.steps),
        ("batch_size", "--batch-size", args.batch_size),
        ("learning_rate", "--lr", args.lr),
        ("track", "--track", tuple(args.track) or None),
    ):
        if value is not None:
            if key in training:
                raise ConfigError(f"{key} is given twice, by {option} and by --train; give it once")
            training[key] = value
    return training


def check_out(args: argparse.Namespace, *, policy: bool) -> None:
    """Refuse a folder that the outcome could not be saved in, before anything is read or trained."""
    from actok.core import ConfigError, check_folder

    if not first_process():
        return
    check_folder(args.out, policy=policy)
    if args.run and Path(args.run).resolve().is_relative_to(Path(args.out).resolve()):
        raise ConfigError(f"--run {args.run} is in --out, which the outcome alone is saved in; name another folder")


def _tell(args: argparse.Namespace, tokenizer: Any) -> None:
    """Save, and say what was made."""
    folder = tokenizer.save_pretrained(args.out)
    for facts in tokenizer.meta["data"]:
        print(
            f"{facts['name']}: {facts['episodes']} episodes, {facts['frames']} frames; fitted on {facts['train_chunks']}"
            f" chunks of {facts['horizon']} steps; action space {facts['space_origin']}"
        )
    if report := tokenizer.meta.get("tolerance"):
        print(report["summary"])
    elif summary := tokenizer.meta.get("training"):
        print(_training_text(summary))
    print(
        f"{args.name} saved in {folder} (hash {tokenizer.weights_hash[:12]}); look at it with: actok inspect {args.out}"
    )
    if "training" in tokenizer.meta:
        print(
            f"judge it on the test episodes with: actok bench --data {shlex.join(args.data)} --tokenizers {args.out} --out DIR"
        )


def _training_text(summary: Mapping[str, Any]) -> str:
    text = (
        f"trained {summary['steps']} steps ({summary['epochs']:.1f} epochs) in {summary['seconds']:.0f} s on"
        f" {summary['device']}: {summary['chunks_per_s']:.0f} chunks/s, {summary['waiting']:.0%} of the time waiting for data"
    )
    found = summary["validation"]
    if found is None:
        return f"{text}; nothing was held out, so the last weights are kept"
    rates = ", ".join(f"{rate:.1%} of steps within {tolerance}" for tolerance, rate in found["vrr"].items())
    used = " ".join(f"{share:.0%}" for share in found["codes_used"])
    return (
        f"{text}\nvalidation episodes: l1 {found['l1']:.4f} in normalised units, {rates}; codes used {used} (weights of step"
        f" {found['step']}, the best)"
    )


def first_process() -> bool:
    """Whether this is the process that tells and writes."""
    return os.environ.get("RANK", "0") == "0"


def leave_processes() -> None:
    """Leave the group of a run in several processes in order, so that none of them complains."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
