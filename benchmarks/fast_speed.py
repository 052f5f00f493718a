"""FAST's speed against the published processor's algorithm, in one run, on one thread, with identical ids.

    python benchmarks/fast_speed.py [--published FOLDER] [--chunks 512] [--repeats 7]

Chunks of T = 50 steps and D = 14 dimensions in [-1, 1]: sums of a few slow sinusoids, dwell phases and a little noise.
Two tokenizers: an own fit on them, and, where the folder is given, the published FAST+ files. The reference is what the
published processor does, without its layers of Python above the tokenizers library: one scipy DCT over the batch, then
for each chunk a string made by chr and one BPE call; back by the library's decode, ord and an inverse DCT. Ours is the
public API, with the checks, normaliser, range counts and validity that the reference lacks. Times are the best of
several runs that alternate between the two. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import tokenizers

import actok
from actok.core import ActionSpace, ChunkContext, FitPart
from actok.signal.statistics import Statistics
from actok.tokenizers.fast import FastConfig, FastTokenizer

T, D = 50, 14
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS")
ONE_THREAD = {**dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}


def motions(count: int, seed: int) -> np.ndarray:
    """Smooth chunks [B, T, D] in [-1, 1]: reaches with pauses, and grippers that open and close."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, T)[None, :, None]
    x = rng.uniform(-0.6, 0.6, (count, 1, D))
    for _ in range(3):
        amplitude = rng.exponential(0.12, (count, 1, D)) * (rng.random((count, 1, D)) < 0.6)
        x = x + amplitude * np.sin(2 * np.pi * (rng.uniform(0.1, 1.5, (count, 1, D)) * t + rng.random((count, 1, D))))
    x = x + rng.normal(size=(count, T, D)) * 0.003
    x[..., 6::7] = np.sign(t - rng.uniform(-1, 2, (count, 1, 2)))
    return np.clip(x, -1, 1).astype(np.float32)


def reference_encode(bpe: tokenizers.Tokenizer, scale: float, min_token: int, chunks: np.ndarray) -> list[list[int]]:
    """The published algorithm."""
    coefficients = np.around(scipy.fft.dct(chunks, axis=1, norm="ortho") * scale)
    ids = []
    for row in coefficients:
        text = "".join(map(chr, np.maximum(row.flatten() - min_token, 0).astype(int)))
        ids.append(bpe.encode(text).ids)
    return ids


def reference_decode(bpe: tokenizers.Tokenizer, scale: float, min_token: int, ids: list[list[int]]) -> np.ndarray:
    """The published algorithm, back."""
    actions = []
    for row in ids:
        text = bpe.decode(row)
        coefficients = (np.array(list(map(ord, text))) + min_token).reshape(-1, D)
        actions.append(scipy.fft.idct(coefficients / scale, axis=0, norm="ortho"))
    return np.stack(actions)


def best(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each, the runs taken in turns so that a busy machine hits all alike."""
    times: dict[str, float] = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - started)
    return times


def compare(tokenizer: FastTokenizer, chunks: np.ndarray, repeats: int) -> dict[str, Any]:
    """Ratios of one tokenizer; raises AssertionError where ids or actions differ."""
    context = ChunkContext(embodiment=f"normalised-{D}")
    started = time.perf_counter()
    tokenizer.encode(chunks[:1], context)
    first_call = time.perf_counter() - started
    bpe, scale, min_token = tokenizer.bpe.library, tokenizer.config.scale, tokenizer.min_token
    tokens = tokenizer.encode(chunks, context)
    ids = reference_encode(bpe, scale, min_token, chunks)
    assert [row.tolist() for row in tokens] == ids, "ids differ from the published algorithm"
    decoded = tokenizer.decode(tokens)
    assert decoded.valid.all()
    assert np.allclose(decoded.actions, reference_decode(bpe, scale, min_token, ids), atol=1e-5), "actions differ"
    one, one_ids = chunks[:1], ids[:1]
    times = best(
        {
            "encode": lambda: tokenizer.encode(chunks, context),
            "encode_published": lambda: reference_encode(bpe, scale, min_token, chunks),
            "decode": lambda: tokenizer.decode(tokens),
            "decode_published": lambda: reference_decode(bpe, scale, min_token, ids),
        },
        repeats,
    )
    single = best(
        {
            "encode": lambda: tokenizer.encode(one, context),
            "encode_published": lambda: reference_encode(bpe, scale, min_token, one),
            "decode": lambda: tokenizer.decode(one_ids, context, horizon=T),
            "decode_published": lambda: reference_decode(bpe, scale, min_token, one_ids),
        },
        50 * repeats,
    )
    return {
        "vocab": tokenizer.vocab_size,
        "tokens_per_chunk": round(float(tokens.lengths.mean()), 2),
        "identical_ids": True,
        "compiled": tokenizer.bpe.accelerated,
        "first_call_seconds": round(first_call, 3),
        "batch_microseconds_per_chunk": {k: round(v / len(chunks) * 1e6, 2) for k, v in times.items()},
        "batch_ratio": {k: round(times[f"{k}_published"] / times[k], 1) for k in ("encode", "decode")},
        "single_chunk_microseconds": {k: round(v * 1e6, 1) for k, v in single.items()},
        "single_chunk_ratio": {k: round(single[f"{k}_published"] / single[k], 1) for k in ("encode", "decode")},
    }


def processor_name() -> str:
    """The CPU's model name where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", type=Path, help="folder with the published FAST+ files")
    parser.add_argument("--chunks", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):  # libraries read these when they load
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **ONE_THREAD}).returncode)
    chunks = motions(options.chunks, 1)
    training = motions(2000, 0)
    part = FitPart(
        actions=training,
        space=ActionSpace.raw(D, "motions"),
        statistics=Statistics.from_array(np.ones((2, D)) * [[-1], [1]]),
    )
    results = {"fast, own fit": compare(FastTokenizer.fit([part], FastConfig()), chunks, options.repeats)}
    if options.published is not None:
        results["FAST+, published files"] = compare(
            FastTokenizer.from_published(options.published), chunks, options.repeats
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    conditions = {
        "chunks": options.chunks,
        "T": T,
        "D": D,
        "threads": 1,
        "cpu": processor_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "tokenizers": tokenizers.__version__,
        "actok": actok.__version__,
        "commit": commit.stdout.strip(),
    }
    print(json.dumps({"conditions": conditions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
