"""actok train-policy"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from actok.cli.fit import check_out, first_process, leave_processes, training_settings

__all__ = ["run", "training_text"]


def run(args: argparse.Namespace) -> int:
    """Train on the training episodes, save, and say what was made."""
    from actok.core import ConfigError, parse_assignments
    from actok.core.tokenizer import ActionTokenizer
    from actok.training.policy import policy_tokenizer, train_policy
    from actok.training.run_folder import check_run

    check_out(args, policy=True)
    folder = args.run or f"{args.out.rstrip(os.sep)}-run"
    check_run(folder, resume=args.resume)
    settings = parse_assignments(args.set)
    if args.backbone is not None:
        if "backbone" in settings:
            raise ConfigError("the backbone is given twice, by --backbone and by --set; give it once")
        settings["backbone"] = args.backbone
    training = training_settings(args)
    views = tuple(view.strip() for view in (args.views or "").split(",") if view.strip())
    try:
        tokenizer: ActionTokenizer | None = None
        if args.tokenizer is not None and args.init is None:
            tokenizer = policy_tokenizer(
                args.tokenizer, args.data, horizon=args.horizon, space=args.space, rate_hz=args.rate, seed=args.seed
            )
        policy = train_policy(
            args.data,
            tokenizer or args.tokenizer,
            init=args.init,
            preset=args.policy,
            horizon=args.horizon,
            views=views,
            space=args.space,
            rate_hz=args.rate,
            seed=args.seed,
            settings=settings,
            training=training,
            run=folder,
            resume=args.resume,
        )
    except KeyboardInterrupt as stopped:
        if str(stopped) and first_process():
            remedy = "; the same command with --resume goes on" if "saved in" in str(stopped) else ""
            print(f"actok: interrupted: {stopped}{remedy}", file=sys.stderr)
            return 130
        raise
    if first_process():
        saved = policy.save_pretrained(args.out)
        print(training_text(policy))
        print(f"{args.policy} saved in {saved}; let it act with: actok rollout --policy {args.out} --env ENV --out DIR")
    leave_processes()
    return 0


def training_text(policy: Any) -> str:
    """What a policy was trained on, and how it went; without a training in its meta, that it was not."""
    meta: Mapping[str, Any] = policy.meta
    lines = [
        f"{facts['name']}: {facts['train_episodes']} training episodes, {facts['frames']} frames; action space"
        f" {facts['space_origin']}"
        for facts in meta.get("data", [])
    ]
    if (origin := meta.get("started_from")) is not None:
        lines.append(f"began with the weights of {origin['name']} (integrity {origin['integrity'][:16]})")
    if (tokens := meta.get("tokens")) is not None:
        passes = meta.get("passes")
        told = "" if passes is None else f", emitted in {passes:.4g} passes"
        lines.append(
            f"chunks of {policy.horizon} steps are {tokens['mean']:.4g} tokens (at most {tokens['most']}) of the tokenizer"
            f" {policy.tokenizer.kind}{told}; heads: {', '.join(policy.heads)}"
        )
    if (summary := meta.get("training")) is None:
        return "\n".join([*lines, "not trained by actok train-policy"])
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
