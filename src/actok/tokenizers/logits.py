"""Constrained generation in transformers: only sequences that decode can be sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actok.core import ConfigError, Constraint, TokenError, to_numpy

if TYPE_CHECKING:
    import torch

__all__ = ["ActionLogitsProcessor"]


class ActionLogitsProcessor:
    """A logits processor for `model.generate(logits_processor=[...])`, or for any loop that masks scores.

    At each step the scores of all tokens that cannot lead to a decodable chunk become -inf; where the chunk is
    complete, only `eos_id` stays. Nothing is kept by row: a row's state is a function of its own prefix, looked up
    among the states of the step before (and recomputed where it is not there), so beams may be reordered, rows dropped
    and one instance used for several generations.

    Give `generate` room for the longest sequence: max_new_tokens >= tokenizer.layout.max_len + 1. What it cuts off
    before the end marker is incomplete, and decodes as invalid.

    Args:
        constraint: `tokenizer.constraint(context)`; all rows share its horizon and embodiment.
        lm_ids: [V] the language model's id of each code, all different.
        eos_id: id that ends the sequence, none of `lm_ids`.
        prompt_length: where actions start in each row (rows are left-padded to one length); or
        begin_id: the marker after which actions start: its last occurrence counts, and rows without it stay free.

    Raises ConfigError where these do not fit together.
    """

    def __init__(
        self,
        constraint: Constraint,
        lm_ids: Any,
        *,
        eos_id: int,
        prompt_length: int | None = None,
        begin_id: int | None = None,
    ) -> None:
        ids = np.asarray(to_numpy(lm_ids), np.int64)
        if ids.shape != (constraint.vocab_size,) or len(np.unique(ids)) != len(ids) or ids.min() < 0:
            raise ConfigError(
                f"lm_ids has shape {ids.shape} and {len(np.unique(ids))} different values; give one language-model id"
                f" for each of the {constraint.vocab_size} codes"
            )
        if eos_id in ids or (begin_id is not None and begin_id in ids):
            raise ConfigError(f"eos_id {eos_id} or begin_id {begin_id} is also the id of a code; choose another")
        if (prompt_length is None) == (begin_id is None):
            raise ConfigError("give either prompt_length or begin_id, so that it is known where actions start")
        self._constraint = constraint
        self._lm_ids = ids
        self._code_of = np.full(int(ids.max()) + 1, -1, np.int64)
        self._code_of[ids] = np.arange(len(ids))
        self._eos = eos_id
        self._prompt_length = prompt_length
        self._begin = begin_id
        self._states: dict[bytes, np.ndarray | None] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, LM vocabulary] with everything masked that cannot follow input_ids [B, N]."""
        import torch

        if int(self._lm_ids.max()) >= scores.shape[1] or self._eos >= scores.shape[1]:
            raise TokenError(
                f"lm_ids and eos_id go up to {max(int(self._lm_ids.max()), self._eos)}, the model has {scores.shape[1]}"
                " ids; resize its embeddings"
            )
        prefixes = [self._prefix(row) for row in to_numpy(input_ids)]
        keep = np.zeros((len(scores), scores.shape[1]), bool)
        active, lost = [], []
        for b, prefix in enumerate(prefixes):
            if prefix is None:
                keep[b] = True
            elif self._eos in prefix:
                keep[b, self._eos] = True
            else:
                active.append(b)
        states = self._advance([self._codes(prefixes[b]) for b in active])
        for b, state in zip(active, states, strict=True):
            if state is None:  # a beam kept for want of others, with a score of -inf: let it end
                keep[b, self._eos] = True
                lost.append(b)
        if lost and len(lost) == len(prefixes):
            raise TokenError(
                f"row 0 goes on with {prefixes[0][:8]} after its prompt, which cannot lead to a decodable sequence;"  # type: ignore[index]
                " check prompt_length or begin_id, and lm_ids"
            )
        rows = np.array([b for b, s in zip(active, states, strict=True) if s is not None], np.int64)
        if len(rows):
            state = np.concatenate([s for s in states if s is not None])
            keep[rows[:, None], self._lm_ids] = self._constraint.allowed(state)
            keep[rows, self._eos] = self._constraint.done(state)
        return scores.masked_fill(~torch.from_numpy(keep).to(scores.device), -torch.inf)  # type: ignore[return-value]

    def _prefix(self, row: np.ndarray) -> np.ndarray | None:
        """What was generated so far, or None where actions have not begun."""
        if self._prompt_length is not None:
            return row[self._prompt_length :]
        begins = np.flatnonzero(row == self._begin)
        return row[begins[-1] + 1 :] if len(begins) else None

    def _codes(self, prefix: np.ndarray | None) -> np.ndarray:
        """Codes of language-model ids, -1 where an id is none."""
        assert prefix is not None
        inside = (prefix >= 0) & (prefix < len(self._code_of))
        return np.where(inside, self._code_of[np.where(inside, prefix, 0)], -1)

    def _advance(self, prefixes: list[np.ndarray]) -> list[np.ndarray | None]:
        """State of each prefix, None where it cannot be completed: one step from its parent's where that is known."""
        parents = [self._parent(codes) for codes in prefixes]
        moving = [i for i, codes in enumerate(prefixes) if len(codes) and parents[i] is not None]
        states = [parent if not len(codes) else None for codes, parent in zip(prefixes, parents, strict=True)]
        if moving:
            state = np.concatenate([p for p in (parents[i] for i in moving) if p is not None])
            last = np.array([prefixes[i][-1] for i in moving])
            fits = (last >= 0) & self._constraint.allowed(state)[np.arange(len(last)), last]
            moved = self._constraint.advance(state[fits], last[fits])
            for row, i in enumerate(np.array(moving)[fits]):
                states[i] = moved[row : row + 1]
        # The next step's parents are this step's prefixes: older ones are not needed again.
        self._states = {codes.tobytes(): state for codes, state in zip(prefixes, states, strict=True)}
        return states

    def _parent(self, codes: np.ndarray) -> np.ndarray | None:
        """State before the last code, from the step before or from scratch."""
        if not len(codes):
            return self._constraint.start(1)
        key = codes[:-1].tobytes()
        if key in self._states:
            return self._states[key]
        state = self._constraint.start(1)
        for code in codes[:-1]:
            if code < 0 or not self._constraint.allowed(state)[0, code]:
                return None
            state = self._constraint.advance(state, np.array([code]))
        return state
