"""Speed of learned tokenizers at inference, on one thread or a GPU: latency of one chunk, throughput of many.

    python benchmarks/learned_speed.py [--presets fastervq fastervq-tiny] [--batch 4096] [--rounds 5]
        [--ways tokenizer codec onnx] [--device cuda]

Ways of calling the same codec, chunks of T = 20 steps of one arm (D = 7):

    tokenizer     `tokenizer.encode`, `tokenizer.decode`: NumPy in and out, with checks, normaliser, limits and validity
    codec         the network alone, on tensors that are there already
    compiled      the same through torch.compile (needs a C++ compiler on a CPU)
    onnx          the files of `actok export` in ONNX Runtime: raw actions in and out, ids checked (CPU only)
    cuda_graph    the network, replayed from a CUDA graph (CUDA only)

Weights are random, which changes no speed. The ways take turns, round by round; the fastest of the rounds' medians is
reported, with the 99th percentile of that round, so that other work on the machine counts least; throughput is one round.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actok.core import ActionGroup, ActionSpace, FitPart, build_config, find_preset
from actok.core.provenance import circumstances
from actok.core.registry import load_target
from actok.tokenizers.export import export_onnx
from actok.tokenizers.neural import NeuralTokenizer

T, D = 20, 7
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WAYS = ("tokenizer", "codec", "compiled", "onnx", "cuda_graph")
SECONDS = 0.4  # of one way's calls in one round
GROUPS = (
    ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta"),
    ActionGroup(name="rotation", kind="rotation", dims=(3, 4, 5), rotation="axis_angle", mode="delta"),
    ActionGroup(name="gripper", kind="gripper", dims=(6,)),
)


def prepared(preset: str, chunks: np.ndarray) -> NeuralTokenizer:
    """The preset with random weights."""
    found = find_preset(preset)
    target = load_target(found.target)
    config = build_config(target.config_class, found.settings, preset)
    space = ActionSpace(embodiment="arm", dim=D, groups=GROUPS, rate_hz=20.0)
    tokenizer: NeuralTokenizer = target.prepare([FitPart(actions=chunks, space=space)], config)
    return tokenizer


def ways(
    tokenizer: NeuralTokenizer, chunks: np.ndarray, device: torch.device, sessions: Any, wanted: list[str]
) -> dict[str, Any]:
    """Functions without arguments that encode and decode these chunks, by way; and why a way is missing."""
    codec, normalised = tokenizer.codec, tokenizer.normalise(chunks)
    batch = tokenizer.batch(normalised).to(device)
    with torch.inference_mode():
        ids = codec.tokenize(batch)
    on_host = ids.cpu().numpy()

    def tokenize(actions: torch.Tensor) -> torch.Tensor:
        return codec.tokenize(replace(batch, actions=actions))

    def detokenize(some: torch.Tensor) -> torch.Tensor:
        return codec.detokenize(some, batch)

    def called(function: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                function(given)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return call

    found: dict[str, Any] = {
        "tokenizer": {"encode": lambda: tokenizer.encode(chunks), "decode": lambda: tokenizer.decode(on_host)},
        "codec": {"encode": called(tokenize, batch.actions), "decode": called(detokenize, ids)},
    }
    if device.type == "cuda" or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        found["compiled"] = {
            "encode": called(torch.compile(tokenize, dynamic=False), batch.actions),
            "decode": called(torch.compile(detokenize, dynamic=False), ids),
        }
    else:
        found["compiled"] = "no C++ compiler"
    if device.type == "cuda" and "cuda_graph" in wanted:
        found["cuda_graph"] = {
            "encode": recorded(tokenize, batch.actions),
            "decode": recorded(detokenize, ids),
        }
    elif sessions is not None:
        found["onnx"] = {
            "encode": lambda: sessions[0].run(None, {"actions": chunks}),
            "decode": lambda: sessions[1].run(None, {"ids": on_host}),
        }
    return {way: functions for way, functions in found.items() if way in wanted}


def recorded(function: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> Callable[[], None]:
    """Replays a CUDA graph of the function on a tensor that stays where it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(given)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            function(given)

    def call() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def round_of(call: Callable[[], Any]) -> np.ndarray:
    """Milliseconds of each call for SECONDS."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return np.array(times) * 1e3


def measure(functions: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The round with the fastest median of every way and direction."""
    calls = {
        (way, direction): call
        for way, both in functions.items()
        if isinstance(both, dict)
        for direction, call in both.items()
    }
    for call in calls.values():
        call()  # compiles, allocates
    best: dict[tuple[str, str], np.ndarray] = {}
    for _ in range(rounds):
        for key, call in calls.items():
            times = round_of(call)
            if key not in best or np.median(times) < np.median(best[key]):
                best[key] = times
    return {
        way: both if not isinstance(both, dict) else {direction: best[way, direction] for direction in both}
        for way, both in functions.items()
    }


def sessions_of(tokenizer: NeuralTokenizer) -> Any:
    """ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(tokenizer, folder)
        return [onnxruntime.InferenceSession(str(path), options) for path in (done.encoder, done.decoder)]


def told(times: Any, count: int) -> Any:
    """Numbers to report, or the reason why there are none."""
    if isinstance(times, str):
        return times
    if count == 1:
        return {
            k: {
                "fastest_ms": round(float(v.min()), 3),
                "median_ms": round(float(np.median(v)), 3),
                "p99_ms": round(float(np.quantile(v, 0.99)), 3),
            }
            for k, v in times.items()
        }
    return {k: {"chunks_per_second": round(count / float(np.median(v)) * 1e3)} for k, v in times.items()}


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["fastervq", "fastervq-tiny"])
    parser.add_argument("--batch", type=int, default=4096, help="chunks of a call for the throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # libraries read these when they load
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, "1")})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    chunks = np.random.default_rng(0).normal(size=(options.batch, T, D)).astype(np.float32).cumsum(1)
    results = {}
    for preset in options.presets:
        tokenizer = prepared(preset, chunks)
        sessions = sessions_of(tokenizer) if device.type == "cpu" and "onnx" in options.ways else None
        tokenizer.to(device)
        one = measure(ways(tokenizer, chunks[:1], device, sessions, options.ways), options.rounds)
        many = measure(ways(tokenizer, chunks, device, sessions, options.ways), 1)
        results[preset] = {
            "parameters": sum(p.numel() for p in tokenizer.codec.parameters()),
            "tokens": tokenizer.layout.max_len,
            "one_chunk": {way: told(times, 1) for way, times in one.items()},
            f"batch_of_{options.batch}": {way: told(times, options.batch) for way, times in many.items()},
        }
    conditions = {
        **circumstances(["torch", "onnxruntime", "numpy"]),
        "T": T,
        "D": D,
        "weights": "random",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one thread",
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps({"conditions": conditions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
