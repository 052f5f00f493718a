"""Substitution: codes chosen from the words alone, decoded, and compared with what was really done under those words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from actok.core import ActionSpace, ActionTokenizer, ChunkContext, DataError, TokenLayout, to_numpy
from actok.signal.normalise import Normaliser

# Training chunks that vote on a code: all of a text, thinned evenly; and those nearest in state.
VOTERS, NEAREST = 128, 16

__all__ = ["Substitution", "cosine_of_motion", "likely_codes", "substitution"]


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Mean cosine between a true test chunk's motion and a decoded one.

    Attributes:
        state: whether the map from words to codes also saw the state at the chunk's start.
        chunks: test chunks judged.
        own: codes chosen from the chunk's own words.
        other: codes chosen from the words of another instruction.
        difference: own - other.
        closer: share of chunks whose own words came closer than the other's.
        same_phase: own - codes chosen from the words of another instruction in the same phase: what the instruction adds
            to the phase. Over the chunks for which there is such a text, None where there is none.
        reconstruction: the chunk's own codes: what the tokenizer can reach.
    """

    state: bool
    chunks: int
    own: float
    other: float
    difference: float
    closer: float
    reconstruction: float
    same_phase: float | None


def substitution(
    tokenizer: ActionTokenizer,
    layout: TokenLayout,
    *,
    train_ids: Int[np.ndarray, "n N"],
    train_text: Int[np.ndarray, "n"],
    train_instruction: Int[np.ndarray, "n"],
    train_phase: Int[np.ndarray, "n"],
    train_state: Float[np.ndarray, "n P"] | None,
    test_ids: Int[np.ndarray, "m N"],
    test_text: Int[np.ndarray, "m"],
    test_instruction: Int[np.ndarray, "m"],
    test_phase: Int[np.ndarray, "m"],
    test_state: Float[np.ndarray, "m P"] | None,
    actions: Float[np.ndarray, "m T D"],
    context: ChunkContext,
    space: ActionSpace,
    normaliser: Normaliser,
    seed: int = 0,
) -> Substitution:
    """Words to codes to actions.

    A text is a number that stands for distinct words (instruction and sub-task); equal words have equal features in a
    text encoder, so nearest-neighbour regression on features is a look-up by text. Each test chunk gets the codes that
    its text's training chunks vote for (`likely_codes`), of all of them, or, where states are given, of the NEAREST in
    standardised state. The codes are decoded in the test chunk's own context and compared with the true chunk by
    `cosine_of_motion`; against the same with the text of a training chunk of another instruction, drawn with `seed`, the
    same for every tokenizer; and with one of another instruction and the same phase (0: no phase is known), where any
    training chunk has one. Test chunks whose text no training chunk has are left out.

    Raises DataError where no test chunk is left, or there is only one instruction.
    """
    instructions = np.unique(train_instruction)
    rows = np.flatnonzero(np.isin(test_text, train_text))
    if not len(rows) or len(instructions) < 2:
        raise DataError(
            f"{len(rows)} test chunks under words known from training, {len(instructions)} instructions; substitution needs"
            " one chunk and two instructions"
        )
    rng = np.random.default_rng(seed)
    other = np.zeros(len(rows), np.int64)
    for instruction in np.unique(test_instruction[rows]):
        asked = test_instruction[rows] == instruction
        other[asked] = rng.choice(train_text[train_instruction != instruction], int(asked.sum()))
    states = None
    if train_state is not None and test_state is not None:
        spread = train_state.std(0) + 1e-9
        states = (train_state / spread, test_state[rows] / spread)
    members = {int(t): np.flatnonzero(train_text == t) for t in np.unique(train_text)}

    def predict(texts: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_ N"]:
        if states is None:
            asked = np.unique(texts).tolist()
            vote = {t: likely_codes(train_ids[_thin(members[t])], layout) for t in asked}
            return np.stack([vote[int(t)] for t in texts])
        found = []
        for text, state in zip(texts, states[1], strict=True):
            member = members[int(text)]
            near = np.argsort(((states[0][member] - state) ** 2).sum(1), kind="stable")[:NEAREST]
            found.append(likely_codes(train_ids[member[near]], layout))
        return np.stack(found)

    one = _rows_of(context, rows)
    steps = None if context.pad_mask is None else ~np.asarray(context.pad_mask)[rows]

    def score(ids: Int[np.ndarray, "_ N"]) -> Float[np.ndarray, "_"]:
        decoded = to_numpy(tokenizer.decode(ids, one).actions)
        return cosine_of_motion(actions[rows], decoded, space, normaliser, steps)

    own, against, best = score(predict(test_text[rows])), score(predict(other)), score(test_ids[rows])
    alike, asked_alike = other.copy(), np.zeros(len(rows), bool)
    draw = np.random.default_rng([seed, 1])
    kinds = np.stack([test_instruction[rows], test_phase[rows]], 1)
    for instruction, phase in np.unique(kinds[kinds[:, 1] > 0], axis=0):
        among = train_text[(train_instruction != instruction) & (train_phase == phase)]
        if len(among):
            asked = (kinds == (instruction, phase)).all(1)
            alike[asked], asked_alike[asked] = draw.choice(among, int(asked.sum())), True
    same_phase = None
    if asked_alike.any():
        same_phase = float((own - score(predict(alike)))[asked_alike].mean())
    return Substitution(
        state=states is not None,
        chunks=len(rows),
        own=float(own.mean()),
        other=float(against.mean()),
        difference=float((own - against).mean()),
        closer=float(((own > against) + 0.5 * (own == against)).mean()),
        reconstruction=float(best.mean()),
        same_phase=same_phase,
    )


def likely_codes(ids: Int[np.ndarray, "k N"], layout: TokenLayout) -> Int[np.ndarray, "N"]:
    """The code at each position that most of k sequences [k, N] have, level by level.

    At a slot (time and part) the code of the first level is the most frequent one; of each further level, the most
    frequent among the sequences that agree with the levels chosen before, so that residuals belong to what they
    correct. Ties go to the earliest sequence.
    """
    _, slot = np.unique(layout.coords[:, 1:], axis=0, return_inverse=True)
    slot = slot.reshape(-1)
    agrees = np.ones((len(ids), slot.max() + 1), bool)
    chosen = np.zeros(layout.max_len, np.int64)
    for level in np.unique(layout.coords[:, 0]):
        at = np.flatnonzero(layout.coords[:, 0] == level)
        codes, voters = ids[:, at], agrees[:, slot[at]]
        votes = ((codes[:, None] == codes[None]) & voters[None]).sum(1) * voters
        chosen[at] = np.take_along_axis(codes, votes.argmax(0)[None], 0)[0]
        for n, position in enumerate(at):
            agrees[:, slot[position]] &= codes[:, n] == chosen[position]
    return chosen


def cosine_of_motion(
    reference: Float[np.ndarray, "B T D"],
    decoded: Float[np.ndarray, "B T D"],
    space: ActionSpace,
    normaliser: Normaliser,
    steps: Bool[np.ndarray, "B T"] | None = None,
) -> Float[np.ndarray, "B"]:
    """Cosine [B] of two chunks' motions over real steps and dimensions; 0 where either does not move.

    Motion in units of the normaliser's half range: a delta or velocity as it is (0 is rest), anything else as the
    difference to the chunk's own first step. Dimensions that never change have no unit and are left out.
    """
    incremental = np.array(space.incremental)
    mask = np.broadcast_to(~normaliser.constant, reference.shape)
    if steps is not None:
        mask = mask & steps[:, :, None]

    def motion(chunks: np.ndarray) -> np.ndarray:
        moved = chunks - np.where(incremental, 0.0, chunks[:, :1])
        return np.where(mask, moved / normaliser.half, 0.0).reshape(len(chunks), -1)

    a, b = motion(np.asarray(reference, np.float64)), motion(np.asarray(decoded, np.float64))
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(length > 1e-12, (a * b).sum(1) / np.maximum(length, 1e-12), 0.0)


def _thin(rows: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
    return rows[np.unique(np.linspace(0, len(rows) - 1, VOTERS).round().astype(np.int64))]


def _rows_of(context: ChunkContext, rows: Int[np.ndarray, "_"]) -> ChunkContext:
    arrays = {k: getattr(context, k) for k in ("anchor", "dof_mask", "pad_mask")}
    return ChunkContext(
        horizon=context.horizon,
        embodiment=context.embodiment,
        **{k: None if v is None else np.asarray(v)[rows] for k, v in arrays.items()},
    )
