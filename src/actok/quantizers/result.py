"""What quantising gives, and how much of the codebooks it used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Quantised", "Usage", "measure_usage"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a batch spreads over the codes of each level; masked slots are left out.

    Attributes:
        share: [Q] share of the level's K codes that occur, 0 to 1.
        perplexity: [Q] exp of the entropy of the level's code frequencies, 1 (one code) to K (all alike).
    """

    share: Float[Tensor, "Q"]
    perplexity: Float[Tensor, "Q"]


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """One batch of latents, quantised. All vectors are float32.

    Attributes:
        quantised: [B, S, C] what the decoder gets: the value of the codes, the gradient going to the latents.
        codes: [B, S, Q] int64, each level's code (multi-scale: [B, sum(scales), 1]). Masked slots have codes too.
        level_vectors: [B, S, Q, C] each level's own contribution: their sum over Q is the value of `quantised`
            (multi-scale: [B, sum(scales), 1, C], the vector of each code before it is widened to S slots). Each passes
            its gradient straight to the latents, so that objectives on one level reach the encoder; their sum would
            pass it Q times, so decode from `quantised`.
        losses: name -> scalar, weighted; the training loss takes their sum. Masked slots are left out.
        usage: of this batch, in this process.
    """

    quantised: Float[Tensor, "B S C"]
    codes: Int[Tensor, "B slots Q"]
    level_vectors: Float[Tensor, "B slots Q C"]
    losses: dict[str, Tensor]
    usage: Usage


@torch.no_grad()
def measure_usage(codes: Int[Tensor, "B S Q"], sizes: Sequence[int], mask: Bool[Tensor, "B S"] | None = None) -> Usage:
    """Usage of codes where `mask` is True (None: everywhere). An empty batch has share 0 and perplexity 1."""
    weight = torch.ones(codes.shape[:2], device=codes.device) if mask is None else mask.float()
    shares, perplexities = [], []
    for level, size in enumerate(sizes):
        counts = torch.zeros(size, device=codes.device).index_add_(0, codes[..., level].flatten(), weight.flatten())
        frequency = counts / counts.sum().clamp(min=1.0)
        shares.append((counts > 0).float().mean())
        perplexities.append(torch.special.entr(frequency).sum().exp())
    return Usage(share=torch.stack(shares), perplexity=torch.stack(perplexities))
