"""Texts -> signatures: what duplicate search needs to know of a document, in 272 bytes.

Exact: a 128-bit hash of the document's words, lower-cased. 64 bits would drop a document by accident in 1 of 37 corpora
of 10^9 documents; 128 bits never do in practice.
Near: MinHash (Broder 1997) over the set of the document's word 5-grams ("shingles"). Two documents agree in one of the
values with probability J, the Jaccard similarity of their sets, so the share of equal values estimates J. Of each value
one byte is kept (b-bit MinHash, Li and Koenig 2010): unequal ones agree in it by chance once in 256 times, which the
estimate takes out again. Its standard error is sqrt(J (1 - J) / 256): 0.025 at J = 0.8.

Everything is done by numpy on blocks of many documents. A word is hashed eight bytes at a time, all words at once. One
hash function per value is a multiplication of the shingle's 32-bit hash by an odd number, a permutation of the 32-bit
numbers; the hashes it permutes are well mixed, so the estimate's error is that of independent functions (measured in
tests/data_pipeline/test_minhash.py). One-permutation hashing needs fewer products, but its minima per bin and the
filling of empty bins do not vectorise; 256 products a shingle take about half of the time here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import xxhash

from configs.schema import DedupeConfig

SHINGLE_WORDS = 5
NUM_VALUES = 256  # MinHash values of a document
RECALL = 0.95  # of the bands, for pairs just at the similarity that is asked for
LONGEST_WORD = 64  # bytes; longer ones count as several words, so that hashing takes at most 8 rounds
BLOCK_CHARACTERS = 1 << 18  # of text at once; the arrays of a block stay in the second-level cache

# Lower case, and a space for all that separates words; bytes from 128 on have been sorted out before.
_WORD_BYTES = bytes(
    0 if byte == 0 else ord(chr(byte).lower()) if chr(byte).isalnum() or byte == ord("_") else ord(" ")
    for byte in range(128)
) + bytes(range(128, 256))
# Letters of scripts that put no spaces between words; each is a word of its own.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width Katakana
    (0x20000, 0x323AF),  # Han
)
_SEPARATOR, _LETTER, _WHOLE_WORD = 0, 1, 2
_LOW_BYTES = np.array([256**count - 1 for count in range(9)], dtype=np.uint64)  # masks of the lowest 0 to 8 bytes
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))
_RANDOM = np.random.Generator(np.random.Philox(1))
_PLACES = _RANDOM.integers(1, 2**63, SHINGLE_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_MULTIPLIERS = _RANDOM.integers(0, 2**31, NUM_VALUES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)


def signature_dtype(config: DedupeConfig) -> np.dtype:
    """`exact` (2,) uint64, and `values` (NUM_VALUES,) uint8 if near-duplicates are looked for."""
    exact = ("exact", "<u8", (2,))
    return np.dtype([exact, ("values", "u1", (NUM_VALUES,))] if config.near else [exact])


def signatures(texts: Iterable[str], config: DedupeConfig) -> np.ndarray:
    """One row per text, in their order: (documents,) of `signature_dtype(config)`.

    The words are those of `\\w+` after lower-casing, with combining marks, in scripts without spaces the characters. A
    text without words is compared as it stands, one of fewer words than a shingle is one shingle.
    """
    rows: list[tuple[list[int], np.ndarray]] = []
    waiting: dict[bool, tuple[list[int], list[str]]] = {True: ([], []), False: ([], [])}
    sizes = {True: 0, False: 0}
    number = -1
    for number, text in enumerate(texts):
        if len(text) > BLOCK_CHARACTERS:
            rows.append(([number], _long_signature(text, config)))
            continue
        ascii_only = text.isascii()  # these need no look at each character's class
        numbers, block = waiting[ascii_only]
        numbers.append(number)
        block.append(text)
        sizes[ascii_only] += len(text) + 1
        if sizes[ascii_only] >= BLOCK_CHARACTERS:
            rows.append((numbers, _block_signatures(block, config)))
            waiting[ascii_only], sizes[ascii_only] = ([], []), 0
    rows += [(numbers, _block_signatures(block, config)) for numbers, block in waiting.values() if block]
    result = np.empty(number + 1, dtype=signature_dtype(config))
    for numbers, found in rows:
        result[numbers] = found
    return result


def estimated_similarity(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimates of the Jaccard similarity, (n,) float64, from `values` and `others`, both (n, NUM_VALUES) uint8."""
    # eight comparisons are one 64-bit number of zero and one bytes
    equal = np.bitwise_count(np.equal(values, others).view(np.uint64)).sum(axis=1, dtype=np.int64)
    return (equal / NUM_VALUES - 1 / 256) / (1 - 1 / 256)


@dataclass(frozen=True)
class Bands:
    """Locality-sensitive hashing: documents meet if they agree in all `rows` values of one of `num_bands` bands."""

    num_bands: int
    rows: int  # values of a band, at most 8: a band is then one 64-bit number

    def recall(self, similarity: float) -> float:
        """Probability that documents of this Jaccard similarity meet: 1 - (1 - s^rows)^num_bands, an S-curve."""
        agree = similarity + (1 - similarity) / 256
        return 1 - (1 - agree**self.rows) ** self.num_bands

    def keys(self, values: np.ndarray) -> np.ndarray:
        """The bands of `values` (documents, NUM_VALUES) uint8 as well mixed numbers, (num_bands, documents) uint64."""
        keys = np.empty((self.num_bands, len(values)), dtype=np.uint64)
        for start in range(0, len(values), 4096):  # what fits into the second-level cache
            bands = values[start : start + 4096, : self.num_bands * self.rows]
            packed = np.zeros((len(bands), self.num_bands, 8), dtype=np.uint8)
            packed[:, :, : self.rows] = bands.reshape(len(bands), self.num_bands, self.rows)
            keys[:, start : start + 4096] = _mix(packed.view("<u8")[:, :, 0], 0).T
        return keys


def choose_bands(similarity: float) -> Bands:
    """The most selective bands that miss at most 5 % of the pairs of just this similarity, and fewer of closer ones.

    At 0.8 these are 17 bands of 8 values. Pairs of similarity 0.3, 0.5, 0.6, 0.7, 0.8, 0.85 and 0.9 meet with
    probability 0.001, 0.07, 0.25, 0.64, 0.96, 0.996 and 1. Below 0.5, which the settings refuse, a band would hold
    so few values that most pairs of a large corpus meet in one.
    """
    for rows in range(8, 1, -1):
        for num_bands in range(1, NUM_VALUES // rows + 1):
            bands = Bands(num_bands, rows)
            if bands.recall(similarity) >= RECALL:
                return bands
    raise AssertionError(f"no bands of {NUM_VALUES} values find pairs of similarity {similarity}")


def _block_signatures(texts: list[str], config: DedupeConfig) -> np.ndarray:
    words, counts = _words_of_texts(texts)
    ends = np.cumsum(counts)
    result = np.empty(len(texts), dtype=signature_dtype(config))
    bounds = [0, *(8 * ends).tolist()]
    view = words.view(np.uint8).data
    digests = [xxhash.xxh3_128_digest(view[start:end]) for start, end in pairwise(bounds)]
    result["exact"] = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    if config.near:
        result["values"] = _one_byte_each(_minima(words, counts))
    return result


def _long_signature(text: str, config: DedupeConfig) -> np.ndarray:
    """The same for one text of any length, block by block: the memory does not grow with it."""
    digest = xxhash.xxh3_128()
    minima = np.full((1, NUM_VALUES), 2**32 - 1, dtype=np.uint32)
    open_word, last_words, num_words = b"", np.empty(0, np.uint64), 0
    for start in range(0, len(text), BLOCK_CHARACTERS):
        content = open_word + _words_apart(text[start : start + BLOCK_CHARACTERS].replace("\0", " "))
        cut = len(content)
        if start + BLOCK_CHARACTERS < len(text):  # the last word may go on
            word_start = content.rfind(b" ") + 1
            cut = word_start + (len(content) - word_start) // LONGEST_WORD * LONGEST_WORD
        open_word = content[cut:]
        words = _hash_words(content[:cut])[0]
        digest.update(words.data)
        num_words += len(words)
        words = np.concatenate([last_words, words])
        if len(words) >= SHINGLE_WORDS and config.near:
            np.minimum(minima, _minima(words, np.array([len(words)])), out=minima)
        last_words = words[-(SHINGLE_WORDS - 1) :]
    if not num_words:
        last_words = _whole_text_hashes([text])
        digest.update(last_words.data)
    if num_words < SHINGLE_WORDS and config.near:
        minima = _minima(last_words, np.array([len(last_words)]))
    result = np.empty(1, dtype=signature_dtype(config))
    result["exact"] = np.frombuffer(digest.digest(), dtype="<u8")
    if config.near:
        result["values"] = _one_byte_each(minima)
    return result


def _words_of_texts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of the words of all texts (words,) uint64, number of words of each text (texts,) int64, at least 1)."""
    joined = "\0".join([text.replace("\0", " ") if "\0" in text else text for text in texts])
    words, counts = _hash_words(_words_apart(joined))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        places = (np.cumsum(counts) - counts)[empty]
        words = np.insert(words, places, _whole_text_hashes([texts[number] for number in empty]))
        counts[empty] = 1
    return words, counts


def _whole_text_hashes(texts: list[str]) -> np.ndarray:
    hashes = [xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts]
    return np.array(hashes, dtype=np.uint64)


def _words_apart(text: str) -> bytes:
    """Lower-case UTF-8 with spaces between words and nothing else but them and the NULs of `text`."""
    if text.isascii():
        return text.encode().translate(_WORD_BYTES)
    # of the two small sigmas, which one comes out depends on the next letter, also over the end of a block
    lowered = text.lower().replace("ς", "σ")
    codes = np.frombuffer(lowered.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).copy()
    places = np.flatnonzero(codes >= 128)
    classes = _character_classes()[codes[places]]
    codes[places[classes == _SEPARATOR]] = ord(" ")
    alone = places[classes == _WHOLE_WORD]
    if len(alone):
        codes = np.insert(codes, np.concatenate([alone, alone + 1]), ord(" "))
    spaced = codes.tobytes().decode("utf-32-le", "surrogatepass")
    return spaced.encode("utf-8", "surrogatepass").translate(_WORD_BYTES)


@lru_cache(maxsize=1)
def _character_classes() -> np.ndarray:
    """Of each code point from 128 on: separator, letter (or digit, or mark) of a word, or a word by itself."""
    classes = np.full(0x110000, _SEPARATOR, dtype=np.uint8)
    assigned = _UNSPACED[-1][1] + 1  # beyond are no letters
    classes[:assigned] = [unicodedata.category(chr(code))[0] in "LNM" for code in range(assigned)]
    for first, last in _UNSPACED:
        classes[first : last + 1] *= _WHOLE_WORD
    return classes


def _hash_words(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all words (words,) uint64, number of words before each NUL and after the last (NULs + 1,) int64).

    The hash of a word of up to eight bytes is a permutation of its bytes: these never collide.
    """
    padded = b" " + content + b" " * LONGEST_WORD
    letters = np.frombuffer(padded, dtype=np.uint8)
    inside = letters > ord(" ")
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, lengths = edges[0::2], edges[1::2] - edges[0::2]
    if len(lengths) and lengths.max() > LONGEST_WORD:
        starts, lengths = _cut_words(starts, lengths)
    # every position's next eight bytes as one number, unaligned, without a copy
    windows: np.ndarray = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
    hashes = windows[starts] & _LOW_BYTES[np.minimum(lengths, 8)]
    hashes = _mix(hashes, 0)
    going_on, offset = np.flatnonzero(lengths > 8), 8
    while len(going_on):
        following = windows[starts[going_on] + offset] & _LOW_BYTES[np.minimum(lengths[going_on] - offset, 8)]
        hashes[going_on] = _mix(hashes[going_on] + following, 0)
        offset += 8
        going_on = going_on[lengths[going_on] > offset]
    before = np.searchsorted(starts, np.flatnonzero(letters == 0))
    return _mix(hashes, 1), np.diff(before, prepend=0, append=len(starts))


def _cut_words(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words longer than LONGEST_WORD in pieces of that length, counted from their beginnings."""
    pieces = -(-lengths // LONGEST_WORD)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece within its word
    offsets = number * LONGEST_WORD
    return np.repeat(starts, pieces) + offsets, np.minimum(np.repeat(lengths, pieces) - offsets, LONGEST_WORD)


def _mix(numbers: np.ndarray, multiplier: int) -> np.ndarray:
    """A permutation of the 64-bit numbers that carries low bits up and high bits down."""
    mixed = numbers * _MIX[multiplier]
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _minima(words: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The MinHash values, (documents, NUM_VALUES) uint32, of documents with `counts` (documents,) of all `words`."""
    shingles, num_shingles = _shingles(words, counts)
    starts = np.cumsum(num_shingles) - num_shingles
    minima = np.empty((NUM_VALUES, len(counts)), dtype=np.uint32)
    permuted = np.empty_like(shingles)
    for value, multiplier in zip(minima, _MULTIPLIERS, strict=True):
        np.multiply(shingles, multiplier, out=permuted)
        np.minimum.reduceat(permuted, starts, out=value)
    return minima.T


def _shingles(words: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of the 5-grams of all documents, uint32, how many each document has: at least 1)."""
    padded = np.concatenate([words, np.zeros(SHINGLE_WORDS - 1, dtype=np.uint64)])
    hashes = words * _PLACES[0]
    for place in range(1, SHINGLE_WORDS):
        hashes += padded[place : place + len(words)] * _PLACES[place]
    ends = np.cumsum(counts)
    short = np.flatnonzero(counts < SHINGLE_WORDS)
    if len(short):  # one shingle, of the words there are
        firsts = ends[short] - counts[short]
        hashes[firsts] = words[firsts] * _PLACES[0]
        for place in range(1, SHINGLE_WORDS - 1):
            here = firsts[counts[short] > place]
            hashes[here] += words[here + place] * _PLACES[place]
    complete = np.ones(len(words), dtype=bool)
    for back in range(1, SHINGLE_WORDS):  # a document's last words begin no shingle, but its first one always does
        complete[ends[counts > back] - back] = False
    return (_mix(hashes[complete], 0) >> np.uint64(32)).astype(np.uint32), np.maximum(counts - SHINGLE_WORDS + 1, 1)


def _one_byte_each(minima: np.ndarray) -> np.ndarray:
    # minima are small numbers: the product spreads what differs in them over the highest byte
    return ((minima * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)
