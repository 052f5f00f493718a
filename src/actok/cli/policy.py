"""actok train-policy"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from actok.cli.fit import first_process, leave_processes, training_settings

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Train on the training episodes, save, and say what was made."""
    from actok.core import ConfigError, parse_assignments
    from actok.training.policy import policy_tokenizer, train_policy

    settings = parse_assignments(args.set)
    if args.backbone is not None:
        if "backbone" in settings:
            raise ConfigError("the backbone is given twice, by --backbone and by --set; give it once")
        settings["backbone"] = args.backbone
    training = training_settings(args)
    views = tuple(view.strip() for view in (args.views or "").split(",") if view.strip())
    try:
        tokenizer = policy_tokenizer(args.tokenizer, args.data, horizon=args.horizon, space=args.space, seed=args.seed)
        policy = train_policy(
            args.data,
            tokenizer,
            preset=args.policy,
            horizon=args.horizon,
            views=views,
            space=args.space,
            seed=args.seed,
            settings=settings,
            training=training,
            run=args.run or f"{args.out.rstrip(os.sep)}-run",
            resume=args.resume,
        )
    except KeyboardInterrupt as stopped:
        if str(stopped) and first_process():
            remedy = "; the same command with --resume goes on" if "saved in" in str(stopped) else ""
            print(f"actok: interrupted: {stopped}{remedy}", file=sys.stderr)
            return 130
        raise
    if first_process():
        folder = policy.save_pretrained(args.out)
        print(_text(policy))
        print(
            f"{args.policy} saved in {folder}; let it act with: actok rollout --policy {args.out} --env ENV --out DIR"
        )
    leave_processes()
    return 0


def _text(policy: Any) -> str:
    """What was trained, on what, and how it went."""
    meta: Mapping[str, Any] = policy.meta
    lines = [
        f"{facts['name']}: {facts['train_episodes']} training episodes, {facts['frames']} frames; action space"
        f" {facts['space_origin']}"
        for facts in meta["data"]
    ]
    tokens, passes = meta["tokens"], meta.get("passes")
    told = "" if passes is None else f", emitted in {passes:.4g} passes"
    lines.append(
        f"chunks of {policy.horizon} steps are {tokens['mean']:.4g} tokens (at most {tokens['most']}) of the tokenizer"
        f" {policy.tokenizer.kind}{told}; heads: {', '.join(policy.heads)}"
    )
    summary = meta["training"]
    lines.append(
        f"trained {summary['steps']} steps ({summary['epochs']:.1f} epochs) in {summary['seconds']:.0f} s on"
        f" {summary['device']}: {summary['chunks_per_s']:.0f} samples/s, {summary['waiting']:.0%} of the time waiting for"
        f" data; loss {_numbers(summary['losses'])}"
    )
    if (found := summary["validation"]) is not None:
        lines.append(
            f"validation episodes: loss {_numbers(found['losses'])}"
            f"{'; ' + _numbers(found['report']) if found['report'] else ''} ({found['samples']} samples; the last weights are"
            " kept)"
        )
    else:
        lines.append("nothing was held out; the last weights are kept")
    return "\n".join(lines)


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
