"""TFRecord files and tf.train.Example messages, without TensorFlow or protobuf.

A TFRecord file is a sequence of records: length (uint64), masked CRC-32C of the length, content, masked CRC-32C of the
content; all little-endian. A tf.train.Example maps names to lists of bytes, floats or integers.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from actok.core import DataError

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_MASK = 0xA282EAD8
_HEADER, _FOOTER = 12, 4
# Bytes that one lane of the vectorised CRC runs through; longer records get more lanes, up to this length of each.
_LANE = 1024

__all__ = ["Feature", "TFRecordFile", "crc32c", "feature_values", "masked_crc", "parse_example"]


# -- CRC-32C ------------------------------------------------------------------------------------------------------------


@cache
def _tables() -> np.ndarray:
    """uint32 [4, 65536]: the CRC register after two bytes and 0, 2, 4 or 6 zero bytes (slicing-by-8, Kounavis & Berry
    2005, with two bytes a look-up)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    single = [table]
    for _ in range(7):
        single.append((single[-1] >> 8) ^ table[single[-1] & 0xFF])
    pairs = np.arange(65536)
    return np.stack([single[2 * k + 1][pairs & 0xFF] ^ single[2 * k][pairs >> 8] for k in range(4)])


@cache
def _shift_tables(log2_bytes: int) -> np.ndarray:
    """uint32 [4, 256]: what 2^n zero bytes, n >= 3, do to each byte of a CRC register; it is linear over GF(2)."""
    if log2_bytes == 3:
        values = np.arange(256, dtype=np.uint32)
        # Eight zero bytes are two registers of input; the register goes in by exclusive or with the first.
        return np.stack([_step(values << np.uint32(8 * k), np.zeros_like(values)) for k in range(4)])
    half = _shift_tables(log2_bytes - 1)
    return _look_up(half, half)


def _step(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The register after eight bytes given as two little-endian words, the register before being in the first."""
    tables = _tables()
    first, second = low.view(np.uint16), high.view(np.uint16)
    return tables[3][first[0::2]] ^ tables[2][first[1::2]] ^ tables[1][second[0::2]] ^ tables[0][second[1::2]]


def _look_up(tables: np.ndarray, registers: np.ndarray) -> np.ndarray:
    return (
        tables[0][registers & 0xFF]
        ^ tables[1][(registers >> 8) & 0xFF]
        ^ tables[2][(registers >> 16) & 0xFF]
        ^ tables[3][registers >> 24]
    )


def crc32c(content: bytes | memoryview) -> int:
    """CRC-32C. The content is cut into lanes of one length that run side by side; their registers are then merged."""
    data = np.frombuffer(content, np.uint8)
    size = len(data)
    lane = 8
    while lane < _LANE and lane * lane < size:
        lane *= 2
    lanes = 1
    while lanes * lane < size:
        lanes *= 2
    # Zeros in front change nothing while the register is zero; the initial value is accounted for below.
    padded = np.zeros(lanes * lane, np.uint8)
    padded[len(padded) - size :] = data
    words = np.ascontiguousarray(padded.view("<u4").reshape(lanes, lane // 8, 2).transpose(1, 2, 0))
    registers = np.zeros(lanes, np.uint32)
    for low, high in words:
        registers = _step(low ^ registers, high)
    shift = lane.bit_length() - 1
    while len(registers) > 1:
        registers = _look_up(_shift_tables(shift), registers[0::2]) ^ registers[1::2]
        shift += 1
    # The register starts with ones, which then see as many bytes as there are.
    initial = 0xFFFFFFFF
    for _ in range(size % 8):
        for _ in range(8):
            initial = (initial >> 1) ^ (_POLYNOMIAL if initial & 1 else 0)
    started = np.array([initial], np.uint32)
    for bit in range(3, size.bit_length()):
        if size >> bit & 1:
            started = _look_up(_shift_tables(bit), started)
    return int(registers[0] ^ started[0]) ^ 0xFFFFFFFF


def masked_crc(content: bytes | memoryview) -> int:
    """The CRC as TFRecord files store it."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


# -- records ------------------------------------------------------------------------------------------------------------


class TFRecordFile:
    """The records of one file, memory-mapped while it is being read; contents are only touched when asked for.

    Opening walks over the lengths. Raises DataError naming file and record where it is truncated or a length's checksum
    is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: memoryview | None = None
        self._spans: list[tuple[int, int]] = []
        view, at = self._view, 0
        while at < len(view):
            if at + _HEADER > len(view):
                raise self._truncated()
            header = view[at : at + _HEADER]
            length, crc = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != crc:
                raise DataError(
                    f"{path}: the length of record {len(self._spans)} has a wrong checksum; the file is damaged or no"
                    " TFRecord, download it again"
                )
            start = at + _HEADER
            at = start + length + _FOOTER
            if at > len(view):
                raise self._truncated()
            self._spans.append((start, start + length))

    @property
    def _view(self) -> memoryview:
        if self._map is None:
            try:
                with open(self.path, "rb") as stream:
                    size = stream.seek(0, 2)
                    self._map = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
            except OSError as error:
                raise DataError(f"{self.path} cannot be opened ({error.strerror}); check the path") from None
        return self._map

    def release(self) -> None:
        """Give the mapping and its file handle back; reading maps the file again. Datasets have thousands of files."""
        self._map = None

    def _truncated(self) -> DataError:
        return DataError(f"{self.path} is truncated in record {len(self._spans)}; download it again")

    def __len__(self) -> int:
        return len(self._spans)

    def peek(self, index: int) -> memoryview:
        """A record's content, unchecked."""
        start, stop = self._spans[index]
        return self._view[start:stop]

    def record(self, index: int) -> memoryview:
        """A record's content. Raises DataError where its checksum is wrong."""
        start, stop = self._spans[index]
        content = self._view[start:stop]
        (crc,) = struct.unpack("<I", self._view[stop : stop + _FOOTER])
        if masked_crc(content) != crc:
            raise DataError(f"{self.path}: record {index} has a wrong checksum; the file is damaged, download it again")
        return content


# -- tf.train.Example ---------------------------------------------------------------------------------------------------

Feature = list[memoryview] | np.ndarray


def parse_example(content: memoryview, where: str) -> dict[str, memoryview]:
    """Name -> undecoded tf.train.Feature (see `feature_values`). Raises DataError where it is no tf.train.Example."""
    features: dict[str, memoryview] = {}
    try:
        for number, body in _fields(content):
            if number != 1 or isinstance(body, int):
                continue
            for inner, entry in _fields(body):
                if inner != 1 or isinstance(entry, int):
                    continue
                pair = dict(_fields(entry))
                key, value = pair.get(1, memoryview(b"")), pair.get(2, memoryview(b""))
                if isinstance(key, int) or isinstance(value, int):
                    raise ValueError("a map entry is not a message")
                features[str(key, "utf-8")] = value
    except (IndexError, ValueError) as error:
        raise DataError(f"{where} is no tf.train.Example ({error}); the file is damaged or of another kind") from None
    return features


def feature_values(feature: memoryview, where: str) -> Feature:
    """A list of bytes, or an array of float32 or int64. Raises DataError where the message is broken."""
    try:
        for kind, body in _fields(feature):
            if isinstance(body, int) or kind not in (1, 2, 3):
                raise ValueError(f"field {kind} is none of bytes, floats and integers")
            parts = [part for number, part in _fields(body) if number == 1]
            if kind == 1:
                return [part for part in parts if not isinstance(part, int)]
            chunks = [bytes([]) if isinstance(p, int) else p for p in parts]
            if kind == 2:
                return np.frombuffer(b"".join(chunks), "<f4")
            if parts and all(isinstance(p, int) for p in parts):
                return np.array(parts, np.uint64).astype(np.int64)
            return _varints(b"".join(chunks))
    except (IndexError, ValueError) as error:
        raise DataError(f"{where} holds a broken feature ({error}); download the file again") from None
    return []


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field number and content: bytes for wire types 2, 1 and 5, the value for wire type 0."""
    at, size = 0, len(message)
    while at < size:
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > size:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def _varints(packed: bytes) -> np.ndarray:
    """int64 values of packed variable-length integers."""
    data = np.frombuffer(packed, np.uint8)
    last = data < 0x80
    if last.all():
        return data.astype(np.int64)
    if not last[-1]:
        raise ValueError("a list of integers ends within one")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(data)) - np.repeat(starts, np.diff(np.append(starts, len(data))))
    bits = (data & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).astype(np.int64)
