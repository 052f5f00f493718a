"""Vector quantisation: each latent becomes the nearest vector of one codebook.

Sources: van den Oord et al. 2017 (arXiv 1711.00937, equations 1 to 3); Yu et al. 2021 (ViT-VQGAN, arXiv 2110.04627,
section 3.2: low-dimensional codes, codes on the unit sphere); Fifty et al. 2024 (the rotation trick, arXiv 2410.06424,
section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import ConfigError
from actok.quantizers.base import (
    Quantizer,
    check_choice,
    check_count,
    check_range,
    full_precision,
    masked_mean,
    straight_through,
)
from actok.quantizers.codebook import DISTANCES, Codebook
from actok.quantizers.result import Quantised, measure_usage

__all__ = ["VectorConfig", "VectorQuantizer", "rotate"]


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """Settings of VectorQuantizer.

    Attributes:
        codes: K.
        code_dim: width of the codes; latents are projected to it and back. None: C, without projections.
        distance: "euclidean"; "cosine", latents and codes on the unit sphere; "direction", nearest by angle while the
            codes keep their lengths.
        update: "ema", moving averages; "gradient", codes are parameters with a codebook loss of weight 1.
        decay: of the moving averages, per step.
        dead_below: a code whose moving count is below this share of the mean count is replaced. 0: never.
        kmeans_steps: of k-means on the first training batch. 0: codes start as random normal vectors.
        gradient: from the decoder to the latents: "straight_through" or "rotation".
        commitment: weight of the commitment loss, mean of (latent - code)^2 over slots and channels.
    """

    codes: int = 512
    code_dim: int | None = None
    distance: str = "euclidean"
    update: str = "ema"
    decay: float = 0.99
    dead_below: float = 0.1
    kmeans_steps: int = 10
    gradient: str = "straight_through"
    commitment: float = 0.25

    def __post_init__(self) -> None:
        self._check_codes()
        if self.code_dim is not None:
            check_count("code_dim", self.code_dim)
        check_choice("distance", self.distance, DISTANCES)
        check_choice("update", self.update, ("ema", "gradient"))
        check_choice("gradient", self.gradient, ("straight_through", "rotation"))
        check_range("decay", self.decay, 0.0, 1.0)
        check_range("dead_below", self.dead_below, 0.0)
        check_range("commitment", self.commitment, 0.0)
        check_count("kmeans_steps", self.kmeans_steps, least=0)
        if self.dead_below >= 1:
            raise ConfigError(f"dead_below is {self.dead_below!r}, a share of the mean count; give less than 1")

    def _check_codes(self) -> None:
        check_count("codes", self.codes, least=2)


class VectorQuantizer(Quantizer):
    """One code a slot (Q = 1).

    `forward` is written for any number of levels, each quantising what the ones before it left (a single level leaves
    nothing to do); ResidualQuantizer gives it more than one. Losses: "commitment", and "codebook" where codes learn by
    gradient; over several levels their sum.
    """

    def __init__(self, config: VectorConfig, dim: int) -> None:
        self._build(config, dim, (config.codes,))
        self.codebooks = nn.ModuleList([Codebook(config.codes, self.width, config)])

    def _build(self, config: VectorConfig, dim: int, sizes: tuple[int, ...]) -> None:
        Quantizer.__init__(self, dim, sizes)
        self.config = config
        self.width = config.code_dim or dim
        same = self.width == dim
        self.project_in = nn.Identity() if same else nn.Linear(dim, self.width)
        self.project_out = nn.Identity() if same else nn.Linear(self.width, dim)

    def codebook(self, level: int) -> Codebook:
        """The codebook of a level."""
        return self.codebooks[level]  # type: ignore[return-value]

    def forward(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Quantised:
        """See Quantizer."""
        with full_precision(z):
            latents = self._enter(z)
            real = None if mask is None else mask.flatten()
            kept = self._kept(len(z), z.shape[1], z.device)
            residual, value = latents, torch.zeros_like(latents)
            codes, vectors, errors, searched = [], [], [], []
            for level in range(self.levels):
                codebook, keep = self.codebook(level), None if kept is None else kept[:, level]
                rows = keep if real is None else real if keep is None else real & keep
                codebook.start(residual, rows)
                code = codebook.search(residual.detach())
                vector = codebook.lookup(code)
                errors.append(self._errors(residual, vector, rows))
                searched.append((residual.detach(), code, rows))
                level_vector = straight_through(residual, vector)
                if keep is not None:
                    level_vector = torch.where(keep[:, None], level_vector, 0.0)
                residual = residual - vector.detach()
                value = value + level_vector.detach()
                codes.append(code.view(z.shape[:2]))
                vectors.append(level_vector)
            self._learn(searched)
            stacked = torch.stack(codes, dim=-1)
            carry = rotate if self.config.gradient == "rotation" else straight_through
            return Quantised(
                quantised=self.project_out(carry(latents, value)).view(z.shape),
                codes=stacked,
                level_vectors=self._leave(torch.stack(vectors, dim=1)).view(*z.shape[:2], self.levels, self.dim),
                losses={name: torch.stack([e[name] for e in errors]).sum() for name in errors[0]},
                usage=measure_usage(stacked, self.sizes, mask),
            )

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "B S Q"]:
        """See Quantizer; `mask` changes nothing, every slot stands for itself."""
        with full_precision(z):
            residual, codes = self._enter(z), []
            for level in range(self.levels):
                code = self.codebook(level).search(residual)
                codes.append(code)
                if level + 1 < self.levels:
                    residual = residual - self.codebook(level).lookup(code)
            return torch.stack(codes, dim=-1).view(*z.shape[:2], self.levels)

    def lookup(self, codes: Int[Tensor, "B S q"]) -> Float[Tensor, "B S C"]:
        """See Quantizer."""
        with full_precision(codes):
            value = torch.zeros((), device=codes.device)
            for level in range(codes.shape[-1]):
                value = value + self.codebook(level).lookup(codes[..., level])
            return self.project_out(value)

    def _enter(self, z: Tensor) -> Tensor:
        """[B, S, C] of any float type to [B * S, width] float32."""
        latents = self.project_in(z.float().reshape(-1, self.dim))
        return F.normalize(latents, dim=1) if self.config.distance == "cosine" else latents

    def _leave(self, vectors: Tensor) -> Tensor:
        """Vectors [N, Q, width] of levels as latents [N, Q, C]; the output projection's bias belongs to the first."""
        if isinstance(self.project_out, nn.Identity):
            return vectors
        first = self.project_out(vectors[:, :1])
        return torch.cat([first, F.linear(vectors[:, 1:], self.project_out.weight)], dim=1)

    def _errors(self, residual: Tensor, vector: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """Losses of one level."""
        losses = {"commitment": self.config.commitment * masked_mean((residual - vector.detach()).square(), rows)}
        if self.config.update == "gradient":
            losses["codebook"] = masked_mean((vector - residual.detach()).square(), rows)
        return losses

    def _kept(self, batch: int, slots: int, device: torch.device) -> Tensor | None:
        """[B * S, Q] False where a level is dropped; None where nothing is."""
        return None

    def _learn(self, searched: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Update the codebooks with what each level searched, found and may count."""
        for level, (residual, code, rows) in enumerate(searched):
            self.codebook(level).update(residual, code, rows)


def rotate(z: Float[Tensor, "N C"], value: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Exactly `value`, with the gradient of the rotation and scaling that takes each z to it, held constant.

    Section 4.2 of the rotation trick: with unit vectors e of z and q of the value, r = (e + q) / |e + q|, the map is
    |value| / |z| * (I - 2 r r^T + 2 q e^T). A z or value of length zero has no direction; there the gradient is z's.
    """
    with torch.no_grad():
        length, target = z.norm(dim=1, keepdim=True), value.norm(dim=1, keepdim=True)
        turns = (length > 1e-6) & (target > 1e-6)
        e, q = F.normalize(z, dim=1), F.normalize(value, dim=1)
        r = F.normalize(e + q, dim=1)
        scale = target / length.clamp(min=1e-6)
    turned = scale * (z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * q * (e * z).sum(1, keepdim=True))
    return straight_through(torch.where(turns, turned, z), value)
