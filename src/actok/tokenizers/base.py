"""What every tokenizer here shares: checks, padding, normalisers by embodiment, masks, limits, torch, artifacts.

A subclass sees only finite normalised chunks and in-vocabulary ids. It defines `kind`, `config_class`, `_encode`,
`_decode`, `layout_for` and, unless every sequence of the right length decodes, `constraint`; how it comes to be fitted
is told by `closed_form.py` and `neural.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core import (
    ActionSpace,
    ActionTokenizer,
    Artifact,
    ArtifactError,
    ChunkContext,
    ConfigError,
    Constraint,
    Decoded,
    FitPart,
    FixedLengthConstraint,
    SpaceMismatchError,
    TokenError,
    Tokens,
    as_float_batch,
    as_ids,
    build_config,
    is_torch,
    like,
    to_numpy,
)
from actok.core.errors import DataError
from actok.signal.normalise import Normaliser
from actok.signal.rotations import proper
from actok.signal.statistics import Statistics
from actok.tokenizers.embodiments import Embodiment, make_embodiment, redundant_rotations

__all__ = ["CodecInput", "Encoded", "Reconstruction", "TokenizerBase", "fill_padding", "fixed_rows", "known_parts"]


class CodecInput(NamedTuple):
    """What a codec's fit sees: normalised chunks of one embodiment, and the parts' raw facts."""

    chunks: Float[np.ndarray, "B T D"]  # float32 [B, T, D], normalised
    embodiment: Embodiment
    part: FitPart


class Encoded(NamedTuple):
    """What `_encode` returns."""

    flat: Int[np.ndarray, "_"]  # int64
    offsets: Int[np.ndarray, "ends"]  # [B + 1]
    saturated: Int[np.ndarray, "ends-1"]  # [B]


class Reconstruction(NamedTuple):
    """What `_decode` returns. Values of invalid rows are ignored unless `repaired`."""

    chunks: Float[np.ndarray, "B T D"]  # float32 [B, T, D], normalised
    valid: Bool[np.ndarray, "B"]  # bool [B]
    slots_used: Int[np.ndarray, "B"]  # [B]
    reasons: list[str | None]
    repaired: Bool[np.ndarray, "B"] | None = None  # bool [B]


class TokenizerBase(ActionTokenizer):
    """Template of all tokenizers here. Instances are immutable."""

    kind: ClassVar[str]
    config_class: ClassVar[type]
    repair_modes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: Any,
        embodiments: Mapping[str, Embodiment],
        horizon: int,
        tensors: Mapping[str, np.ndarray] | None = None,
        files: Mapping[str, bytes] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self._embodiments = dict(embodiments)
        self._horizon = int(horizon)
        self._tensors = dict(tensors or {})
        self._files = dict(files or {})
        self._meta = dict(meta or {})
        self._build()

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Make derived tables from `_tensors` and `_files`. Called once, at the end of construction."""

    @abstractmethod
    def _encode(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment, context: ChunkContext) -> Encoded:
        """Ids of normalised float32 chunks [B, T, D]."""

    @abstractmethod
    def _decode(
        self,
        flat: Int[np.ndarray, "_"],
        offsets: Int[np.ndarray, "_"],
        horizon: int,
        embodiment: Embodiment,
        context: ChunkContext,
        repair: str | None,
    ) -> Reconstruction:
        """Normalised chunks of in-vocabulary ids."""

    # -- adapt ----------------------------------------------------------------------------------------------------

    def adapt(self, space: ActionSpace, statistics: Statistics) -> Self:
        """See ActionTokenizer.adapt.

        Raises SpaceMismatchError where the codec cannot serve that space or already has an embodiment of its name,
        DataError where `statistics` are none.
        """
        if not isinstance(statistics, Statistics):
            raise DataError(
                f"statistics are of type {type(statistics).__name__}; give actok.signal.statistics.Statistics, e.g."
                " Statistics.from_array(actions)"
            )
        if space.embodiment in self._embodiments:
            raise SpaceMismatchError(
                f"embodiment {space.embodiment!r} is already known to this tokenizer, whose tokens depend on it; add the"
                " space under another name with space.renamed(name)"
            )
        if space.dim != statistics.dim:
            raise SpaceMismatchError(
                f"statistics have {statistics.dim} dimensions, the space {space.dim}; give both of one"
            )
        self._check_adaptable(space)
        embodiments = {
            **self._embodiments,
            space.embodiment: self._adapted(make_embodiment(space, statistics, self.config.normaliser)),
        }
        return type(self)(self.config, embodiments, self._horizon, self._tensors, self._files, self._meta)

    def _adapted(self, embodiment: Embodiment) -> Embodiment:
        """A robot to add, with the facts of this kind of tokenizer; as it is unless overridden."""
        return embodiment

    def _check_adaptable(self, space: ActionSpace) -> None:
        """Raise SpaceMismatchError where the fitted codec depends on D and `space` has another one."""

    # -- encode, decode -------------------------------------------------------------------------------------------

    def embodiment(self, name: str | None = None) -> Embodiment:
        """The embodiment of that name (None: the default). Raises SpaceMismatchError naming those there are."""
        if name is None:
            return next(iter(self._embodiments.values()))
        if name not in self._embodiments:
            raise SpaceMismatchError(
                f"embodiment {name!r} is unknown to this tokenizer, which knows {', '.join(self._embodiments)};"
                " add it with adapt(space, statistics)"
            )
        return self._embodiments[name]

    def encode(self, actions: Any, context: ChunkContext | None = None) -> Tokens:
        """See ActionTokenizer.encode."""
        context = context or ChunkContext()
        embodiment = self.embodiment(context.embodiment)
        chunks, out_of_range = self._prepare(actions, embodiment, context)
        encoded = self._encode(chunks, embodiment, context)
        layout_length = self.layout_for(chunks.shape[1], context.embodiment).fixed_length
        return Tokens(
            flat=like(encoded.flat, actions),
            offsets=encoded.offsets,
            horizon=chunks.shape[1],
            fixed_length=layout_length,
            out_of_range=out_of_range,
            saturated=encoded.saturated,
            context=context,
        )

    def decode(
        self, ids: Any, context: ChunkContext | None = None, *, horizon: int | None = None, repair: str | None = None
    ) -> Decoded:
        """See ActionTokenizer.decode."""
        if repair is not None and repair not in self.repair_modes:
            raise ConfigError(
                f"repair mode {repair!r} is unknown to {self.kind}; "
                + (
                    f"use one of {', '.join(self.repair_modes)}"
                    if self.repair_modes
                    else "every sequence decodes, leave it out"
                )
            )
        reference = ids
        if isinstance(ids, Tokens):
            context = context or ids.context
            if horizon is None and (context is None or context.horizon is None):
                horizon = ids.horizon
            reference, flat, offsets = ids.flat, to_numpy(ids.flat).astype(np.int64), ids.offsets
        else:
            flat, offsets = as_ids(ids)
            if isinstance(ids, (list, tuple)) and ids and is_torch(ids[0]):
                reference = ids[0]
        context = context or ChunkContext()
        embodiment = self.embodiment(context.embodiment)
        horizon = self._resolve_horizon(horizon, context)
        self._check_ids(flat, offsets, horizon, context)
        present = None
        if context.dof_mask is not None:
            present = self._mask(context.dof_mask, (len(offsets) - 1, embodiment.space.dim), "dof_mask")
        result = self._decode(flat, offsets, horizon, embodiment, context, repair)
        repaired = np.zeros(len(result.valid), bool) if result.repaired is None else result.repaired
        usable = result.valid | repaired
        actions, clipped = embodiment.normaliser.clip_to_limits(embodiment.normaliser.inverse(result.chunks))
        for group in redundant_rotations(embodiment.space):
            dims = list(group.dims)
            actions[:, :, dims] = proper(actions[:, :, dims], str(group.rotation))
        if present is not None:
            actions = np.where(present[:, None], actions, np.float32(0))
        actions = np.where(usable[:, None, None], actions, np.float32(np.nan)).astype(np.float32, copy=False)
        return Decoded(
            actions=like(actions, reference),
            valid=result.valid,
            slots_used=result.slots_used,
            clipped=np.where(usable, clipped, 0),
            repaired=repaired,
            reasons=result.reasons,
        )

    def constraint(self, context: ChunkContext | None = None) -> Constraint:
        """See ActionTokenizer.constraint; here only length and vocabulary bind."""
        context = context or ChunkContext()
        return FixedLengthConstraint(self.layout_for(context.horizon, context.embodiment))

    def normalise(self, actions: Any, context: ChunkContext | None = None) -> Any:
        """See ActionTokenizer.normalise."""
        embodiment = self.embodiment((context or ChunkContext()).embodiment)
        chunks = as_float_batch(actions)
        self._check_dim(chunks, embodiment)
        return like(embodiment.normaliser(chunks).reshape(np.shape(to_numpy(actions))), actions)

    def denormalise(self, actions: Any, context: ChunkContext | None = None) -> Any:
        """See ActionTokenizer.denormalise."""
        embodiment = self.embodiment((context or ChunkContext()).embodiment)
        chunks = as_float_batch(actions)
        self._check_dim(chunks, embodiment)
        return like(embodiment.normaliser.inverse(chunks).reshape(np.shape(to_numpy(actions))), actions)

    # -- the steps of encode and decode ---------------------------------------------------------------------------

    def _prepare(
        self, actions: Any, embodiment: Embodiment, context: ChunkContext
    ) -> tuple[Float[np.ndarray, "B T D"], Int[np.ndarray, "B"]]:
        """Checked, padded, normalised, masked chunks float32 [B, T, D], and out-of-range counts [B]."""
        chunks = as_float_batch(actions)
        self._check_dim(chunks, embodiment)
        pad = None
        if context.pad_mask is not None:
            pad = self._mask(context.pad_mask, chunks.shape[:2], "pad_mask")
            chunks = fill_padding(chunks, pad, np.array(embodiment.space.incremental))
        normalised = embodiment.normaliser(chunks)
        outside = embodiment.normaliser.out_of_range(normalised)
        if pad is not None:
            outside &= ~pad[:, :, None]
        if context.dof_mask is not None:
            present = self._mask(context.dof_mask, (len(chunks), chunks.shape[2]), "dof_mask")
            normalised = np.where(present[:, None], normalised, np.float32(0))
            outside &= present[:, None]
        return normalised, outside.sum((1, 2))

    def _check_dim(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment) -> None:
        if chunks.shape[2] != embodiment.space.dim:
            raise SpaceMismatchError(
                f"actions have {chunks.shape[2]} dimensions, embodiment {embodiment.space.embodiment!r} has"
                f" {embodiment.space.dim} ({', '.join(embodiment.space.names)}); give actions of that space or name"
                " another embodiment in the context"
            )

    @staticmethod
    def _mask(mask: Any, shape: tuple[int, ...], name: str) -> Bool[np.ndarray, "..."]:
        array = to_numpy(mask)
        if array.dtype != bool or array.shape != shape:
            raise DataError(f"{name} has dtype {array.dtype} and shape {array.shape}; give bool {shape}")
        return array

    def _resolve_horizon(self, horizon: int | None, context: ChunkContext) -> int:
        chosen = horizon if horizon is not None else context.horizon if context.horizon is not None else self._horizon
        if not isinstance(chosen, (int, np.integer)) or chosen < 1:
            raise DataError(f"horizon is {chosen!r}; give a whole number of steps, at least 1")
        return int(chosen)

    def _check_ids(
        self, flat: Int[np.ndarray, "_"], offsets: Int[np.ndarray, "_"], horizon: int, context: ChunkContext
    ) -> None:
        layout = self.layout_for(horizon, context.embodiment)
        if not len(flat):
            return
        smallest = int(layout.vocab.min())
        if flat.min() >= 0 and flat.max() < smallest:
            return  # inside every position's vocabulary, whatever the lengths
        lengths = np.diff(offsets)
        # A sequence of a length that decodes is checked position by position. Any other becomes valid=False later on;
        # of it one can only say that its ids exist at all.
        limit = np.full(len(flat), layout.vocab.max())
        if layout.fixed_length is not None:
            position = np.arange(len(flat)) - np.repeat(offsets[:-1], lengths)
            known = np.repeat(np.isin(lengths, (layout.fixed_length, *layout.prefixes)), lengths)
            limit[known] = layout.vocab[position[known]]
        bad = (flat < 0) | (flat >= limit)
        if bad.any():
            i = int(np.argmax(bad))
            b = int(np.searchsorted(offsets, i, side="right")) - 1
            raise TokenError(
                f"token {flat[i]} at position {i - offsets[b]} of sequence {b} is outside 0..{limit[i] - 1};"
                " map language-model ids back to codes before decoding"
            )

    # -- facts, artifact ------------------------------------------------------------------------------------------

    @property
    def horizon(self) -> int:
        """T it was fitted at."""
        return self._horizon

    @property
    def spaces(self) -> Mapping[str, ActionSpace]:
        """Action space by embodiment; the first is the default."""
        return MappingProxyType({name: e.space for name, e in self._embodiments.items()})

    @property
    def meta(self) -> Mapping[str, Any]:
        """See ActionTokenizer.meta."""
        return MappingProxyType(self._meta)

    def with_meta(self, meta: Mapping[str, Any]) -> Self:
        """See ActionTokenizer.with_meta."""
        return type(self)(
            self.config, self._embodiments, self._horizon, self._tensors, self._files, {**self._meta, **meta}
        )

    def to_artifact(self) -> Artifact:
        """See ActionTokenizer.to_artifact."""
        return Artifact(
            kind=self.kind,
            config={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()},
            embodiments={
                name: {
                    "space": e.space.to_dict(),
                    "normaliser": e.normaliser.to_dict(),
                    **({"facts": dict(e.facts)} if e.facts else {}),
                }
                for name, e in self._embodiments.items()
            },
            horizon=self._horizon,
            tensors=self._tensors,
            files=self._files,
            meta=self._meta,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Self:
        """See ActionTokenizer.from_artifact."""
        try:
            embodiments = {
                name: Embodiment(
                    ActionSpace.from_dict(e["space"]), Normaliser.from_dict(e["normaliser"]), e.get("facts", {})
                )
                for name, e in artifact.embodiments.items()
            }
            config = build_config(cls.config_class, artifact.config, f"tokenizer {cls.kind!r}")
            return cls(config, embodiments, artifact.horizon, artifact.tensors, artifact.files, artifact.meta)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"the artifact lacks {error}; save or fit the tokenizer again") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, horizon={self._horizon}, embodiments={list(self._embodiments)})"


def known_parts(parts: Sequence[FitPart], config: Any) -> tuple[list[CodecInput], dict[str, Embodiment], int]:
    """Checked and normalised parts, the embodiments by name, and the horizon that all share.

    Raises DataError where there is nothing to fit on or horizons differ, SpaceMismatchError where a part's width is not
    that of its space, or two parts of one name differ in their space. Warns about dimensions that are constant.
    """
    if not parts or not sum(len(p.actions) for p in parts):
        raise DataError("nothing to fit on: no chunk was given; give at least one episode")
    horizons = {p.actions.shape[1] for p in parts}
    if len(horizons) != 1:
        raise DataError(f"chunks to fit on have horizons {sorted(horizons)}; cut all to one horizon")
    inputs = []
    embodiments: dict[str, Embodiment] = {}
    for part in parts:
        actions = as_float_batch(part.actions)
        if actions.shape[2] != part.space.dim:
            raise SpaceMismatchError(
                f"chunks have {actions.shape[2]} dimensions, action space {part.space.embodiment!r} has"
                f" {part.space.dim}; give the space of this data"
            )
        name = part.space.embodiment
        known = embodiments.get(name)
        if known is not None:
            if found := known.space.differences(part.space):
                raise SpaceMismatchError(
                    f"two datasets of embodiment {name!r} differ in {'; '.join(found)}; give them different"
                    " embodiment names"
                )
        else:
            statistics = part.statistics or Statistics.from_array(actions, part.pad_mask)
            known = embodiments[name] = make_embodiment(part.space, statistics, config.normaliser)
        inputs.append(CodecInput(known.normaliser(actions), known, part))
    return inputs, embodiments, int(horizons.pop())


def fill_padding(
    chunks: Float[np.ndarray, "B T D"], pad_mask: Bool[np.ndarray, "B T"], incremental: Bool[np.ndarray, "D"]
) -> Float[np.ndarray, "B T D"]:
    """Canonical padding of raw chunks [B, T, D]: 0 where a dimension is incremental, else the last real value.

    Padding must follow the real steps; a chunk of padding alone is refused with DataError.
    """
    real = (~pad_mask).sum(1)
    if (real == 0).any():
        raise DataError(f"chunk {int(np.argmin(real))} is padding from its first step on; drop it before encoding")
    if (pad_mask != (np.arange(pad_mask.shape[1])[None] >= real[:, None])).any():
        raise DataError("pad_mask has real steps after padded ones; padding stands at the end of a chunk")
    last = np.take_along_axis(chunks, (real - 1)[:, None, None], axis=1)
    return np.where(pad_mask[:, :, None], np.where(incremental, np.float32(0), last), chunks)


def fixed_rows(
    flat: Int[np.ndarray, "_"], offsets: Int[np.ndarray, "ends"], length: int
) -> tuple[Int[np.ndarray, "ends-1 {length}"], Bool[np.ndarray, "ends-1"], Int[np.ndarray, "ends-1"], list[str | None]]:
    """Ids as [B, length] with validity, tokens used and reasons; a sequence of another length is invalid (zeros here)."""
    lengths = np.diff(offsets)
    valid = lengths == length
    if valid.all():
        codes = flat.reshape(len(lengths), length)
    else:
        codes = np.zeros((len(lengths), length), np.int64)
        for b in np.flatnonzero(valid):
            codes[b] = flat[offsets[b] : offsets[b + 1]]
    reasons = [None if ok else f"{n} tokens, expected {length}" for ok, n in zip(valid, lengths, strict=True)]
    return codes, valid, np.minimum(lengths, length), reasons
