"""Find documents that share text with a test set, so that a benchmark measures learning and not memory.

Brown et al. 2020 (GPT-3, section 4 and appendix C): a document and a test example overlap if they share 13 words in a
row, or, where the example is shorter than that, all of it; in lower case, without punctuation. As there, nothing
shorter than 8 words counts, since it is found in innocent documents. What differs: a word is a run of letters and
digits (`\\w+`, after NFKC and case folding), not what stands between spaces; each Chinese character or kana is a word
of its own, as these scripts have no spaces; and the document is dropped as a whole, which GPT-3 did at first, before it
cut out 200 characters around the overlap instead. GPT-3 also ignored n-grams found in more than 10 documents of the
training data (quotations, legal phrases), which takes another pass over all of it: left out.

Hashes roll twice, in numpy: over characters to words, over words to n-grams. An overlap is never missed; two different
n-grams are taken for the same with a probability of about 2^-64 a pair. See `contaminated_by`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import open_bytes

MIN_WORDS = (
    8  # of a whole example that is shorter than an n-gram; of n-grams as long at least, the prefix in the filter
)
PIECE_CHARACTERS = 1 << 17  # of a document that are looked at together: what numpy makes of them stays in the cache
LONGEST_WORD = 1 << 20  # in characters; longer ones are cut
FILTER_BITS = 32  # for each n-gram, up to MAX_FILTER_BITS (256 MB) in all
MAX_FILTER_BITS = 1 << 31
PROBES = (1, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)  # odd factors, each of which gives a hash a bit of the filter

_END_OF_WORD = re.compile(r"[\s.,;:!?，。、]")  # characters that no combining mark changes
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # kana, Han
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class Ngrams:
    """The hashed n-grams of test sets: 8 bytes a word of them (16 while they are loaded), and the filter."""

    num_words: int  # n
    lengths: frozenset[int]  # in words: n, and those of whole examples that are shorter
    files: list[str]
    hashes: list[np.ndarray]  # of each file: (n-grams,) uint64, sorted
    filter: np.ndarray  # (2^k,) uint8: a Bloom filter of the first words of all n-grams

    @property
    def num_first(self) -> int:
        """How many words of an n-gram are in the filter."""
        return min(MIN_WORDS, self.num_words)

    def may_begin(self, first: np.ndarray) -> np.ndarray:
        """Places where n-grams may begin, by their first words: (n,) uint64 hashes -> indices. Never misses one.

        Of the other places 1 in 1,000 stays, as each hash has three bits in the filter, which is full to a tenth.
        """
        places = np.arange(len(first))
        for factor in PROBES:
            byte, bit = _place_in_filter(first[places], factor, len(self.filter))
            places = places[(self.filter[byte] & bit) != 0]
            if not len(places):
                break
        return places

    def file_with(self, hashes: np.ndarray) -> str | None:
        """The first file that has one of `hashes` (uint64)."""
        for file, known in zip(self.files, self.hashes, strict=True):
            if (known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes).any():
                return file
        return None


def load_ngrams(files: list[str], num_words: int) -> Ngrams:
    """The n-grams of all texts in `files`, n = `num_words`; of a text with fewer words, but at least 8, all of it.

    By the files' names (each may also end in .gz or .zst): .jsonl, .json and .parquet: every string at any depth; .csv
    and .tsv: every cell; others: every line. Raises DataError for a file that is broken, or has no n-gram.
    """
    # Arrays that grow in place: lists of numpy arrays would be there twice when they are joined.
    hashes, lengths, first = [], {num_words}, array("Q")
    fewest = min(MIN_WORDS, num_words)
    for file in files:
        of_file = array("Q")
        for text in _texts(file):
            if len(text) < fewest:
                continue
            words = np.concatenate([np.empty(0, np.uint64), *_hashed_pieces(text)])
            length = min(num_words, len(words))
            if length >= fewest:
                lengths.add(length)
                of_text = dict(_hash_ngrams(words, {fewest, length}))
                first.frombytes(of_text[fewest][: len(of_text[length])].tobytes())
                of_file.frombytes(of_text[length].tobytes())
        if not of_file:
            raise DataError(
                f"{file}: has no text of {fewest} or more words; data.build.clean.decontaminate takes .jsonl, .json, "
                f".parquet, .csv, .tsv, and text with one example a line"
            )
        hashes.append(np.frombuffer(of_file, dtype=np.uint64))
        hashes[-1].sort()
    return Ngrams(num_words, frozenset(lengths), list(files), hashes, _make_filter(np.frombuffer(first, np.uint64)))


def contaminated_by(text: str, ngrams: Ngrams) -> str | None:
    """A test file with which `text` shares an n-gram, or None. Memory does not grow with the text."""
    before = np.empty(0, np.uint64)  # the last words of the piece before
    for piece in _hashed_pieces(text):
        words = np.concatenate([before, piece]) if len(before) else piece
        for _, first in _hash_ngrams(words, {ngrams.num_first}):
            places = ngrams.may_begin(first)
            for _, hashes in _hash_ngrams(words, ngrams.lengths) if len(places) else ():
                if file := ngrams.file_with(hashes[places[places < len(hashes)]]):
                    return file
        before = words[max(0, len(words) - ngrams.num_words + 1) :]
    return None


# --- hashes


def _hashed_pieces(text: str) -> Iterator[np.ndarray]:
    """The hashes of the text's words, in order: (words,) uint64 for each piece of it."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            end = _END_OF_WORD.search(text, stop, stop + LONGEST_WORD)
            stop = end.start() if end else stop + LONGEST_WORD
        yield _hash_words(text[start:stop])
        start = stop


def _hash_words(text: str) -> np.ndarray:
    """One hash for each word of `text`: (words,) uint64.

    A word's hash is the sum over its characters of mix(character) B^j, j from its beginning, and mixed again. With the
    sums S[i] of mix(character) B^i up to each place of the text, that is (S[stop] - S[start]) B^-start.
    """
    text = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = np.zeros(len(characters) + 2, np.uint8)  # with the outside on both sides
    kinds[1:-1] = _word_table()[characters]
    inside = kinds != 0
    parted = (kinds[1:] != kinds[:-1]) | (kinds[1:] == 2)  # between a place and the one before
    starts = np.flatnonzero(parted & inside[1:])
    stops = np.flatnonzero(parted & inside[:-1])
    size = 1 << len(characters).bit_length()
    sums = np.zeros(len(characters) + 1, np.uint64)
    np.cumsum(_mix(characters.astype(np.uint64)) * _powers(_BASE, size)[: len(characters)], out=sums[1:])
    return _mix((sums[stops] - sums[starts]) * _powers(_INVERSE, size)[starts])


def _hash_ngrams(words: np.ndarray, lengths: set[int] | frozenset[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(length, hashes of all n-grams of that length) for `words` (k,) uint64: (k - length + 1,) uint64 each."""
    sums = words
    for length in range(1, min(max(lengths), len(words)) + 1):
        if length > 1:
            sums = sums[:-1] * np.uint64(_BASE) + words[length - 1 :]
        if length in lengths:
            yield length, sums


def _mix(values: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers after which equal differences are not equal any more (as in SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX + np.uint64(_BASE)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64: (count,) uint64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


@cache
def _word_table() -> np.ndarray:
    """Of each code point: 0, not in a word; 1, in a word, as `\\w` has it; 2, a word by itself. (0x110000,) uint8."""
    table = np.array([chr(point).isalnum() for point in range(0x110000)], dtype=np.uint8)
    table[ord("_")] = 1
    for first, last in _UNSPACED:
        table[first : last + 1] *= 2
    return table


def _make_filter(first: np.ndarray) -> np.ndarray:
    size = min(MAX_FILTER_BITS, max(1 << 10, 1 << (FILTER_BITS * len(first)).bit_length())) // 8
    filter_bytes = np.zeros(size, np.uint8)
    for start in range(0, len(first), 1 << 20):
        for factor in PROBES:
            byte, bit = _place_in_filter(first[start : start + (1 << 20)], factor, size)
            np.bitwise_or.at(filter_bytes, byte, bit)
    return filter_bytes


def _place_in_filter(hashes: np.ndarray, factor: int, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The bit that is numbered by the first bits of hash x factor: its byte, (n,) int64, and its value there, uint8."""
    number = hashes * np.uint64(factor) >> np.uint64(62 - num_bytes.bit_length())
    return (number >> np.uint64(3)).view(np.int64), np.uint8(1) << (number & np.uint64(7)).astype(np.uint8)


# --- test sets


def _texts(file: str) -> Iterator[str]:
    name = file.removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith(".parquet"):
            yield from _parquet_texts(file)
            return
        with open_bytes(file) as opened:
            if name.endswith(".json"):
                yield from _strings(json.loads(opened.read()))
            elif name.endswith(".jsonl"):
                yield from _jsonl_texts(file, opened)
            elif name.endswith((".csv", ".tsv")):
                yield from _table_texts(opened)
            else:
                for line in opened:
                    yield line.decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; correct data.build.clean.decontaminate") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error}); convert the file to UTF-8") from error
    except (json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read by its ending's format ({error}); repair or rename it") from error


def _jsonl_texts(file: str, opened: io.BufferedIOBase) -> Iterator[str]:
    for number, line in enumerate(opened, 1):
        if not line.isspace():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}:{number}: is not valid JSON ({error}); repair or remove the line") from error
            yield from _strings(record)


def _table_texts(opened: io.BufferedIOBase) -> Iterator[str]:
    """All cells. Where the first line has a tab, the cells are parted by tabs, whatever the name says, and unquoted."""
    lines: Any = io.TextIOWrapper(opened, encoding="utf-8", newline="")
    first = lines.readline()
    lines = chain([first], lines)
    for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if "\t" in first else csv.reader(lines):
        yield from row


def _parquet_texts(file: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from _strings(batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: is not a whole parquet file ({error}); copy it again") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
