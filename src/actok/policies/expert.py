"""The lightweight action expert: a stack of the backbone's geometry that reads the backbone's keys and values.

Sources: pi0 (arXiv 2410.24164, section IV), whose expert has the backbone's depth and heads but a smaller width, so that
layer l of it attends to what layer l of the backbone has cached; FASTer (arXiv 2512.04952, section 3.2), whose expert
emits codes in the same way. Deviation: norm and feed-forward are RMSNorm and SwiGLU for every backbone, and its own queries,
keys and values have neither the norm of Qwen3's nor the biases of Qwen2.5's.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.backbones.decoder import DecoderBackbone, KVCache
from actok.core import ConfigError
from actok.nn.transformer import DecoderBlock, rotary_angles
from actok.policies.blocks import additive_mask

__all__ = ["Expert"]


class Expert(nn.Module):
    """As many layers, heads and rotary positions as the backbone, of its own width."""

    def __init__(self, backbone: DecoderBackbone, width: int) -> None:
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ConfigError(f"the expert's width is {width!r}; give a whole number of at least 1")
        self.width, self.head_dim, self.rotary_base = width, backbone.head_dim, backbone.rotary_base
        self.layers = nn.ModuleList(
            DecoderBlock(width, backbone.heads, kv_heads=backbone.kv_heads, head_dim=backbone.head_dim)
            for _ in range(backbone.layers)
        )
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
        angles = rotary_angles(positions, self.head_dim, self.rotary_base)
        added = additive_mask(mask, embeds.dtype)[:, None]
        keys, values = [], []
        x = embeds
        for layer, past in zip(self.layers, zip(cache.keys, cache.values, strict=True), strict=True):
            x, k, v = layer(x, angles, added, (past[0].to(x.dtype), past[1].to(x.dtype)))
            keys.append(k)
            values.append(v)
        return self.norm(x), KVCache(keys=tuple(keys), values=tuple(values))
