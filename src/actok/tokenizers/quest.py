"""QueST's skill autoencoder (Mete et al. 2024, arXiv 2407.15840, section 4.1): causal in time from end to end.

    actions [T, D] -> strided causal convolutions, one latent per `downsample` steps -> causal Transformer
            -> FSQ, one code a latent -> Transformer decoder: a query a step, which reads the codes -> [T, D]

Slot j is a time: its code depends on the steps before (j + 1) * downsample, and step t is decoded from the codes up to
slot t // downsample. So the codes of a motion's beginning do not change with its continuation, and the first j codes are
enough for the first j * downsample steps. Every sequence decodes.

Loss: mean absolute error; FSQ adds none.

What differs from the paper, or is not stated there:

* The decoder's causal mask covers attention over the codes too, which makes the second half of the statement above true.
* One convolution of stride 2 for each halving (kernels of 5, then 3 steps) and one residual convolution after them.
* Attention blocks are this library's: pre-norm, SwiGLU, rotary positions in the encoder, sinusoidal queries in the
  decoder (the paper's kind).
* A horizon that is no multiple of `downsample` is filled up with its last step, and cut after decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float

from actok.core import CodecBatch, ConfigError
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape  # first: it says if torch is missing
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from actok.nn.convolution import ConvBlock, TimeConv
from actok.nn.transformer import Stack, block_causal_mask, sinusoids
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count, check_range

__all__ = ["Quest", "QuestConfig", "QuestTokenizer"]


@dataclass(frozen=True, kw_only=True)
class QuestConfig:
    """Settings of QueST's autoencoder.

    Attributes:
        downsample: steps of one token, a power of two (the paper: 4).
        width, heads: of the blocks (the paper: 256 and 4).
        encoder_depth, decoder_depth: Transformer blocks (the paper: 2 and 4).
        dropout: in the blocks, in training (the paper: 0.1).
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of the actions.
    """

    downsample: int = 4
    width: int = 256
    heads: int = 4
    encoder_depth: int = 2
    decoder_depth: int = 4
    dropout: float = 0.1
    quantizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "fsq", "levels": [8, 5, 5, 5]})
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        for name in ("downsample", "width", "heads", "encoder_depth", "decoder_depth"):
            check_count(f"quest: {name}", getattr(self, name))
        check_range("quest: dropout", self.dropout, 0.0, 0.9)
        if self.downsample.bit_count() != 1:
            raise ConfigError(f"quest: downsample is {self.downsample}; give a power of two, such as 4")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(
                f"quest: width {self.width} and {self.heads} heads; a head's size width / heads must be even and whole"
            )


class Quest(Codec):
    """The network; S = ceil(T / downsample)."""

    order = "slot"

    def __init__(self, config: QuestConfig, shape: CodecShape) -> None:
        super().__init__()
        self.shape = shape
        self.slots = -(-shape.horizon // config.downsample)
        self.missing = self.slots * config.downsample - shape.horizon
        width, halvings = config.width, config.downsample.bit_length() - 1
        self.lift = nn.Linear(shape.channels, width)
        self.convs = nn.ModuleList(
            TimeConv(width, width, 5 if i == 0 else 3, stride=2, causal=True) for i in range(halvings)
        )
        self.mix = ConvBlock(width, 3, causal=True)
        self.encoder = Stack(config.encoder_depth, width, config.heads, rotary=True, dropout=config.dropout)
        self.quantizer = make_quantizer(config.quantizer, width)
        self.decoder = Stack(config.decoder_depth, width, config.heads, context_width=width, dropout=config.dropout)
        self.head = nn.Linear(width, shape.channels)
        step = torch.arange(shape.horizon)
        seen = torch.arange(self.slots) <= (step // config.downsample)[:, None]
        self.register_buffer("queries", sinusoids(shape.horizon, width), persistent=False)
        self.register_buffer("earlier_slots", block_causal_mask([1] * self.slots), persistent=False)
        self.register_buffer("earlier_steps", block_causal_mask([1] * shape.horizon), persistent=False)
        self.register_buffer("seen_slots", seen, persistent=False)

    queries: Tensor
    earlier_slots: Tensor
    earlier_steps: Tensor
    seen_slots: Tensor

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode."""
        x = batch.actions
        if self.missing:
            x = torch.cat([x, x[:, -1:].expand(-1, self.missing, -1)], 1)
        x = self.lift(x)
        for conv in self.convs:
            x = nn.functional.gelu(conv(x))
        return self.encoder(self.mix(x), mask=self.earlier_slots)

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode."""
        queries = self.queries.expand(len(latents), -1, -1)
        return self.head(self.decoder(queries, latents, mask=self.earlier_steps, context_mask=self.seen_slots))


class QuestTokenizer(NeuralTokenizer):
    """QueST's autoencoder behind the contract of every tokenizer."""

    kind = "quest"
    config_class = QuestConfig
    codec_class = Quest
    config: QuestConfig

    def _slots(self, embodiment: Embodiment) -> int:
        return -(-self.shape.horizon // self.config.downsample)
