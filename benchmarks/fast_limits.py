"""How many tokens FAST needs by the length of its longest token, and by the number of chunks that train its BPE.

    python benchmarks/fast_limits.py FOLDER

FOLDER holds sim/aloha_sim/transfer_cube.npz, sim/libero_state/libero_object.npz and real/unitree_g1_inspire (LeRobot).
The byte-level column is the published fit: byte-level BPE behind the GPT-2 regex, tokens up to 10000, same vocabulary.
Prints JSON; peak memory is that of the whole process up to then.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from actok.core import ActionSpace, FitPart
from actok.tokenizers.fast import FastConfig, FastTokenizer, quantise
from actok.training.fitting import load_material

LIMITS = (64, 128, 256, 512, 1024)


def chunks_of(actions: np.ndarray, episode: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Every third chunk [B, T, D] that stays within an episode, and its episode."""
    starts = [i for i in range(0, len(actions) - horizon, 3) if episode[i] == episode[i + horizon - 1]]
    return np.stack([actions[i : i + horizon] for i in starts]).astype(np.float32), episode[starts]


def tokens_of(training: np.ndarray, held_out: np.ndarray, **settings: int) -> float:
    """Mean tokens of held-out chunks."""
    part = FitPart(actions=training, space=ActionSpace.raw(training.shape[2]))
    return float(FastTokenizer.fit([part], FastConfig(**settings)).encode(held_out).lengths.mean())


def published_tokens(training: np.ndarray, held_out: np.ndarray) -> float:
    """The same by a byte-level fit."""
    part = FitPart(actions=training, space=ActionSpace.raw(training.shape[2]))
    own = FastTokenizer.fit([part], FastConfig())
    symbols = [quantise(own.normalise(x), own.config.scale).reshape(len(x), -1) for x in (training, held_out)]
    low = symbols[0].min()
    texts = [["".join(map(chr, np.maximum(row - low, 0))) for row in rows] for rows in symbols]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, max_token_length=10_000, show_progress=False
    )
    bpe.train_from_iterator(texts[0], trainer)
    return float(np.mean([len(e.ids) for e in bpe.encode_batch(texts[1])]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    results: dict[str, dict[str, object]] = {}

    aloha = np.load(folder / "sim" / "aloha_sim" / "transfer_cube.npz")
    chunks, episode = chunks_of(aloha["action"], aloha["episode_index"], 50)
    training, held_out = chunks[episode < 16], chunks[episode >= 16]
    results["aloha, T = 50"] = {str(n): tokens_of(training, held_out, max_token_length=n) for n in LIMITS}
    results["aloha, T = 50"]["byte-level"] = published_tokens(training, held_out)

    libero = np.load(folder / "sim" / "libero_state" / "libero_object.npz")
    for horizon in (20, 50):
        chunks, episode = chunks_of(libero["action"], libero["episode_index"], horizon)
        training, held_out = chunks[episode < 38], chunks[episode >= 38]
        training[::2, horizon // 5 :] = 0
        results[f"libero, half of the chunks zero-padded, T = {horizon}"] = {
            str(n): tokens_of(training, held_out, max_token_length=n) for n in LIMITS
        }

    material = load_material(folder / "real" / "unitree_g1_inspire")
    assert material.test is not None
    for count in (5_000, 10_000, len(material.train.actions)):
        started = time.perf_counter()
        tokenizer = FastTokenizer.fit([material.train], FastConfig(max_chunks=count))
        results[f"unitree g1, {count} chunks"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
            "tokens": float(tokenizer.encode(material.test.actions).lengths.mean()),
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
