"""actok export"""

from __future__ import annotations

import argparse

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Write the ONNX files of a saved tokenizer."""
    from actok.tokenizers.export import export_onnx
    from actok.training import load

    tokenizer = load(args.tokenizer)
    done = export_onnx(tokenizer, args.out, embodiment=args.embodiment)
    space, agreement = tokenizer.spaces[done.embodiment], done.agreement
    layout = tokenizer.layout_for(None, done.embodiment)
    print(
        f"{done.encoder}: actions [batch, {tokenizer.horizon}, {space.dim}] of {done.embodiment} to ids"
        f" [batch, {layout.max_len}]\n"
        f"{done.decoder}: ids to actions, in the units of the data\n"
        f"{done.facts}: what they are\n"
        f"checked on {agreement.chunks} random chunks: same ids, actions within {agreement.actions:.1e} (normalised)"
    )
    return 0
