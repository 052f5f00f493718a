"""OAT: ordered action tokens (arXiv 2602.04215), and block-compatible OAT (arXiv 2607.21670).

    [steps 1 ... T | registers 1 ... S] -> Transformer -> the registers' outputs -> FSQ -> codes 1 ... S
    codes 1 ... n, a learned mask vector for the others -> Transformer decoder with one query a step -> steps 1 ... T

Steps see all steps; a register sees all steps, itself and the registers before it, so that a code depends on none after
it. In training all but the first n registers of a chunk are replaced by the mask vector, n drawn from `prefixes`: early
registers learn what matters most, and each of these lengths decodes to a whole chunk (nested dropout).

With `blocks`, registers see their whole block and the blocks before, and prefixes end where blocks do: a policy may then
emit one block in each pass. Without, every register is a block of its own and the prefixes are 1, 2, 4, ... and S.

From the papers: width 256, heads of 64, encoder depth 2, decoder depth 4, 8 registers, FSQ of 8 x 5 x 5 x 5 codes,
query-key norm, SwiGLU, sinusoidal queries, mean squared error; the block sizes 1, 1, 2, 4, 8 of 16 registers.

Our choices, where nothing is stated: all prefixes are equally likely; latents have `latent_dim` channels and the quantiser
projects them; steps enter with the sinusoids that query the decoder; every register has linear layers of its own on either
side of the quantiser. Several quantiser levels, which the papers do not have, stand next to each other in a register's
place. Embodiments share all layers, over the zero-padded union of their channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import CodecBatch, ConfigError, TokenLayout
from actok.nn.slots import SlotLinear
from actok.nn.transformer import Stack, block_causal_mask, sinusoids
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape, masked_mean, weights
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer

__all__ = ["Oat", "OatConfig", "OatTokenizer"]


@dataclass(frozen=True, kw_only=True)
class OatConfig:
    """Settings of OAT.

    Attributes:
        registers: S, tokens of a window (times the quantiser's levels).
        blocks: sizes of the blocks of registers, which add up to S. Empty: one register each, the causal OAT.
        prefixes: numbers of registers that training keeps, ascending to S, each the end of a block. Empty: the ends of
            all blocks, or 1, 2, 4, ... and S without blocks.
        latent_dim: C.
        width, heads: of both Transformers.
        encoder_depth, decoder_depth: their numbers of blocks.
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of the actions.
    """

    registers: int = 8
    blocks: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    latent_dim: int = 64
    width: int = 256
    heads: int = 4
    encoder_depth: int = 2
    decoder_depth: int = 4
    quantizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "fsq", "levels": [8, 5, 5, 5]})
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        for name in ("registers", "latent_dim", "width", "heads", "encoder_depth", "decoder_depth"):
            check_count(name, getattr(self, name))
        for name in ("blocks", "prefixes"):
            if not isinstance(getattr(self, name), tuple):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a list of whole numbers")
            for number in getattr(self, name):
                check_count(name, number)
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads; give a multiple of them")
        if self.blocks and sum(self.blocks) != self.registers:
            raise ConfigError(
                f"blocks {list(self.blocks)} hold {sum(self.blocks)} registers, registers is {self.registers}; make them"
                " agree"
            )
        if self.prefixes:
            ascending = all(a < b for a, b in itertools.pairwise(self.prefixes))
            if not ascending or self.prefixes[-1] != self.registers or not set(self.prefixes) <= set(self.ends):
                raise ConfigError(
                    f"prefixes are {list(self.prefixes)}; give ascending numbers of registers that end with"
                    f" {self.registers}, out of {', '.join(map(str, self.ends))}"
                )

    @property
    def ends(self) -> tuple[int, ...]:
        """Registers before the end of each block."""
        return tuple(itertools.accumulate(self.blocks or (1,) * self.registers))

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of registers that training keeps: `prefixes` with its default filled in."""
        powers = {2**i for i in range(self.registers.bit_length())}
        return self.prefixes or tuple(n for n in self.ends if self.blocks or n in {*powers, self.registers})


class Oat(Codec):
    """The network. Levels of a register stand together, register after register."""

    order = "slot"

    def __init__(self, config: OatConfig, shape: CodecShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        steps, slots, width = shape.horizon, config.registers, config.width
        self.quantizer = make_quantizer(config.quantizer, config.latent_dim)
        if self.quantizer.slots is not None:
            raise ConfigError(
                f"quantizer kind {config.quantizer['kind']!r} mixes all registers in its codes, so that no prefix decodes;"
                " use one that gives each register codes of its own, such as 'fsq'"
            )
        self.action_in = nn.Linear(shape.channels, width)
        nn.init.normal_(self.action_in.weight)  # as large as the sinusoids, which would drown the actions otherwise
        self.registers = nn.Parameter(0.02 * torch.randn(slots, width))
        self.encoder = Stack(config.encoder_depth, width, config.heads, qk_norm=True)
        self.to_latent = SlotLinear(slots, width, config.latent_dim)
        self.from_latent = SlotLinear(slots, config.latent_dim, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.decoder = Stack(config.decoder_depth, width, config.heads, context_width=width, qk_norm=True)
        self.action_out = nn.Linear(width, shape.channels)
        # Constants of config and shape: not part of the weights.
        self.register_buffer("time", sinusoids(steps, width), persistent=False)
        self.register_buffer("seen", register_mask(steps, config.ends), persistent=False)
        self.register_buffer("kept", torch.tensor(config.kept), persistent=False)

    time: Tensor
    seen: Tensor
    kept: Tensor

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode: what the registers have read."""
        steps = self.action_in(batch.actions) + self.time
        x = torch.cat([steps, self.registers.expand(steps.shape[0], -1, -1)], 1)
        return self.to_latent(self.encoder(x, mask=self.seen)[:, steps.shape[1] :])

    def decode(self, latents: Float[Tensor, "B n C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """Normalised actions from the latents of the first n <= S registers.

        The others are masked. In training mode, so are all but a random number of those given.
        """
        x = self.from_latent(latents)
        count, given = x.shape[:2]
        if self.training:
            kept = self.kept[torch.randint(len(self.kept), (count, 1), device=x.device)]
            x = torch.where((torch.arange(given, device=x.device) < kept)[:, :, None], x, self.mask.to(x.dtype))
        x = torch.cat([x, self.mask.to(x.dtype).expand(count, self.config.registers - given, -1)], 1)
        return self.action_out(self.decoder(self.time.expand(count, -1, -1), x))

    def reconstruction_losses(self, batch: CodecBatch, reconstruction: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Mean squared error over real steps and present channels."""
        return {"mse": masked_mean((reconstruction - batch.actions).square(), weights(batch))}


def register_mask(steps: int, ends: tuple[int, ...]) -> Bool[Tensor, "L L"]:
    """Who sees whom, [T + S, T + S]: steps see steps, registers see steps and registers up to the end of their block."""
    sizes = [b - a for a, b in itertools.pairwise((0, *ends))]
    seen = torch.zeros(steps + ends[-1], steps + ends[-1], dtype=torch.bool)
    seen[:, :steps] = True
    seen[steps:, steps:] = block_causal_mask(sizes)
    return seen


class OatTokenizer(NeuralTokenizer):
    """OAT behind the contract of every tokenizer. Each of `layout.prefixes` decodes to a whole chunk."""

    kind = "oat"
    config_class = OatConfig
    codec_class = Oat
    config: OatConfig

    def _window_layout(self, embodiment: Embodiment) -> TokenLayout:
        """Coordinates: register as level, time 0, quantiser level as part. Tables: one a quantiser level."""
        levels = self.codec.quantizer.levels
        register, level = np.divmod(np.arange(self.config.registers * levels), levels)
        ends = [levels * end for end in self.config.ends]
        return TokenLayout(
            vocab=np.array(self.codec.quantizer.sizes)[level],
            table=level,
            coords=np.stack([register, np.zeros_like(register), level], 1),
            blocks=tuple(tuple(range(a, b)) for a, b in itertools.pairwise((0, *ends))),
            prefixes=tuple(levels * n for n in self.config.kept),
            min_len=len(register),
            max_len=len(register),
            total=True,
        )

    def _order(self, windows: int, embodiment: Embodiment) -> Int[np.ndarray, "N"]:
        """Registers first, then windows: a prefix of the sequence is the same prefix of every window."""
        one = self._window_layout(embodiment)
        window, place = np.divmod(np.arange(windows * one.max_len), one.max_len)
        return np.lexsort((place, window, one.coords[place, 0]))
