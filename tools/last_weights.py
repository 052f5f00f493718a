"""Judge the kept and the last weights of a training run on a data set's test episodes: what averaging weights did.

    python tools/last_weights.py TOKENIZER_DIR RUN_DIR --data PATH [--horizon 20]

Prints mean error in normalised units and the share of steps valid at .03 and .1, for both. Splits by episode, seed 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import actok
from actok.benchmark.prepare import Prepared
from actok.core import ChunkContext, to_numpy
from actok.evaluation.comparison import Comparison
from actok.evaluation.metrics import normalised_error, valid_reconstruction

LEVELS = (0.03, 0.1)


def main() -> None:
    """Load both, decode the same test chunks, print JSON."""
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--horizon", type=int, default=20)
    args = parser.parse_args()

    data = Prepared(
        args.data,
        space=None,
        horizon=args.horizon,
        seed=0,
        max_chunks=2000,
        max_fit_chunks=100,
        tolerances=LEVELS,
    ).held_out
    kept = actok.load(args.tokenizer)
    checkpoint = max((args.run / "checkpoints").glob("step-*"))
    last = kept.with_weights(load_file(checkpoint / "model.safetensors"))
    found = {}
    for name, tokenizer in (("kept", kept), ("last", last)):
        context = ChunkContext(
            horizon=args.horizon, pad_mask=data.pad_mask, embodiment=tokenizer.embodiment_for(data.space)
        )
        decoded = tokenizer.decode(tokenizer.encode(data.test, context), context)
        comparison = Comparison(
            reference=data.test,
            reconstruction=to_numpy(decoded.actions),
            space=data.space,
            normaliser=data.normaliser,
            pad_mask=data.pad_mask,
        )
        valid = valid_reconstruction(comparison, LEVELS).literal
        found[name] = {
            "l1": normalised_error(comparison).l1,
            "vrr": dict(zip(map(str, LEVELS), valid or (), strict=True)),
        }
    print(json.dumps({"checkpoint": checkpoint.name, "chunks": len(data.test), **found}, indent=1))


if __name__ == "__main__":
    main()
