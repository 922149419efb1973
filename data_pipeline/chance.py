"""Random numbers as a function of where they are used: number i of a row is a hash of (the row's key, i). Pure.

A generator object costs more to seed than a row of BERT takes to make (numpy's Philox: 10 to 20 microseconds) and has
to be asked in a fixed order. Here the numbers of a whole micro batch come from a handful of array operations, in any
order, and the same row draws the same numbers whichever rank, worker or batch it falls to.

Number i under key k is splitmix64's i-th output when it is started at k (Steele, Lea and Flood 2014): mix(k + (i + 1)
GAMMA) mod 2^64. The keys are such numbers themselves, so that neighbouring rows start far apart.
"""

from __future__ import annotations

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def row_keys(base: int, draws: np.ndarray) -> np.ndarray:
    """The keys of rows: (n,) uint64 from `base`, 64 bits, and draws (n,), integers in [0, 2^63)."""
    return bits(np.uint64(base), draws)


def bits(keys: np.ndarray | np.uint64, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each pair of key (uint64) and counter (an integer in [0, 2^63)); broadcasts; uint64."""
    return mix(keys + (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * GAMMA)


def uniform(keys: np.ndarray | np.uint64, counters: np.ndarray) -> np.ndarray:
    """As `bits`, but float64, multiples of 2^-53 in [0, 1)."""
    return (bits(keys, counters) >> np.uint64(11)) * 2.0**-53


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 that flips each bit of its result with probability 1/2."""
    mixed = values >> np.uint64(30)
    mixed ^= values
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
