"""ActionCodec: a Perceiver whose tokens do not read each other (arXiv 2602.15397).

    steps and prompts of the embodiment -> read by S latent queries, `depth` times -> vector quantisation -> codes
    codes' vectors and prompts of the embodiment -> read by one query a step, `depth` times -> steps

Every reader is cross-attention and feed-forward. Nothing mixes the latent queries, so a token depends on the actions and on
no other token, and nothing mixes the steps' queries. A step is known by its time in seconds, as Fourier features, so that
chunks of different control rates share their weights. An embodiment is known by learned prompt vectors; in training they
are at random those of "none", which serves embodiments that are added later.

From the paper and its published configuration: 16 tokens, latents of 512 channels, 2048 codes (moving averages, k-means
start), width 256, depth 6 and 8 heads on either side, no self-attention, Fourier features of time, quantiser dropout 0.25.

Deviations and our choices, where nothing is stated:

* Residual levels are added by the paper after training, and fine-tuned; here `quantizer.levels` above 1 are trained at
  once, with quantiser dropout, and stand after all tokens of the first level.
* The paper's objectives of temporal and language alignment are no part of the codec; the loss is l1.
* All embodiments share one input and one output layer over the zero-padded union of their channels.
* Queries and keys are normalised, and every token has linear layers of its own on either side of the quantiser.
* Fourier features: `width` / 2 frequencies from 1/20 to 32 Hz in geometric steps; an action space that states no control
  rate counts as having `rate_hz`. Prompts: `prompts` vectors, "none" with probability `prompt_dropout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from actok.core import ActionSpace, CodecBatch, CodecOutput, ConfigError
from actok.nn.slots import SlotLinear
from actok.nn.transformer import Attention, FeedForward
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count, check_range
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

__all__ = ["ActionCodec", "ActionCodecConfig", "ActionCodecTokenizer"]

# Of the Fourier features, in Hz: half a period of the slowest outlasts a chunk, the fastest tells 60 Hz steps apart.
SLOWEST, FASTEST = 0.05, 32.0


@dataclass(frozen=True, kw_only=True)
class ActionCodecConfig:
    """Settings of ActionCodec.

    Attributes:
        tokens: S, latent queries.
        latent_dim: C.
        width, depth, heads: of encoder and decoder each.
        prompts: vectors of each embodiment.
        prompt_dropout: probability that a training chunk has the prompts of no embodiment.
        rate_hz: control rate assumed of an action space that states none.
        block: tokens of one step of block-wise decoding.
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of the actions.
    """

    tokens: int = 16
    latent_dim: int = 512
    width: int = 256
    depth: int = 6
    heads: int = 8
    prompts: int = 1
    prompt_dropout: float = 0.1
    rate_hz: float = 20.0
    block: int = 1
    quantizer: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "residual", "levels": 1, "codes": 2048, "dropout": 0.25}
    )
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        for name in ("tokens", "latent_dim", "width", "depth", "heads", "prompts", "block"):
            check_count(name, getattr(self, name))
        if self.width % self.heads or self.width % 2:
            raise ConfigError(
                f"width is {self.width} with {self.heads} heads; give an even number that is a multiple of them"
            )
        check_range("prompt_dropout", self.prompt_dropout, 0.0, 1.0)
        if check_range("rate_hz", self.rate_hz, 0.0) == 0:
            raise ConfigError("rate_hz is 0; give a control rate in Hz, above 0")


class Reader(nn.Module):
    """`depth` times: each query attends to a context, then feed-forward; residual. Queries do not see each other."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.context_norm = nn.RMSNorm(width)
        self.query_norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.attentions = nn.ModuleList(
            Attention(width, heads, context_width=width, qk_norm=True) for _ in range(depth)
        )
        self.feed_norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.feeds = nn.ModuleList(FeedForward(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)

    def forward(self, queries: Float[Tensor, "B L W"], context: Float[Tensor, "B M W"]) -> Float[Tensor, "B L W"]:
        """What the queries have read, normalised."""
        x, context = queries, self.context_norm(context)
        layers = zip(self.query_norms, self.attentions, self.feed_norms, self.feeds, strict=True)
        for query_norm, attention, feed_norm, feed in layers:
            x = x + attention(query_norm(x), context)
            x = x + feed(feed_norm(x))
        return self.norm(x)


class ActionCodec(Codec):
    """The network; levels come first in a sequence."""

    order = "level"

    def __init__(self, config: ActionCodecConfig, shape: CodecShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        width = config.width
        self.quantizer = make_quantizer(config.quantizer, config.latent_dim)
        self.action_in = nn.Linear(shape.channels, width)
        nn.init.normal_(
            self.action_in.weight
        )  # as large as the Fourier features, which would drown the actions otherwise
        self.queries = nn.Parameter(0.02 * torch.randn(config.tokens, width))
        self.encoder = Reader(config.depth, width, config.heads)
        self.to_latent = SlotLinear(config.tokens, width, config.latent_dim)
        self.from_latent = SlotLinear(config.tokens, config.latent_dim, width)
        self.decoder = Reader(config.depth, width, config.heads)
        self.action_out = nn.Linear(width, shape.channels)
        # Embodiment 0 is none. One half of a row is for the encoder, the other for the decoder.
        self.prompts = nn.Embedding(len(shape.embodiments) + 1, 2 * config.prompts * width)
        nn.init.normal_(self.prompts.weight, std=0.02)
        self.register_buffer("frequencies", torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), width // 2), False)

    frequencies: Tensor

    @classmethod
    def structure(cls, config: ActionCodecConfig, space: ActionSpace, shape: CodecShape) -> dict[str, np.ndarray]:
        """seconds: float32 [T], when each step is commanded."""
        return {"seconds": (np.arange(shape.horizon) / (space.rate_hz or config.rate_hz)).astype(np.float32)}

    def forward(self, batch: CodecBatch) -> CodecOutput:
        """See Codec.forward; in training mode, chunks at random belong to no known embodiment."""
        if self.training and self.config.prompt_dropout:
            drops = torch.rand(len(batch), device=batch.embodiment.device) < self.config.prompt_dropout
            batch = replace(batch, embodiment=batch.embodiment.masked_fill(drops, 0))
        return super().forward(batch)

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode."""
        prompts, _ = self._prompts(batch)
        steps = self.action_in(batch.actions) + self._time(batch)
        queries = self.queries.expand(steps.shape[0], -1, -1)
        return self.to_latent(self.encoder(queries, torch.cat([prompts, steps], 1)))

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode."""
        _, prompts = self._prompts(batch)
        context = torch.cat([prompts, self.from_latent(latents)], 1)
        return self.action_out(self.decoder(self._time(batch), context))

    def _prompts(self, batch: CodecBatch) -> tuple[Float[Tensor, "B P W"], Float[Tensor, "B P W"]]:
        """The embodiments' prompts for encoder and decoder."""
        encoder, decoder = self.prompts(batch.embodiment).unflatten(1, (2, -1, self.config.width)).unbind(1)
        return encoder, decoder

    def _time(self, batch: CodecBatch) -> Float[Tensor, "B T W"]:
        """Fourier features of the steps' times."""
        angle = 2 * math.pi * batch.structure["seconds"][:, :, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)


class ActionCodecTokenizer(NeuralTokenizer):
    """ActionCodec behind the contract of every tokenizer."""

    kind = "actioncodec"
    config_class = ActionCodecConfig
    codec_class = ActionCodec
    config: ActionCodecConfig

    def _slots(self, embodiment: Embodiment) -> int:
        return self.codec.quantizer.slots or self.config.tokens

    def _places(self, slot: Int[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """A latent reads the whole window: it is a part of it, not a time."""
        return np.zeros_like(slot), slot

    def _block(self) -> int:
        return self.config.block
