"""A codec small enough to train in a test: two linear layers, dropout, a codebook kept by moving averages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from actok.core import ActionSpace, FitPart, Preset
from actok.quantizers import make_quantizer
from actok.tokenizers.codec import Codec
from actok.tokenizers.neural import NeuralTokenizer

QUANTIZER = {"kind": "residual", "levels": 2, "codes": 13, "kmeans_steps": 3}


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Settings; `breaks` makes the loss NaN, or an allocator fail, at that forward pass in training."""

    normaliser: str = "quantile"
    width: int = 8
    dropout: float = 0.1
    quantizer: dict[str, Any] = field(default_factory=lambda: dict(QUANTIZER))
    breaks: str = ""
    breaks_at: int = 0


class TinyCodec(Codec):
    def __init__(self, config, shape):
        super().__init__()
        self.config = config
        values = shape.horizon * shape.channels
        self.encoder = nn.Linear(values, 2 * config.width)
        self.drop = nn.Dropout(config.dropout)
        self.quantizer = make_quantizer(config.quantizer, config.width)
        self.norm = nn.LayerNorm(2 * config.width)
        self.robot = nn.Embedding(len(shape.embodiments) + 1, 2 * config.width)
        self.decoder = nn.Linear(2 * config.width, values)
        self.shape = (shape.horizon, shape.channels)
        self.calls = 0

    def encode(self, batch):
        if self.training:
            self.calls += 1
            if self.config.breaks and self.calls == self.config.breaks_at:
                return self._break(batch)
        return self.drop(self.encoder(batch.actions.flatten(1))).unflatten(1, (2, self.config.width))

    def _break(self, batch):
        if self.config.breaks == "memory":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return torch.full((len(batch), 2, self.config.width), float("nan"))

    def decode(self, latents, batch):
        hidden = self.norm(latents.flatten(1)) + self.robot(batch.embodiment)
        return self.decoder(hidden).unflatten(1, self.shape)


class TinyTokenizer(NeuralTokenizer):
    kind = "tiny"
    config_class = TinyConfig
    codec_class = TinyCodec

    def _slots(self, embodiment):
        return 2

    def finish(self, parts):
        return self.with_meta({"finished_with": [len(p.actions) for p in parts]})


TRAINING = {"steps": 14, "batch_size": 12, "learning_rate": 0.003, "log_every": 3}
PRESET = Preset(
    name="tiny",
    summary="for tests",
    target="training_codec:TinyTokenizer",
    settings={"quantizer": QUANTIZER},
    training=TRAINING,
)


def chunks(count: int, steps: int = 7, dim: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth motions [count, T, D]."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, (count, 1, dim)), rng.uniform(0.2, 1, (count, 1, dim))
    return np.sin(np.arange(steps)[None, :, None] * speed + phase).astype(np.float32)


def episodes(count: int, dim: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Episodes [T, D] of 11 to 30 steps."""
    rng = np.random.default_rng(seed)
    return [
        chunks(1, int(n), dim, int(s))[0]
        for n, s in zip(rng.integers(11, 31, count), rng.integers(0, 999, count), strict=True)
    ]


def part(count: int, dim: int = 3, name: str = "arm", seed: int = 0) -> FitPart:
    """Chunks of a raw space."""
    return FitPart(actions=chunks(count, dim=dim, seed=seed), space=ActionSpace.raw(dim, name))
