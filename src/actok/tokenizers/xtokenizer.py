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
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from actok.core import (
    ActionSpace,
    ChunkContext,
    CodecBatch,
    ConfigError,
    DataError,
    FitPart,
    SpaceMismatchError,
    TokenLayout,
    to_numpy,
)
from actok.signal.statistics import Statistics
from actok.tokenizers.base import Encoded
from actok.tokenizers.codec import CodecShape
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer
from actok.tokenizers.xtokenizer_codec import (
    LEAST_STEPS,
    MOST_STEPS,
    SLOT_STEPS,
    XTokenizerCodec,
    XTokenizerConfig,
    slots_of,
)
from actok.tokenizers.xtokenizer_layout import UnionMap, layout_space
from actok.tokenizers.xtokenizer_ranges import Shared, estimate, measure

__all__ = ["XTokenizer", "XTokenizerCodec", "XTokenizerConfig"]


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
        anchor, shared = anchor.astype(np.float64), self._shared[embodiment.space.embodiment]
        statistics = embodiment.normaliser.statistics
        if shared.union.needs_anchor and statistics is not None and anchor.shape[1] == embodiment.space.dim:
            shared.check_anchor(anchor, statistics)
        return anchor

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
