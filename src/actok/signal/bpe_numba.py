"""Exact byte-pair encoding by longest match, compiled with numba.

A sequence of tokens is the BPE encoding of what it spells if and only if each adjacent pair of its tokens is the
encoding of what that pair spells. (A merge across the border of two tokens would have to happen between their last
atoms, so looking at neighbours is enough.) Hence: take the longest token that matches and goes with its predecessor;
where none does, drop the predecessor and try its shorter prefixes; positions found to be dead ends are remembered.
The pairs that go together are tabulated once, in V x V bits. The time is linear in the text for tokens of bounded length. The
scheme is that of van Antwerpen and Neubeck ("So many tokens, so little time", github.blog, 2024); the tables for texts
that end in a run, as chunks end in zeros, and the numbering of the trie are ours.

The argument needs each token to be made by one merge, and each token's own text to encode to that token; where a file
breaks this, `Matcher.build` returns None and the caller uses the `tokenizers` library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from actok.core import ArtifactError
from actok.signal.bpe_tables import (
    ATOM_BITS,
    NODE_BITS,
    build_trie,
    compiled,
    go_together,
    hash_of,
    number_nodes,
    pack,
    pair_tables,
    run_tables,
)

if TYPE_CHECKING:
    from actok.signal.bpe import Bpe

LARGEST_VOCABULARY = 8192  # 64 MB of pairs while they are made, 8 MB after
OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3

__all__ = ["Matcher"]


@compiled
def _child(node: int, atom: int, edges: np.ndarray) -> int:
    """The node reached from `node` by `atom`, or -1."""
    key = np.int64(node) << ATOM_BITS | np.int64(atom)
    mask = len(edges) - 1
    slot = hash_of(key) & mask
    while True:
        edge = edges[slot]
        if edge < 0:
            return -1
        if edge >> NODE_BITS == key:
            return edge & ((1 << NODE_BITS) - 1)
        slot = (slot + 1) & mask


@compiled
def _longest(
    text: np.ndarray,
    position: int,
    end: int,
    first: int,
    root: np.ndarray,
    edges: np.ndarray,
    heavy: np.ndarray,
    best_at: np.ndarray,
) -> int:
    """The longest token at `position` of text[:end]."""
    node = root[text[position] - first]
    for i in range(position + 1, end):
        if heavy[node + 1] == text[i]:  # the usual way, without waiting for memory
            node += 1
            continue
        child = _child(node, text[i], edges)
        if child < 0:
            break
        node = child
    return best_at[node]


@compiled
def _match(
    text: np.ndarray,
    end: int,
    first: int,
    root: np.ndarray,
    edges: np.ndarray,
    heavy: np.ndarray,
    best_at: np.ndarray,
    shorter: np.ndarray,
    lengths: np.ndarray,
    pairs: np.ndarray,
    unit: np.ndarray,
    run_tokens: np.ndarray,
    run_matches: np.ndarray,
    run_after: np.ndarray,
    dead: np.ndarray,
    out: np.ndarray,
    begin: int,
) -> int:
    """Write the encoding of text[:end] to out[begin:]; returns where it ends. `dead` [>= end + 1] is 0 before and after."""
    u = len(unit)
    run, phase = end, u - 1
    while run > 0 and text[run - 1] == unit[phase]:
        run -= 1
        phase = phase - 1 if phase > 0 else u - 1
    count, position, cleared = begin, 0, False
    token = _longest(text, 0, end, first, root, edges, heavy, best_at)
    while True:
        if position >= run and count > begin:  # only the run is left: its tables know the rest, or that there is none
            missing = end - position
            for j in range(len(run_tokens)):
                length = lengths[run_tokens[j]]
                if (
                    length <= missing
                    and run_matches[missing % u, j]
                    and go_together(out[count - 1], run_tokens[j], pairs)
                    and (length == missing or run_after[missing - length, j] >= 0)
                ):
                    out[count] = run_tokens[j]
                    count += 1
                    missing -= length
                    break
            if missing < end - position:
                while missing > 0:
                    j = run_after[missing, j]
                    out[count] = run_tokens[j]
                    count += 1
                    missing -= lengths[run_tokens[j]]
                break
            dead[position] = 1
            cleared = True
            count -= 1
            token = out[count]
            position -= lengths[token]
        reached = position + lengths[token]
        if not dead[reached] and (count == begin or go_together(out[count - 1], token, pairs)):
            out[count] = token
            count += 1
            position = reached
            if position == end:
                break
            if position < run:
                token = _longest(text, position, end, first, root, edges, heavy, best_at)
            continue
        token = shorter[token]
        while token < 0:  # nothing fits here: the token before was too long
            dead[position] = 1
            cleared = True
            count -= 1
            position -= lengths[out[count]]
            token = shorter[out[count]]
    if cleared:
        dead[: end + 1] = 0
    return count


@compiled
def _encode_characters(
    points: np.ndarray,
    first: int,
    root: np.ndarray,
    edges: np.ndarray,
    heavy: np.ndarray,
    best_at: np.ndarray,
    shorter: np.ndarray,
    lengths: np.ndarray,
    pairs: np.ndarray,
    unit: np.ndarray,
    run_tokens: np.ndarray,
    run_matches: np.ndarray,
    run_after: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of rows of code points [B, N], each row one text."""
    rows, n = points.shape
    out = np.empty(rows * n, np.int64)
    offsets = np.zeros(rows + 1, np.int64)
    dead = np.zeros(n + 1, np.uint8)
    for b in range(rows):
        offsets[b + 1] = _match(
            points[b],
            n,
            first,
            root,
            edges,
            heavy,
            best_at,
            shorter,
            lengths,
            pairs,
            unit,
            run_tokens,
            run_matches,
            run_after,
            dead,
            out,
            offsets[b],
        )
    return out[: offsets[rows]].copy(), offsets


@compiled
def _expand(flat: np.ndarray, atoms: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
    """Write the atoms of all tokens end to end."""
    end = 0
    for i in range(len(flat)):
        for j in range(starts[flat[i]], starts[flat[i] + 1]):
            out[end] = atoms[j]
            end += 1


@compiled
def _piece_end(text: np.ndarray, i: int, classes: np.ndarray) -> int:
    """Where the piece that starts at i ends, by GPT-2's regex.

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
    """
    n = len(text)
    if text[i] == 39 and i + 1 < n:  # '
        after = text[i + 1]
        if after == 115 or after == 116 or after == 109 or after == 100:  # s t m d
            return i + 2
        if i + 2 < n:
            last = text[i + 2]
            if ((after == 114 or after == 118) and last == 101) or (after == 108 and last == 108):  # re ve ll
                return i + 3
    start = i
    if text[i] == 32 and i + 1 < n and classes[text[i + 1]] != SPACE:
        start = i + 1
    kind = classes[text[start]]
    end = start + 1
    while end < n and classes[text[end]] == kind:
        end += 1
    if kind == SPACE and end < n and end - start > 1:
        end -= 1  # the last blank belongs to what follows
    return end


@compiled
def _encode_bytes(
    points: np.ndarray,
    classes: np.ndarray,
    first: int,
    root: np.ndarray,
    edges: np.ndarray,
    heavy: np.ndarray,
    best_at: np.ndarray,
    shorter: np.ndarray,
    lengths: np.ndarray,
    pairs: np.ndarray,
    unit: np.ndarray,
    run_tokens: np.ndarray,
    run_matches: np.ndarray,
    run_after: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of rows of code points [B, N] below 2 ** 16, split by the regex, spelled in UTF-8."""
    rows, n = points.shape
    out = np.empty(rows * n * 3, np.int64)
    offsets = np.zeros(rows + 1, np.int64)
    dead = np.zeros(3 * n + 1, np.uint8)
    text = np.empty(3 * n, np.uint8)
    for b in range(rows):
        row = points[b]
        count = offsets[b]
        i = 0
        while i < n:
            stop = _piece_end(row, i, classes)
            size = 0
            while i < stop:
                point = row[i]
                if point < 0x80:
                    text[size] = point
                    size += 1
                elif point < 0x800:
                    text[size] = 0xC0 | point >> 6
                    text[size + 1] = 0x80 | point & 0x3F
                    size += 2
                else:
                    text[size] = 0xE0 | point >> 12
                    text[size + 1] = 0x80 | point >> 6 & 0x3F
                    text[size + 2] = 0x80 | point & 0x3F
                    size += 3
                i += 1
            count = _match(
                text,
                size,
                first,
                root,
                edges,
                heavy,
                best_at,
                shorter,
                lengths,
                pairs,
                unit,
                run_tokens,
                run_matches,
                run_after,
                dead,
                out,
                count,
            )
        offsets[b + 1] = count
    return out[: offsets[rows]].copy(), offsets


class Matcher:
    """The compiled encoder of one BPE. `classes` and the run tables grow when a longer or larger text needs it."""

    def __init__(self, bpe: Bpe, alive: np.ndarray, pairs: np.ndarray) -> None:
        pairs = np.packbits(pairs, axis=1, bitorder="little")
        self._bpe = bpe
        self._alive = alive
        self._pairs = pairs
        first, last = int(bpe.base_atoms[0]), int(bpe.base_atoms[-1])
        size = 1 << int(np.ceil(np.log2(4 * len(bpe.atoms) + 4)))
        root, keys, targets, best_at, shorter = build_trie(bpe.atoms, bpe.starts, alive, size, first, last - first + 1)
        if len(best_at) >> NODE_BITS:
            raise ArtifactError(
                f"the tokens have {len(best_at)} prefixes, more than {1 << NODE_BITS}; use shorter ones"
            )
        order = np.argsort(keys, kind="stable")[(keys < 0).sum() :]
        source, atom, target = keys[order] >> ATOM_BITS, keys[order] & ((1 << ATOM_BITS) - 1), targets[order]
        number = number_nodes(source, target, len(best_at))
        source, target = number[source], number[target]
        follows = target == source + 1
        heavy = np.full(len(best_at) + 1, -1, np.int32)
        heavy[target[follows]] = atom[follows]
        edges = pack((source << ATOM_BITS | atom)[~follows], target[~follows])
        root = np.where(root < 0, -1, number[root])
        best_at[number] = best_at.copy()
        self._tables = (first, root, edges, heavy, best_at, shorter, bpe.lengths, pairs)
        self._classes = np.zeros(0, np.uint8)
        self._unit = self._usual_unit()
        self._grow_runs(1024)

    @classmethod
    def build(cls, bpe: Bpe) -> Self | None:
        """Tables of a BPE, or None where the longest match would not be exact."""
        vocab, results = bpe.vocab_size, bpe.merges[:, 2]
        if vocab > LARGEST_VOCABULARY or len(np.unique(results)) != len(results) or bpe.base[results].any():
            return None
        rank = np.full(vocab, -1, np.int64)
        rank[results] = np.arange(len(results))
        left, right = np.full(vocab, -1, np.int64), np.full(vocab, -1, np.int64)
        left[results], right[results] = bpe.merges[:, 0], bpe.merges[:, 1]
        alive = bpe.base.copy()
        alive[results] = True
        parts = bpe.merges[:, :2]
        if not alive[parts].all() or (rank[parts] >= np.arange(len(parts))[:, None]).any():
            return None
        exact, pairs = pair_tables(bpe.merges, rank, left, right, alive)
        return cls(bpe, alive, pairs) if exact else None

    def encode(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Bpe.encode."""
        points = np.ascontiguousarray(points, np.int32)
        if (longest := points.shape[1] * len(self._unit)) > self._run_size:
            self._grow_runs(2 * longest)
        if not self._bpe.byte_level:
            return _encode_characters(points, *self._tables, *self._runs)
        if (largest := int(points.max())) >= len(self._classes):
            self._classes = self._classify(max(largest + 1, 1024))
        return _encode_bytes(points, self._classes, *self._tables, *self._runs)

    def expand(self, flat: np.ndarray, count: int) -> np.ndarray:
        """The `count` atoms of all tokens end to end."""
        out = np.empty(count, self._bpe.atoms.dtype)
        _expand(flat, self._bpe.atoms, self._bpe.starts, out)
        return out

    def _grow_runs(self, size: int) -> None:
        self._runs = (
            self._unit,
            *run_tables(self._unit, size, self._bpe.atoms, self._bpe.starts, self._alive, self._pairs),
        )
        self._run_size = size

    def _usual_unit(self) -> np.ndarray:
        """Atoms of the character whose repetition makes the longest token: what the fitted data repeat most."""
        for token in np.argsort(-self._bpe.lengths, kind="stable"):
            atoms = self._bpe.atoms[self._bpe.starts[token] : self._bpe.starts[token + 1]]
            if self._bpe.byte_level:
                text = bytes(atoms.astype(np.uint8)).decode(errors="replace")
                if len(set(text)) == 1 and text[0] != "\ufffd":
                    return np.frombuffer(text[0].encode(), np.uint8).astype(np.int32)
            elif (atoms == atoms[:1]).all():
                return atoms[:1]
        return self._bpe.base_atoms[:1]

    def _classify(self, count: int) -> np.ndarray:
        """Class of each code point, asked of the library's own regex so that Unicode versions cannot differ."""
        split = self._bpe.library.pre_tokenizer.pre_tokenize_str
        classes = np.full(count, SPACE, np.uint8)
        for point in range(count):
            for kind, same in ((LETTER, "x"), (NUMBER, "1"), (OTHER, "!")):
                if len(split(same + chr(point) + same)) == 1:
                    classes[point] = kind
                    break
        return classes
