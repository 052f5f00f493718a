"""Tables of the compiled byte-pair encoder (`bpe_numba`): which pairs of tokens go together, the trie of tokens, runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# A trie edge is one int64: node << 16 | atom, then the node it leads to. Atoms are code points below U+D800, or bytes.
ATOM_BITS, NODE_BITS = 16, 23

__all__ = [
    "ATOM_BITS",
    "NODE_BITS",
    "build_trie",
    "compiled",
    "go_together",
    "hash_of",
    "number_nodes",
    "pack",
    "pair_tables",
    "run_tables",
]


def compiled(function: Callable[..., Any]) -> Any:
    """numba.njit, kept on disk where a folder can be written to."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither beside the module nor in the user's cache
        return numba.njit(nogil=True)(function)


@compiled
def hash_of(key: int | np.int64) -> int:
    """Fibonacci hashing: the middle bits of key x 2^64 / golden ratio."""
    return np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(36))  # type: ignore[return-value]


@compiled
def _slot(key: int | np.int64, keys: np.ndarray) -> int:
    """Where `key` stands in an open-addressed table of 2 ** k keys, or the free slot (-1) where it would."""
    mask = len(keys) - 1
    slot = hash_of(key) & mask
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def _rank_of(a: int, b: int, vocab: int, keys: np.ndarray, ranks: np.ndarray) -> int:
    """Rank of the merge of tokens a and b, -1 where there is none."""
    slot = _slot(a * vocab + b, keys)
    return ranks[slot] if keys[slot] >= 0 else -1


@compiled
def _goes_together(
    a: int, b: int, rank: np.ndarray, left: np.ndarray, right: np.ndarray, keys: np.ndarray, ranks: np.ndarray
) -> bool:
    """Whether no merge crosses the border of tokens a and b before both are complete.

    Undoes the merges on both sides of the border, latest first. A merge across it would have come first if its rank is
    below that of the merge last undone, or equal to it where that one lies to the right (ties merge from the left).
    The merge of a with b as a whole is the caller's business.
    """
    vocab = len(rank)
    while rank[a] >= 0 or rank[b] >= 0:
        if rank[a] > rank[b]:
            limit = rank[a]
            a = right[a]
        else:
            limit = rank[b] + 1
            b = left[b]
        crossing = _rank_of(a, b, vocab, keys, ranks)
        if 0 <= crossing < limit:
            return False
    return True


@compiled
def pair_tables(
    merges: np.ndarray, rank: np.ndarray, left: np.ndarray, right: np.ndarray, alive: np.ndarray
) -> tuple[bool, np.ndarray]:
    """(each merged token is the encoding of its text, uint8 [V, V] pairs that go together)."""
    vocab = len(rank)
    size = 4
    while size < 4 * len(merges):
        size *= 2
    keys = np.full(size, -1, np.int64)
    ranks = np.full(size, -1, np.int64)
    for r in range(len(merges)):
        slot = _slot(merges[r, 0] * vocab + merges[r, 1], keys)
        keys[slot] = merges[r, 0] * vocab + merges[r, 1]
        ranks[slot] = r
    pairs = np.zeros((vocab, vocab), np.uint8)
    for r in range(len(merges)):
        if not _goes_together(merges[r, 0], merges[r, 1], rank, left, right, keys, ranks):
            return False, pairs
    for a in range(vocab):
        if alive[a]:
            for b in range(vocab):
                if alive[b] and _rank_of(a, b, vocab, keys, ranks) < 0:
                    pairs[a, b] = _goes_together(a, b, rank, left, right, keys, ranks)
    return True, pairs


@compiled
def go_together(a: int, b: int, pairs: np.ndarray) -> bool:
    """The bit of tokens a, b: eight times more of the table stays in the processor's cache than by bytes."""
    return (pairs[a, b >> 3] >> (b & 7)) & 1 == 1


@compiled
def build_trie(
    atoms: np.ndarray, starts: np.ndarray, alive: np.ndarray, size: int, first: int, span: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The tokens as a trie.

    Returns the node of each single atom [span] (atom - first; -1: none), edge keys and targets (open-addressed), the
    longest token that is a prefix of each node, and the longest token that is a proper prefix of each token (-1: none).
    """
    vocab = len(starts) - 1
    root = np.full(span, -1, np.int32)
    keys = np.full(size, -1, np.int64)
    targets = np.full(size, -1, np.int32)
    best_at = np.full(size, -1, np.int32)
    shorter = np.full(vocab, -1, np.int32)
    nodes = 0
    # Shorter tokens first: then a node that is new inherits the longest token before it, for good.
    for token in np.argsort(starts[1:] - starts[:-1], kind="mergesort"):
        if not alive[token]:
            continue
        start, end = starts[token], starts[token + 1]
        if root[atoms[start] - first] < 0:
            root[atoms[start] - first] = nodes
            nodes += 1
        node = root[atoms[start] - first]
        for i in range(start + 1, end):
            key = np.int64(node) << ATOM_BITS | np.int64(atoms[i])
            slot = _slot(key, keys)
            if keys[slot] < 0:
                keys[slot] = key
                targets[slot] = nodes
                best_at[nodes] = best_at[node]
                nodes += 1
            node = targets[slot]
        shorter[token] = best_at[node]
        best_at[node] = token
    return root, keys, targets, best_at[:nodes].copy(), shorter


@compiled
def number_nodes(sources: np.ndarray, targets: np.ndarray, nodes: int) -> np.ndarray:
    """New node numbers in which the child with most descendants follows its parent directly.

    Edges are sorted by source, and children have larger numbers than their parents.
    """
    size, parent = np.ones(nodes, np.int64), np.full(nodes, -1, np.int64)
    for e in range(len(sources)):
        parent[targets[e]] = sources[e]
    for node in range(nodes - 1, -1, -1):
        if parent[node] >= 0:
            size[parent[node]] += size[node]
    begin = np.searchsorted(sources, np.arange(nodes + 1))
    number = np.full(nodes, -1, np.int64)
    stack = np.empty(nodes + 1, np.int64)
    count = 0
    for top in range(nodes):
        if parent[top] >= 0:
            continue
        stack[0], depth = top, 1
        while depth > 0:
            depth -= 1
            node = stack[depth]
            number[node] = count
            count += 1
            largest = -1
            for e in range(begin[node], begin[node + 1]):
                stack[depth] = targets[e]
                if largest < 0 or size[targets[e]] > size[stack[largest]]:
                    largest = depth
                depth += 1
            if largest >= 0:  # on top of the stack, so that it comes next
                stack[largest], stack[depth - 1] = stack[depth - 1], stack[largest]
    return number


@compiled
def pack(keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Edges in one array of half-filled slots, key << NODE_BITS | target, so that a step is one access; free: -1."""
    size = 4
    while size < 2 * len(keys):
        size *= 2
    edges = np.full(size, -1, np.int64)
    for i in range(len(keys)):
        slot = hash_of(keys[i]) & (size - 1)
        while edges[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        edges[slot] = keys[i] << NODE_BITS | targets[i]
    return edges


@compiled
def run_tables(
    unit: np.ndarray, size: int, atoms: np.ndarray, starts: np.ndarray, alive: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How a text goes on that ends in repetitions of `unit` (a chunk ends in zeros: high frequencies are empty).

    Returns the tokens [R] that occur in such a run; bool [u, R], whether a token matches where the missing atoms m have
    m % u = row; and by m <= size and the token before (as an index into the first array) the next token's index, or -1
    where the run cannot be completed after that token.
    """
    u, vocab = len(unit), len(starts) - 1
    matches = np.zeros((u, vocab), np.bool_)
    count = 0
    tokens = np.empty(vocab, np.int64)
    for token in range(vocab):
        if not alive[token]:
            continue
        fits = False
        for phase in range(u):
            same = True
            for i in range(starts[token], starts[token + 1]):
                if atoms[i] != unit[(u - phase + i - starts[token]) % u]:
                    same = False
                    break
            matches[phase, count] = same
            fits = fits or same
        if fits:
            tokens[count] = token
            count += 1
        else:
            matches[:, count] = False
    tokens, matches = tokens[:count].copy(), matches[:, :count].copy()
    after = np.full((size + 1, count), -1, np.int16)
    for missing in range(1, size + 1):
        for j in range(count):
            length = starts[tokens[j] + 1] - starts[tokens[j]]
            rest = missing - length
            if rest < 0 or not matches[missing % u, j]:
                continue
            for i in range(count):
                if not go_together(tokens[i], tokens[j], pairs):
                    continue
                if rest == 0 or after[rest, j] >= 0:
                    after[missing, i] = j
    return tokens, matches, after
