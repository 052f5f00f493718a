"""Template of the learned tokenizers: a `Codec` behind the contract of `ActionTokenizer`.

A paper's file defines a config, a `Codec` and a subclass of `NeuralTokenizer` that names both. Training is done by
`actok.training`; here are the untrained tokenizer (`prepare`), batches, windows, token layout and weights.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from actok.core import (
    ActionSpace,
    ArtifactError,
    ChunkContext,
    CodecBatch,
    ConfigError,
    FitPart,
    SpaceMismatchError,
    TokenLayout,
    to_numpy,
)
from actok.tokenizers.base import Encoded, Reconstruction, TokenizerBase, known_parts
from actok.tokenizers.codec import Codec, CodecShape
from actok.tokenizers.embodiments import Embodiment

SHAPE_FILE = "codec.json"
# Windows that go through the codec at once outside training, which bounds memory. On a CPU, what passes between two layers
# should stay in its cache.
ROWS, ROWS_CPU = 4096, 256

__all__ = ["NeuralTokenizer", "join"]


class NeuralTokenizer(TokenizerBase):
    """A tokenizer whose codec is trained by gradient descent. Instances are immutable but for the device.

    The codec works on windows of the horizon T that it was trained at. A longer chunk is cut into ceil(T' / T) windows,
    the last padded; a shorter one is one padded window. Tokens of several windows are ordered as the codec orders its
    own: by level first (`Codec.order` "level"), then by window, or window after window ("slot").

    Class attributes:
        codec_class: the network.
    """

    learned: ClassVar[bool] = True
    codec_class: ClassVar[type[Codec]]

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def prepare(cls, parts: Sequence[FitPart], config: Any, *, seed: int = 0) -> Self:
        """An untrained tokenizer for chunks of one or more embodiments (the first is the default), all of one horizon.

        Normalisers and the codec's size come from `parts`, initial weights from `seed`. Raises as
        `actok.tokenizers.base.known_parts` does, ConfigError where the quantiser does not suit the codec.
        """
        _, embodiments, horizon = known_parts(parts, config)
        embodiments = cls._studied(parts, embodiments, config)
        shape = cls._shape(config, embodiments, horizon)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: the caller's GPU goes on as it was
            codec = cls.codec_class(config, shape)
        files = {SHAPE_FILE: json.dumps(asdict(shape), sort_keys=True).encode()}
        tokenizer = cls(config, embodiments, horizon, _arrays(codec.state_dict()), files)
        tokenizer.layout_for()  # refuses a quantiser that does not suit, before anything is trained
        return tokenizer

    @classmethod
    def _studied(
        cls, parts: Sequence[FitPart], embodiments: dict[str, Embodiment], config: Any
    ) -> dict[str, Embodiment]:
        """The embodiments with the facts that this kind finds in the training chunks; none unless overridden."""
        return embodiments

    @classmethod
    def _shape(cls, config: Any, embodiments: Mapping[str, Embodiment], horizon: int) -> CodecShape:
        """What the codec's size depends on. Its channels are those of the widest embodiment unless overridden."""
        spaces = [e.space for e in embodiments.values()]
        return CodecShape(
            horizon=horizon,
            channels=max(s.dim for s in spaces),
            embodiments=tuple(embodiments),
            extra=cls.codec_class.measure(config, spaces),
        )

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> Self:
        """The same tokenizer with other weights, a `state_dict` of its codec."""
        return type(self)(self.config, self._embodiments, self._horizon, _arrays(state), self._files, self._meta)

    def training_steps(self, draw: int) -> int:
        """How many steps the chunks of a training batch have, at most the horizon they are cut at.

        `draw` is a random whole number of 32 bits, for tokenizers that are trained on chunks of many lengths; here it is
        always the fitted horizon.
        """
        return self._horizon

    def finish(self, parts: Sequence[FitPart]) -> Self:
        """Whatever is fitted after training, on the trained codec; nothing unless overridden."""
        return self

    def _build(self) -> None:
        facts = json.loads(self._files[SHAPE_FILE])
        self.shape = CodecShape(**{**facts, "embodiments": tuple(facts["embodiments"])})
        with torch.random.fork_rng(devices=[]):  # loading a tokenizer leaves the caller's random state alone
            codec = self.codec_class(self.config, self.shape)
        try:
            codec.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in self._tensors.items()})
        except RuntimeError as error:
            raise ArtifactError(
                f"the weights do not fit the config of {self.kind!r} ({error}); save or fit the tokenizer again"
            ) from None
        self.codec = codec.eval().requires_grad_(False)
        self._structures = {
            name: self.codec_class.structure(self.config, e.space, self.shape) for name, e in self._embodiments.items()
        }
        self._facts: dict[tuple[Hashable, ...], Any] = {}

    def _once(self, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
        """What follows from config and embodiments is worked out once: a single chunk would wait for it at every call."""
        if key not in self._facts:
            self._facts[key] = make()
        return self._facts[key]

    def to(self, device: Any) -> Self:
        """Move the codec; encoding and decoding then compute there. Returns this same tokenizer.

        A tokenizer made from it (`adapt`, `with_meta`, `with_weights`) is on the CPU.
        """
        self.codec.to(device)
        return self

    def _check_adaptable(self, space: ActionSpace) -> None:
        if space.dim > self.shape.channels:
            raise SpaceMismatchError(
                f"space {space.embodiment!r} has {space.dim} dimensions, this codec at most {self.shape.channels}; train"
                " one with such an embodiment among its data"
            )
        self.codec_class.structure(self.config, space, self.shape)

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
        """A codec's batch from normalised chunks [B, T, D of the embodiment] of the codec's horizon, on the CPU.

        `anchor`, raw proprioception at their starts, is for codecs that read the state; others leave it alone.
        """
        name = next(iter(self._embodiments)) if embodiment is None else embodiment
        count, steps, dim = chunks.shape
        actions = torch.zeros(count, steps, self.shape.channels)
        actions[:, :, :dim] = torch.from_numpy(np.ascontiguousarray(chunks, np.float32))
        mask = torch.zeros(count, self.shape.channels, dtype=torch.bool)
        mask[:, :dim] = True if present is None else torch.from_numpy(present)
        known = self.shape.embodiments
        return CodecBatch(
            actions=actions * mask[:, None],
            present=mask,
            real=torch.ones(count, steps, dtype=torch.bool) if real is None else torch.from_numpy(real.copy()),
            embodiment=torch.full((count,), known.index(name) + 1 if name in known else 0),
            structure={
                key: torch.from_numpy(table).expand(count, *table.shape)
                for key, table in self._structures[name].items()
            },
        )

    def _blank(self, count: int, embodiment: Embodiment, present: Bool[np.ndarray, "{count} _"] | None) -> CodecBatch:
        """What decoding knows of chunks, everything but their values, on the codec's device."""
        name, dim = embodiment.space.embodiment, embodiment.space.dim
        device = self._device
        one = self._once(
            ("blank", name, device), lambda: self.batch(np.zeros((1, self._horizon, dim), np.float32), name).to(device)
        )
        batch = CodecBatch(
            actions=one.actions.expand(count, -1, -1),
            present=one.present.expand(count, -1),
            real=one.real.expand(count, -1),
            embodiment=one.embodiment.expand(count),
            structure={key: table[0].expand(count, *table.shape[1:]) for key, table in one.structure.items()},
        )
        if present is None:
            return batch
        mask = torch.nn.functional.pad(torch.from_numpy(present), (0, self.shape.channels - dim))
        return replace(batch, present=mask.to(device))

    # -- encode, decode -------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.codec.parameters()).device

    def _anchor(
        self, context: ChunkContext, count: int, embodiment: Embodiment
    ) -> Float[np.ndarray, "{count} P"] | None:
        """Checked raw proprioception at the chunks' starts; None for tokenizers that do not read it."""
        return None

    def _cuts(self, count: int) -> list[slice]:
        """Rows that go through the codec together."""
        rows = ROWS_CPU if self._device.type == "cpu" else ROWS
        return [slice(i, i + rows) for i in range(0, count, rows)]

    def _windows(self, horizon: int) -> int:
        return -(-horizon // self._horizon)

    def _encode(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment, context: ChunkContext) -> Encoded:
        count, steps, dim = chunks.shape
        windows = self._windows(steps)
        real = np.ones((count, steps), bool) if context.pad_mask is None else ~to_numpy(context.pad_mask)
        if missing := windows * self._horizon - steps:
            rest = embodiment.normaliser(np.zeros((1, dim), np.float32))
            last = np.where(np.array(embodiment.space.incremental), rest, chunks[:, -1])
            if context.dof_mask is not None:
                last = np.where(to_numpy(context.dof_mask), last, np.float32(0))
            chunks = np.concatenate([chunks, np.repeat(last[:, None].astype(np.float32), missing, 1)], 1)
            real = np.concatenate([real, np.zeros((count, missing), bool)], 1)
        chunks = chunks.reshape(count * windows, self._horizon, dim)
        real = real.reshape(count * windows, self._horizon)
        present = None if context.dof_mask is None else np.repeat(to_numpy(context.dof_mask), windows, 0)
        kept = self._kept(embodiment)
        found = []
        with torch.inference_mode():
            for cut in self._cuts(len(chunks)):
                mask = None if present is None else present[cut]
                batch = self.batch(chunks[cut], embodiment.space.embodiment, real=real[cut], present=mask)
                ids = self.codec.tokenize(batch.to(self._device)).cpu().numpy()
                found.append(ids if kept is None else ids[:, kept])
        one = self._one_window(embodiment).max_len
        ids = np.concatenate(found).reshape(count, windows * one) if found else np.zeros((0, windows * one), np.int64)
        flat = ids[:, self._sequence(windows, embodiment)].reshape(-1)
        return Encoded(flat=flat, offsets=np.arange(count + 1) * (windows * one), saturated=np.zeros(count, np.int64))

    def _decode(
        self,
        flat: Int[np.ndarray, "_"],
        offsets: Int[np.ndarray, "_"],
        horizon: int,
        embodiment: Embodiment,
        context: ChunkContext,
        repair: str | None,
    ) -> Reconstruction:
        layout = self.layout_for(horizon, embodiment.space.embodiment)
        lengths = np.diff(offsets)
        decodable = sorted({*layout.prefixes, layout.max_len})
        valid = np.isin(lengths, decodable)
        anchor = self._anchor(context, len(lengths), embodiment)
        chunks = np.zeros((len(lengths), horizon, embodiment.space.dim), np.float32)
        for length in np.unique(lengths[valid]):
            rows = np.flatnonzero(lengths == length)
            ids = flat[offsets[rows][:, None] + np.arange(length)]
            present = None if context.dof_mask is None else to_numpy(context.dof_mask)[rows]
            state = None if anchor is None else anchor[rows]
            chunks[rows] = self._decode_rows(ids, horizon, embodiment, present, state)
        expected = " or ".join(map(str, decodable))
        return Reconstruction(
            chunks=chunks,
            valid=valid,
            slots_used=np.minimum(lengths, layout.max_len),
            reasons=[None if ok else f"{n} tokens, expected {expected}" for ok, n in zip(valid, lengths, strict=True)],
        )

    def _decode_rows(
        self,
        ids: Int[np.ndarray, "B N"],
        horizon: int,
        embodiment: Embodiment,
        present: Bool[np.ndarray, "B D"] | None,
        anchor: np.ndarray | None = None,
    ) -> Float[np.ndarray, "B {horizon} D"]:
        """Normalised chunks of sequences of one length, which may be a prefix; `anchor` [B, P] is raw."""
        windows = self._windows(horizon)
        count, length = ids.shape
        # Of every window the ids that are there, in the window's own order.
        back = self._once(
            ("back", windows, length, embodiment.space.embodiment),
            lambda: np.argsort(self._sequence(windows, embodiment)[:length], kind="stable"),
        )
        by_window = ids[:, back].reshape(count * windows, length // windows)
        if (kept := self._kept(embodiment)) is not None:
            places = np.append(np.flatnonzero(kept), len(kept))  # a prefix ends where the next token would stand
            whole = np.zeros((len(by_window), places[by_window.shape[1]]), np.int64)
            whole[:, places[: by_window.shape[1]]] = by_window
            by_window = whole
        mask = None if present is None else np.repeat(present, windows, 0)
        found = []
        with torch.inference_mode():
            for cut in self._cuts(len(by_window)):
                some = torch.from_numpy(np.ascontiguousarray(by_window[cut], np.int64)).to(self._device)
                blank = self._blank(len(some), embodiment, None if mask is None else mask[cut])
                found.append(self.codec.detokenize(some, blank).float().cpu().numpy())
        dim = embodiment.space.dim
        chunks = np.concatenate(found)[:, :, :dim].reshape(count, windows * self._horizon, dim)[:, :horizon]
        return np.where(embodiment.normaliser.constant, np.float32(0), chunks)  # what never changed stays exact

    # -- layout ---------------------------------------------------------------------------------------------------

    def _window_layout(self, embodiment: Embodiment) -> TokenLayout:
        """Layout of one window: slots x levels in the codec's order, one table a level, blocks of one token."""
        quantizer = self.codec.quantizer
        slots, levels = self._slots(embodiment), quantizer.levels
        if quantizer.slots not in (None, slots):
            raise ConfigError(
                f"the quantizer makes {quantizer.slots} code slots of the {slots} that {self.kind} has; use one that gives"
                " each slot codes of its own, such as 'residual'"
            )
        level, slot = np.divmod(np.arange(slots * levels), slots)
        if self.codec.order == "slot":
            slot, level = np.divmod(np.arange(slots * levels), levels)
        time, part = self._places(slot)
        return TokenLayout.uniform(
            np.array(quantizer.sizes)[level], np.stack([level, time, part], 1), table=level, block=self._block()
        )

    def _slots(self, embodiment: Embodiment) -> int:
        """S, the latents of one window."""
        raise NotImplementedError(f"{type(self).__name__} states its number of slots")

    def _places(self, slot: Int[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Time and part of slots; each slot is a time and there are no parts unless overridden."""
        return slot, np.zeros_like(slot)

    def _block(self) -> int:
        """Tokens that a block-wise policy emits in one pass."""
        return 1

    def _kept(self, embodiment: Embodiment) -> Bool[np.ndarray, "M"] | None:
        """Which of the M tokens that the codec gives for a window are in this embodiment's sequences; None: all.

        For codecs whose number of tokens follows the channels: what they say of absent ones is not sent.
        """
        return None

    def _order(self, windows: int, embodiment: Embodiment) -> Int[np.ndarray, "N"]:
        """Position n of the sequence holds the id at [order[n]] of the windows' sequences put one after another."""
        one = self._one_window(embodiment)
        window, place = np.divmod(np.arange(windows * one.max_len), one.max_len)
        if self.codec.order == "slot":
            return window * one.max_len + place
        return np.lexsort((place, window, one.coords[place, 0]))

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """See ActionTokenizer.layout_for."""
        known = self.embodiment(embodiment)
        windows = self._windows(self._resolve_horizon(horizon, ChunkContext()))
        layout: TokenLayout = self._once(
            ("layout", windows, known.space.embodiment), lambda: self._layout_of(windows, known)
        )
        return layout

    def _one_window(self, embodiment: Embodiment) -> TokenLayout:
        layout: TokenLayout = self._once(
            ("window", embodiment.space.embodiment), lambda: self._window_layout(embodiment)
        )
        return layout

    def _sequence(self, windows: int, embodiment: Embodiment) -> Int[np.ndarray, "N"]:
        order: np.ndarray = self._once(
            ("order", windows, embodiment.space.embodiment), lambda: self._order(windows, embodiment)
        )
        return order

    def _layout_of(self, windows: int, embodiment: Embodiment) -> TokenLayout:
        one = self._one_window(embodiment)
        if windows == 1:
            return one
        order = self._sequence(windows, embodiment)
        window, place = np.divmod(order, one.max_len)
        coords = one.coords[place]
        coords[:, 1] += window * (one.coords[:, 1].max() + 1)
        sizes = [len(b) for b in one.blocks]
        if len({*sizes[:-1]}) > 1 or sizes[-1] > sizes[0]:  # they grow: each takes in its counterpart of every window
            ends = np.cumsum([0] + [s * windows for s in sizes])
        else:
            ends = np.append(np.arange(0, len(order), sizes[0]), len(order))
        return TokenLayout(
            vocab=one.vocab[place],
            table=one.table[place],
            coords=coords,
            blocks=tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends)),
            prefixes=tuple(p * windows for p in one.prefixes),
            min_len=len(order),
            max_len=len(order),
            total=one.total,
        )


def join(batches: Sequence[CodecBatch]) -> CodecBatch:
    """One batch of several, e.g. of different embodiments, whose tables are filled up with zeros to the longest."""
    if len(batches) == 1:
        return batches[0]
    tables: dict[str, torch.Tensor] = {}
    for key in batches[0].structure:
        parts = [b.structure[key] for b in batches]
        longest = max(p.shape[1] for p in parts)
        fill = [0, 0] * (parts[0].ndim - 2)
        tables[key] = torch.cat([torch.nn.functional.pad(p, (*fill, 0, longest - p.shape[1])) for p in parts])
    return CodecBatch(
        **{
            name: torch.cat([getattr(b, name) for b in batches])
            for name in ("actions", "present", "real", "embodiment")
        },
        structure=tables,
        state=None if batches[0].state is None else torch.cat([b.state for b in batches]),
        has_state=None if batches[0].has_state is None else torch.cat([b.has_state for b in batches]),
    )


def _arrays(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}
