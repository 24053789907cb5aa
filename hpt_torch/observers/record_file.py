"""TensorBoard's record format, framed here: its own writer takes 80 µs a record for the checksum, in a loop
over bytes, which was the larger half of what TensorBoard files cost a run."""

from __future__ import annotations

import functools
import struct

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

_LONGEST = 4096  # bytes that the table is for; longer records (tracebacks) are left to TensorBoard
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_ONES = 0xFFFFFFFF


def framed(record: bytes) -> bytes:
    """The record as it stands in a file: length, its checksum, content, its checksum."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, _checksum(length), record, _checksum(record)))


def _checksum(data: bytes) -> bytes:
    if len(data) > _LONGEST:
        return struct.pack("<I", masked_crc32c(data))
    crc = _crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ONES)


def _crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4) of at most `_LONGEST` bytes.

    It is linear: each byte adds (xor) a number that depends only on it and on how many bytes follow.
    """
    table, start, offsets = _tables()
    places = offsets[_LONGEST - len(data) :] + np.frombuffer(data, np.uint8)
    return int(np.bitwise_xor.reduce(table[places]) ^ start[len(data)]) ^ _ONES


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(what byte b with k bytes after it adds, at 256 k + b; the start value's share in n bytes; 256 k)."""
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, (row >> 1) ^ np.uint32(_POLYNOMIAL), row >> 1).astype(np.uint32)
    table = np.empty((_LONGEST, 256), np.uint32)
    start = np.empty(_LONGEST + 1, np.uint32)
    table[0], start[0] = row, _ONES
    for k in range(1, _LONGEST):
        table[k] = row[table[k - 1] & 0xFF] ^ (table[k - 1] >> 8)
    for n in range(1, _LONGEST + 1):
        start[n] = row[start[n - 1] & 0xFF] ^ (start[n - 1] >> 8)
    return table.reshape(-1), start, np.arange(_LONGEST)[::-1] * 256
