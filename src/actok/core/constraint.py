"""Which tokens may come next, so that a language model can only emit sequences that decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import numpy as np

from actok.core.errors import TokenError
from actok.core.layout import TokenLayout

__all__ = ["Constraint", "FixedLengthConstraint"]


class Constraint(ABC):
    """A batched automaton over token prefixes. A state is an opaque int64 array whose first axis is the batch.

    `allowed` gives exactly the tokens after which the sequence can still be completed to a decodable one; where `done`,
    nothing is allowed (the caller ends the sequence).
    """

    vocab_size: int

    @abstractmethod
    def start(self, batch: int = 1) -> np.ndarray:
        """The state before the first token."""

    @abstractmethod
    def allowed(self, state: np.ndarray) -> np.ndarray:
        """bool [B, V]: True for every token that can still lead to a decodable sequence."""

    @abstractmethod
    def advance(self, state: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The state after one more token each (ids [B]). Raises TokenError for a token that is not allowed."""

    @abstractmethod
    def done(self, state: np.ndarray) -> np.ndarray:
        """bool [B]: True where the sequence so far is complete."""


@final
class FixedLengthConstraint(Constraint):
    """For tokenizers where every in-range sequence of the right length decodes: only length and vocabulary bind."""

    def __init__(self, layout: TokenLayout) -> None:
        self._vocab = np.append(layout.vocab, 0)
        self.vocab_size = int(layout.vocab.max())

    def start(self, batch: int = 1) -> np.ndarray:
        return np.zeros(batch, np.int64)

    def allowed(self, state: np.ndarray) -> np.ndarray:
        return np.arange(self.vocab_size)[None] < self._vocab[state][:, None]

    def advance(self, state: np.ndarray, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        bad = (ids < 0) | (ids >= self._vocab[state])
        if bad.any():
            b = int(np.argmax(bad))
            raise TokenError(
                f"token {ids[b]} of sequence {b} is not allowed at position {state[b]}; use allowed(state)"
            )
        return state + 1

    def done(self, state: np.ndarray) -> np.ndarray:
        return state == len(self._vocab) - 1
