"""Next-frame prediction: the codes of a chunk tell what the teacher sees when it is over.

Source: X-Tokenizer (arXiv 2606.14752).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from actok.alignment.features import FeatureBatch
from actok.alignment.slots import pooled, standardised

__all__ = ["NextFeature"]


class NextFeature(nn.Module):
    """Two linear layers from the quantised latents to the feature of the frame right after the chunk.

    It reads the mean over real slots: for codecs whose slots are no times there is no last one, and all slots get the
    gradient. Features are standardised (layer norm without scale), so that the loss means the same for all teachers.

    Args:
        dim: C. feature_dim: F. width: of the hidden layer.
    """

    def __init__(self, dim: int, feature_dim: int, *, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, width), nn.Linear(width, feature_dim)

    def forward(
        self, quantised: Float[Tensor, "B S C"], real: Bool[Tensor, "B S"], features: FeatureBatch
    ) -> Float[Tensor, ""]:
        """Mean absolute error over chunks that are followed by a frame, and over channels; 0 where there are none."""
        found = self.outer(F.gelu(self.inner(pooled(quantised, real)))).float()
        errors = (found - standardised(features.next)).abs().mean(1)
        return (errors * features.has_next).sum() / features.has_next.sum().clamp(min=1)
