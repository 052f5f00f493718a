"""What DCT and PCA scalar tokens share: which scalars are kept, their bits, order, layout and truncated sequences.

A linear transform turns a normalised chunk into scalars that hardly correlate. The ones that vary most are kept, each
less its training mean, and each is quantised on its own. Tokens run from the scalar of most variance to that of least,
so a sequence cut after one of `layout.prefixes` decodes too: what is missing is taken at its mean.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionSpace, ChunkContext, ConfigError, SpaceMismatchError, TokenLayout
from actok.signal.scalar_quantise import SMALLEST_BITS, UniformQuantiser, allocate_bits
from actok.tokenizers.base import CodecInput, Encoded, Reconstruction
from actok.tokenizers.closed_form import ClosedFormTokenizer
from actok.tokenizers.embodiments import Embodiment

_BLOCK = 4096  # chunks whose float64 copy is in memory at once while fitting
_SAMPLE = 16384  # chunks, evenly spaced over all, that the ranges are fitted on

__all__ = ["ScalarConfig", "ScalarTokenizer", "Transform"]


@dataclass(frozen=True, kw_only=True)
class ScalarConfig:
    """Settings of the scalar tokenizers.

    Attributes:
        scalars: how many are kept at most: a whole number, or a share of T x D below 1 (rounded up).
        bits: mean bits of a kept scalar; `scalars` x `bits` are allocated by variance, so some may end up with none.
        max_bits: most bits of one scalar. Where `bits` equals it, all scalars have that many.
        normaliser: what the chunks are brought to before the transform, and so the weight of each dimension.
    """

    scalars: int | float = 0.125
    bits: float = 8
    max_bits: int = 8
    normaliser: str = "quantile"

    def __post_init__(self) -> None:
        number = isinstance(self.scalars, (int, float)) and not isinstance(self.scalars, bool)
        if not number or not (0 < self.scalars < 1 or (self.scalars >= 1 and self.scalars == int(self.scalars))):
            raise ConfigError(f"scalars is {self.scalars!r}; give a whole number, or a share of T x D between 0 and 1")
        if not isinstance(self.max_bits, int) or not SMALLEST_BITS < self.max_bits <= 16:
            raise ConfigError(f"max_bits is {self.max_bits!r}; give a whole number from {SMALLEST_BITS + 1} to 16")
        if not isinstance(self.bits, (int, float)) or not 0 < self.bits <= self.max_bits:
            raise ConfigError(f"bits is {self.bits!r}; give a number above 0 and up to max_bits ({self.max_bits})")

    def count(self, steps: int, dim: int) -> int:
        """How many scalars of T x D are kept at most. Raises ConfigError where there are not that many."""
        if self.scalars < 1:
            return math.ceil(self.scalars * steps * dim)
        if self.scalars > steps * dim:
            raise ConfigError(
                f"scalars is {self.scalars}, chunks of {steps} steps and {dim} dimensions hold {steps * dim}; give at"
                " most that many, or a share below 1"
            )
        return int(self.scalars)


class Transform(NamedTuple):
    """What a subclass's `fit_transform` finds; S scalars in order of falling variance."""

    tensors: dict[str, np.ndarray]  # all that `_analyse` and `_synthesise` need
    rows: tuple[str, ...]  # names of the tensors that have one row a scalar
    variance: Float[np.ndarray, "S"]  # float64 [S] over all training chunks
    sample: Float[np.ndarray, "_ S"]  # float64 [M, S], scalars less their mean of the sampled chunks


class ScalarTokenizer(ClosedFormTokenizer):
    """One token a kept scalar (a window and scalar where a chunk takes several windows). Total."""

    config_class = ScalarConfig
    config: ScalarConfig

    @classmethod
    @abstractmethod
    def fit_transform(
        cls, blocks: Sequence[Float[np.ndarray, "_ T D"]], sample: Float[np.ndarray, "_ T D"], count: int
    ) -> Transform:
        """The `count` scalars of most variance over normalised chunks, given in blocks [B, T, D]; `sample` [M, T, D]."""

    @abstractmethod
    def _analyse(self, chunks: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B windows S"]:
        """Kept scalars less their mean, float64 [B, W, S], of normalised chunks."""

    @abstractmethod
    def _synthesise(
        self, scalars: Float[np.ndarray, "B windows S"], horizon: int
    ) -> Float[np.ndarray, "B {horizon} D"]:
        """Normalised chunks [B, T, D] from kept scalars less their mean [B, W, S]."""

    @abstractmethod
    def _coordinates(self, windows: int) -> tuple[Int[np.ndarray, "S {windows}"], Int[np.ndarray, "S {windows}"]]:
        """(time, part) of every scalar and window, [S, W] each; -1 where there is none."""

    def _windows(self, horizon: int) -> int:
        """W: how many windows a chunk of that horizon takes."""
        return 1

    @classmethod
    def fit_codec(cls, inputs: Sequence[CodecInput], config: Any, horizon: int) -> tuple[dict, dict]:
        """Transform and bits on the chunks without padding (with it only where every chunk has some), ranges on a sample."""
        spaces = [i.embodiment.space for i in inputs]
        for space in spaces[1:]:
            _check_dim(cls.kind, spaces[0], space)
        whole = [i.chunks if i.part.pad_mask is None else i.chunks[~i.part.pad_mask.any(1)] for i in inputs]
        chunks = whole if any(map(len, whole)) else [i.chunks for i in inputs]
        blocks = [c[i : i + _BLOCK] for c in chunks for i in range(0, len(c), _BLOCK)]
        total = sum(map(len, blocks))
        chosen = np.unique(np.linspace(0, total - 1, min(total, _SAMPLE)).astype(np.int64))
        starts = np.cumsum([0, *map(len, blocks[:-1])])
        sample = np.concatenate(
            [b[chosen[(chosen >= s) & (chosen < s + len(b))] - s] for s, b in zip(starts, blocks, strict=True)]
        )
        transform = cls.fit_transform(blocks, sample, config.count(horizon, spaces[0].dim))
        variance = transform.variance
        varying = variance > 1e-12 * max(variance.max(), 1e-12)
        variance = np.where(varying, variance, 0.0)
        if varying.any():
            bits = allocate_bits(variance, round(config.bits * len(variance)), largest=config.max_bits)
        else:  # nothing ever moves: one token that always says so
            bits = np.where(np.arange(len(variance)) == 0, SMALLEST_BITS, 0)
        kept = bits > 0
        quantiser = UniformQuantiser.fit(transform.sample[:, kept], bits[kept])
        tensors = {k: v[kept] if k in transform.rows else v for k, v in transform.tensors.items()}
        return {**tensors, "bits": quantiser.bits, "low": quantiser.low, "step": quantiser.step}, {}

    def _build(self) -> None:
        self._quantiser = UniformQuantiser(**{k: self._tensors[k] for k in ("bits", "low", "step")})

    def _check_adaptable(self, space: ActionSpace) -> None:
        _check_dim(self.kind, self.embodiment().space, space)

    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """Level = rank by variance, table = rank, W windows of a rank side by side, one block a rank."""
        self.embodiment(embodiment)
        windows = self._windows(self._resolve_horizon(horizon, ChunkContext()))
        ranks = len(self._quantiser.bits)
        level = np.repeat(np.arange(ranks), windows)
        time, part = self._coordinates(windows)
        return TokenLayout.uniform(
            self._quantiser.levels[level],
            np.stack([level, time.reshape(-1), part.reshape(-1)], axis=1),
            table=level,
            block=windows,
            prefixes=tuple(windows * n for n in (*(2**i for i in range((ranks - 1).bit_length())), ranks)),
        )

    def _encode(self, chunks: Float[np.ndarray, "B T D"], embodiment: Embodiment, context: ChunkContext) -> Encoded:
        codes, outside = self._quantiser.encode(self._analyse(chunks))
        flat = codes.transpose(0, 2, 1).reshape(-1)
        return Encoded(flat, np.arange(len(codes) + 1) * codes[0].size, outside.sum((1, 2)))

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
        valid = np.isin(lengths, layout.prefixes)
        windows = layout.max_len // len(self._quantiser.bits)
        scalars = np.zeros((len(lengths), windows, len(self._quantiser.bits)))
        for n in np.unique(lengths[valid]):
            rows = lengths == n
            ranks = n // windows
            codes = flat[offsets[:-1][rows][:, None] + np.arange(n)].reshape(-1, ranks, windows)
            scalars[rows, :, :ranks] = self._quantiser.decode(codes.transpose(0, 2, 1))
        chunks = self._synthesise(scalars, horizon)
        chunks = np.where(embodiment.normaliser.constant, 0.0, chunks).astype(np.float32)
        reasons = [
            None if ok else f"{n} tokens, expected {layout.max_len} or a prefix of {list(layout.prefixes)}"
            for ok, n in zip(valid, lengths, strict=True)
        ]
        return Reconstruction(chunks, valid, np.minimum(lengths, layout.max_len), reasons)


def _check_dim(kind: str, fitted: ActionSpace, other: ActionSpace) -> None:
    if fitted.dim != other.dim:
        raise SpaceMismatchError(
            f"{kind} mixes all dimensions, and {fitted.embodiment!r} has {fitted.dim}, {other.embodiment!r}"
            f" {other.dim}; fit one tokenizer for each"
        )
