"""VQ-BeT's action autoencoder (Lee et al. 2024, arXiv 2403.03181, section 4.1), also that of MiniVLA: two MLPs.

    actions [T, D] -> one vector of T D numbers -> MLP -> one latent -> residual VQ, N_q levels -> MLP -> [T, D]

A window is one latent, so it has as many tokens as the quantiser has levels, from coarse to fine: 2 in VQ-BeT, 7 in
MiniVLA. Tokens of several windows follow window after window. Every sequence decodes.

Losses: mean absolute error, plus the quantiser's commitment, which the presets weigh with the paper's 5.

What differs from the paper, or is not stated there:

* The width of actions is that of the widest embodiment trained on; absent channels enter as zeros and count in no loss.
* Residual levels start from k-means, and dead codes are replaced (`actok.quantizers`).
* How many hidden layers the MLPs have is `depth`; 2 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from actok.core import CodecBatch
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

__all__ = ["VqBet", "VqBetConfig", "VqBetTokenizer"]


@dataclass(frozen=True, kw_only=True)
class VqBetConfig:
    """Settings of VQ-BeT's autoencoder.

    Attributes:
        hidden: units of a hidden layer (the paper: 128).
        depth: hidden layers, in encoder and decoder each.
        latent_dim: channels of the latent (the paper: 512).
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of the actions.
    """

    hidden: int = 128
    depth: int = 2
    latent_dim: int = 512
    quantizer: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "residual", "levels": 2, "codes": 16, "commitment": 5.0}
    )
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        for name in ("hidden", "depth", "latent_dim"):
            check_count(f"vqbet: {name}", getattr(self, name))


def mlp(width: int, hidden: int, depth: int, out: int) -> nn.Sequential:
    """`depth` hidden layers with ReLU between linear maps."""
    layers: list[nn.Module] = []
    for before in [width] + [hidden] * (depth - 1):
        layers += [nn.Linear(before, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out))


class VqBet(Codec):
    """The network; S = 1."""

    order = "slot"

    def __init__(self, config: VqBetConfig, shape: CodecShape) -> None:
        super().__init__()
        self.shape = shape
        size = shape.horizon * shape.channels
        self.encoder = mlp(size, config.hidden, config.depth, config.latent_dim)
        self.decoder = mlp(config.latent_dim, config.hidden, config.depth, size)
        self.quantizer = make_quantizer(config.quantizer, config.latent_dim)

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B 1 C"]:
        """See Codec.encode."""
        return self.encoder(batch.actions.flatten(1))[:, None]

    def decode(self, latents: Float[Tensor, "B 1 C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode."""
        return self.decoder(latents[:, 0]).unflatten(1, (self.shape.horizon, self.shape.channels))


class VqBetTokenizer(NeuralTokenizer):
    """VQ-BeT's autoencoder behind the contract of every tokenizer."""

    kind = "vqbet"
    config_class = VqBetConfig
    codec_class = VqBet
    config: VqBetConfig

    def _slots(self, embodiment: Embodiment) -> int:
        return 1
