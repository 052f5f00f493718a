"""How long a teacher's features of a training batch take, on one thread.

    python benchmarks/feature_speed.py [--batch 256] [--width 384] [--repeats 20]

"words": features that change every 30 frames, as those of a sentence encoder do; "frames": every frame has its own, as where
a teacher sees images. Slots stand for four steps. Figures are the median milliseconds of processor time, which other work
on the machine disturbs less than the clock. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from actok.alignment.store import FeatureStore
from actok.alignment.store_write import as_stored, merge_parts, write_part
from actok.core.provenance import cpu_model

FRAMES, LENGTH = 80_000, 100
KINDS = {"words": np.arange(FRAMES) // 30 % 166, "frames": np.arange(FRAMES)}


def measure(store: FeatureStore, batch: int, steps: int, repeats: int) -> float:
    """Milliseconds of one call."""
    rng = np.random.default_rng(0)
    spans = np.array([[t, t + 4] for t in range(0, steps, 4)])
    times = []
    for _ in range(repeats):
        episode, start = rng.integers(0, FRAMES // LENGTH, batch), rng.integers(0, LENGTH, batch)
        before = time.thread_time()
        store.chunk(episode, start, steps, spans)
        times.append(time.thread_time() - before)
    return round(1e3 * float(np.median(times)), 2)


def main() -> None:
    """Write features, read batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {"cpu": cpu_model(), "torch": torch.__version__, **vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        for kind, index in KINDS.items():
            rows = np.random.default_rng(0).normal(size=(index.max() + 1, args.width))
            part = Path(folder) / f"{kind}.npz"
            write_part(part, as_stored(rows, "random", str), index)
            lengths = [LENGTH] * (FRAMES // LENGTH)
            meta = {"dataset": kind, "fingerprint": kind, "lengths": lengths, "teacher": {"model": "random"}}
            merge_parts([part], Path(folder) / "store" / kind, meta, None)
            store = FeatureStore.open(Path(folder) / "store", kind, kind)
            for steps in (20, 64):
                found[f"{kind}, {steps} steps, ms"] = measure(store, args.batch, steps, args.repeats)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
