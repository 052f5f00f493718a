"""Grouped quantisation: the channels of a latent are split, and each group has a quantiser of its own.

Sources: Jegou et al. 2011 (product quantisation, section III-A); Yang et al. 2023 (grouped residual quantisation,
arXiv 2305.02765, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ConfigError
from actok.quantizers.base import Quantizer, check_count
from actok.quantizers.result import Quantised, Usage

__all__ = ["GroupedConfig", "GroupedQuantizer"]


@dataclass(frozen=True, kw_only=True)
class GroupedConfig:
    """Settings of GroupedQuantizer.

    Attributes:
        groups: G.
        inner: settings of the groups' quantisers (`kind` and its fields): one table for all, or one a group.
        widths: channels of each group, in order; None: C / G each.
    """

    groups: int = 2
    inner: Mapping[str, Any] | tuple[Mapping[str, Any], ...] = field(default_factory=lambda: {"kind": "vq"})
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count("groups", self.groups)
        if not isinstance(self.inner, Mapping) and len(self.inner) != self.groups:
            raise ConfigError(f"inner has {len(self.inner)} tables for {self.groups} groups; give one, or one a group")
        if self.widths is not None and (len(self.widths) != self.groups or any(w < 1 for w in self.widths)):
            raise ConfigError(f"widths is {self.widths!r} for {self.groups} groups; give one positive number a group")


class GroupedQuantizer(Quantizer):
    """Q = G x (levels of a group) codes a slot, level by level and within a level group by group: q = level * G + group.

    So the first levels of all groups come first, and a prefix is coarse everywhere rather than blind in some channels.
    A level's vector is zero outside its group's channels. Losses are means over channels: groups weigh as their widths.
    """

    def __init__(self, config: GroupedConfig, dim: int) -> None:
        from actok.quantizers.make import make_quantizer  # which knows this module

        if config.widths is None and dim % config.groups:
            raise ConfigError(f"groups is {config.groups}, which does not divide {dim} channels; give widths")
        widths = config.widths or (dim // config.groups,) * config.groups
        if sum(widths) != dim:
            raise ConfigError(f"widths {widths!r} make {sum(widths)} channels of {dim}; they must add up")
        tables = (config.inner,) * config.groups if isinstance(config.inner, Mapping) else config.inner
        inner = [make_quantizer(table, width) for table, width in zip(tables, widths, strict=True)]
        if len({q.levels for q in inner}) > 1 or any(q.slots is not None for q in inner):
            raise ConfigError("inner quantizers differ in levels or have slots of their own; give all the same levels")
        super().__init__(dim, [q.sizes[level] for level in range(inner[0].levels) for q in inner])
        self.config, self.widths = config, widths
        self.inner = nn.ModuleList(inner)

    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """See Quantizer."""
        found: list[Quantised] = [q(part, mask) for q, part in zip(self.inner, z.split(self.widths, -1), strict=True)]
        vectors, before = [], 0
        for width, one in zip(self.widths, found, strict=True):
            vectors.append(F.pad(one.level_vectors, (before, self.dim - before - width)))
            before += width
        losses: dict[str, Tensor] = {}
        for width, one in zip(self.widths, found, strict=True):
            for name, value in one.losses.items():
                share = value * (width / self.dim)
                losses[name] = losses[name] + share if name in losses else share
        return Quantised(
            quantised=torch.cat([one.quantised for one in found], dim=-1),
            codes=torch.stack([one.codes for one in found], dim=-1).flatten(2),
            level_vectors=torch.stack(vectors, dim=3).flatten(2, 3),
            losses=losses,
            usage=Usage(
                share=torch.stack([one.usage.share for one in found], dim=-1).flatten(),
                perplexity=torch.stack([one.usage.perplexity for one in found], dim=-1).flatten(),
            ),
        )

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B S Q"]:
        """See Quantizer."""
        parts = z.split(self.widths, -1)
        return torch.stack([self._quantizer(g).encode(p, mask) for g, p in enumerate(parts)], dim=-1).flatten(2)

    def lookup(self, codes: Int[Tensor, "B S q"]) -> Float[Tensor, "B S C"]:
        """See Quantizer. A group that has no code yet is zero."""
        parts = []
        for group, width in enumerate(self.widths):
            own = codes[..., group :: self.config.groups]
            absent = torch.zeros(*codes.shape[:2], width, device=codes.device)
            parts.append(self._quantizer(group).lookup(own) if own.shape[-1] else absent)
        return torch.cat(parts, dim=-1)

    def _quantizer(self, group: int) -> Quantizer:
        return self.inner[group]  # type: ignore[return-value]
