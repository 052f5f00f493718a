"""Settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actok.core import ConfigError, build_config

PRECISIONS = ("no", "bf16")
# Training chunks, of all datasets together, that are handed to what is fitted after training.
FINISH_CHUNKS = 20_000

__all__ = ["FINISH_CHUNKS", "TrainConfig", "train_config"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a learned tokenizer is trained: AdamW, a linear warm-up, then a cosine down to a share of the peak.

    Weight decay acts on the weight matrices of linear maps and convolutions only; biases, norms, embeddings, learned
    queries and codebooks have none.

    Attributes:
        steps: of the optimiser.
        batch_size: chunks of a step, of all processes together, so that a run on W processes takes the same steps.
        learning_rate: peak.
        min_learning_rate: what the cosine ends at, as a share of `learning_rate`.
        weight_decay: of AdamW.
        betas: of AdamW.
        warmup_steps: of the learning rate; at most a tenth of `steps`.
        quantise_after: steps that the codec learns without its quantiser, whose codebooks then start from the latents of
            several batches instead of those of an untrained encoder; at most a quarter of `steps`. Nothing is evaluated
            before. 0: quantised from the first step on.
        anneal_codebooks: the moving averages of codebooks slow down as the learning rate falls: a batch's weight is
            (1 - decay) times the learning rate as a share of its peak (1 in the warm-up). Each code is then the mean of
            many more latents in the end, instead of a noisy one of the last few batches.
        clip_norm: largest norm of the gradient; 0: no clipping.
        precision: "bf16": the codec computes under autocast (quantisers stay in float32); "no": float32.
        weight_ema: decay of a moving average of the weights, which then is what is evaluated and kept; 0: none. Early on
            the decay is (1 + step) / (10 + step), if smaller.
        compile: compile the codec with torch.compile.
        eval_every: steps between evaluations on the validation episodes; 0: only at the end.
        eval_chunks: validation chunks of each dataset that are judged, an even sample.
        checkpoint_every: steps between checkpoints, where there is a run folder; 0: only at the end or when stopped.
        log_every: steps between lines of the log.
        seed: of initial weights, batches and dropout. (The split has its own.)
        track: trackers of accelerate to log to as well, e.g. ("tensorboard",).
    """

    steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 500
    quantise_after: int = 0
    anneal_codebooks: bool = False
    clip_norm: float = 1.0
    precision: str = "no"
    weight_ema: float = 0.0
    compile: bool = False
    eval_every: int = 500
    eval_chunks: int = 2048
    checkpoint_every: int = 1000
    log_every: int = 50
    seed: int = 0
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_chunks", "log_every"):
            self._whole(name, 1)
        for name in ("warmup_steps", "quantise_after", "eval_every", "checkpoint_every", "seed"):
            self._whole(name, 0)
        self._number("learning_rate", above=0.0)
        self._number("min_learning_rate", most=1.0)
        self._number("weight_decay")
        self._number("clip_norm")
        self._number("weight_ema", below=1.0)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        for name in ("compile", "anneal_codebooks"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give true or false")
        betas = self.betas
        if not isinstance(betas, tuple) or len(betas) != 2 or not all(_real(b) and 0 <= b < 1 for b in betas):
            raise ConfigError(f"betas is {betas!r}; give two numbers from 0 to below 1")
        track = (self.track,) if isinstance(self.track, str) else self.track
        if not isinstance(track, tuple) or not all(isinstance(t, str) for t in track):
            raise ConfigError(f"track is {self.track!r}; give names of trackers, e.g. tensorboard")
        object.__setattr__(self, "track", track)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")

    def _number(self, name: str, *, above: float = -1.0, below: float = math.inf, most: float = math.inf) -> None:
        value = getattr(self, name)
        if not _real(value) or not (value >= 0 and above < value < below and value <= most):
            limits = "above 0" if above == 0 else "of at least 0"
            limits += "" if below == math.inf else f", below {below:g}"
            limits += "" if most == math.inf else f", at most {most:g}"
            raise ConfigError(f"{name} is {value!r}; give a number {limits}")

    @property
    def warmup(self) -> int:
        """Steps of the warm-up that takes place."""
        return min(self.warmup_steps, self.steps // 10)

    @property
    def unquantised(self) -> int:
        """Steps without the quantiser that take place."""
        return min(self.quantise_after, self.steps // 4)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        share = self.min_learning_rate + (1 - self.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * share


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def train_config(preset: Mapping[str, Any], given: Mapping[str, Any] | None, owner: str) -> TrainConfig:
    """The preset's [training] table with the caller's values on top. Raises ConfigError for an unknown one."""
    config: TrainConfig = build_config(TrainConfig, {**preset, **(given or {})}, f"training of {owner}")
    return config
