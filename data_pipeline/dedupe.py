"""Drop documents that say (nearly) the same as an earlier one.

Exact: the same words after lower-casing. Near: MinHash signatures (Broder 1997) of word 5-grams in bands (locality
sensitive hashing, as Lee et al. 2022 use it on training data): two documents meet if they agree in all values of some
band. With 9 bands of 5 values, documents that share 80 % of their 5-grams meet with probability 0.97, half: 0.25.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash

from data_pipeline.sources import Document

SHINGLE_WORDS = 5
NUM_BANDS, BAND_VALUES = 9, 5
WORD = re.compile(r"\w+")
_MULTIPLIERS = np.random.Generator(np.random.Philox(1)).integers(1, 2**63, NUM_BANDS * BAND_VALUES, dtype=np.uint64) | 1


def drop_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without those that equal or nearly equal an earlier one; the first one stays.

    Memory: about 1 kB a kept document.
    """
    exact: set[int] = set()
    bands: list[set[int]] = [set() for _ in range(NUM_BANDS)]
    for document in documents:
        words = WORD.findall(document.text.lower())
        whole = xxhash.xxh3_64_intdigest(" ".join(words).encode())
        if whole in exact:
            continue
        exact.add(whole)
        keys = signature(words)
        if any(key in band for key, band in zip(keys, bands, strict=True)):
            continue
        for key, band in zip(keys, bands, strict=True):
            band.add(key)
        yield document


def signature(words: list[str]) -> list[int]:
    """One hash per band of the document's MinHash values; documents shorter than a shingle are one shingle."""
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words] or [0], dtype=np.uint64)
    shingles = hashes[: max(1, len(hashes) - SHINGLE_WORDS + 1)].copy()
    for offset in range(1, min(SHINGLE_WORDS, len(hashes))):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(shingles)]
    shingles = np.unique(shingles ^ (shingles >> np.uint64(29)))
    # One hash function per value: multiplication by an odd number permutes the 64-bit numbers.
    products = shingles[:, None] * _MULTIPLIERS
    smallest = (products ^ (products >> np.uint64(32))).min(axis=0)
    return [xxhash.xxh3_64_intdigest(band.tobytes()) for band in smallest.reshape(NUM_BANDS, BAND_VALUES)]
