"""From slots to chunks, and a teacher's features at one scale: what the objectives share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["pooled", "real_slots", "standardised"]


def real_slots(real: Bool[Tensor, "B T"], spans: Int[Tensor, "S 2"]) -> Bool[Tensor, "B S"]:
    """Which slots stand for any step that is no padding; `spans` holds each slot's first step and one past its last."""
    before = F.pad(real.long().cumsum(1), (1, 0))
    return before[:, spans[:, 1]] > before[:, spans[:, 0]]


def pooled(vectors: Float[Tensor, "B S C"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B C"]:
    """Mean over real slots, in float32; 0 where a chunk has none."""
    weight = real.float()[:, :, None]
    return (vectors.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def standardised(features: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """Each feature vector at mean 0 and variance 1 over its F channels, whatever the scale of the teacher; float32."""
    with torch.autocast(features.device.type, enabled=False):
        return F.layer_norm(features.float(), features.shape[-1:])
