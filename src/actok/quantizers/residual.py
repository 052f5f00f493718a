"""Residual vector quantisation: each level quantises what the levels before it left.

Sources: Zeghidour et al. 2021 (SoundStream, arXiv 2107.03312, algorithm 1 and section III-C, quantiser dropout); Lee et
al. 2022 (RQ-VAE, arXiv 2203.01941, section 3.1: one codebook shared by all levels).

Deviation: FASTer (arXiv 2512.04952, equation 1) states a commitment of the latents to the sum of all levels only. Here, as
in SoundStream and RQ-VAE, every level commits what it quantises to its own code; FASTer's term is that of the last level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actok.core import ConfigError
from actok.quantizers.base import check_count, check_range
from actok.quantizers.codebook import Codebook
from actok.quantizers.vq import VectorConfig, VectorQuantizer

__all__ = ["ResidualConfig", "ResidualQuantizer"]


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(VectorConfig):
    """Settings of ResidualQuantizer, besides those of VectorConfig.

    Attributes:
        codes: K of every level, or one K a level.
        levels: Q.
        dropout: probability that a sample of a training batch keeps only its first levels, 1 to Q of them, all equally
            likely. Dropped levels count in no codebook and no loss; `codes` and `usage` hold them all the same.
        shared: one codebook for all levels.
    """

    codes: int | tuple[int, ...] = 512  # type: ignore[assignment]
    levels: int = 3
    dropout: float = 0.0
    shared: bool = False

    def _check_codes(self) -> None:
        check_count("levels", self.levels)
        for size in self.sizes:
            check_count("codes", size, least=2)
        if len(self.sizes) != self.levels:
            raise ConfigError(f"codes is {self.codes!r} for {self.levels} levels; give one number, or one a level")
        if self.shared and len(set(self.sizes)) > 1:
            raise ConfigError(f"codes is {self.codes!r} with shared=true; levels that share a codebook have one size")
        if self.distance == "cosine" and self.levels > 1:
            raise ConfigError(
                "distance is 'cosine', whose unit vectors cannot follow shrinking residuals; use 'direction'"
            )
        check_range("dropout", self.dropout, 0.0, 1.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """K of each level."""
        return self.codes if isinstance(self.codes, tuple) else (self.codes,) * self.levels


class ResidualQuantizer(VectorQuantizer):
    """Q codes a slot, from coarse to fine; any first levels decode. Losses are sums over levels."""

    config: ResidualConfig

    def __init__(self, config: ResidualConfig, dim: int) -> None:
        self._build(config, dim, config.sizes)
        own = config.sizes[:1] if config.shared else config.sizes
        self.codebooks = nn.ModuleList([Codebook(size, self.width, config) for size in own])

    def codebook(self, level: int) -> Codebook:
        """The codebook of a level."""
        return self.codebooks[0 if self.config.shared else level]  # type: ignore[return-value]

    def _kept(self, batch: int, slots: int, device: torch.device) -> Tensor | None:
        if not self.training or self.config.dropout == 0:
            return None
        drops = torch.rand(batch, device=device) < self.config.dropout
        depth = torch.randint(1, self.levels + 1, (batch,), device=device)
        depth = torch.where(drops, depth, self.levels)
        kept = torch.arange(self.levels, device=device) < depth[:, None]
        return kept.repeat_interleave(slots, dim=0)

    def _learn(self, searched: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        if not self.config.shared:
            return super()._learn(searched)
        residuals, codes, rows = zip(*searched, strict=True)
        mask = None if rows[0] is None else torch.cat(rows)
        return self.codebook(0).update(torch.cat(residuals), torch.cat(codes), mask)
