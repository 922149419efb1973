"""The sample order: a keyed permutation, so that position -> sample needs no memory and no state. Pure.

A Feistel network on 2b bits is a bijection whatever its round function is (Luby and Rackoff 1988); with b chosen so
that 2^(2b) is at most four times the number of samples, values that fall outside are mapped again until they fall
inside (cycle walking, Black and Rogaway 2002). Each epoch has its own key.
"""

from __future__ import annotations

import numpy as np
import xxhash

ROUNDS = 6


def sample_ids(seed: int, fingerprint: str, first: int, count: int, num_samples: int) -> np.ndarray:
    """Samples at the positions first, first + 1, ..., first + count - 1 of the endless order; (count,) int64.

    Position p is in epoch p // num_samples; each epoch visits every sample once, in an order of its own that depends
    on (seed, fingerprint, epoch) only.
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, within = np.divmod(positions, num_samples)
    result = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = permute(within[chosen], num_samples, key(seed, fingerprint, "order", int(epoch)))
    return result


def key(*parts: object) -> int:
    """64 bits that depend on all parts."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode())


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """A permutation of range(size), applied to `indices` (any shape, values in [0, size)); int64."""
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    values = np.asarray(indices, dtype=np.uint64).copy()
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, key)
        outside &= values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: np.uint64, key: int) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for number in range(ROUNDS):
        round_key = np.uint64((key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
