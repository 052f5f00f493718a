"""X-Tokenizer: one tokenizer for many arms, whose codes a vision-language model can learn (arXiv 2606.14752).

    actions -> shared channels, relative to the chunk's start (`xtokenizer_layout`)
    frames -> read by one latent query per 4 frames, `encoder_depth` times -> residual vector quantisation -> codes
    codes' vectors -> read by one query a frame, `decoder_depth` times -> shared channels -> actions

Every layer is cross-attention to what is read (frames or latents, and the proprioception at the chunk's start), then
self-attention, then feed-forward; rotary positions are times in frames. A chunk of T steps has ceil(T / 4) slots, whatever
T. One longer than the chunks that were trained on is cut into windows of that length (rounded down to whole slots), the
last one of its own length; each is encoded by itself, in the order of time.

From the paper: the 26 channels (`layout`), ranges between the 0.1 % and 99.9 % quantiles, 12 + 4 layers of width 1024 with 8
heads, feed-forward of 4 x the width, dropout 0.1, rotary base 1e4, up to 16 latent and 64 positional queries, 4 levels of
2048 codes with moving averages of 0.8 and a k-means start, state and embodiment dropped to "none" with probabilities 0.2,
0.2 and 0.1 for both, and the losses with their weights.

Deviations and our choices, where nothing is stated:

* `layout = "wide"` has places for joints, hands and a torso, so that robots without poses take part as they are.
* `frame = "step"` leaves steps as steps. A path that is decoded with an error e in every frame gives steps with an error of
  about 1.4 e, of a range that is several times smaller; where single steps matter (replay), this is the better choice.
* A latent query starts from its own four frames and a frame's query from the latent of its slot, by linear maps beside the
  learned queries, which learns sooner than attention alone.
* Queries and keys are normalised; norms are RMSNorm. Encoder and decoder are told which channels are present.
* The state is the whole proprioception, normalised by its mean and standard deviation, at most 5 of them, and zero-padded to the longest of the
  training embodiments. Later windows of a long chunk have the state "none": nobody knows it when decoding.
* The three dropouts exclude each other: 0.5 of the training chunks keep both.
* A dead code is one below a share of the mean use (see `actok.quantizers.codebook`), not below a count of 2.
* Robots that command absolute values in several windows have them relative to the chunk's start in each; steps and
  velocities begin anew in every window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actok.core import (
    ActionSpace,
    ChunkContext,
    CodecBatch,
    CodecOutput,
    ConfigError,
    DataError,
    FitPart,
    SpaceMismatchError,
    TokenLayout,
    to_numpy,
)
from actok.nn.transformer import Attention, FeedForward
from actok.quantizers import make_quantizer
from actok.quantizers.base import check_count, check_range
from actok.signal.normalise import NormaliserKind
from actok.signal.statistics import Statistics
from actok.tokenizers.base import Encoded
from actok.tokenizers.codec import Codec, CodecShape, dct_matrix, masked_mean, weights
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer
from actok.tokenizers.xtokenizer_layout import FrameName, LayoutName, UnionMap, layout_space
from actok.tokenizers.xtokenizer_ranges import Shared, estimate, measure

SLOT_STEPS = 4
# Shortest chunks of training, and the longest window.
LEAST_STEPS, MOST_STEPS = 8, 64

__all__ = ["XTokenizer", "XTokenizerCodec", "XTokenizerConfig"]


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


class XTokenizer(NeuralTokenizer):
    """X-Tokenizer behind the contract of every tokenizer.

    Robots that command absolute poses need `ChunkContext.anchor` in the action's layout to encode and to decode. For all
    others the anchor [B, P], of the P that they were trained with, is welcome: encoder and decoder read it as the state.
    """

    kind = "xtokenizer"
    config_class = XTokenizerConfig
    codec_class = XTokenizerCodec
    config: XTokenizerConfig

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def _studied(
        cls, parts: Sequence[FitPart], embodiments: dict[str, Embodiment], config: XTokenizerConfig
    ) -> dict[str, Embodiment]:
        steps = parts[0].actions.shape[1]
        if not SLOT_STEPS <= steps <= MOST_STEPS:
            raise ConfigError(
                f"chunks to train on have {steps} steps; give a horizon of {SLOT_STEPS} to {MOST_STEPS} (longer chunks are"
                " then encoded window by window)"
            )
        measured = measure(parts, embodiments, config.layout, config.frame)
        return {name: replace(e, facts=measured[name].facts) for name, e in embodiments.items()}

    @classmethod
    def _shape(cls, config: XTokenizerConfig, embodiments: Mapping[str, Embodiment], horizon: int) -> CodecShape:
        states = [e.facts["state"] for e in embodiments.values()]
        return CodecShape(
            horizon=horizon,
            channels=layout_space(config.layout).dim,
            embodiments=tuple(embodiments),
            extra={
                "state": max((len(s["mean"]) for s in states if s is not None), default=0),
                "rotations": sum(
                    place.endswith("_rotation") for e in embodiments.values() for place, _ in e.facts["places"].values()
                ),
            },
        )

    def training_steps(self, draw: int) -> int:
        """Uniform between 8 and the fitted horizon."""
        return self._horizon if self._horizon <= LEAST_STEPS else LEAST_STEPS + draw % (self._horizon - LEAST_STEPS + 1)

    def _build(self) -> None:
        super()._build()
        layout, frame = self.config.layout, self.config.frame
        self._shared = {n: Shared.of(e.space, e.facts, layout, frame) for n, e in self._embodiments.items()}
        self._structures = {name: shared.tables() for name, shared in self._shared.items()}

    def adapt_to(self, part: FitPart) -> Self:
        """As `adapt`, with the ranges of chunks [B, T, D] of the fitted horizon instead of estimates.

        Raises DataError where the horizon differs, and as `adapt` does.
        """
        if part.actions.shape[1] != self._horizon:
            raise DataError(f"chunks have {part.actions.shape[1]} steps; give chunks of the fitted {self._horizon}")
        statistics = part.statistics or Statistics.from_array(part.actions, part.pad_mask)
        adapted, name = self.adapt(part.space, statistics), part.space.embodiment
        robot = adapted.embodiment(name)
        found = measure([part], {name: robot}, self.config.layout, self.config.frame)[name]
        robots = {**adapted._embodiments, name: replace(robot, facts={**found.facts, "state": None})}
        return type(self)(self.config, robots, self._horizon, self._tensors, self._files, self._meta)

    def _check_adaptable(self, space: ActionSpace) -> None:
        union = UnionMap.infer(space, self.config.layout, self.config.frame)
        trained = {c for name in self.shape.embodiments for c in self._shared[name].union.channels}
        if missing := [p.group.name for p in union.placements if not trained.issuperset(p.channels)]:
            raise SpaceMismatchError(
                f"{', '.join(missing)} of {space.embodiment!r} would take channels that no training embodiment"
                f" ({', '.join(self.shape.embodiments)}) has; train with such an embodiment among the data"
            )

    def _adapted(self, embodiment: Embodiment) -> Embodiment:
        """With estimated ranges: see `actok.tokenizers.xtokenizer_ranges.estimate`."""
        trained = [(self._embodiments[name], self._shared[name]) for name in self.shape.embodiments]
        found = estimate(embodiment, trained, self.config.layout, self.config.frame, self._horizon)
        return replace(embodiment, facts=found.facts)

    # -- batches --------------------------------------------------------------------------------------------------

    def batch(
        self,
        chunks: Float[np.ndarray, "B T _"],
        embodiment: str | None = None,
        *,
        real: Bool[np.ndarray, "B T"] | None = None,
        present: Bool[np.ndarray, "B _"] | None = None,
        anchor: Float[np.ndarray, "B P"] | None = None,
    ) -> CodecBatch:
        """See NeuralTokenizer.batch; in the shared channels, of any number of steps up to the fitted horizon.

        Raises DataError where the robot commands absolute poses and there is no anchor.
        """
        robot = self.embodiment(embodiment)
        raw = robot.normaliser.inverse(chunks.astype(np.float64))
        channels = self._shared[robot.space.embodiment].there(raw, anchor)
        batch = self._described(len(chunks), chunks.shape[1], robot, present, anchor)
        actions = torch.from_numpy(channels) * batch.present[:, None]
        return replace(batch, actions=actions, real=batch.real if real is None else torch.from_numpy(real.copy()))

    def _described(
        self,
        count: int,
        steps: int,
        robot: Embodiment,
        present: Bool[np.ndarray, "{count} D"] | None,
        anchor: Float[np.ndarray, "{count} P"] | None,
    ) -> CodecBatch:
        """A batch of which all is known but the values."""
        name, known = robot.space.embodiment, self.shape.embodiments
        shared = self._shared[name]
        state, has_state = shared.state(anchor, count, max(1, self.shape.extra["state"]))
        return CodecBatch(
            actions=torch.zeros(count, steps, self.shape.channels),
            present=torch.from_numpy(shared.union.present(present, count)),
            real=torch.ones(count, steps, dtype=torch.bool),
            embodiment=torch.full((count,), known.index(name) + 1 if name in known else 0),
            structure={
                key: torch.from_numpy(table).expand(count, *table.shape)
                for key, table in self._structures[name].items()
            },
            state=torch.from_numpy(state),
            has_state=torch.from_numpy(has_state),
        )

    # -- encode, decode -------------------------------------------------------------------------------------------

    def _anchor(
        self, context: ChunkContext, count: int, embodiment: Embodiment
    ) -> Float[np.ndarray, "{count} P"] | None:
        if context.anchor is None:
            return None
        anchor = to_numpy(context.anchor)
        if anchor.ndim != 2 or len(anchor) != count or anchor.dtype.kind not in "fiu":
            raise DataError(
                f"anchor has dtype {anchor.dtype} and shape {anchor.shape}; give the proprioception at the chunks' starts,"
                f" floats [{count}, P]"
            )
        if not np.isfinite(anchor).all():
            row = int(np.argmin(np.isfinite(anchor).all(1)))
            raise DataError(f"anchor of chunk {row} holds a value that is not finite; repair it, or give no anchor")
        return anchor.astype(np.float64)

    def _spans(self, horizon: int) -> list[slice]:
        """Windows of a chunk: itself, or whole slots up to the fitted horizon and the rest."""
        if horizon <= self._horizon:
            return [slice(0, horizon)]
        window = self._horizon // SLOT_STEPS * SLOT_STEPS
        return [slice(i, min(i + window, horizon)) for i in range(0, horizon, window)]

    def _encode(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment, context: ChunkContext) -> Encoded:
        count, name = len(chunks), embodiment.space.embodiment
        anchor = self._anchor(context, count, embodiment)
        real = np.ones(chunks.shape[:2], bool) if context.pad_mask is None else ~to_numpy(context.pad_mask)
        present = None if context.dof_mask is None else to_numpy(context.dof_mask)
        length = self.layout_for(chunks.shape[1], name).max_len
        found = [np.zeros((0, length), np.int64)]
        with torch.inference_mode():
            for cut in self._cuts(count):
                ids = []
                for span in self._spans(chunks.shape[1]):
                    batch = self.batch(
                        chunks[cut, span],
                        name,
                        real=real[cut, span],
                        present=None if present is None else present[cut],
                        anchor=None if anchor is None else anchor[cut],
                    )
                    ids.append(self.codec.tokenize(_at(batch, span).to(self._device)).cpu().numpy())
                found.append(np.concatenate(ids, 1))
        return Encoded(
            flat=np.concatenate(found).reshape(-1),
            offsets=np.arange(count + 1) * length,
            saturated=np.zeros(count, np.int64),
        )

    def _decode_rows(
        self,
        ids: Int[np.ndarray, "B N"],
        horizon: int,
        embodiment: Embodiment,
        present: Bool[np.ndarray, "B D"] | None,
        anchor: np.ndarray | None = None,
    ) -> Float[np.ndarray, "B {horizon} D"]:
        shared, levels = self._shared[embodiment.space.embodiment], self.codec.quantizer.levels
        result = np.zeros((len(ids), horizon, embodiment.space.dim), np.float32)
        with torch.inference_mode():
            for cut in self._cuts(len(ids)):
                some = torch.from_numpy(np.ascontiguousarray(ids[cut], np.int64))
                start = None if anchor is None else anchor[cut]
                mask = None if present is None else present[cut]
                for span in self._spans(horizon):
                    blank = self._described(len(some), span.stop - span.start, embodiment, mask, start)
                    first, last = slots_of(span.start) * levels, slots_of(span.stop) * levels
                    channels = self.codec.detokenize(
                        some[:, first:last].to(self._device), _at(blank, span).to(self._device)
                    )
                    raw = shared.back(channels.float().cpu().numpy(), start, embodiment.normaliser.centre)
                    result[cut, span] = embodiment.normaliser(raw)
        return np.where(embodiment.normaliser.constant, np.float32(0), result)  # what never changed stays exact

    # -- layout ---------------------------------------------------------------------------------------------------

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """See ActionTokenizer.layout_for: ceil(T / 4) slots, all levels of one after another. Coordinates: level, slot, 0."""
        self.embodiment(embodiment)
        slots = slots_of(self._resolve_horizon(horizon, ChunkContext()))
        layout: TokenLayout = self._once(("layout", slots), lambda: self._layout_of_slots(slots))
        return layout

    def _layout_of_slots(self, slots: int) -> TokenLayout:
        sizes = np.array(self.codec.quantizer.sizes)
        slot, level = np.divmod(np.arange(slots * len(sizes)), len(sizes))
        return TokenLayout.uniform(sizes[level], np.stack([level, slot, np.zeros_like(slot)], 1), table=level)


def _at(batch: CodecBatch, span: slice) -> CodecBatch:
    """A window's batch: what is known of the chunk's start is the state of its first window only."""
    return batch if span.start == 0 else replace(batch, has_state=torch.zeros_like(batch.has_state))
