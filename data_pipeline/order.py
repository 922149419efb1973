"""The sample order: a keyed permutation, so that position -> sample needs no memory and no state. Pure.

A sample index i < size is written as (i // b, i % b) with a x b just above size. A round adds to one of the two, modulo
a or b, a hash of the other: a bijection whatever the hash is, a Feistel network over mixed radices (Luby and Rackoff
1988; Black and Rogaway 2002). The few results of size or more are mapped again until they fall inside (cycle walking,
ibid.); since a x b - size < a, about one in sqrt(size) is. Each epoch has its own key.

With a shuffle window, whole shards are permuted, and then the samples within each run of `window` samples. A stretch of
that order touches few shards, and each shard in one stretch of the epoch only, which is what a dataset that is fetched
from afar needs; the price is that a window holds samples of those few shards (`benchmarks/shuffle_window.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import xxhash

ROUNDS = 12  # sizes below 10 need 10 for all permutations to be equally likely; larger ones look random from 8 on
_MASK = (1 << 64) - 1


def sample_ids(seed: int, fingerprint: str, first: int, count: int, num_samples: int) -> np.ndarray:
    """Samples at the positions first, first + 1, ..., first + count - 1 of the endless order; (count,) int64.

    Position p is in epoch p // num_samples; each epoch visits every sample once, in an order of its own that depends
    on (seed, fingerprint, epoch) only.
    """
    return _by_epoch(
        first, count, num_samples, lambda at, epoch: permute(at, num_samples, key(seed, fingerprint, "order", epoch))
    )


def nearby_ids(
    seed: int, fingerprint: str, first: int, count: int, block_starts: np.ndarray, window: int
) -> np.ndarray:
    """As `sample_ids`, but the samples of a block stay near each other; (count,) int64.

    block_starts (num_blocks + 1,) int64, ascending: the first sample of each block (shard), and the number of samples
    at the end. window: in samples, how far the order mixes beyond the order of the blocks. The memory is that of a few
    arrays like block_starts.
    """

    def permute_epoch(positions: np.ndarray, epoch: int) -> np.ndarray:
        epoch_key = key(seed, fingerprint, "nearby", epoch)
        mixed = _permute_windows(positions, int(block_starts[-1]), window, epoch_key)
        blocks = permute(np.arange(len(block_starts) - 1), len(block_starts) - 1, epoch_key)
        ends = np.cumsum(np.diff(block_starts)[blocks])  # of the blocks, one after the other in the epoch's order
        place = np.searchsorted(ends, mixed, side="right")
        return mixed - ends[place] + block_starts[blocks[place] + 1]

    return _by_epoch(first, count, int(block_starts[-1]), permute_epoch)


def key(*parts: object) -> int:
    """64 bits that depend on all parts."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode())


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """A permutation of range(size), applied to `indices` (any shape, values in [0, size)); int64. size < 2^62."""
    a = math.isqrt(max(size - 1, 0)) + 1  # the smallest with a x a >= size
    b = -(-size // a)
    round_keys = [_mix((key + (number + 1) * 0x9E3779B97F4A7C15) & _MASK) for number in range(ROUNDS)]
    shape = np.shape(indices)
    values = _rounds(np.asarray(indices).astype(np.uint64).reshape(-1), a, b, round_keys)
    outside = np.flatnonzero(values >= np.uint64(size))
    while len(outside):
        values[outside] = again = _rounds(values[outside], a, b, round_keys)
        outside = outside[again >= np.uint64(size)]
    return values.astype(np.int64).reshape(shape)


def _by_epoch(
    first: int, count: int, num_samples: int, permute_epoch: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """permute_epoch(positions within the epoch, epoch), put together for `count` positions of the endless order."""
    parts = []
    while count:
        epoch, within = divmod(first, num_samples)
        length = min(count, num_samples - within)
        parts.append(permute_epoch(np.arange(within, within + length), epoch))
        first, count = first + length, count - length
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _permute_windows(indices: np.ndarray, size: int, window: int, key: int) -> np.ndarray:
    """Permute each run of `window` indices in itself, with a key of its own; the last run may be shorter."""
    result = np.empty_like(indices)
    numbers = indices // window
    for number in np.unique(numbers).tolist():
        start, chosen = number * window, numbers == number
        own_key = _mix((key + number * 0xD1B54A32D192ED03) & _MASK)
        result[chosen] = start + permute(indices[chosen] - start, min(window, size - start), own_key)
    return result


def _rounds(values: np.ndarray, a: int, b: int, round_keys: list[int]) -> np.ndarray:
    """values (num,) uint64 in [0, a x b); a permutation of that range."""
    high, low = np.divmod(values, np.uint64(b))
    for number, round_key in enumerate(round_keys):
        if number % 2:
            _add_hash(low, high, round_key, b)
        else:
            _add_hash(high, low, round_key, a)
    return high * np.uint64(b) + low


def _add_hash(target: np.ndarray, other: np.ndarray, round_key: int, radix: int) -> None:
    """target = (target + hash(other)) % radix, in place; both are below 2^32, so that no product overflows."""
    mixed = other ^ np.uint64(round_key)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed >>= np.uint64(32)  # the best 32 bits, scaled to [0, radix)
    mixed *= np.uint64(radix)
    mixed >>= np.uint64(32)
    target += mixed
    np.minimum(target, target - np.uint64(radix), out=target)  # the difference wraps to a huge number where it is < 0


def _mix(value: int) -> int:
    """splitmix64's finaliser (Steele et al. 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
