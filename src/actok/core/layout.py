"""TokenLayout: what each position of a token sequence is, and how sequences may be generated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actok.core.errors import ConfigError

__all__ = ["TokenLayout"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLayout:
    """The structure of one horizon's token sequences.

    Attributes:
        vocab: [N] number of codes that may stand at each position.
        table: [N] which code table each position reads (0 everywhere for a shared vocabulary).
        coords: [N, 3] (level, time, part) of each position; -1 where a position has no such coordinate (BPE).
        blocks: positions grouped into the steps of block-wise decoding, in order; together each position once.
        prefixes: lengths at which a truncated sequence still decodes (empty: none).
        min_len, max_len: bounds of the sequence length; equal where it is fixed.
        total: every in-range sequence decodes to finite actions within limits.
    """

    vocab: np.ndarray
    table: np.ndarray
    coords: np.ndarray
    blocks: tuple[tuple[int, ...], ...]
    prefixes: tuple[int, ...] = ()
    min_len: int
    max_len: int
    total: bool

    def __post_init__(self) -> None:
        for name in ("vocab", "table", "coords"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int64))
        n = len(self.vocab)
        if self.table.shape != (n,) or self.coords.shape != (n, 3) or self.max_len != n:
            raise ConfigError(
                f"token layout: vocab {self.vocab.shape}, table {self.table.shape}, coords {self.coords.shape},"
                f" max_len {self.max_len} disagree; all describe the same N positions"
            )
        if [p for b in self.blocks for p in b] != sorted(p for b in self.blocks for p in b) or sum(
            map(len, self.blocks)
        ) != n:
            raise ConfigError("token layout: blocks must list every position once, in order")

    @classmethod
    def uniform(
        cls,
        vocab: int | np.ndarray,
        coords: np.ndarray,
        *,
        table: np.ndarray | None = None,
        block: int = 1,
        prefixes: tuple[int, ...] = (),
        total: bool = True,
    ) -> TokenLayout:
        """A fixed-length layout with equal blocks (the last may be ragged); `vocab` one number or one a position."""
        n = len(coords)
        return cls(
            vocab=np.broadcast_to(np.asarray(vocab), (n,)),
            table=np.zeros(n, np.int64) if table is None else table,
            coords=coords,
            blocks=tuple(tuple(range(i, min(i + block, n))) for i in range(0, n, block)),
            prefixes=prefixes,
            min_len=n,
            max_len=n,
            total=total,
        )

    @classmethod
    def variable(cls, vocab: int, min_len: int, max_len: int) -> TokenLayout:
        """Sequences of varying length over one vocabulary whose positions mean nothing by themselves (BPE)."""
        return cls(
            vocab=np.full(max_len, vocab),
            table=np.zeros(max_len, np.int64),
            coords=np.full((max_len, 3), -1),
            blocks=tuple((i,) for i in range(max_len)),
            min_len=min_len,
            max_len=max_len,
            total=False,
        )

    @property
    def fixed_length(self) -> int | None:
        """N where every sequence has N tokens, else None."""
        return self.max_len if self.min_len == self.max_len else None

    @property
    def passes(self) -> int:
        """Forward passes of a policy that emits one block a pass."""
        return len(self.blocks)

    @cached_property
    def bits(self) -> float:
        """Fixed-rate size of a sequence of max_len tokens: sum of log2(vocab)."""
        return float(np.log2(self.vocab).sum())
