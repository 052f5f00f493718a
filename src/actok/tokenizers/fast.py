"""FAST: discrete cosine transform and byte-pair encoding (Pertsch et al., arXiv 2501.09747, section V, algorithm 1).

    c = round(scale * DCT-II(x))        orthonormal, along time, per dimension; half to even
    s = (c[0, 0], c[0, 1], ..., c[T-1, D-1])    by frequency, then by dimension
    ids = BPE(s)

Published fit: scale 10, vocabulary 1024, 1 % to 99 % quantiles to [-1, 1].

Deviations, each deliberate:
* One BPE symbol an integer over the full range of fitted coefficients, without text or its regex: an integer that the
  data skipped can still be written, and no token is undecodable by itself. (Published files hold UTF-8 bytes behind
  GPT-2's regex; `from_published` reads those, with the same ids.)
* A coefficient outside the alphabet is saturated to its end and counted in `Tokens.saturated`.
* A sequence that does not spell T x D coefficients is invalid (published: all zeros). `repair="truncate_pad"` cuts a
  surplus, fills what is missing by zeros, and marks the result as repaired.
* Coefficients are bounded by scale * sqrt(T) * range_limit, which no signal inside [-range_limit, range_limit] exceeds
  (Cauchy-Schwarz, since the basis is orthonormal). The bound is the same for each frequency.
* Tokens are at most `max_token_length` symbols long (published: 10000), so that no token outgrows a chunk.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.fft

from actok.core import (
    ActionSpace,
    ArtifactError,
    ChunkContext,
    ConfigError,
    Constraint,
    FitPart,
    SpaceMismatchError,
    TokenLayout,
    Tokens,
    to_numpy,
    write_folder,
)
from actok.signal.automaton import SpellingConstraint, SpellingTables
from actok.signal.bpe import FIRST_CHAR, LARGEST_ALPHABET, Bpe, read_bpe, train_bpe
from actok.signal.normalise import Normaliser
from actok.signal.statistics import Statistics
from actok.tokenizers import fast_plus
from actok.tokenizers.base import CodecInput, Encoded, Reconstruction
from actok.tokenizers.closed_form import ClosedFormTokenizer
from actok.tokenizers.embodiments import Embodiment
from actok.tokenizers.fast_plus import TOKENIZER_FILE, is_published_folder

NORMALISED = re.compile(r"normalised-([1-9]\d{0,3})")

__all__ = ["Alphabet", "FastConfig", "FastTokenizer", "is_published_folder"]


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """Settings of FastTokenizer.

    Attributes:
        scale: coefficient x scale is rounded; the step of a coefficient is 1 / scale.
        vocab: V, the alphabet of integers included.
        normaliser: see actok.signal.normalise.
        max_token_length: longest token in coefficients.
        max_chunks: at most so many chunks, drawn with `seed`, train the BPE (memory: 150 bytes a coefficient). Chunks
            overlap, so more of them hardly matter: see docs/tokenizers/fast.md.
        range_limit: largest normalised value that must be representable; larger coefficients than such a signal can
            have are saturated. None: the largest normalised value in the fitted chunks, at least 1.
        seed: of the draw.
    """

    scale: float = 10.0
    vocab: int = 1024
    normaliser: str = "quantile"
    max_token_length: int = 1024
    max_chunks: int = 10_000
    range_limit: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1e6:
            raise ConfigError(f"scale is {self.scale!r}; give a number above 0, at most 1e6")
        if not isinstance(self.vocab, int) or not 2 <= self.vocab <= 65536:
            raise ConfigError(f"vocab is {self.vocab!r}; give a whole number from 2 to 65536")
        for name in ("max_token_length", "max_chunks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a whole number of at least 1")
        if self.range_limit is not None and not 0 < self.range_limit < math.inf:
            raise ConfigError(f"range_limit is {self.range_limit!r}; give a number above 0, or leave it out")


class Alphabet(NamedTuple):
    """The code points that coefficients of one horizon may take."""

    low: int
    high: int
    nearest: np.ndarray  # [high - low + 1] the closest code point that the BPE can spell
    spelled: np.ndarray  # bool [high - low + 1]


class FastTokenizer(ClosedFormTokenizer):
    """Variable-length BPE over DCT coefficients. Not total; `constraint` admits exactly what decodes.

    Works at any horizon, and one vocabulary serves robots of different D. The embodiment "normalised-<D>" is always
    there: D dimensions that lie in [-1, 1] already. A tokenizer from published files has no other one until `adapt`
    adds it; without a context it takes each chunk's D as it comes. The first robot that `adapt` adds becomes the
    default, so that raw actions never meet the identity unless it is named.
    """

    kind = "fast"
    config_class = FastConfig
    repair_modes = ("truncate_pad",)

    def _build(self) -> None:
        if TOKENIZER_FILE not in self._files or not {"min_token", "range_limit"} <= self._tensors.keys():
            raise ArtifactError(f"the artifact lacks {TOKENIZER_FILE}, min_token or range_limit; save or fit it again")
        self._alphabets: dict[int, Alphabet] = {}
        self._layouts: dict[tuple[int, int], TokenLayout] = {}
        self._spelling: dict[tuple[int, int], SpellingTables] = {}

    @cached_property
    def bpe(self) -> Bpe:
        """The byte-pair encoding."""
        return read_bpe(self._files[TOKENIZER_FILE])

    @property
    def min_token(self) -> int:
        """Coefficient = code point + min_token, as in the published files."""
        return int(self._tensors["min_token"][0])

    @property
    def range_limit(self) -> float:
        """Largest normalised value that must be representable."""
        return float(self._tensors["range_limit"][0])

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.bpe.vocab_size

    # -- fit ------------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, parts: Sequence[FitPart], config: Any) -> Self:
        """See ActionTokenizer.fit. Raises ConfigError where the coefficients' range exceeds the vocabulary."""
        fitted = super().fit(parts, config)
        total = fitted._meta["fitted_on_chunks"]
        fitted._meta["bpe_trained_on_chunks"] = min(total, config.max_chunks)
        return fitted

    @classmethod
    def fit_codec(
        cls, inputs: Sequence[CodecInput], config: Any, horizon: int
    ) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
        """Train the BPE on rounded coefficients."""
        limit = config.range_limit or max(1.0, *(float(np.abs(i.chunks).max()) for i in inputs))
        bound = coefficient_bound(config.scale, horizon, limit)
        rows = [np.clip(quantise(i.chunks, config.scale), -bound, bound).reshape(len(i.chunks), -1) for i in inputs]
        low = min(0, *(int(r.min()) for r in rows))
        high = max(0, *(int(r.max()) for r in rows))
        alphabet = high - low + 1
        if alphabet > min(config.vocab, LARGEST_ALPHABET):
            raise ConfigError(
                f"coefficients from {low} to {high} need {alphabet} tokens, the vocabulary has {config.vocab}; give a"
                f" lower scale (now {config.scale:g}), a larger vocab, or a range_limit below {limit:.4g}"
            )
        total = sum(map(len, rows))
        if total > config.max_chunks:
            chosen = np.sort(np.random.default_rng(config.seed).choice(total, config.max_chunks, replace=False))
            edges = np.cumsum([0, *map(len, rows)])
            rows = [
                r[chosen[(chosen >= a) & (chosen < b)] - a] for r, a, b in zip(rows, edges[:-1], edges[1:], strict=True)
            ]
        source = train_bpe(
            [r - low for r in rows if len(r)],
            alphabet=alphabet,
            vocab=config.vocab,
            max_token_length=config.max_token_length,
        )
        tensors = {"min_token": np.array([low - FIRST_CHAR], np.int64), "range_limit": np.array([limit], np.float64)}
        return tensors, {TOKENIZER_FILE: source}

    # -- published files ------------------------------------------------------------------------------------------

    @classmethod
    def from_published(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        *,
        dim: int | None = None,
        horizon: int | None = None,
        space: ActionSpace | None = None,
        range_limit: float | None = None,
        normaliser: str = "quantile",
        revision: str | None = None,
    ) -> Self:
        """Read a published FAST or FAST+ folder (Hub id: physical-intelligence/fast). Same ids, no transformers.

        The codec's input is in [-1, 1], so the default embodiment has the identity as normaliser: `space` if given,
        else D = `dim` unnamed dimensions, else none. `adapt(space, statistics)` adds one in raw units, by
        `normaliser`. `horizon` is T where a call names none. `range_limit` is as in FastConfig; None: 5, see
        actok.tokenizers.fast_plus. Raises ArtifactError.
        """
        files = fast_plus.read(folder_or_hub_id, revision)
        bpe = read_bpe(files.source)
        dim = space.dim if space is not None else dim if dim is not None else files.dim
        embodiments = {}
        if dim is not None:
            known = _normalised(dim) if space is None else Embodiment(space, Normaliser.identity(dim))
            embodiments[known.space.embodiment] = known
        config = cls.config_class(
            scale=files.scale, vocab=bpe.vocab_size, normaliser=normaliser, range_limit=range_limit
        )
        tensors = fast_plus.tensors_of(files, range_limit)
        return cls(config, embodiments, horizon or files.horizon or 0, tensors, {TOKENIZER_FILE: files.source})

    def to_published(self, folder: str | os.PathLike[str]) -> Path:
        """Write a folder that the published processor reads, atomically: inputs in [-1, 1], same ids, same decoding.

        The normalisers stay behind, as the format has no place for them: users must normalise by themselves.
        """
        dims = {space.dim for space in self.spaces.values()}
        files = fast_plus.publish(
            source=self._files[TOKENIZER_FILE],
            scale=self.config.scale,
            min_token=self.min_token,
            vocab=self.vocab_size,
            horizon=self._horizon or None,
            dim=dims.pop() if len(dims) == 1 else None,
        )
        return write_folder(Path(folder), files)

    def adapt(self, space: ActionSpace, statistics: Statistics) -> Self:
        """See TokenizerBase.adapt; a robot comes before "normalised-<D>", which is known without being listed."""
        adapted = super().adapt(space, statistics)
        robots = {name: e for name, e in adapted._embodiments.items() if not _is_placeholder(name, e)}
        return type(self)(self.config, robots, self._horizon, self._tensors, self._files, self._meta)

    def embodiment_for(self, space: ActionSpace) -> str:
        """See ActionTokenizer.embodiment_for; "normalised-<D>" is only for data of a space of that name."""
        found = super().embodiment_for(space)
        if found != space.embodiment and _is_placeholder(found, self._embodiments[found]):
            raise SpaceMismatchError(
                f"this FAST tokenizer knows only {found!r}, actions that lie in [-1, 1] already, and data of action space"
                f" {space.embodiment!r} are in raw units; add the robot with adapt(space, statistics), or call the space"
                f" {found!r} where the data are normalised"
            )
        return found

    def embodiment(self, name: str | None = None) -> Embodiment:
        """See ClosedFormTokenizer.embodiment; "normalised-<D>" is known to every FAST tokenizer."""
        if name is None and not self._embodiments:
            raise SpaceMismatchError(
                "this FAST tokenizer has no action space of its own; add one by adapt(space, statistics), or name"
                ' embodiment "normalised-<D>" in the context where actions lie in [-1, 1]'
            )
        if name is not None and name not in self._embodiments and (match := NORMALISED.fullmatch(name)):
            return _normalised(int(match[1]))
        return super().embodiment(name)

    def encode(self, actions: Any, context: ChunkContext | None = None) -> Tokens:
        """See ActionTokenizer.encode."""
        context = context or ChunkContext()
        if context.embodiment is None and not self._embodiments:
            context = replace(context, embodiment=f"normalised-{np.shape(to_numpy(actions))[-1]}")
        return super().encode(actions, context)

    # -- what a horizon allows ------------------------------------------------------------------------------------

    def alphabet(self, horizon: int) -> Alphabet:
        """Code points of representable coefficients at that horizon."""
        if horizon not in self._alphabets:
            self._alphabets[horizon] = self._make_alphabet(horizon)
        return self._alphabets[horizon]

    def _make_alphabet(self, horizon: int) -> Alphabet:
        bound = coefficient_bound(self.config.scale, horizon, self.range_limit)
        atoms = self.bpe.base_atoms
        first, last = (0, 0xD7FF) if self.bpe.byte_level else (int(atoms[0]), int(atoms[-1]))
        low, high = max(first, -bound - self.min_token), min(last, bound - self.min_token)
        points = np.arange(low, high + 1)
        if self.bpe.byte_level:
            known = np.isin(np.arange(256), atoms)
            spelled = np.array([known[list(chr(p).encode())].all() for p in points], bool)
        else:
            spelled = np.isin(points, atoms)
        if not low <= -self.min_token <= high or not spelled[-self.min_token - low]:
            raise ArtifactError(
                f"the vocabulary cannot write the coefficient 0 (min_token {self.min_token}); the files do not belong"
                " together"
            )
        known_points = points[spelled]
        right = np.clip(np.searchsorted(known_points, points), 0, len(known_points) - 1)
        left = np.maximum(right - 1, 0)
        closer_left = np.abs(points - known_points[left]) < np.abs(known_points[right] - points)
        return Alphabet(low, high, known_points[np.where(closer_left, left, right)], spelled)

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """Variable length; positions have no level, time or part."""
        steps, dim = self._resolve_horizon(horizon, ChunkContext()), self.embodiment(embodiment).space.dim
        if (steps, dim) not in self._layouts:
            n, longest = steps * dim, int(self.bpe.lengths.max())
            atoms = len(chr(self.alphabet(steps).high).encode()) if self.bpe.byte_level else 1
            self._layouts[steps, dim] = TokenLayout.variable(self.vocab_size, -(-n // longest), n * atoms)
        return self._layouts[steps, dim]

    def constraint(self, context: ChunkContext | None = None) -> Constraint:
        """Exactly the sequences that spell T x D coefficients within the bound."""
        context = context or ChunkContext()
        horizon = self._resolve_horizon(None, context)
        alphabet = self.alphabet(horizon)
        key = alphabet.low, alphabet.high
        if key not in self._spelling:
            points = np.arange(alphabet.low, alphabet.high + 1)[alphabet.spelled]
            self._spelling[key] = SpellingTables.build(self.bpe, points)
        dim = self.embodiment(context.embodiment).space.dim
        return SpellingConstraint(self._spelling[key], horizon * dim)

    # -- encode, decode -------------------------------------------------------------------------------------------

    def _encode(self, chunks: np.ndarray, embodiment: Embodiment, context: ChunkContext) -> Encoded:
        alphabet = self.alphabet(chunks.shape[1])
        points = quantise(chunks, self.config.scale).reshape(len(chunks), -1)
        points -= np.int32(self.min_token)
        saturated = np.zeros(len(chunks), np.int64)
        if points.min() < alphabet.low or points.max() > alphabet.high or not alphabet.spelled.all():
            wanted = points
            points = alphabet.nearest[np.clip(wanted, alphabet.low, alphabet.high) - alphabet.low]
            saturated = (points != wanted).sum(1)
        flat, offsets = self.bpe.encode(points)
        return Encoded(flat, offsets, saturated)

    def _decode(
        self,
        flat: np.ndarray,
        offsets: np.ndarray,
        horizon: int,
        embodiment: Embodiment,
        context: ChunkContext,
        repair: str | None,
    ) -> Reconstruction:
        dim = embodiment.space.dim
        n = horizon * dim
        alphabet = self.alphabet(horizon)
        points = self.bpe.decode(flat, offsets)
        lengths = np.diff(points.offsets)
        if len(points.flat) == 0 or points.flat.min() < alphabet.low or points.flat.max() > alphabet.high:
            legal = (points.flat >= alphabet.low) & (points.flat <= alphabet.high)
        else:
            legal = np.ones(len(points.flat), bool)
        if not alphabet.spelled.all():
            legal &= alphabet.spelled[np.clip(points.flat - alphabet.low, 0, len(alphabet.spelled) - 1)]
        if (lengths == n).all() and legal.all():
            coefficients = (points.flat + np.int32(self.min_token)).reshape(-1, horizon, dim)
            size = len(lengths)
            return Reconstruction(
                dequantise(coefficients, self.config.scale), np.ones(size, bool), np.diff(offsets), [None] * size
            )
        coefficients = np.zeros((len(lengths), n), np.int64)
        used, reasons = np.diff(offsets), list[str | None]()
        for b in range(len(lengths)):
            row = slice(int(points.offsets[b]), int(points.offsets[b + 1]))
            reasons.append(self._fault(points.flat[row], legal[row], n))
            kept = np.clip(points.flat[row][:n], alphabet.low, alphabet.high)
            coefficients[b, : len(kept)] = np.where(points.flat[row][:n] < 0, 0, kept + self.min_token)
            if lengths[b] > n:
                used[b] = self._tokens_until(flat[offsets[b] : offsets[b + 1]], n)
        valid = np.array([r is None for r in reasons], bool)
        chunks = dequantise(coefficients.reshape(-1, horizon, dim), self.config.scale)
        return Reconstruction(chunks, valid, used, reasons, ~valid if repair else None)

    def _fault(self, points: np.ndarray, legal: np.ndarray, n: int) -> str | None:
        """What is wrong with one decoded sequence, in words."""
        if (points < 0).any():
            return f"token bytes are not UTF-8 from coefficient {int(np.argmax(points < 0))} on"
        if len(points) != n:
            return f"{len(points)} coefficients, expected {n}"
        if not legal.all():
            i = int(np.argmin(legal))
            return f"coefficient {points[i] + self.min_token} at {i} is beyond what the tokenizer represents"
        return None

    def _tokens_until(self, ids: np.ndarray, n: int) -> int:
        """How many ids it takes to spell the first n coefficients."""
        characters = self.bpe.characters[ids]
        return int((np.cumsum(characters) - characters < n).sum())


@lru_cache(maxsize=64)
def _normalised(dim: int) -> Embodiment:
    """D dimensions that lie in [-1, 1] already."""
    return Embodiment(ActionSpace.raw(dim, f"normalised-{dim}"), Normaliser.identity(dim))


def _is_placeholder(name: str, embodiment: Embodiment) -> bool:
    """Whether this is what `_normalised` gives, as `from_published` or an artifact holds it."""
    match = NORMALISED.fullmatch(name)
    return match is not None and (
        embodiment.normaliser.kind == "identity" and embodiment.space == _normalised(int(match[1])).space
    )


def quantise(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Rounded coefficients int32 [B, T, D] of float32 chunks; beyond +-2 ** 30 (far out of range) they stop there."""
    with np.errstate(over="ignore"):
        coefficients = scipy.fft.dct(chunks, axis=1, norm="ortho")
        coefficients *= np.float32(scale)
    np.clip(coefficients, -(2.0**30), 2.0**30, out=coefficients)
    return np.rint(coefficients, out=coefficients).astype(np.int32)


def dequantise(coefficients: np.ndarray, scale: float) -> np.ndarray:
    """float32 chunks [B, T, D] of integer coefficients."""
    values = coefficients.astype(np.float32)
    values /= np.float32(scale)
    return scipy.fft.idct(values, axis=1, norm="ortho", overwrite_x=True)


def coefficient_bound(scale: float, horizon: int, limit: float) -> int:
    """The largest rounded coefficient of a signal of T = horizon steps inside [-limit, limit]."""
    return round(scale * math.sqrt(horizon) * limit)
