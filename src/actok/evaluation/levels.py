"""The codes of chunks level by level: which symbols occur in each chunk, as bags that a linear model can read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from actok.core import DataError, TokenLayout, Tokens, to_numpy

__all__ = ["LevelCodes", "LevelUse", "level_use", "split_levels"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelCodes:
    """The symbols of one level (or of whole sequences) of B chunks.

    A symbol is a code together with the code table it was read from and the part (group of dimensions) it stands for:
    code 5 of the gripper is another symbol than code 5 of the position. Where in time it stands is no part of it.

    Attributes:
        level: q of `TokenLayout.coords`, or None for all tokens of a sequence together.
        symbols: int64 [n], chunk after chunk.
        offsets: int64 [B + 1]; chunk b has symbols[offsets[b]:offsets[b + 1]].
        size: how many symbols there could be.
    """

    level: int | None
    symbols: Int[np.ndarray, "n"]
    offsets: Int[np.ndarray, "ends"]
    size: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "_"]:
        """[B] symbols of each chunk."""
        return np.diff(self.offsets)

    @cached_property
    def bags(self) -> Any:
        """Sparse [B, size] (scipy CSR) counts of each symbol over the root of the chunk's number of symbols.

        A chunk of pairwise different symbols then has length 1, whatever their number.
        """
        from scipy.sparse import csr_matrix

        weight = np.repeat(1 / np.sqrt(np.maximum(self.lengths, 1)), self.lengths)
        found = csr_matrix((weight, self.symbols, self.offsets), shape=(len(self), self.size))
        found.sum_duplicates()
        return found

    def take(self, rows: Int[np.ndarray, "_"]) -> LevelCodes:
        """These chunks, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return LevelCodes(
            level=self.level,
            symbols=self.symbols[np.repeat(self.offsets[:-1][rows], lengths) + within],
            offsets=offsets,
            size=self.size,
        )


def split_levels(tokens: Tokens, layout: TokenLayout) -> tuple[LevelCodes, ...]:
    """One entry a level of the layout, in their order, and after them (or alone) the whole sequences.

    A layout of varying length, or without levels (BPE), gives whole sequences only; one with a single level gives that
    level only, since the whole is the same. Raises DataError where a sequence is longer than the layout.
    """
    flat = to_numpy(tokens.flat).astype(np.int64)
    offsets = np.asarray(tokens.offsets, np.int64)
    if len(tokens) and tokens.lengths.max() > layout.max_len:
        raise DataError(
            f"a sequence of {tokens.lengths.max()} tokens exceeds the layout's {layout.max_len}; fix layout_for"
        )
    position = np.arange(len(flat)) - np.repeat(offsets[:-1], np.diff(offsets))
    # Symbols of a position begin where those of the (table, part) pairs before it end.
    _, kind = np.unique(np.stack([layout.table, layout.coords[:, 2]], 1), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    fixed = layout.fixed_length is not None
    levels = np.unique(layout.coords[:, 0]).tolist() if fixed and layout.coords[:, 0].min() >= 0 else []

    def part(level: int | None) -> LevelCodes:
        where = np.ones(layout.max_len, bool) if level is None else layout.coords[:, 0] == level
        sizes = np.zeros(kind.max() + 1, np.int64)
        np.maximum.at(sizes, kind[where], layout.vocab[where])
        start = np.cumsum(sizes) - sizes
        kept = where[position]
        before = np.concatenate([[0], np.cumsum(kept)])
        return LevelCodes(
            level=level,
            symbols=(flat + start[kind[position]])[kept],
            offsets=before[offsets].astype(np.int64),
            size=int(sizes.sum()),
        )

    found = [part(level) for level in levels]
    return tuple(found if len(found) == 1 else [*found, part(None)])


@dataclass(frozen=True, kw_only=True)
class LevelUse:
    """How the symbols of one level are used.

    Attributes:
        drawn: symbols counted.
        size: symbols there could be.
        perplexity: 2 to the entropy (bits) of the empirical distribution: as many equally frequent symbols would be as
            hard to guess.
        used: share of the `size` symbols seen at least once.
        used_if_uniform: the share that as many uniform draws would be expected to see.
    """

    drawn: int
    size: int
    perplexity: float
    used: float
    used_if_uniform: float


def level_use(codes: LevelCodes) -> LevelUse:
    """Perplexity and use of one level. X-Tokenizer's authors report 510/700/828/916 for levels of 2048 codes."""
    counts = np.bincount(codes.symbols, minlength=codes.size)
    p = counts[counts > 0] / max(1, len(codes.symbols))
    uniform = -np.expm1(len(codes.symbols) * np.log1p(-1 / codes.size)) if codes.size > 1 else len(p) > 0
    return LevelUse(
        drawn=len(codes.symbols),
        size=codes.size,
        perplexity=float(2 ** -(p * np.log2(p)).sum()),
        used=len(p) / codes.size,
        used_if_uniform=float(uniform),
    )
