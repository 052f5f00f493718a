"""OmniSAT: splines of body parts, residual vector quantisation, byte-pair encoding (Lyu et al., arXiv 2510.09667).

    actions [T, D] -> parts: position, rotation, gripper (the space's groups)
            -> 8 control points of a B-spline a dimension, by least squares    (consistency encoding, section 3.1)
            -> one latent a part -> residual VQ of 8 levels, 256 / 256 / 64 codes by class of part    (section 3.2)
            -> codes part by part, from coarse to fine -> BPE, 2048 tokens, fitted after training

Sequences vary in length. Not every one decodes: `valid` says which, and `constraint` admits exactly those that do.

What the paper leaves open, and what is done here:

* Groups of every kind but rotation and gripper (joint, base, hand, velocity, raw) count as position. A group wider than
  `part_width` (a hand, an unnamed vector) is cut into parts about equally wide, so that the rate follows D. Parts are
  padded to the widest of their class.
* Gripper splines have degree 0 (as in BEAST, arXiv 2506.06072): a gripper that jumps makes a smooth spline ring.
* The networks between control points and latent are residual perceptrons, one for each class; both ways pass the loss,
  which is the mean absolute error of actions.
* 8 x (256 + 256 + 64) symbols, one for each level, class and code, would not fit into 2048 tokens. Levels share symbols,
  since the position in the chunk tells the level; classes do not, so no token mixes up a gripper with a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Self

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from actok.core import ChunkContext, Constraint, FitPart, TokenLayout
from actok.signal.automaton import RangeConstraint
from actok.signal.bpe import FIRST_CHAR, Bpe, read_bpe, train_bpe
from actok.tokenizers.base import Encoded, Reconstruction
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.neural import NeuralTokenizer
from actok.tokenizers.omnisat_codec import OmniSatCodec, OmniSatConfig

BPE_FILE = "bpe.json"

__all__ = ["OmniSatCodec", "OmniSatConfig", "OmniSatTokenizer"]


class OmniSatTokenizer(NeuralTokenizer):
    """Variable-length BPE over the codes of parts. Before `finish` has fitted it, tokens are the codes themselves.

    Works at any horizon: a longer chunk is several windows, whose codes follow one another.
    """

    kind = "omnisat"
    config_class = OmniSatConfig
    codec_class = OmniSatCodec
    codec: OmniSatCodec

    def _build(self) -> None:
        super()._build()
        self._constraints: dict[tuple[int, str], RangeConstraint] = {}

    @cached_property
    def bpe(self) -> Bpe | None:
        """The byte-pair encoding, None before `finish`."""
        return read_bpe(self._files[BPE_FILE]) if BPE_FILE in self._files else None

    def with_weights(self, state: Mapping[str, Tensor]) -> Self:
        """See NeuralTokenizer. Other weights give other codes, so the BPE is dropped; `finish` fits it again."""
        files = {name: data for name, data in self._files.items() if name != BPE_FILE}
        plain = type(self)(self.config, self._embodiments, self._horizon, self._tensors, files, self._meta)
        return super(OmniSatTokenizer, plain).with_weights(state)

    def finish(self, parts: Sequence[FitPart]) -> Self:
        """Fit the BPE on the codes of these chunks."""
        rows = []
        for part in parts:
            context = ChunkContext(embodiment=part.space.embodiment, pad_mask=part.pad_mask)
            embodiment = self.embodiment(context.embodiment)
            chunks, _ = self._prepare(part.actions, embodiment, context)
            codes = super()._encode(chunks, embodiment, context).flat.reshape(len(chunks), -1)
            rows.append(codes + self._ranges(chunks.shape[1], embodiment)[0])
        source = train_bpe(
            rows,
            alphabet=int(self.codec.class_sizes.sum()),
            vocab=self.config.vocab,
            max_token_length=max(r.shape[1] for r in rows),
        )
        files = {**self._files, BPE_FILE: source}
        return type(self)(self.config, self._embodiments, self._horizon, self._tensors, files, self._meta)

    # -- codes ----------------------------------------------------------------------------------------------------

    def _kept(self, embodiment: Embodiment) -> Bool[np.ndarray, "M"]:
        there = self._structures[embodiment.space.embodiment]["channels"] < self.shape.channels
        return np.repeat(there.any(1), self.codec.quantizer.levels)

    def _window_layout(self, embodiment: Embodiment) -> TokenLayout:
        """The codes of a window: part by part, from coarse to fine. Table = class * Q + level."""
        levels = self.codec.quantizer.levels
        kept = self._kept(embodiment)
        slot, level = np.divmod(np.arange(len(kept)), levels)
        slot, level = slot[kept], level[kept]
        part_class = self.codec.slot_class[slot]
        sizes = np.array([q.sizes for _, q, _ in self.codec.quantizer.each()])
        part = np.unique(slot, return_inverse=True)[1]
        return TokenLayout.uniform(
            sizes[part_class, level],
            np.stack([level, np.zeros_like(level), part], 1),
            table=part_class * levels + level,
        )

    def _ranges(self, horizon: int, embodiment: Embodiment) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """The first symbol and the one after the last that may stand at each place of a chunk's codes."""
        layout = super().layout_for(horizon, embodiment.space.embodiment)
        first = np.cumsum(self.codec.class_sizes) - self.codec.class_sizes
        low = first[layout.table // self.codec.quantizer.levels]
        return low, low + layout.vocab

    # -- tokens ---------------------------------------------------------------------------------------------------

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """Variable length; positions have no level, time or part. Before `finish`: one position a code."""
        codes = super().layout_for(horizon, embodiment)
        if self.bpe is None:
            return codes
        return TokenLayout.variable(
            self.bpe.vocab_size, -(-codes.max_len // int(self.bpe.lengths.max())), codes.max_len
        )

    def constraint(self, context: ChunkContext | None = None) -> Constraint:
        """Exactly the sequences that spell a code of the right class and level at each place."""
        if self.bpe is None:
            return super().constraint(context)
        context = context or ChunkContext()
        embodiment, horizon = self.embodiment(context.embodiment), self._resolve_horizon(None, context)
        key = horizon, embodiment.space.embodiment
        if key not in self._constraints:
            self._constraints[key] = RangeConstraint(self.bpe, *self._ranges(horizon, embodiment))
        return self._constraints[key]

    def _encode(self, chunks: np.ndarray, embodiment: Embodiment, context: ChunkContext) -> Encoded:
        found = super()._encode(chunks, embodiment, context)
        if self.bpe is None:
            return found
        low, _ = self._ranges(chunks.shape[1], embodiment)
        flat, offsets = self.bpe.encode(found.flat.reshape(len(chunks), -1) + low + FIRST_CHAR)
        return Encoded(flat, offsets, found.saturated)

    def _decode(
        self,
        flat: np.ndarray,
        offsets: np.ndarray,
        horizon: int,
        embodiment: Embodiment,
        context: ChunkContext,
        repair: str | None,
    ) -> Reconstruction:
        if self.bpe is None:
            return super()._decode(flat, offsets, horizon, embodiment, context, repair)
        low, high = self._ranges(horizon, embodiment)
        points = self.bpe.decode(flat, offsets)
        symbols = [row - FIRST_CHAR for row in np.split(points.flat, points.offsets[1:-1])][: len(offsets) - 1]
        reasons = [_fault(row, low, high) for row in symbols]
        valid = np.array([reason is None for reason in reasons], bool)
        chunks = np.zeros((len(valid), horizon, embodiment.space.dim), np.float32)
        if valid.any():
            codes = np.stack([row for row, ok in zip(symbols, valid, strict=True) if ok]).astype(np.int64) - low
            present = None if context.dof_mask is None else np.asarray(context.dof_mask)[valid]
            chunks[valid] = self._decode_rows(codes, horizon, embodiment, present)
        return Reconstruction(chunks, valid, np.diff(offsets), reasons)


def _fault(symbols: Int[np.ndarray, "n"], low: Int[np.ndarray, "N"], high: Int[np.ndarray, "N"]) -> str | None:
    """What is wrong with the symbols of one sequence, in words."""
    if len(symbols) != len(low):
        return f"{len(symbols)} codes, expected {len(low)}"
    outside = (symbols < low) | (symbols >= high)
    if outside.any():
        i = int(np.argmax(outside))
        return f"code {i} of {len(low)} is symbol {symbols[i]}, outside {low[i]}..{high[i] - 1} of its part"
    return None
