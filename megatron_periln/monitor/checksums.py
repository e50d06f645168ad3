"""The checksums of TensorBoard's event files, by numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["crc32c", "masked_crc32c"]

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, its bits reversed
_SHORT = 64
"""Bytes below which Python's own loop is faster."""
_PIECE = 32
"""Bytes, a power of two."""

Words = NDArray[np.uint32]


def masked_crc32c(data: bytes, short: Callable[[bytes], int]) -> int:
    """Return the checksum of a record of an event file; ``short`` takes that of short ones."""
    if len(data) < _SHORT:
        return short(data)
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of four bytes or more.

    Without its initial inversion, done here by inverting four bytes, a CRC is linear, and zeros in front
    don't change it: that of a whole is the sum of those of its halves, the first one's moved past the second.
    So pieces are summed side by side, two bytes at a time, and then joined with their neighbours.
    """
    padded = np.zeros(len(data) + -len(data) % _PIECE, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 0xFF
    columns = np.ascontiguousarray(padded.view("<u2").reshape(-1, _PIECE // 2).T)
    crcs: Words = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        crcs = crcs >> 16 ^ _pairs().take(crcs.astype(np.uint16) ^ column)
    level = _PIECE.bit_length() - 1
    while len(crcs) > 1:
        if len(crcs) % 2:
            crcs = np.concatenate([np.zeros(1, np.uint32), crcs])
        crcs = _moved(crcs[0::2], level) ^ crcs[1::2]
        level += 1
    return int(crcs[0]) ^ 0xFFFFFFFF


@functools.cache
def _pairs() -> Words:
    """Return the CRC of every two bytes, read as one little-endian number."""
    pair = np.arange(1 << 16)
    crcs = _bytes()[pair & 0xFF]
    return _moved(crcs, 0) ^ _bytes()[pair >> 8]


@functools.cache
def _bytes() -> Words:
    crcs: Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crcs = (crcs >> np.uint32(1)) ^ (crcs & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return crcs


def _moved(crcs: Words, level: int) -> Words:
    """Return the CRCs after ``2**level`` more bytes, which are zeros."""
    table = _after_zeros(level)
    moved = table[0][crcs & 0xFF]
    for place in (1, 2, 3):
        moved = moved ^ table[place][crcs >> np.uint32(8 * place) & 0xFF]
    return moved


@functools.cache
def _after_zeros(level: int) -> Words:
    """Return for each byte of a CRC at each of its four places what becomes of it, ``[4, 256]``."""
    place = np.arange(4, dtype=np.uint32)[:, None]
    crcs = np.arange(256, dtype=np.uint32) << 8 * place
    if level == 0:
        return (crcs >> 8) ^ _bytes()[crcs & 0xFF]
    return _moved(_moved(crcs, level - 1), level - 1)
