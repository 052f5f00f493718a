"""Lookup-free quantisation: the signs of a few channels are the bits of a code.

Source: Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737, section 3.1, equations 3 to 5). The soft code of a latent x is the softmax of
-|x - c|^2 / temperature over all codes c, in which bit b is set with probability sigmoid(4 x_b / temperature), on its own.
So the entropy of one soft code is the sum over its bits, and the mean soft code is a product of two half-codes: both exact
without a [B * S, K] table.

Deviation: with several processes, the mean soft code is that of each process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ConfigError
from actok.quantizers.base import (
    Quantizer,
    check_count,
    check_range,
    full_precision,
    masked_mean,
    straight_through,
)
from actok.quantizers.result import Quantised, measure_usage

__all__ = ["LookupFreeConfig", "LookupFreeQuantizer"]


@dataclass(frozen=True, kw_only=True)
class LookupFreeConfig:
    """Settings of LookupFreeQuantizer.

    Attributes:
        bits: channels of a code; K = 2^bits.
        entropy: weight of (entropy of each soft code - diversity * entropy of their mean): sure codes, all of them used.
        diversity: see `entropy`.
        temperature: of the soft codes.
        commitment: weight of the mean of (latent - sign)^2.
    """

    bits: int = 10
    entropy: float = 0.1
    diversity: float = 1.0
    temperature: float = 0.01
    commitment: float = 0.25

    def __post_init__(self) -> None:
        if check_count("bits", self.bits) > 20:
            raise ConfigError(f"bits is {self.bits}, {2**self.bits} codes; give at most 20")
        for name in ("entropy", "diversity", "commitment"):
            check_range(name, getattr(self, name), 0.0)
        check_range("temperature", self.temperature, 1e-6)


class LookupFreeQuantizer(Quantizer):
    """One code a slot (Q = 1). Latents are projected to `bits` channels and back, unless C is that number already.

    The first channel is the lowest bit; a positive latent is 1. Losses: "commitment" and "entropy".
    """

    strides: Tensor

    def __init__(self, config: LookupFreeConfig, dim: int) -> None:
        super().__init__(dim, (2**config.bits,))
        self.config = config
        self.project_in = nn.Identity() if config.bits == dim else nn.Linear(dim, config.bits)
        self.project_out = nn.Identity() if config.bits == dim else nn.Linear(config.bits, dim)
        self.register_buffer("strides", 2 ** torch.arange(config.bits), persistent=False)

    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """See Quantizer."""
        with full_precision(z):
            latents = self.project_in(z.float())
            signs = torch.where(latents > 0, 1.0, -1.0)
            codes = self._codes(latents)
            quantised = self.project_out(straight_through(latents, signs))
            rows, real = latents.flatten(0, 1), None if mask is None else mask.flatten()
            losses = {
                "commitment": self.config.commitment * masked_mean((rows - signs.flatten(0, 1)).square(), real),
                "entropy": self.config.entropy * self._entropy(rows, real),
            }
            return Quantised(
                quantised=quantised,
                codes=codes,
                level_vectors=quantised[:, :, None],
                losses=losses,
                usage=measure_usage(codes, self.sizes, mask),
            )

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B S 1"]:
        """See Quantizer."""
        with full_precision(z):
            return self._codes(self.project_in(z.float()))

    def lookup(self, codes: Int[Tensor, "B S 1"]) -> Float[Tensor, "B S C"]:
        """See Quantizer."""
        with full_precision(codes):
            return self.project_out((codes // self.strides % 2).float() * 2 - 1)

    def _codes(self, latents: Tensor) -> Tensor:
        return ((latents > 0).long() * self.strides).sum(-1, keepdim=True)

    def _entropy(self, rows: Float[Tensor, "N bits"], mask: Bool[Tensor, "N"] | None) -> Float[Tensor, ""]:
        """Entropy of the soft codes, on average, minus `diversity` times that of their average; in nats."""
        logits = rows * (4 / self.config.temperature)
        sure, unsure = F.logsigmoid(logits), F.logsigmoid(-logits)
        single = masked_mean(-(sure.exp() * sure + unsure.exp() * unsure), mask) * self.config.bits
        weight = rows.new_ones(len(rows)) if mask is None else mask.to(rows.dtype)
        half = self.config.bits // 2
        low, high = (self._soft(sure[:, part], unsure[:, part]) for part in (slice(half), slice(half, None)))
        mean = (low * weight[:, None]).T @ high / weight.sum().clamp(min=1.0)
        # The clamp keeps the gradient finite where a code has no share at all: p log p is flat only in value.
        spread = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
        return single - self.config.diversity * spread

    @staticmethod
    def _soft(sure: Float[Tensor, "N b"], unsure: Float[Tensor, "N b"]) -> Float[Tensor, "N half"]:
        """Probabilities of all 2^b codes of a few bits."""
        bits = torch.arange(2 ** sure.shape[1], device=sure.device)
        ones = (bits >> torch.arange(sure.shape[1], device=sure.device)[:, None] & 1).to(sure.dtype)
        return (sure @ ones + unsure @ (1 - ones)).exp()
