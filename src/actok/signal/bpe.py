"""Byte-pair encoding over characters or UTF-8 bytes, read from a `tokenizer.json`, in whole batches.

A `Bpe` maps rows of code points to token ids and back, with exactly the ids of the `tokenizers` library. Encoding runs
through compiled tables (`bpe_numba`) where numba is installed and the file allows it, else through the library itself;
decoding is a gather over the tokens' expansions.

Two kinds of files occur (FAST, arXiv 2501.09747): a BPE whose atoms are the characters themselves (what `train_bpe`
makes), and a byte-level BPE behind the GPT-2 text regex (what the published files hold), whose atoms are bytes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from actok.core.errors import ArtifactError, ConfigError
from actok.signal.utf8 import BYTE_OF_CHAR, decode_rows, points_to_text

# Symbol 0 of a trained BPE. The block of CJK ideographs has no spaces, controls or combining marks, and lies below the
# surrogates, so that JSON, UTF-8 and UTF-16 all keep it as it is.
FIRST_CHAR = 0x4E00
LARGEST_ALPHABET = 0xD800 - FIRST_CHAR

__all__ = ["FIRST_CHAR", "LARGEST_ALPHABET", "Bpe", "Points", "read_bpe", "train_bpe"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Decoded code points of B sequences.

    Attributes:
        flat: int32; -1 where the bytes are not UTF-8.
        offsets: [B + 1].
        readable: bool [B], False where a sequence holds bytes that are not UTF-8.
    """

    flat: Int[np.ndarray, "_"]
    offsets: Int[np.ndarray, "ends"]
    readable: Bool[np.ndarray, "ends-1"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bpe:
    """A byte-pair encoding.

    Attributes:
        source: the tokenizer.json.
        byte_level: atoms are bytes behind the GPT-2 regex, else code points without a regex.
        atoms: int32, the expansions of all tokens, end to end.
        starts: [V + 1]; token v expands to atoms[starts[v]:starts[v + 1]].
        merges: int64 [M, 3] (left, right, result) in order of rank.
        base: [V] bool, tokens of a single atom from which the merges start.
    """

    source: bytes
    byte_level: bool
    atoms: Int[np.ndarray, "_"]
    starts: Int[np.ndarray, "ends"]
    merges: Int[np.ndarray, "_ 3"]
    base: Bool[np.ndarray, "ends-1"]

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> Int[np.ndarray, "V"]:
        """[V] atoms of each token."""
        return np.diff(self.starts)

    @cached_property
    def characters(self) -> Int[np.ndarray, "V"]:
        """[V] atoms of each token that start a character: all, or bytes that continue none."""
        begins = (self.atoms & 0xC0) != 0x80 if self.byte_level else np.ones(len(self.atoms), bool)
        before = np.concatenate([[0], np.cumsum(begins)])
        return before[self.starts[1:]] - before[self.starts[:-1]]

    @cached_property
    def base_atoms(self) -> Int[np.ndarray, "_"]:
        """Sorted atoms that an encoding can start from; a code point is encodable where all its atoms are here."""
        return np.sort(self.atoms[self.starts[:-1][self.base]])

    @cached_property
    def library(self) -> Any:
        """The same BPE as a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.source.decode())

    @cached_property
    def _matcher(self) -> Any:
        """Compiled tables, or None where numba is missing or the file's merges do not allow them."""
        try:
            from actok.signal.bpe_numba import Matcher
        except ImportError:
            return None
        return Matcher.build(self)

    @property
    def accelerated(self) -> bool:
        """True where encoding runs through compiled tables."""
        return self._matcher is not None

    def encode(self, points: Int[np.ndarray, "B N"]) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "B+1"]]:
        """Ids (flat int64) and offsets [B + 1] of code points [B, N], all of them encodable."""
        if self._matcher is not None:
            return self._matcher.encode(points)
        return self.encode_with_library(points)

    def encode_with_library(
        self, points: Int[np.ndarray, "B N"]
    ) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "B+1"]]:
        """`encode` by the `tokenizers` library."""
        rows = [e.ids for e in self.library.encode_batch_fast(points_to_text(points), add_special_tokens=False)]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(r) for r in rows], out=offsets[1:])
        return np.fromiter((i for r in rows for i in r), np.int64, int(offsets[-1])), offsets

    def decode(self, flat: Int[np.ndarray, "_"], offsets: Int[np.ndarray, "ends"]) -> Points:
        """Code points of ids."""
        atoms, atom_offsets = self.expand(flat, offsets)
        if self.byte_level:
            before = np.concatenate([[0], np.cumsum(self.characters[flat])])
            return Points(**decode_rows(atoms, atom_offsets, np.diff(before[offsets])))
        return Points(flat=atoms, offsets=atom_offsets, readable=np.ones(len(offsets) - 1, bool))

    def expand(
        self, flat: Int[np.ndarray, "_"], offsets: Int[np.ndarray, "ends"]
    ) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "ends"]]:
        """Atoms of ids end to end, and where each sequence starts [B + 1]."""
        lengths = self.lengths[flat]
        ends = np.cumsum(lengths)
        count = int(ends[-1]) if len(ends) else 0
        if self._matcher is not None:
            atoms = self._matcher.expand(flat, count)
        else:
            index = np.repeat(self.starts[flat] - ends + lengths, lengths)
            index += np.arange(count)
            atoms = self.atoms[index]
        return atoms, np.concatenate([[0], ends])[offsets]


@lru_cache(maxsize=16)
def read_bpe(source: bytes) -> Bpe:
    """Parse a tokenizer.json. Raises ArtifactError naming what a FAST tokenizer cannot have.

    Cached, since tokenizers that share a file (adapted to another robot) share its tables.
    """
    try:
        body = json.loads(source)
        model = body["model"]
        vocab: dict[str, int] = model["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"tokenizer.json is truncated or not of the tokenizers library ({error!r})") from None
    if model.get("type") not in ("BPE", None):
        raise ArtifactError(f"tokenizer.json holds a {model['type']!r} model; FAST needs a BPE")
    extras = [
        k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges") if model.get(k)
    ]
    extras += [k for k in ("added_tokens", "normalizer") if body.get(k)]
    if extras:
        raise ArtifactError(f"tokenizer.json uses {', '.join(extras)}, which change the symbols; FAST has none of them")
    pre = body.get("pre_tokenizer")
    byte_level = pre is not None
    if byte_level and (pre.get("type") != "ByteLevel" or pre.get("add_prefix_space") or not pre.get("use_regex", True)):
        raise ArtifactError(
            f"tokenizer.json splits text by {pre}; FAST files split by ByteLevel with the regex, or not at all"
        )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ArtifactError(f"tokenizer.json: the ids of its {len(vocab)} tokens are not 0..{len(vocab) - 1}")
    expansions: list[list[int]] = [[]] * len(vocab)
    base = np.zeros(len(vocab), bool)
    for token, index in vocab.items():
        if byte_level and all(c in BYTE_OF_CHAR for c in token):
            expansions[index] = [BYTE_OF_CHAR[c] for c in token]
            base[index] = len(token) == 1
        elif byte_level:  # the library's decoder takes a token that its byte table does not know as plain text
            expansions[index] = list(token.encode())
        else:
            expansions[index] = [ord(c) for c in token]
            base[index] = len(token) == 1
    try:
        triples = [(vocab[a], vocab[b], vocab[a + b]) for a, b in merges]
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"tokenizer.json has a merge of tokens that it does not list: {error}") from None
    starts = np.zeros(len(vocab) + 1, np.int64)
    np.cumsum([len(e) for e in expansions], out=starts[1:])
    return Bpe(
        source=source,
        byte_level=byte_level,
        atoms=np.array([a for e in expansions for a in e], np.int32),
        starts=starts,
        merges=np.array(triples, np.int64).reshape(-1, 3),
        base=base,
    )


def train_bpe(rows: list[Int[np.ndarray, "_ _"]], *, alphabet: int, vocab: int, max_token_length: int) -> bytes:
    """A tokenizer.json trained on symbols 0..alphabet - 1, given as integer arrays [B, N] (N may differ by array).

    Every symbol is a token of its own (id = symbol), so every row is encodable. Raises ConfigError where the alphabet
    does not fit into the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, trainers

    if alphabet > min(vocab, LARGEST_ALPHABET):
        raise ConfigError(f"{alphabet} symbols do not fit into a vocabulary of {min(vocab, LARGEST_ALPHABET)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()  # without a decoder the library joins tokens by spaces
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
        initial_alphabet=[chr(FIRST_CHAR + i) for i in range(alphabet)],
        max_token_length=max_token_length,
    )
    slices = (block[i : i + 4096] for block in rows for i in range(0, len(block), 4096))  # strings are made as needed
    texts = (text for part in slices for text in points_to_text(part + FIRST_CHAR))
    tokenizer.train_from_iterator(texts, trainer, length=sum(map(len, rows)))
    return tokenizer.to_str().encode()
