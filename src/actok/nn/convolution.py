"""Convolutions in time."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvBlock", "TimeConv"]


class TimeConv(nn.Module):
    """1-D convolution over [B, L, W] (channels last) that keeps L, or ceil(L / stride).

    `causal`: output t sees inputs up to (t + 1) * stride - 1, the last of its own stride, and none of the input is left
    unseen; the kernel must then be at least as long as the stride. Otherwise the padding is symmetric.
    """

    def __init__(
        self, width: int, out: int, kernel: int = 3, *, stride: int = 1, causal: bool = False, groups: int = 1
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.causal = kernel, stride, causal
        self.conv = nn.Conv1d(width, out, kernel, stride=stride, groups=groups)

    def forward(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B M X"]:
        """[B, L, width] to [B, ceil(L / stride), out]."""
        before, after = (self.kernel - self.stride, 0) if self.causal else ((self.kernel - 1) // 2, self.kernel // 2)
        after += (-x.shape[1]) % self.stride
        return self.conv(F.pad(x.transpose(1, 2), (before, after))).transpose(1, 2)


class ConvBlock(nn.Module):
    """Residual: norm, convolution in time, GELU, pointwise projection."""

    def __init__(self, width: int, kernel: int = 3, *, hidden: int | None = None, causal: bool = False) -> None:
        super().__init__()
        hidden = hidden or width
        self.norm = nn.RMSNorm(width)
        self.conv = TimeConv(width, hidden, kernel, causal=causal)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Same shape."""
        return x + self.out(F.gelu(self.conv(self.norm(x))))
