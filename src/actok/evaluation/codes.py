"""Metrics of the code sequences themselves: length, bits, use of the codebook, predictability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Int, Shaped

from actok.core import DataError, TokenLayout, Tokens, to_numpy

# Points of a sorted-frequency curve that are kept for each table.
PLOTTED = 48

__all__ = ["CodeSequences", "CodeUse", "NgramFit", "Rate", "code_use", "ngram_fit", "rate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeSequences:
    """Code sequences with the table and vocabulary of every code.

    Attributes:
        flat: int64 [n] codes.
        offsets: [B + 1].
        table: int64 [n] which code table each code was read from.
        vocab: int64 [n] how many codes could have stood there.
        sizes: codes of each table, by table number.
        fixed_length: N, or None where lengths vary.
    """

    flat: Int[np.ndarray, "N"]
    offsets: Int[np.ndarray, "_"]
    table: Int[np.ndarray, "N"]
    vocab: Int[np.ndarray, "N"]
    sizes: dict[int, int]
    fixed_length: int | None

    @classmethod
    def of(cls, tokens: Tokens, layout: TokenLayout) -> Self:
        """From encoded chunks and their layout. Raises DataError where a sequence is longer than the layout."""
        flat = to_numpy(tokens.flat).astype(np.int64)
        lengths = tokens.lengths
        if len(lengths) and lengths.max() > layout.max_len:
            raise DataError(
                f"a sequence of {lengths.max()} tokens exceeds the layout's {layout.max_len}; fix layout_for"
            )
        position = np.arange(len(flat)) - np.repeat(tokens.offsets[:-1], lengths)
        tables = np.unique(layout.table)
        return cls(
            flat=flat,
            offsets=np.asarray(tokens.offsets),
            table=layout.table[position],
            vocab=layout.vocab[position],
            sizes={int(t): int(layout.vocab[layout.table == t].max()) for t in tables},
            fixed_length=layout.fixed_length,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How much a chunk costs.

    Attributes:
        tokens_mean, tokens_p50, tokens_p99: tokens of a chunk.
        bits_fixed: bits of a chunk at fixed rate, sum over positions of log2(vocabulary of the position), mean.
        bits_entropy: bits of a held-out chunk under an ideal order-0 code built on the training codes.
        over_bins: bits_fixed against 8 bits a value (256 bins): T D 8 / bits_fixed; above 1 is smaller.
        over_float32: bits_fixed against 32 bits a value.
    """

    tokens_mean: float
    tokens_p50: float
    tokens_p99: float
    bits_fixed: float
    bits_entropy: float
    over_bins: float
    over_float32: float


def rate(train: CodeSequences, test: CodeSequences, values: int) -> Rate:
    """Length and size of held-out chunks of `values` = T x D numbers.

    `bits_entropy` is the order-0 empirical code length -log2 p(code | table), p from the training codes with 1/2 added
    to every count (Krichevsky-Trofimov), so a code never seen in training still has a finite length.
    """
    lengths = np.diff(test.offsets)
    fixed = float(np.log2(test.vocab).sum() / len(test))
    entropy = 0.0
    for table, size in test.sizes.items():
        counts = np.bincount(train.flat[train.table == table], minlength=size) + 0.5
        bits = -np.log2(counts / counts.sum())
        entropy += float(bits[test.flat[test.table == table]].sum())
    return Rate(
        tokens_mean=float(lengths.mean()),
        tokens_p50=float(np.quantile(lengths, 0.5)),
        tokens_p99=float(np.quantile(lengths, 0.99)),
        bits_fixed=fixed,
        bits_entropy=entropy / len(test),
        over_bins=values * 8 / fixed if fixed else float("inf"),
        over_float32=values * 32 / fixed if fixed else float("inf"),
    )


@dataclass(frozen=True, kw_only=True)
class CodeUse:
    """How one code table is used.

    Attributes:
        table: its number in the layout.
        size: K codes.
        drawn: how many codes were counted.
        used: share of the K codes seen at least once.
        used_if_uniform: the share that `drawn` uniform draws would be expected to see, 1 - (1 - 1/K)^drawn.
        entropy: entropy of the empirical distribution over log2 K (0 one code only, 1 uniform; 0 for K = 1).
        f_max: frequency of the most frequent code.
        above_1e3, above_2e2: how many codes have a frequency above 1e-3 and 2e-2.
        frequencies: the frequencies in descending order, zeros left out, thinned evenly in log rank to at most PLOTTED, for plotting.
        ranks: their ranks, from 1.
    """

    table: int
    size: int
    drawn: int
    used: float
    used_if_uniform: float
    entropy: float
    f_max: float
    above_1e3: int
    above_2e2: int
    frequencies: tuple[float, ...]
    ranks: tuple[int, ...]


def code_use(codes: CodeSequences) -> tuple[CodeUse, ...]:
    """Use of each code table, in the order of their numbers. Tables from which nothing was drawn are reported too."""
    found = []
    for table, size in sorted(codes.sizes.items()):
        counts = np.bincount(codes.flat[codes.table == table], minlength=size)
        drawn = int(counts.sum())
        frequency = counts / max(drawn, 1)
        seen = np.sort(frequency[frequency > 0])[::-1]
        entropy = float(-(seen * np.log2(seen)).sum() / np.log2(size)) if size > 1 and drawn else 0.0
        ranks: Any = np.unique(np.geomspace(1, len(seen), min(len(seen), PLOTTED)).round().astype(int)) if drawn else []
        found.append(
            CodeUse(
                table=table,
                size=size,
                drawn=drawn,
                used=len(seen) / size,
                used_if_uniform=float(-np.expm1(drawn * np.log1p(-1 / size))) if size > 1 else float(drawn > 0),
                entropy=entropy,
                f_max=float(seen[0]) if drawn else 0.0,
                above_1e3=int((frequency > 1e-3).sum()),
                above_2e2=int((frequency > 2e-2).sum()),
                frequencies=tuple(float(f"{seen[r - 1]:.4g}") for r in ranks),
                ranks=tuple(int(r) for r in ranks),
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class NgramFit:
    """Predictability of held-out codes under an n-gram model of the training codes.

    Attributes:
        order: n.
        perplexity: 2^(bits per symbol); a symbol is a code, or the end of a sequence where lengths vary.
        bits_per_chunk: bits of a whole held-out chunk: comparable across tokenizers of different lengths.
    """

    order: int
    perplexity: float
    bits_per_chunk: float


def ngram_fit(train: CodeSequences, test: CodeSequences, order: int) -> NgramFit:
    """Interpolated Witten-Bell n-gram model (Witten and Bell 1991; Chen and Goodman 1998, section 2.5).

        P_n(w | h) = (c(h w) + D(h) P_{n-1}(w | h')) / (c(h) + D(h)),   P_0 = 1 / K

    c counts in the training codes, D(h) is the number of distinct codes seen after history h, h' drops the oldest code
    of h, and K is the size of the code table of the position. Which table a position reads is known to the model.
    Histories begin with start symbols. Where lengths vary, the end of a sequence is one more symbol of the table and is
    predicted like a code; a fixed length needs none. Every code has a probability above 0, seen or not.
    """
    if order < 1:
        raise DataError(f"n-gram order is {order}; give at least 1")
    base = np.cumsum([0] + [size + 1 for _, size in sorted(test.sizes.items())])
    start = {t: int(b) for t, b in zip(sorted(test.sizes), base, strict=False)}
    alphabet = int(base[-1]) + 1  # all tables, an end symbol each, and the start symbol
    if not len(train.flat) or not len(test):
        raise DataError(
            f"{len(train.flat)} training codes and {len(test)} sequences to judge; give at least one of each"
        )
    if alphabet**order >= 2**62:
        raise DataError(f"order {order} over {alphabet} symbols does not fit in 64-bit keys; use a lower order")
    grams, _ = _grams(train, order, start, alphabet)
    queries, kinds = _grams(test, order, start, alphabet)
    probability = 1.0 / (np.array([test.sizes[t] + (test.fixed_length is None) for t in sorted(test.sizes)])[kinds])
    for n in range(1, order + 1):
        # A key of order n is (history of n - 1, table, symbol); symbols are unique to their table, so the history's
        # key with the table added tells P(. | h) of one table apart from another's.
        seen, query = grams % alphabet**n, queries % alphabet**n
        table_of = np.searchsorted(base, np.arange(alphabet), side="right") - 1
        keys, counts = np.unique(seen, return_counts=True)
        contexts = keys // alphabet * len(base) + table_of[keys % alphabet]
        context, inverse, distinct = np.unique(contexts, return_inverse=True, return_counts=True)
        total = np.bincount(inverse, weights=counts)
        hit = _lookup(keys, counts, query)
        asked = query // alphabet * len(base) + table_of[query % alphabet]
        types, mass = _lookup(context, distinct, asked), _lookup(context, total, asked)
        probability = np.where(mass > 0, (hit + types * probability) / np.maximum(mass + types, 1), probability)
    bits = float(-np.log2(probability).sum())
    return NgramFit(order=order, perplexity=float(2 ** (bits / len(queries))), bits_per_chunk=bits / len(test))


def _lookup(
    keys: Int[np.ndarray, "keys"], values: Shaped[np.ndarray, "keys"], query: Int[np.ndarray, "queries"]
) -> Shaped[np.ndarray, "queries"]:
    """values[keys == query], 0 where the key is not there; `keys` sorted and not empty."""
    at = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[at] == query, values[at], 0)


def _grams(
    codes: CodeSequences, order: int, start: dict[int, int], alphabet: int
) -> tuple[Int[np.ndarray, "symbols"], Int[np.ndarray, "symbols"]]:
    """Key of the n-gram that ends at each symbol, base `alphabet` with the newest symbol last, and its table's index."""
    tables = np.array(sorted(start))
    first = np.array([start[t] for t in sorted(start)])
    kinds = np.searchsorted(tables, codes.table)
    symbols = codes.flat + first[kinds]
    lengths = np.diff(codes.offsets)
    if codes.fixed_length is None:
        end = first[0] + codes.sizes[int(tables[0])]
        symbols = np.insert(symbols, codes.offsets[1:], end)
        kinds = np.insert(kinds, codes.offsets[1:], 0)
        lengths = lengths + 1
    position = np.arange(len(symbols)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keys = symbols.copy()
    for back in range(1, order):
        shifted = np.concatenate([np.full(min(back, len(symbols)), alphabet - 1), symbols[:-back]])
        keys += np.where(position >= back, shifted, alphabet - 1) * alphabet**back
    return keys, kinds
