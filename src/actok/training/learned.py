"""From chunks and a learned tokenizer's class to a trained tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actok.core import ActionTokenizer, FitPart
from actok.training.config import TrainConfig
from actok.training.engine import Trainer
from actok.training.sources import Source

# Training chunks, of all datasets together, that are handed to what is fitted after training.
FINISH_CHUNKS = 20_000

__all__ = ["train_parts"]


def train_parts(target: Any, config: Any, parts: Sequence[FitPart], training: TrainConfig) -> ActionTokenizer:
    """Train a tokenizer of class `target` on chunks in memory; the last weights are kept."""
    tokenizer = target.prepare(parts, config, seed=training.seed)
    trainer = Trainer(tokenizer, [Source.of_part(p) for p in parts], training)
    trained = trainer.run()
    each = max(1, FINISH_CHUNKS // len(parts))
    finished: ActionTokenizer = trained.tokenizer.finish([sample_of(p, each) for p in parts])
    return finished.with_meta({"training": trained.summary})


def sample_of(part: FitPart, most: int) -> FitPart:
    """At most so many chunks of a part, evenly spread."""
    if len(part.actions) <= most:
        return part
    rows = np.linspace(0, len(part.actions) - 1, most).round().astype(np.int64)
    pad = None if part.pad_mask is None else part.pad_mask[rows]
    return replace(part, actions=part.actions[rows], pad_mask=pad)
