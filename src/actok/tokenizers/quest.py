"""QueST's skill autoencoder (Mete et al. 2024, arXiv 2407.15840, section 4.1): codes that are causal in time.

    actions [T, D] -> strided causal convolutions, one latent per `downsample` steps -> causal Transformer
            -> FSQ, one code a latent -> Transformer decoder: a query a step, which reads the codes -> [T, D]

Slot j is a time: its code depends on the steps before (j + 1) * downsample only, so the codes of a motion's beginning do
not change with its continuation. Every sequence decodes.

Loss: mean absolute error; FSQ adds none.

What differs from the paper, or is not stated there:

* The decoder's causal mask is that of attention among the steps; every step reads all codes. (Were step t to read the
  codes up to its own time only, one code would have to say where all joints are in the first `downsample` steps.)
* One convolution of stride 2 for each halving (kernels of 5, then 3 steps) and one residual convolution after them.
* Attention blocks are this library's: pre-norm, SwiGLU, rotary positions in the encoder, sinusoidal queries in the
  decoder (the paper's kind), a learned vector added to each slot there.
* A horizon that is no multiple of `downsample` is filled up with its last step, and cut after decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actok.core import CodecBatch, ConfigError
from actok.nn.convolution import ConvBlock, TimeConv
from actok.nn.transformer import Stack, block_causal_mask, sinusoids
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count, check_range
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

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
        # As in a residual network's start. With PyTorch's own, random biases outweigh the actions, latents of all chunks are
        # nearly one, and FSQ's rounding hides the rest: whole dimensions then stay unlearnt for long.
        for value in [*self.lift.parameters(), *self.convs.parameters()]:
            if value.ndim > 1:
                nn.init.kaiming_normal_(value, nonlinearity="relu")
            else:
                nn.init.zeros_(value)
        self.mix = ConvBlock(width, 3, causal=True)
        self.encoder = Stack(config.encoder_depth, width, config.heads, rotary=True, dropout=config.dropout)
        self.quantizer = make_quantizer(config.quantizer, width)
        self.place = nn.Parameter(torch.randn(2, self.slots, width) / 4)  # of each slot, in encoder and decoder
        self.context_norm = nn.RMSNorm(width)
        self.decoder = Stack(config.decoder_depth, width, config.heads, context_width=width, dropout=config.dropout)
        self.head = nn.Linear(width, shape.channels)
        self.register_buffer("queries", sinusoids(shape.horizon, width), persistent=False)
        self.register_buffer("earlier_slots", block_causal_mask([1] * self.slots), persistent=False)
        self.register_buffer("earlier_steps", block_causal_mask([1] * shape.horizon), persistent=False)

    queries: Tensor
    earlier_slots: Tensor
    earlier_steps: Tensor

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode."""
        x = batch.actions
        if self.missing:
            x = torch.cat([x, x[:, -1:].expand(-1, self.missing, -1)], 1)
        x = self.lift(x)
        for conv in self.convs:
            x = nn.functional.gelu(conv(x))
        return self.encoder(self.mix(x) + self.place[0], mask=self.earlier_slots)

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode."""
        queries = self.queries.expand(latents.shape[0], -1, -1)
        codes = self.context_norm(latents + self.place[1])
        return self.head(self.decoder(queries, codes, mask=self.earlier_steps))


class QuestTokenizer(NeuralTokenizer):
    """QueST's autoencoder behind the contract of every tokenizer."""

    kind = "quest"
    config_class = QuestConfig
    codec_class = Quest
    config: QuestConfig

    def _slots(self, embodiment: Embodiment) -> int:
        return -(-self.shape.horizon // self.config.downsample)
