"""CRC-32C (Castagnoli), as TensorFlow's files have it, at the speed of a disk and without another dependency.

A checksum goes through its bytes one after the other. But its state is linear over the bits: that of two stretches is
the state of the first, moved over as many zero bytes as the second is long, xor that of the second. So 65,536 stretches
advance together, a byte a step in numpy, and are joined in pairs at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]

POLYNOMIAL = 0x82F63B78  # reflected
MOST_LANES_LOG2 = 16
MASK_DELTA = 0xA282EAD8


def _make_table() -> Bits:
    states = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        states = np.where(states & 1, (states >> 1) ^ np.uint32(POLYNOMIAL), states >> 1)
    return states.astype(np.uint32)


TABLE = _make_table()


def crc32c(data: Any) -> int:
    """The checksum of a bytes-like object, or of a contiguous numpy array."""
    rest: npt.NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)
    state = np.uint32(0xFFFFFFFF)
    while len(rest):
        lanes_log2 = max(0, min(MOST_LANES_LOG2, (len(rest) // 64).bit_length() - 1))
        length = len(rest) >> lanes_log2
        used = length << lanes_log2
        state = _advance(state, rest[:used].reshape(1 << lanes_log2, length))
        rest = rest[used:]
    return int(state ^ np.uint32(0xFFFFFFFF))


def masked(data: Any) -> int:
    """The checksum as it is written: turned and moved, so that checksums of checksums are not special."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def _advance(state: np.uint32, lanes: npt.NDArray[np.uint8]) -> np.uint32:
    """The state behind all bytes of `lanes`, (lanes, length), row after row; the number of lanes is a power of two."""
    states = np.zeros(len(lanes), dtype=np.uint32)
    states[0] = state
    for place in range(lanes.shape[1]):
        states = TABLE[(states ^ lanes[:, place]) & 0xFF] ^ (states >> 8)
    move = _over_zeros(lanes.shape[1])
    while len(states) > 1:
        states = _apply(move, states[0::2]) ^ states[1::2]
        move = _apply(move, move)
    return np.uint32(states[0])


def _over_zeros(length: int) -> Bits:
    """What `length` zero bytes do to a state, (32,): for each bit what it becomes."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    result, power = bits, TABLE[bits & 0xFF] ^ (bits >> 8)
    while length:
        if length & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        length >>= 1
    return result


def _apply(move: Bits, states: Bits) -> Bits:
    moved = np.zeros_like(states)
    for bit in range(32):
        moved ^= move[bit] * ((states >> np.uint32(bit)) & np.uint32(1))
    return moved
