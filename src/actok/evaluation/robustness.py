"""What happens when codes go wrong: noise on the input, one wrong token, random and edited sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionTokenizer, ChunkContext, DataError, Tokens, to_numpy
from actok.evaluation.comparison import Comparison
from actok.evaluation.metrics import normalised_error
from actok.signal.normalise import Normaliser

NOISE = (0.004, 0.006, 0.008)

__all__ = [
    "NOISE",
    "NoiseStability",
    "TokenDamage",
    "ValidShare",
    "edit_distance",
    "noise_stability",
    "valid_share",
    "wrong_token",
]


@dataclass(frozen=True, kw_only=True)
class NoiseStability:
    """How many tokens change when the input moves a little.

    Attributes:
        sigma: standard deviation of the Gaussian noise, normalised units.
        token_error_rate: for each sigma, changed tokens over tokens of the clean sequence: positions that differ where
            the length is fixed, edit distance where it varies (may exceed 1).
    """

    sigma: tuple[float, ...]
    token_error_rate: tuple[float, ...]


def noise_stability(
    tokenizer: ActionTokenizer,
    actions: Float[np.ndarray, "B T D"],
    normaliser: Normaliser,
    context: ChunkContext,
    *,
    sigma: Sequence[float] = NOISE,
    seed: int = 0,
) -> NoiseStability:
    """Token error rate under input noise, as X-Tokenizer reports it ("WER" of the codes).

    Noise is drawn in units of `normaliser`, the benchmark's own, independently for every value (padding is refilled by
    `encode`). The same draw is scaled to each sigma. A constant dimension has no such unit and gets no noise.
    """
    clean = tokenizer.encode(np.asarray(actions, np.float32), context)
    draw = np.random.default_rng(seed).standard_normal(actions.shape) * np.where(
        normaliser.constant, 0.0, normaliser.half
    )
    rates = []
    for s in sigma:
        noisy = tokenizer.encode((actions + s * draw).astype(np.float32), context)
        if clean.fixed_length is not None:
            changed = int((to_numpy(clean.flat) != to_numpy(noisy.flat)).sum())
        else:
            changed = int(edit_distance(_rows(clean), _rows(noisy)).sum())
        rates.append(changed / max(1, int(clean.lengths.sum())))
    return NoiseStability(sigma=tuple(sigma), token_error_rate=tuple(rates))


def edit_distance(a: Sequence[Int[np.ndarray, "_"]], b: Sequence[Int[np.ndarray, "_"]]) -> Int[np.ndarray, "B"]:
    """Levenshtein distance [B] of B pairs of integer sequences (insertion, deletion, substitution cost 1 each).

    The usual table, one row at a time for all pairs at once; the running minimum along a row is a cumulative minimum of
    (value - column).
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} sequences against {len(b)}; give pairs")
    if not len(a):
        return np.zeros(0, np.int64)
    n, m = np.array([len(x) for x in a]), np.array([len(x) for x in b])
    left, right = np.full((len(a), n.max()), -1), np.full((len(b), m.max()), -2)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        left[i, : len(x)], right[i, : len(y)] = x, y
    column = np.arange(m.max() + 1)
    row = np.broadcast_to(column, (len(a), len(column))).copy()
    result = np.where(n == 0, m, 0)
    for i in range(left.shape[1]):
        below = row + 1
        below[:, 1:] = np.minimum(below[:, 1:], row[:, :-1] + (left[:, i : i + 1] != right))
        row = np.minimum.accumulate(below - column, axis=1) + column
        result = np.where(n == i + 1, row[np.arange(len(a)), m], result)
    return result


@dataclass(frozen=True, kw_only=True)
class TokenDamage:
    """What one wrong token does to the decoded chunk.

    Attributes:
        l1: mean |change| in normalised units over the chunks that still decode; None where none does.
        p95: 95th percentile over these chunks of their mean |change|.
        undecodable: share of damaged sequences that do not decode.
    """

    l1: float | None
    p95: float | None
    undecodable: float


def wrong_token(
    tokenizer: ActionTokenizer, tokens: Tokens, clean: Comparison, context: ChunkContext, *, seed: int = 0
) -> TokenDamage:
    """Replace one token of each sequence, at a uniform position, by another code of that position's vocabulary.

    `clean` is the comparison made by decoding `tokens`; its reconstruction is what the damaged decode is compared with.
    """
    rng = np.random.default_rng(seed)
    layout = tokenizer.layout_for(tokens.horizon, context.embodiment)
    rows, keep = [], []
    for b, row in enumerate(_rows(tokens)):
        at = int(rng.integers(len(row))) if len(row) else -1
        size = int(layout.vocab[at]) if at >= 0 else 1
        if size < 2 or not clean.decoded[b]:
            continue
        row = row.copy()
        row[at] = (row[at] + rng.integers(1, size)) % size
        rows.append(row)
        keep.append(b)
    if not rows:
        return TokenDamage(l1=None, p95=None, undecodable=0.0)
    index = np.array(keep)
    decoded = tokenizer.decode(rows, _select(context, index), horizon=tokens.horizon)
    damage = replace(
        clean,
        reference=clean.reconstruction[index],
        reconstruction=to_numpy(decoded.actions),
        pad_mask=None if clean.pad_mask is None else clean.pad_mask[index],
        dof_mask=None if clean.dof_mask is None else clean.dof_mask[index],
    )
    error = normalised_error(damage)
    mask = damage.steps[:, :, None] & damage.scored[:, None] & damage.decoded[:, None, None]
    per_chunk = np.abs(np.where(mask, damage.difference, 0.0)).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)
    per_chunk = per_chunk[mask.any((1, 2))]
    return TokenDamage(
        l1=error.l1,
        p95=float(np.quantile(per_chunk, 0.95)) if len(per_chunk) else None,
        undecodable=error.undecodable,
    )


@dataclass(frozen=True, kw_only=True)
class ValidShare:
    """Share of sequences that decode (`Decoded.valid`).

    Attributes:
        encoded: sequences as `encode` made them.
        random: uniform ids at the lengths of encoded sequences.
        substituted, deleted, inserted: encoded sequences with one edit at a uniform position.
    """

    encoded: float
    random: float
    substituted: float
    deleted: float
    inserted: float


def valid_share(tokenizer: ActionTokenizer, tokens: Tokens, context: ChunkContext, *, seed: int = 0) -> ValidShare:
    """Validity of sequences that a language model might emit. New ids are uniform over their position's vocabulary."""
    rng = np.random.default_rng(seed)
    vocab = tokenizer.layout_for(tokens.horizon, context.embodiment).vocab
    rows = _rows(tokens)

    def share(sequences: list[Int[np.ndarray, "_"]]) -> float:
        return float(np.mean(tokenizer.decode(sequences, context, horizon=tokens.horizon).valid))

    substituted, deleted, inserted = [], [], []
    for row in rows:
        at = int(rng.integers(max(1, len(row))))
        changed = row.copy()
        if len(row) and vocab[at] > 1:
            changed[at] = (row[at] + rng.integers(1, vocab[at])) % vocab[at]
        substituted.append(changed)
        deleted.append(np.delete(row, at) if len(row) else row)
        where = int(rng.integers(len(row) + 1))
        inserted.append(np.insert(row, where, rng.integers(vocab[min(where, len(vocab) - 1)])))
    return ValidShare(
        encoded=share(rows),
        random=share([rng.integers(0, vocab[: len(row)]) for row in rows]),
        substituted=share(substituted),
        deleted=share(deleted),
        inserted=share(inserted),
    )


def _rows(tokens: Tokens) -> list[Int[np.ndarray, "_"]]:
    flat = to_numpy(tokens.flat)
    return [flat[i:j] for i, j in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def _select(context: ChunkContext, index: Int[np.ndarray, "_"]) -> ChunkContext:
    """The context of some chunks of a batch."""
    arrays = {k: getattr(context, k) for k in ("anchor", "dof_mask", "pad_mask")}
    return replace(context, **{k: None if v is None else np.asarray(v)[index] for k, v in arrays.items()})
