"""Attention and feed-forward blocks, pre-norm (Vaswani et al., 2017; RMSNorm: Zhang and Sennrich, 2019; SwiGLU: Shazeer,
2020; rotary positions: Su et al., 2021; query-key norm: Henry et al., 2020).

Masks are boolean and True where a query may look, as in `torch.nn.functional.scaled_dot_product_attention`; every query
must be allowed to look somewhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Attention",
    "Block",
    "DecoderBlock",
    "FeedForward",
    "Stack",
    "block_causal_mask",
    "rotary_angles",
    "rotate",
    "sinusoids",
    "turn",
]


class Attention(nn.Module):
    """Multi-head attention of queries over keys (over themselves unless `context` is given).

    Args:
        width: of queries and output; context_width: of what is attended to (default: the same).
        heads: width / heads is the size of a head.
        qk_norm: normalise queries and keys of each head.
        rotary: turn queries and keys by their positions: 0, 1, 2, ... unless `forward` is given others.
        dropout: of attention weights and output, in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        qk_norm: bool = False,
        rotary: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.rotary, self.dropout = heads, rotary, dropout
        self.cross = context_width is not None
        if self.cross:
            self.query = nn.Linear(width, width, bias=False)
            self.key_value = nn.Linear(context_width or width, 2 * width, bias=False)
        else:
            self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        head = width // heads
        self.query_norm = nn.RMSNorm(head) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width, bias=False)
        self.out_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B L W"],
        context: Float[Tensor, "B M X"] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        positions: Float[Tensor, "L"] | None = None,
        context_positions: Float[Tensor, "M"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """`mask`: bool, broadcast to [B, heads, L, M]; [L, M], or [B, 1, 1, M] for absent keys.

        `positions` of x and `context_positions` of the context are read where rotary.
        """
        if self.cross:
            assert context is not None, "cross-attention needs a context"
            q = self._split(self.query(x))
            k, v = (self._split(part) for part in self.key_value(context).chunk(2, -1))
        else:
            q, k, v = (self._split(part) for part in self.query_key_value(x).chunk(3, -1))
        q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary:
            q = rotate(q, positions=positions)
            k = rotate(k, positions=context_positions if self.cross else positions)
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_dropout(self.out(found.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU, or a plain GELU layer (`gated=False`), with `hidden` units (default 4 x width; gated: 8/3 x width)."""

    def __init__(self, width: int, hidden: int | None = None, *, gated: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.gated = gated
        hidden = hidden or (-(-8 * width // 3 // 8) * 8 if gated else 4 * width)
        self.inner = nn.Linear(width, 2 * hidden if gated else hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch W"]) -> Float[Tensor, "*batch W"]:
        """Position by position."""
        if self.gated:
            gate, value = self.inner(x).chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(self.inner(x))
        return self.dropout(self.outer(hidden))


class Block(nn.Module):
    """Self-attention, then (where `context_width` is given) attention over a context, then feed-forward; all residual."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        context_width: int | None = None,
        qk_norm: bool = False,
        rotary: bool = False,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, qk_norm=qk_norm, rotary=rotary, dropout=dropout)
        self.cross = context_width is not None
        if self.cross:
            self.cross_norm = nn.RMSNorm(width)
            self.cross_attention = Attention(
                width, heads, context_width=context_width, qk_norm=qk_norm, dropout=dropout
            )
        self.feed_norm = nn.RMSNorm(width)
        self.feed = FeedForward(width, hidden, gated=gated, dropout=dropout)

    def forward(
        self,
        x: Float[Tensor, "B L W"],
        context: Float[Tensor, "B M X"] | None = None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        context_mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """`mask` of self-attention, `context_mask` of attention over the context."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        if self.cross:
            x = x + self.cross_attention(self.cross_norm(x), context, context_mask)
        return x + self.feed(self.feed_norm(x))


class Stack(nn.Module):
    """`depth` blocks and a final norm. Further arguments are those of `Block`."""

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        context_width: int | None = None,
        qk_norm: bool = False,
        rotary: bool = False,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                hidden=hidden,
                context_width=context_width,
                qk_norm=qk_norm,
                rotary=rotary,
                gated=gated,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width)

    def forward(
        self,
        x: Float[Tensor, "B L W"],
        context: Float[Tensor, "B M X"] | None = None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        context_mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """As `Block`, `depth` times."""
        for block in self.blocks:
            x = block(x, context, mask=mask, context_mask=context_mask)
        return self.norm(x)


class DecoderBlock(nn.Module):
    """Self-attention that also looks at keys and values of earlier passes, then SwiGLU; both residual, pre-norm.

    The heads may be of any size, so that a block of another width can read the keys and values of a wider network. Fewer
    key-value heads than heads: each serves heads / kv_heads neighbouring ones (Ainslie et al., 2023, arXiv 2305.13245).

    Args:
        width: W; heads, kv_heads: H and G, a divisor of H; head_dim: E, even.
        hidden: units of the feed-forward layer (default: that of `FeedForward`).
    """

    def __init__(self, width: int, heads: int, *, kv_heads: int, head_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"{kv_heads} key-value heads must divide {heads} heads, and {head_dim} channels be even")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.feed_norm = nn.RMSNorm(width)
        self.feed = FeedForward(width, hidden)

    def forward(
        self,
        x: Float[Tensor, "B n W"],
        angles: tuple[Float[Tensor, "B n half"], Float[Tensor, "B n half"]],
        mask: Tensor,
        past: tuple[Float[Tensor, "B G K E"], Float[Tensor, "B G K E"]] | None = None,
    ) -> tuple[Float[Tensor, "B n W"], Float[Tensor, "B G M E"], Float[Tensor, "B G M E"]]:
        """The n new positions, and keys (turned) and values of the M = K + n positions that are known now.

        Args:
            angles: `rotary_angles` of the n positions.
            mask: [B, 1, n, M]: bool, True where a row may look; or what is added to the products.
            past: keys and values of the K positions before.
        """
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned = turn(heads[:, : self.heads + self.kv_heads], *angles)
        q, k, v = turned[:, : self.heads], turned[:, self.heads :], heads[:, self.heads + self.kv_heads :]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        grouped = self.kv_heads < self.heads
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.feed(self.feed_norm(x)), k, v


def rotary_angles(
    positions: Num[Tensor, "*batch n"], head_dim: int, base: float = 1e4
) -> tuple[Float[Tensor, "*batch n half"], Float[Tensor, "*batch n half"]]:
    """Cosines and sines of position * base^(-2i/E) for i in 0..E/2 - 1, float32."""
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def turn(
    x: Float[Tensor, "B H n E"], cos: Float[Tensor, "*batch n half"], sin: Float[Tensor, "*batch n half"]
) -> Float[Tensor, "B H n E"]:
    """Turn channel pairs (i, i + E/2) by these angles, the same for every head; of an odd E the last channel stays."""
    half = x.shape[-1] // 2
    cos, sin = (part.unsqueeze(-3).to(x.dtype) for part in (cos, sin))
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., 2 * half :]], -1)


def rotate(
    x: Float[Tensor, "B H L E"], base: float = 1e4, positions: Num[Tensor, "*batch L"] | None = None
) -> Float[Tensor, "B H L E"]:
    """Rotary positions: channel pair (i, i + E/2) turns by position * base^(-2i/E).

    `positions` are [L], or [B, L] where they differ in the batch; 0..L-1 unless given.
    """
    if positions is None:
        positions = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)
    return turn(x, *rotary_angles(positions, x.shape[-1], base))


def sinusoids(count: int, width: int, base: float = 1e4) -> Float[Tensor, "{count} {width}"]:
    """Fixed sinusoidal positions (Vaswani et al., 2017, section 3.5)."""
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(count, dtype=torch.float32)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def block_causal_mask(blocks: list[int]) -> Bool[Tensor, "L L"]:
    """bool [L, L]: each position sees its own block (of these sizes) and all before it. Blocks of 1: causal."""
    index = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
    return index[:, None] >= index[None, :]
