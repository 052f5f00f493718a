"""Multi-scale residual quantisation: what coarser scales left is pooled to a scale's few slots, quantised, widened again.

Sources: Tian et al. 2024 (VAR, arXiv 2404.02905, algorithms 1 and 2), over images; Gong et al. 2024 (CARP, arXiv
2412.06782, section 3.1), over actions.

Deviations: slots are widened by linear interpolation (VAR: bicubic, over two axes). Every scale has its own smoothing
convolution (VAR shares four among ten scales).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ConfigError, TokenError
from actok.quantizers.base import Quantizer, check_count, check_range, full_precision, masked_mean, straight_through
from actok.quantizers.codebook import Codebook
from actok.quantizers.result import Quantised, measure_usage
from actok.quantizers.vq import VectorConfig, rotate

__all__ = ["MultiScaleConfig", "MultiScaleQuantizer"]


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(VectorConfig):
    """Settings of MultiScaleQuantizer, besides those of VectorConfig. VAR's and CARP's distance is "direction".

    Attributes:
        scales: slots of each scale, rising; the last is S.
        smoothing: share of a convolution over the widened slots (VAR: 0.5). 0: none.
    """

    scales: tuple[int, ...] = (1, 2, 3, 4)
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scales, tuple) or not self.scales or list(self.scales) != sorted(set(self.scales)):
            raise ConfigError(f"scales is {self.scales!r}; give rising numbers of slots, such as [1, 2, 3, 4]")
        for slots in self.scales:
            check_count("scales", slots)
        check_range("smoothing", self.smoothing, 0.0, 1.0)
        if self.distance == "cosine":
            raise ConfigError(
                "distance is 'cosine', whose unit vectors cannot follow shrinking residuals; use 'direction'"
            )


class MultiScaleQuantizer(Quantizer):
    """sum(scales) codes a sample, one after another from the coarsest scale; one codebook for all scales.

    Codes are [B, sum(scales), 1] and `level_vectors` [B, sum(scales), 1, C] holds the vector of each code; `quantised`
    is [B, S, C] with S = scales[-1]. The codes of the first scales decode: `prefixes` lists these lengths. Losses, means
    over scales as in VAR: "commitment" of the latents to the value reached after each scale and, where the codes or
    the smoothing learn by gradient, "codebook", the same distance seen from the other side.

    Where slots are masked, a scale pools over the others only; a pooled slot with nothing under it counts nowhere.
    """

    def __init__(self, config: MultiScaleConfig, dim: int) -> None:
        super().__init__(dim, (config.codes,))
        self.config = config
        self.slots = sum(config.scales)
        self.prefixes = tuple(accumulate(config.scales))
        width = config.code_dim or dim
        self.project_in = nn.Identity() if width == dim else nn.Linear(dim, width)
        self.project_out = nn.Identity() if width == dim else nn.Linear(width, dim)
        self.codebook = Codebook(config.codes, width, config)
        convolutions = [nn.Conv1d(width, width, 3, padding=1) for _ in config.scales] if config.smoothing else []
        self.smooth = nn.ModuleList(convolutions)
        positions = config.scales[-1]
        for scale, slots in enumerate(config.scales):
            pool = F.interpolate(torch.eye(positions)[None], size=slots, mode="area")[0].T
            widen = F.interpolate(torch.eye(slots)[None], size=positions, mode="linear")[0].T
            self.register_buffer(f"pool_{scale}", pool.contiguous(), persistent=False)
            self.register_buffer(f"widen_{scale}", widen.contiguous(), persistent=False)

    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """See Quantizer. Raises ConfigError where S is not the last scale."""
        with full_precision(z):
            latents = self._enter(z)
            real = None if mask is None else mask.flatten()
            self.codebook.start(latents.flatten(0, 1), real)
            residual, value = latents, torch.zeros_like(latents)
            codes, vectors, searched, commitment, fit = [], [], [], [], []
            seen: list[Tensor] = []
            for scale in range(len(self.config.scales)):
                pooled, rows = self._pool(residual, mask, scale)
                code = self.codebook.search(pooled.detach().flatten(0, 1)).view(pooled.shape[:2])
                vector = self.codebook.lookup(code)
                searched.append(pooled.detach())
                wide = self._widen(vector, scale)
                value, residual = value + wide, residual - wide.detach()
                commitment.append(masked_mean((latents - value.detach()).square().flatten(0, 1), real))
                fit.append(masked_mean((value - latents.detach()).square().flatten(0, 1), real))
                codes.append(code)
                vectors.append(straight_through(pooled, vector))
                if rows is not None:
                    seen.append(rows)
            every, counted = torch.cat(codes, dim=1), torch.cat(seen, dim=1) if seen else None
            losses = {"commitment": self.config.commitment * torch.stack(commitment).mean()}
            if self.config.update == "gradient" or self.config.smoothing:
                losses["codebook"] = torch.stack(fit).mean()
            self.codebook.update(
                torch.cat(searched, dim=1).flatten(0, 1),
                every.flatten(),
                None if counted is None else counted.flatten(),
            )
            carry = rotate if self.config.gradient == "rotation" else straight_through
            quantised = carry(latents.flatten(0, 1), value.detach().flatten(0, 1)).view(latents.shape)
            return Quantised(
                quantised=self.project_out(quantised),
                codes=every[..., None],
                level_vectors=self.project_out(torch.cat(vectors, dim=1))[:, :, None],
                losses=losses,
                usage=measure_usage(every[..., None], self.sizes, counted),
            )

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B slots 1"]:
        """See Quantizer. `mask` keeps padded slots out of the coarser scales."""
        with full_precision(z):
            residual, codes = self._enter(z), []
            for scale in range(len(self.config.scales)):
                pooled, _ = self._pool(residual, mask, scale)
                code = self.codebook.search(pooled.flatten(0, 1)).view(pooled.shape[:2])
                residual = residual - self._widen(self.codebook.lookup(code), scale)
                codes.append(code)
            return torch.cat(codes, dim=1)[..., None]

    def lookup(self, codes: Int[Tensor, "B slots 1"]) -> Float[Tensor, "B S C"]:
        """Latents [B, S, C] of the codes of the first scales. Raises TokenError where their number ends within a scale."""
        if codes.shape[1] not in self.prefixes:
            raise TokenError(f"{codes.shape[1]} codes end within a scale; give {', '.join(map(str, self.prefixes))}")
        with full_precision(codes):
            scales = self.config.scales[: self.prefixes.index(codes.shape[1]) + 1]
            value = torch.zeros((), device=codes.device)
            for scale, code in enumerate(codes[..., 0].split(scales, dim=1)):
                value = value + self._widen(self.codebook.lookup(code), scale)
            return self.project_out(value)

    def _enter(self, z: Tensor) -> Tensor:
        if z.shape[1] != self.config.scales[-1]:
            raise ConfigError(
                f"scales end at {self.config.scales[-1]} but there are {z.shape[1]} slots; make them equal"
            )
        return self.project_in(z.float())

    def _pool(self, residual: Tensor, mask: Tensor | None, scale: int) -> tuple[Tensor, Tensor | None]:
        """[B, slots, width] means over what lies under each slot of a scale, and where anything real does [B, slots]."""
        pool = getattr(self, f"pool_{scale}")
        if mask is None:
            return pool @ residual, None
        weight = pool @ mask.float()[..., None]
        kept = torch.where(mask[..., None], residual, 0.0)
        return pool @ kept / weight.clamp(min=torch.finfo(torch.float32).tiny), weight[..., 0] > 0

    def _widen(self, vectors: Tensor, scale: int) -> Tensor:
        """[B, S, width] of the vectors of a scale [B, slots, width], smoothed."""
        wide = getattr(self, f"widen_{scale}") @ vectors
        if not self.config.smoothing:
            return wide
        smooth = self.smooth[scale](wide.transpose(1, 2)).transpose(1, 2)
        return wide * (1 - self.config.smoothing) + smooth * self.config.smoothing
