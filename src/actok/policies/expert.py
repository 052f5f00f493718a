"""The lightweight action expert: a stack of the backbone's geometry that reads the backbone's keys and values.

Sources: pi0 (arXiv 2410.24164, section IV), whose expert has the backbone's depth and heads but a smaller width, so that
layer l of it attends to what layer l of the backbone has cached; FASTer (arXiv 2512.04952, section 3.2), whose expert
emits codes in the same way. Deviation: norm and feed-forward are RMSNorm and SwiGLU for every backbone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from actok.backbones.decoder import DecoderBackbone, KVCache
from actok.core import ConfigError
from actok.nn.transformer import FeedForward, rotate

__all__ = ["Expert"]


class Expert(nn.Module):
    """As many layers, heads and rotary positions as the backbone, of its own width."""

    def __init__(self, backbone: DecoderBackbone, width: int) -> None:
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ConfigError(f"the expert's width is {width!r}; give a whole number of at least 1")
        self.width = width
        self.layers = nn.ModuleList(_Layer(backbone, width) for _ in range(backbone.layers))
        self.norm = nn.RMSNorm(width)

    def run(
        self,
        embeds: Float[Tensor, "B n w"],
        positions: Int[Tensor, "B n"],
        mask: Bool[Tensor, "B n M"],
        cache: KVCache,
    ) -> tuple[Float[Tensor, "B n w"], KVCache]:
        """One pass over the cached K positions, of the backbone and of this expert's earlier passes, and the n new ones.

        M = K + n. Returns hidden states, and the cache with this expert's n keys and values at its end.
        """
        keys, values = [], []
        x, where = embeds, mask[:, None]
        for layer, past_keys, past_values in zip(self.layers, cache.keys, cache.values, strict=True):
            x, k, v = layer(x, positions, where, past_keys, past_values)
            keys.append(k)
            values.append(v)
        return self.norm(x), KVCache(keys=tuple(keys), values=tuple(values))


class _Layer(nn.Module):
    def __init__(self, backbone: DecoderBackbone, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = backbone.heads, backbone.kv_heads, backbone.head_dim
        self.base = backbone.rotary_base
        self.attention_norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, self.heads * self.size, bias=False)
        self.key_value = nn.Linear(width, 2 * self.kv_heads * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, width, bias=False)
        self.feed = FeedForward(width)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = self.attention_norm(x)
        q = self.query(h).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (
            part.unflatten(-1, (self.kv_heads, self.size)).transpose(1, 2) for part in self.key_value(h).chunk(2, -1)
        )
        q, k = rotate(q, self.base, positions), rotate(k, self.base, positions)
        k, v = torch.cat([past_keys.to(k.dtype), k], 2), torch.cat([past_values.to(v.dtype), v], 2)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.feed(self.feed_norm(x)), k, v
