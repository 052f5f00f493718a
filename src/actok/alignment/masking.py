"""Masked action modelling: what was hidden of a chunk is told from the rest of it.

Sources: X-Tokenizer (arXiv 2606.14752; level-0 codes), its project page (the continuous chunk); Devlin et al. 2018 (BERT,
arXiv 1810.04805, section 3.1: of the chosen places 80 % are masked, 10 % replaced at random, 10 % kept).

Deviations: (1) The number of chosen slots is `share` of them on average, at least one and never all, where BERT draws each
place for itself: a chunk has 2 to 16 slots, and one without a chosen slot would teach nothing. A chunk with a single real
slot takes no part. (2) A random code is that of a random slot of the batch, so codes come as often as they are used;
drawn evenly over the codebook, most would be codes that never occur. (3) The project page does not say how actions are
hidden or decoded; see `masked_actions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.alignment.config import HEAD
from actok.alignment.slots import real_slots
from actok.core import CodecBatch
from actok.nn.transformer import Stack, sinusoids
from actok.quantizers import Quantizer

__all__ = ["Corruption", "MaskedCodes", "choose", "corruption", "masked_actions"]

# BERT's shares of the chosen slots.
MASKED, SWAPPED = 0.8, 0.1
# Steps hidden together where slots are no spans of time: as many as a slot of X-Tokenizer stands for.
SPAN = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Corruption:
    """What happens to the slots of a batch; all bool [B, S].

    Attributes:
        chosen: counts in the loss.
        masked: chosen, and hidden behind the mask vector.
        swapped: chosen, and replaced by the code of another slot.
    """

    chosen: Bool[Tensor, "B S"]
    masked: Bool[Tensor, "B S"]
    swapped: Bool[Tensor, "B S"]


def choose(real: Bool[Tensor, "B S"], share: float) -> Bool[Tensor, "B S"]:
    """Random real slots: of n in a chunk share * n on average, at least one and at most n - 1; none where n < 2."""
    slots = real.sum(1)
    wanted = (share * slots + torch.rand(slots.shape, device=real.device)).long().clamp(min=1)
    wanted = torch.minimum(wanted, (slots - 1).clamp(min=0))
    order = torch.rand(real.shape, device=real.device).masked_fill(~real, 2.0).argsort(1)  # the real ones first
    return order.argsort(1) < wanted[:, None]


def corruption(real: Bool[Tensor, "B S"], share: float) -> Corruption:
    """BERT's corruption of `share` of the real slots."""
    chosen = choose(real, share)
    lot = torch.rand(real.shape, device=real.device)
    masked = chosen & (lot < MASKED)
    return Corruption(chosen=chosen, masked=masked, swapped=chosen & ~masked & (lot < MASKED + SWAPPED))


class MaskedCodes(nn.Module):
    """A small Transformer over slots tells the hidden level-0 codes from the others.

    It reads the codes as their vectors, whose gradient goes straight through to the latents (`CodecOutput.level_vectors`);
    ids of a codebook kept by moving averages would pass none to the encoder. The codebook gets no gradient.

    Args:
        dim: C. codes: K of level 0. width, depth: of the Transformer. share: of the slots that are chosen.
    """

    def __init__(self, dim: int, codes: int, *, width: int, depth: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.enter = nn.Linear(dim, width, bias=False)
        self.scale = nn.RMSNorm(width)  # vectors of codes may be of any length; positions are not to drown them
        self.mask = nn.Parameter(torch.randn(width))
        self.model = Stack(depth, width, width // HEAD)
        self.leave = nn.Linear(width, codes)

    def forward(
        self, vectors: Float[Tensor, "B S C"], codes: Int[Tensor, "B S"], real: Bool[Tensor, "B S"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the original codes, mean over chosen slots; 0 where there are none."""
        what = corruption(real, self.share)
        x = self.scale(self.enter(_swapped(vectors, what, real)))
        x = torch.where(what.masked[:, :, None], self.mask.to(x.dtype), x)
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        seen = real | ~real.any(1, keepdim=True)  # a chunk without real slots counts nowhere, but must look somewhere
        logits = self.leave(self.model(x, mask=seen[:, None, None])[what.chosen])
        return F.cross_entropy(logits.float(), codes[what.chosen], reduction="sum") / what.chosen.sum().clamp(min=1)


def _swapped(vectors: Float[Tensor, "B S C"], what: Corruption, real: Bool[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
    """The vectors of swapped slots are those of random real slots of the batch, without their gradient."""
    rows = vectors.detach()[real]
    if not len(rows):
        return vectors
    drawn = torch.randint(len(rows), real.shape, device=real.device)
    return torch.where(what.swapped[:, :, None], rows[drawn], vectors)


def masked_actions(batch: CodecBatch, spans: Int[Tensor, "S 2"] | None, codec: Any, share: float) -> Float[Tensor, ""]:
    """The project page's variant: mean absolute error, over hidden steps and present channels, of the chunk that the codec
    makes of what is left visible; 0 where nothing is hidden.

    Whole slots of steps are hidden (`spans`; every `SPAN` steps where slots are no spans of time), as 0, the middle of the
    normalised range. The chunk goes through the quantiser: codes are all that the decoder will ever read, so it is they that
    have to hold what was inferred. Codebooks see the chunk as it was and no second time: here they neither learn nor drop
    levels.
    """
    steps = batch.actions.shape[1]
    if spans is None:
        starts = torch.arange(0, steps, SPAN, device=batch.real.device)
        spans = torch.stack([starts, (starts + SPAN).clamp(max=steps)], 1)
    chosen = choose(real_slots(batch.real, spans), share)
    time = torch.arange(steps, device=batch.real.device)
    within = (time >= spans[:, :1]) & (time < spans[:, 1:])
    hidden = (chosen[:, :, None] & within).any(1) & batch.real
    with _codebooks_at_rest(codec):
        found = codec(replace(batch, actions=batch.actions.masked_fill(hidden[:, :, None], 0.0))).reconstruction
    counts = hidden[:, :, None] & batch.present[:, None]
    return ((found.float() - batch.actions).abs() * counts).sum() / counts.sum().clamp(min=1)


@contextmanager
def _codebooks_at_rest(codec: nn.Module) -> Iterator[None]:
    """The codec's quantisers in evaluation mode, in which nothing of them changes."""
    awake = [m for m in codec.modules() if isinstance(m, Quantizer) and m.training]
    for quantizer in awake:
        quantizer.eval()
    try:
        yield
    finally:
        for quantizer in awake:
            quantizer.train()
