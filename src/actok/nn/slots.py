"""Linear maps between sequences of slots and what reads them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["SlotLinear"]


class SlotLinear(nn.Module):
    """A linear layer of its own for each of the first n <= `slots` slots.

    Attention starts out nearly uniform. Slots that are read and written through one shared layer then all carry the same
    few numbers, and a reader gets no more than their mean; layers of their own tell them apart from the first step on.
    """

    def __init__(self, slots: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(slots, width, out) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(slots, out))

    def forward(self, x: Float[Tensor, "B n W"]) -> Float[Tensor, "B n X"]:
        """Slot by slot."""
        given = x.shape[1]
        return torch.einsum("bnw,nwx->bnx", x, self.weight[:given]) + self.bias[:given]
