"""Byte-level BPE (Radford et al. 2019) with tiktoken behind a table of chunks, where that is provably exact."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from data_pipeline.chunk_table import ChunkTable
from data_pipeline.encode import SEPARATOR, UNICODE_SPACE, EncodeFlat, chunked_encoder

# GPT-2's pattern (Radford et al. 2019): contractions, words, numbers, other signs, white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BETWEEN_CHUNKS = "<| |>"  # is in no chunk: white space is nowhere in a chunk but at its beginning
LONG_CHUNK = 1 << 19  # characters; tiktoken's regular expression gives up at a million white spaces in a row
LONGEST_WORD = 1 << 22  # characters; a longer stretch of one kind is cut, and may get other ids at the cut

# Classes of bytes: the separator, white space, letters, digits, the apostrophe, other signs of ASCII, the rest.
_SEPARATOR, _SPACE, _LETTER, _DIGIT, _APOSTROPHE, _SIGN, _HIGH = range(7)
_CLASS = np.full(256, _SIGN, np.uint8)
_CLASS[list(b"\t\n\v\f\r ")] = _SPACE
_CLASS[[*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)]] = _LETTER
_CLASS[ord("0") : ord("9") + 1] = _DIGIT
_CLASS[ord("'")] = _APOSTROPHE
_CLASS[128:] = _HIGH
_CLASS[SEPARATOR] = _SEPARATOR
# [class << 3 | next class]: whether no match of the pattern reaches over the place between two bytes. Letters after an
# apostrophe may be a contraction; a byte above 127 may belong to any kind of character.
_PAIRS = np.zeros((8, 8), bool)
_PAIRS[_SEPARATOR, :] = _PAIRS[:, _SEPARATOR] = True
_PAIRS[_LETTER:, _SPACE] = True
_PAIRS[_LETTER, [_DIGIT, _APOSTROPHE, _SIGN]] = True
_PAIRS[_DIGIT, [_LETTER, _APOSTROPHE, _SIGN]] = True
_PAIRS[_SIGN, [_LETTER, _DIGIT]] = True
_PAIRS[_APOSTROPHE, _DIGIT] = True
_IS_CUT = _PAIRS.ravel()
# The last three bytes of white space that is not ASCII, and the last two of U+0085 and U+00A0.
_SPACES = re.findall(f"[{UNICODE_SPACE}]", "".join(map(chr, range(128, 0x3001))))
_LAST_THREE = np.array([int.from_bytes(c.encode(), "big") for c in _SPACES if len(c.encode()) == 3])
_LAST_TWO = np.array([int.from_bytes(c.encode(), "big") for c in _SPACES if len(c.encode()) == 2])


def byte_level_encoder(tokenizer: Tokenizer, layout: dict[str, Any], dtype: np.dtype) -> EncodeFlat | None:
    """An encoder with the ids of `tokenizer`, or None where `layout`, tokenizer.json, does not make that certain."""
    ranks = tiktoken_ranks(tokenizer, layout)
    return None if ranks is None else ranked_encoder(ranks, dtype)


def ranked_encoder(ranks: dict[bytes, int], dtype: np.dtype) -> EncodeFlat:
    """The encoder of a tokenizer with these `tiktoken_ranks`."""
    return chunked_encoder(cut, ChunkTable(_BytePairs(ranks).ids_of, dtype))


def tiktoken_ranks(tokenizer: Tokenizer, layout: dict[str, Any]) -> dict[bytes, int] | None:
    """Token bytes -> id for tiktoken, or None where tiktoken could give other ids than `tokenizer`.

    `tokenizers` applies the first merge of the list that fits; tiktoken joins the two neighbours whose union has the
    lowest id, by whatever pair it is made, and takes a whole word that is a token as it is. This is the same if ids
    ascend with the merges and every merged token, encoded alone, gives itself: inside a stretch that ends up as a token
    no merge has crossed its borders, so it went through the same states as the token alone, and the last of them is
    the only pair that makes it.
    """
    model, before = layout["model"], layout["pre_tokenizer"] or {}
    if model["type"] != "BPE" or before.get("type") != "ByteLevel" or layout["normalizer"] is not None:
        return None
    if before.get("add_prefix_space") or not before.get("use_regex", True):
        return None
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return None
    vocabulary = model["vocab"]
    merged = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    if any(vocabulary[first] >= vocabulary[second] for first, second in itertools.pairwise(merged)):
        return None
    to_byte = {character: byte for byte, character in byte_characters().items()}
    if any(character not in vocabulary for character in to_byte):
        return None
    as_model = tokenizer.model
    if any(len(as_model.tokenize(token)) != 1 for token in merged):
        return None
    return {bytes(to_byte[c] for c in token): vocabulary[token] for token in itertools.chain(to_byte, merged)}


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins: a byte that prints stands for itself, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def cut(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of chunks over whose borders GPT-2's pattern does not reach. data: (bytes,) uint8.

    White space begins a chunk, for its last character may belong to the word after it. A border before white space is
    left out if white space that is not ASCII comes before it, since it belongs to the same run.
    """
    kind = _CLASS.take(data)
    pairs = kind[:-1] << 3
    pairs |= kind[1:]
    edges = np.flatnonzero(_IS_CUT.take(pairs)) + 1
    if len(doubtful := np.flatnonzero((kind[edges - 1] == _HIGH) & (kind[edges] == _SPACE))):
        last = [data[edges[doubtful] - back].astype(np.int64) << 8 * (back - 1) for back in (1, 2, 3)]
        inside = np.isin(last[0] | last[1], _LAST_TWO) | np.isin(last[0] | last[1] | last[2], _LAST_THREE)
        edges = np.delete(edges, doubtful[inside])
    starts, ends = edges[:-1], edges[1:]
    is_chunk = data[starts] != SEPARATOR
    return starts[is_chunk], ends[is_chunk]


class _BytePairs:
    """tiktoken for the chunks of `cut`."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.ranks = ranks
        self.between = max(ranks.values()) + 1  # an id that only BETWEEN_CHUNKS has
        self.tiktoken = tiktoken.Encoding(
            "millstream", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={BETWEEN_CHUNKS: self.between}
        )

    @cached_property
    def whole(self) -> tiktoken.Encoding:
        """Takes white space as it is, however long, without going back over it."""
        return tiktoken.Encoding("white space", pat_str=r"\s++", mergeable_ranks=self.ranks, special_tokens={})

    def ids_of(self, chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if any(len(chunk) > LONG_CHUNK for chunk in chunks):
            found = [self.encode_long(chunk.decode()) for chunk in chunks]
            return np.concatenate(found), np.array([len(ids) for ids in found])
        text = BETWEEN_CHUNKS.encode().join(chunks).decode()
        ids = self.tiktoken.encode_to_numpy(text, allowed_special={BETWEEN_CHUNKS})
        is_between = ids == self.between
        borders = np.concatenate([[-1], np.flatnonzero(is_between), [len(ids)]])
        return ids[~is_between], np.diff(borders) - 1

    def encode_long(self, text: str) -> np.ndarray:
        """Ids of a text of any length, without a stretch that tiktoken gives up at or takes too much memory for."""
        if len(text) <= LONG_CHUNK:
            return self.tiktoken.encode_to_numpy(text, disallowed_special=())
        found = []
        for run, word in re.findall(f"([{UNICODE_SPACE}]*)([^{UNICODE_SPACE}]*)", text):
            spaces = run[:-1] if word else run  # the last one is joined to the word, or stands alone
            found += [self.whole.encode_to_numpy(part) for part in _parts(spaces)]
            found += [self.tiktoken.encode_to_numpy(part) for part in _parts(run[len(spaces) :] + word)]
        return np.concatenate(found)


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most `LONGEST_WORD` characters, cut between a letter and a punctuation mark if it can."""
    start = 0
    while len(text) - start > LONGEST_WORD:
        stop = start + LONGEST_WORD
        for place in range(stop, stop - LONGEST_WORD // 2, -1):
            if text[place - 1].isalpha() and unicodedata.category(text[place]).startswith("P"):
                stop = place
                break
        yield text[start:stop]
        start = stop
    if text:
        yield text[start:]
