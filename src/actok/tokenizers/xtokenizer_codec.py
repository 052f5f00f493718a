"""X-Tokenizer's network and its settings, on the shared channels; `actok.tokenizers.xtokenizer` says where they are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import (
    CodecBatch,
    CodecOutput,
    ConfigError,
)
from actok.nn.transformer import Attention, FeedForward
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count, check_range
from actok.signal.normalise import NormaliserKind
from actok.tokenizers.codec import Codec, CodecShape, dct_matrix, masked_mean, weights
from actok.tokenizers.xtokenizer_layout import FrameName, LayoutName, layout_space

SLOT_STEPS = 4
# Shortest chunks of training, and the longest window.
LEAST_STEPS, MOST_STEPS = 8, 64

__all__ = ["XTokenizerCodec", "XTokenizerConfig", "angle_between", "slots_of"]


@dataclass(frozen=True, kw_only=True)
class XTokenizerConfig:
    """Settings of X-Tokenizer.

    Attributes:
        layout: "26", the paper's channels, or "wide", with joints and hands behind them.
        frame: "relative" to the chunk's start, or "step": groups commanded step by step stay steps.
        latent_dim: C.
        width, heads: of all layers.
        encoder_depth, decoder_depth: layers.
        dropout: of attention and layers, in training.
        state: who reads the proprioception at the chunk's start: "both", "decoder" or "none".
        state_dropout, embodiment_dropout, both_dropout: probabilities that a training chunk has the state "none", the
            embodiment "none", or both; they exclude each other.
        rotation_weight: of the angle between rotations, in rad, beside the l1 loss, whose weight is 1.
        dct_weight: of the l1 loss of DCT coefficients over time.
        velocity_weight: of the l1 loss of first differences.
        quantizer: see `actok.quantizers.make_quantizer`.
        normaliser: of raw actions, for ranges and limits; the shared channels have the paper's.
    """

    layout: LayoutName = "wide"
    frame: FrameName = "relative"
    latent_dim: int = 256
    width: int = 1024
    heads: int = 8
    encoder_depth: int = 12
    decoder_depth: int = 4
    dropout: float = 0.1
    state: Literal["both", "decoder", "none"] = "both"
    state_dropout: float = 0.2
    embodiment_dropout: float = 0.2
    both_dropout: float = 0.1
    rotation_weight: float = 0.2
    dct_weight: float = 0.5
    velocity_weight: float = 0.3
    quantizer: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "residual", "levels": 4, "codes": 2048, "decay": 0.8, "kmeans_steps": 100}
    )
    normaliser: NormaliserKind = "quantile"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", str(self.layout))  # `--set layout=26` is read as a number
        for name, known in (
            ("layout", get_args(LayoutName)),
            ("frame", get_args(FrameName)),
            ("state", ("both", "decoder", "none")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, known))}")
        for name in ("latent_dim", "width", "heads", "encoder_depth", "decoder_depth"):
            check_count(name, getattr(self, name))
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"width is {self.width} with {self.heads} heads; rotary positions take an even share of it for each head"
            )
        for name in ("dropout", "state_dropout", "embodiment_dropout", "both_dropout"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        if (total := self.state_dropout + self.embodiment_dropout + self.both_dropout) > 1:
            raise ConfigError(
                f"state_dropout, embodiment_dropout and both_dropout add up to {total:g}; they exclude each other, so give"
                " at most 1 in all"
            )
        for name in ("rotation_weight", "dct_weight", "velocity_weight"):
            check_range(name, getattr(self, name), 0.0)


class Layer(nn.Module):
    """Queries read a context, then each other, then a feed-forward layer; pre-norm, residual, rotary times."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.read_norm = nn.RMSNorm(width)
        self.read = Attention(width, heads, context_width=width, qk_norm=True, rotary=True, dropout=dropout)
        self.mix_norm = nn.RMSNorm(width)
        self.mix = Attention(width, heads, qk_norm=True, rotary=True, dropout=dropout)
        self.feed_norm = nn.RMSNorm(width)
        self.feed = FeedForward(width, gated=False, dropout=dropout)

    def forward(
        self,
        x: Float[Tensor, "B L W"],
        context: Float[Tensor, "B M W"],
        times: Float[Tensor, "L"],
        context_times: Float[Tensor, "M"],
        mask: Bool[Tensor, "B 1 1 M"] | None,
    ) -> Float[Tensor, "B L W"]:
        """`mask`: True where the context may be read."""
        x = x + self.read(self.read_norm(x), context, mask, positions=times, context_positions=context_times)
        x = x + self.mix(self.mix_norm(x), positions=times)
        return x + self.feed(self.feed_norm(x))


class Reader(nn.Module):
    """`depth` layers, and a final norm."""

    def __init__(self, depth: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.context_norm = nn.RMSNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)

    def forward(
        self,
        x: Float[Tensor, "B L W"],
        context: Float[Tensor, "B M W"],
        times: Float[Tensor, "L"],
        context_times: Float[Tensor, "M"],
        mask: Bool[Tensor, "B 1 1 M"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """As `Layer`, `depth` times."""
        context = self.context_norm(context)
        for layer in self.layers:
            x = layer(x, context, times, context_times, mask)
        return self.norm(x)


class XTokenizerCodec(Codec):
    """The network, on the shared channels. The levels of a slot stand together, slot after slot.

    A batch may have any number of steps up to the trained horizon.
    """

    order = "slot"
    reads_state = True

    def __init__(self, config: XTokenizerConfig, shape: CodecShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        width, channels, numbers = config.width, shape.channels, max(1, shape.extra["state"])
        self.quantizer = make_quantizer(config.quantizer, config.latent_dim)
        if self.quantizer.slots is not None:
            raise ConfigError(
                f"quantizer kind {config.quantizer['kind']!r} takes a fixed number of slots, of which a chunk has as many as"
                " its length asks for; use one that gives each slot codes of its own, such as 'residual'"
            )
        self.action_in = nn.Linear(channels, width)
        self.queries = nn.Parameter(0.02 * torch.randn(slots_of(shape.horizon), width))
        self.own_frames = nn.Linear(SLOT_STEPS * channels, width, bias=False)
        self.encoder = Reader(config.encoder_depth, width, config.heads, config.dropout)
        self.to_latent = nn.Linear(width, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, width)
        self.frames = nn.Parameter(0.02 * torch.randn(shape.horizon, width))
        self.own_slot = nn.Linear(width, width, bias=False)
        self.decoder = Reader(config.decoder_depth, width, config.heads, config.dropout)
        self.action_out = nn.Linear(width, channels)
        self.state_in = nn.Linear(numbers, width)
        self.no_state = nn.Parameter(0.02 * torch.randn(width))
        # What both sides know of the robot: which one (0: none) and which channels it has. One half for each side.
        self.robots = nn.Embedding(len(shape.embodiments) + 1, 2 * width)
        nn.init.normal_(self.robots.weight, std=0.02)
        self.present_in = nn.Linear(channels, 2 * width, bias=False)

    def slot_steps(self, steps: int) -> Int[np.ndarray, "S 2"] | None:
        """See Codec.slot_steps: slot i stands for the frames 4i to 4i + 3, in a chunk of any length."""
        first = SLOT_STEPS * np.arange(slots_of(steps))
        return np.stack([first, np.minimum(first + SLOT_STEPS, steps)], 1)

    def forward(self, batch: CodecBatch) -> CodecOutput:
        """See Codec.forward; in training mode, chunks at random lose their state, their embodiment, or both."""
        if self.training:
            config = self.config
            dice = torch.rand(len(batch), device=batch.actions.device)
            state = dice < config.both_dropout + config.state_dropout
            robot = dice < config.both_dropout
            robot |= (dice >= config.both_dropout + config.state_dropout) & (
                dice < config.both_dropout + config.state_dropout + config.embodiment_dropout
            )
            batch = replace(
                batch, embodiment=batch.embodiment.masked_fill(robot, 0), has_state=batch.has_state & ~state
            )
        return super().forward(batch)

    def encode(self, batch: CodecBatch) -> Float[Tensor, "B S C"]:
        """See Codec.encode: latents of ceil(T / 4) slots."""
        steps = batch.actions.shape[1]
        robot, _ = self._robot(batch)
        slots = slots_of(steps)
        frames, times = self.action_in(batch.actions), self._times(steps, frames=True)
        real = F.pad(batch.actions * batch.real[:, :, None], (0, 0, 0, SLOT_STEPS * slots - steps))
        own = self.own_frames(real.unflatten(1, (slots, SLOT_STEPS)).flatten(2))
        # A chunk of padding alone, the rest of one that has ended, reads its padding.
        seen = batch.real | ~batch.real.any(1, keepdim=True)
        if self.config.state == "both":
            frames, times, seen = self._with_state(frames, times, seen, batch)
        queries = self.queries[:slots] + robot[:, None] + own
        read = self.encoder(queries, frames, self._times(steps, frames=False), times, seen[:, None, None])
        return self.to_latent(read)

    def decode(self, latents: Float[Tensor, "B S C"], batch: CodecBatch) -> Float[Tensor, "B T D"]:
        """See Codec.decode; T is that of `batch.actions`, and the state is read too."""
        steps = batch.actions.shape[1]
        _, robot = self._robot(batch)
        x, times = self.from_latent(latents), self._times(steps, frames=False)
        own = self.own_slot(x).repeat_interleave(SLOT_STEPS, 1)[:, :steps]
        if self.config.state != "none":
            x, times, _ = self._with_state(x, times, None, batch)
        queries = self.frames[:steps] + robot[:, None] + own
        return self.action_out(self.decoder(queries, x, self._times(steps, frames=True), times))

    def reconstruction_losses(self, batch: CodecBatch, reconstruction: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """l1, and with their weights DCT, velocity and the angle between rotations; over real steps and present channels.

        For the DCT, padded steps of both sides hold the last real value.
        """
        config, mask, error = self.config, weights(batch), reconstruction - batch.actions
        losses = {"l1": masked_mean(error.abs(), mask)}
        if config.dct_weight:
            steps = torch.arange(error.shape[1], device=error.device)
            last = (batch.real.sum(1, keepdim=True) - 1).clamp(min=0)
            held = torch.minimum(steps, last)[:, :, None].expand_as(error)
            spectrum = dct_matrix(len(steps), error.device) @ error.float().gather(1, held)
            present = batch.present[:, None].expand_as(error)
            losses["dct"] = config.dct_weight * masked_mean(spectrum.abs(), present)
        if config.velocity_weight and error.shape[1] > 1:
            losses["velocity"] = config.velocity_weight * masked_mean(error.diff(dim=1).abs(), mask[:, 1:])
        if config.rotation_weight and self.shape.extra["rotations"]:
            losses["rotation"] = config.rotation_weight * self._angle(batch, reconstruction)
        return losses

    def _angle(self, batch: CodecBatch, reconstruction: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
        """Mean angle in rad over real steps and present rotations, 0 where there is none."""
        channels = torch.tensor(rotation_channels(self.config.layout), device=reconstruction.device)  # [2, 6]
        present = batch.present[:, channels].all(-1) & batch.structure["rotates"].bool()
        rows = batch.real[:, :, None] & present[:, None]
        centre, half = (batch.structure[key][:, None, channels] for key in ("centre", "half"))
        found, wanted = (x[:, :, channels].float() * half + centre for x in (reconstruction, batch.actions))
        # Absent rotations are all zeros; the angle of one from itself has a finite gradient, which then counts for nothing.
        angle = angle_between(torch.where(rows[..., None], found, wanted).flatten(0, 2), wanted.flatten(0, 2))
        return (angle * rows.flatten()).sum() / rows.sum().clamp(min=1)

    def _robot(self, batch: CodecBatch) -> tuple[Float[Tensor, "B W"], Float[Tensor, "B W"]]:
        """What is known of the robots, for encoder and decoder."""
        known = self.robots(batch.embodiment) + self.present_in(batch.present.to(self.action_in.weight.dtype))
        encoder, decoder = known.chunk(2, -1)
        return encoder, decoder

    def _with_state(
        self,
        x: Float[Tensor, "B M W"],
        times: Float[Tensor, "M"],
        seen: Bool[Tensor, "B M"] | None,
        batch: CodecBatch,
    ) -> tuple[Float[Tensor, "B M1 W"], Float[Tensor, "M1"], Bool[Tensor, "B M1"] | None]:
        """What is read, with the state in front, at time 0."""
        state = torch.where(batch.has_state[:, None], self.state_in(batch.state), self.no_state)[:, None]
        if seen is not None:
            seen = torch.cat([seen.new_ones(len(seen), 1), seen], 1)
        return torch.cat([state.to(x.dtype), x], 1), torch.cat([times.new_zeros(1), times]), seen

    def _times(self, steps: int, *, frames: bool) -> Float[Tensor, "L"]:
        """Of frames, or of slots: the middle of their four frames."""
        device = self.queries.device
        if frames:
            return torch.arange(steps, dtype=torch.float32, device=device)
        middle = (SLOT_STEPS - 1) / 2
        return SLOT_STEPS * torch.arange(slots_of(steps), dtype=torch.float32, device=device) + middle


def slots_of(steps: int) -> int:
    """S of a chunk."""
    return -(-steps // SLOT_STEPS)


def rotation_channels(layout: LayoutName) -> list[list[int]]:
    """Channels of the layout's 6-D rotations."""
    return [list(g.dims) for g in layout_space(layout).groups if g.kind == "rotation"]


def angle_between(a: Float[Tensor, "N 6"], b: Float[Tensor, "N 6"]) -> Float[Tensor, "N"]:
    """Angle in rad between 6-D rotations made orthonormal; finite gradients everywhere, also at 0.

    atan2 of sine and cosine, as `actok.signal.rotations.geodesic_distance`; the root of the squared sine is smoothed by
    1e-6, which is the error of an angle of 0.
    """
    m = _matrices(a).transpose(1, 2) @ _matrices(b)
    sine = torch.stack([m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], -1)
    return torch.atan2((sine.square().sum(-1) + 1e-12).sqrt(), m.diagonal(dim1=1, dim2=2).sum(-1) - 1.0)


def _matrices(six: Float[Tensor, "N 6"]) -> Float[Tensor, "N 3 3"]:
    """Gram-Schmidt (Zhou et al. 2019, section 4.2)."""
    first = F.normalize(six[:, :3], dim=1, eps=1e-4)
    second = six[:, 3:] - (first * six[:, 3:]).sum(1, keepdim=True) * first
    second = F.normalize(second, dim=1, eps=1e-4)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)
