"""Text as arrays: code points to strings and back, and UTF-8 with its errors kept apart by sequence."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Int, Integer

__all__ = ["BYTE_OF_CHAR", "DecodedRows", "decode_rows", "points_to_text"]


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where it prints, else the next character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_characters()


class DecodedRows(TypedDict):
    """See `decode_rows`."""

    flat: Int[np.ndarray, "_"]
    offsets: Int[np.ndarray, "ends"]
    readable: Bool[np.ndarray, "ends-1"]


def points_to_text(points: Int[np.ndarray, "B N"]) -> list[str]:
    """One string a row of code points [B, N]."""
    n = points.shape[1]
    text = np.ascontiguousarray(points, dtype="<u4").tobytes().decode("utf-32-le")
    return [text[i : i + n] for i in range(0, len(text), n)]


def decode_rows(
    data: Integer[np.ndarray, "_"], offsets: Int[np.ndarray, "ends"], characters: Int[np.ndarray, "ends-1"]
) -> DecodedRows:
    """Code points of UTF-8 sequences data[offsets[b]:offsets[b + 1]].

    `characters` [B] counts each row's bytes that start a character (any but 10xxxxxx). An undecodable part becomes one
    -1 (its maximal subpart, as U+FFFD in Unicode 15, section 3.9) and makes the row unreadable.
    """
    data = data.astype(np.uint8)
    firsts = data[offsets[:-1][np.diff(offsets) > 0]]
    if ((firsts & 0xC0) != 0x80).all():
        try:  # the whole batch at once; rows start with a character, so a clean batch has clean rows
            flat = np.frombuffer(data.tobytes().decode().encode("utf-32-le"), "<i4")
            ends = np.cumsum(characters)
            return {"flat": flat, "offsets": np.concatenate([[0], ends]), "readable": np.ones(len(ends), bool)}
        except UnicodeDecodeError:
            pass
    parts, readable = [], np.ones(len(offsets) - 1, bool)
    for b in range(len(readable)):
        raw = data[offsets[b] : offsets[b + 1]].tobytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            readable[b] = False
            text = raw.decode(errors="replace")
        row = np.frombuffer(text.encode("utf-32-le"), "<i4")
        parts.append(row if readable[b] else np.where(row == 0xFFFD, np.int32(-1), row))
    lengths = [len(p) for p in parts]
    return {
        "flat": np.concatenate(parts) if parts else np.zeros(0, np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        "readable": readable,
    }
