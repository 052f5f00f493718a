"""Which tokens of a BPE may come next, so that a sequence spells exactly N characters of a given alphabet.

The automaton's states are the ways in which a prefix can end inside a character: one state where atoms are characters,
and one for each incomplete UTF-8 prefix of a character of the alphabet where atoms are bytes. Together with the number
of characters still missing they decide everything: a token fits if it can be read from the state, completes no more
characters than are missing, and leaves an unfinished character only if one is missing. Each character of the alphabet
can be spelled by tokens of a single atom, so whatever passes this test can also be completed: the mask is exact.

`RangeConstraint` is the same where each of the N characters has an alphabet of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import numpy as np
from jaxtyping import Bool, Int

from actok.core import Constraint, TokenError
from actok.signal.bpe import FIRST_CHAR, Bpe

NEVER = np.iinfo(np.int32).max

__all__ = ["RangeConstraint", "SpellingConstraint", "SpellingTables"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpellingTables:
    """Transitions by state and token, each int32 [S, V] (S the states of this automaton, V the vocabulary).

    Attributes:
        after: state after the token.
        completes: characters that the token completes.
        needs: characters that must still be missing for the token to fit; NEVER where it cannot be read at all.
    """

    after: Int[np.ndarray, "states V"]
    completes: Int[np.ndarray, "states V"]
    needs: Int[np.ndarray, "states V"]

    @classmethod
    def build(cls, bpe: Bpe, alphabet: Int[np.ndarray, "_"]) -> Self:
        """For an alphabet of code points, each of which `bpe` can encode."""
        step, ends = _byte_steps(alphabet) if bpe.byte_level else _character_steps(alphabet)
        states = len(step)
        after = np.broadcast_to(np.arange(states, dtype=np.int32)[:, None], (states, bpe.vocab_size)).copy()
        completes = np.zeros_like(after)
        dead = np.broadcast_to(bpe.lengths == 0, after.shape).copy()
        for position in range(int(bpe.lengths.max())):
            tokens = np.flatnonzero(bpe.lengths > position)
            atoms = np.minimum(bpe.atoms[bpe.starts[tokens] + position], step.shape[1] - 1)
            here = after[:, tokens]
            completes[:, tokens] += ends[here, atoms]
            reached = step[here, atoms]
            dead[:, tokens] |= reached < 0
            after[:, tokens] = np.maximum(reached, 0)
        needs = np.where(dead, NEVER, completes + (after != 0)).astype(np.int32)
        return cls(after=after, completes=completes, needs=needs)


def _character_steps(alphabet: Int[np.ndarray, "_"]) -> tuple[Int[np.ndarray, "1 atoms"], Int[np.ndarray, "1 atoms"]]:
    """(next state or -1, completes a character) by state and atom; the last column stands for all larger atoms."""
    known = np.zeros((1, int(alphabet.max()) + 2), bool)
    known[0, alphabet] = True
    return np.where(known, 0, -1).astype(np.int32), known.astype(np.int32)


def _byte_steps(alphabet: Int[np.ndarray, "_"]) -> tuple[Int[np.ndarray, "states 257"], Int[np.ndarray, "states 257"]]:
    """As `_character_steps`, over the incomplete UTF-8 prefixes of the alphabet. State 0 is between characters."""
    states: dict[bytes, int] = {b"": 0}
    edges: list[tuple[int, int, int]] = []
    for point in alphabet:
        spelling = chr(point).encode()
        for i in range(1, len(spelling) + 1):
            known = len(states)
            to = 0 if i == len(spelling) else states.setdefault(spelling[:i], known)
            edges.append((states[spelling[: i - 1]], spelling[i - 1], to))
    step = np.full((len(states), 257), -1, np.int32)
    ends = np.zeros((len(states), 257), np.int32)
    for state, byte, to in edges:
        step[state, byte] = to
        ends[state, byte] = to == 0
    return step, ends


@final
class SpellingConstraint(Constraint):
    """Sequences that spell exactly `length` characters. A state is [B, 2]: characters missing, automaton state."""

    def __init__(self, tables: SpellingTables, length: int) -> None:
        self._tables = tables
        self._length = length
        self.vocab_size = tables.needs.shape[1]

    def start(self, batch: int = 1) -> Int[np.ndarray, "{batch} 2"]:
        state = np.zeros((batch, 2), np.int64)
        state[:, 0] = self._length
        return state

    def allowed(self, state: Int[np.ndarray, "B 2"]) -> Bool[np.ndarray, "B V"]:
        return self._tables.needs[state[:, 1]] <= state[:, :1]

    def advance(self, state: Int[np.ndarray, "B 2"], ids: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B 2"]:
        ids = np.asarray(ids)
        inside = (ids >= 0) & (ids < self.vocab_size)
        known = np.where(inside, ids, 0)
        bad = ~inside | (self._tables.needs[state[:, 1], known] > state[:, 0])
        if bad.any():
            b = int(np.argmax(bad))
            raise TokenError(
                f"token {ids[b]} of sequence {b} is not allowed with {state[b, 0]} of {self._length} coefficients"
                " missing; use allowed(state)"
            )
        missing = state[:, 0] - self._tables.completes[state[:, 1], known]
        return np.stack([missing, self._tables.after[state[:, 1], known]], axis=1).astype(np.int64)

    def done(self, state: Int[np.ndarray, "B 2"]) -> Bool[np.ndarray, "B"]:
        return (state[:, 0] == 0) & (state[:, 1] == 0)


@final
class RangeConstraint(Constraint):
    """Sequences of BPE tokens that spell N symbols, of which each place takes its own range. A state is [B]: the place.

    Every symbol is a token, so whatever fits where it stands can be completed: the mask is exact.

    Args:
        bpe: over code points FIRST_CHAR + symbol.
        low, high: [N] first symbol and the one after the last at each place.
    """

    def __init__(self, bpe: Bpe, low: Int[np.ndarray, "N"], high: Int[np.ndarray, "N"]) -> None:
        self.vocab_size, self._lengths = bpe.vocab_size, bpe.lengths
        count, longest = len(low), int(bpe.lengths.max())
        # Behind the end nothing fits.
        lows, highs = (np.concatenate([a, np.zeros(longest + 1, np.int64)]) for a in (low, high))
        self._fits = np.ones((count + 1, bpe.vocab_size), bool)
        for i in range(longest):
            tokens = np.flatnonzero(bpe.lengths > i)
            symbols = bpe.atoms[bpe.starts[tokens] + i] - FIRST_CHAR
            places = np.arange(count + 1) + i
            self._fits[:, tokens] &= (symbols >= lows[places, None]) & (symbols < highs[places, None])

    def start(self, batch: int = 1) -> Int[np.ndarray, "{batch}"]:
        return np.zeros(batch, np.int64)

    def allowed(self, state: Int[np.ndarray, "B"]) -> Bool[np.ndarray, "B V"]:
        return self._fits[state]

    def advance(self, state: Int[np.ndarray, "B"], ids: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        ids = np.asarray(ids)
        inside = (ids >= 0) & (ids < self.vocab_size)
        known = np.where(inside, ids, 0)
        bad = ~inside | ~self._fits[state, known]
        if bad.any():
            b = int(np.argmax(bad))
            raise TokenError(
                f"token {ids[b]} of sequence {b} is not allowed after {state[b]} of {len(self._fits) - 1} codes; use"
                " allowed(state)"
            )
        return state + self._lengths[known]

    def done(self, state: Int[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
        return state == len(self._fits) - 1
