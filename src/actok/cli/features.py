"""actok features"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actok.training.features import Extracted

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Extract, and say what there is now."""
    from actok.data import list_mixtures, load_mixture
    from actok.training.features import extract_features

    data: Any = list(args.data)
    if len(data) == 1 and (data[0].endswith(".toml") or (data[0] in list_mixtures() and not Path(data[0]).exists())):
        data = load_mixture(data[0])
    done = extract_features(
        data,
        args.teacher,
        args.out,
        views=_views(args.views),
        stride=args.stride,
        batch_size=args.batch_size,
        rate_hz=args.rate,
        space=args.space,
        shard=_shard(args.shard),
        workers=args.workers,
        options={"layer": args.layer, "device": args.device},
    )
    for found in done.datasets:
        print(_text(found))
    if done.frames:
        print(f"{done.frames} frames in {done.seconds:.1f} s: {done.frames_per_s:,.0f} frames/s")
    else:
        print("nothing was left to do")
    if missing := sum(found.missing for found in done.datasets):
        print(
            f"actok: {missing} parts are missing; the other shards make them, or this command without --shard",
            file=sys.stderr,
        )
    return 0


def _text(found: Extracted) -> str:
    text = f"{found.dataset}: {found.episodes} episodes, {found.frames} frames"
    if found.folder is None:
        return f"{text}; {found.parts - found.missing} of {found.parts} parts are there"
    return f"{text}, {found.rows} distinct rows of {found.dim}; {found.size / 1e6:.1f} MB in {found.folder}"


def _views(text: str | None) -> list[str] | None:
    """Names; an empty list for "none", None where nothing was given."""
    if text is None:
        return None
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]


def _shard(text: str) -> tuple[int, int]:
    from actok.core import ConfigError

    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise ConfigError(f"--shard {text!r} is no shard; write e.g. 2/8, the second of eight") from None
