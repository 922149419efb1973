"""BERT's WordPiece (Devlin et al. 2019) behind a table of chunks, with exactly the ids of `tokenizers`.

Everything that decides an id is asked from `tokenizers` itself: what becomes of a character, where words end, how a
word falls into pieces. What is ours is only that texts are cut at white space and signs of ASCII, over which none of
these looks, and that answers are remembered.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.chunk_table import ChunkTable
from data_pipeline.encode import SEPARATOR, EncodeFlat, chunked_encoder

REMEMBERED_WORDS = 1 << 17
NORMALIZED_AT_ONCE = 1 << 16  # characters; the normalizer needs some 50 bytes for each

# Classes of bytes: white space and the separator, signs, the rest. BERT drops other control characters and joins what
# is on both sides of them, so they are no white space here.
_SPACE, _SIGN, _OTHER = range(3)
_CLASS = np.full(256, _OTHER, np.uint8)
_CLASS[list(b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")] = _SIGN
_CLASS[[*b"\t\n\r ", SEPARATOR]] = _SPACE


def wordpiece_encoder(tokenizer: Tokenizer, layout: dict[str, Any], dtype: np.dtype) -> EncodeFlat | None:
    """An encoder with the ids of `tokenizer`, or None where its `layout`, tokenizer.json, is not that of BERT's."""
    normalizer, before = layout["normalizer"] or {}, layout["pre_tokenizer"] or {}
    if layout["model"]["type"] != "WordPiece" or before.get("type") != "BertPreTokenizer":
        return None
    if normalizer.get("type") != "BertNormalizer" or not normalizer["clean_text"]:
        return None
    return chunked_encoder(cut, ChunkTable(_WordPieces(tokenizer, dtype).ids_of, dtype))


def cut(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of stretches without white space, all signs or without signs of ASCII. data: (bytes,) uint8."""
    kind = _CLASS.take(data)
    edges = np.flatnonzero(kind[1:] != kind[:-1]) + 1
    starts, ends = edges[:-1], edges[1:]
    is_chunk = kind[starts] != _SPACE
    return starts[is_chunk], ends[is_chunk]


class _WordPieces(dict):
    """normalized word -> its ids as bytes; answers `ids_of` for the chunks of `cut`."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.model, self.normalizer = tokenizer.model, tokenizer.normalizer
        self.isolate = _Isolate(tokenizer)
        self.ascii = {code: self.normalizer.normalize_str(chr(code)).translate(self.isolate) for code in range(128)}
        self.longest_word = tokenizer.model.max_input_chars_per_word

    def ids_of(self, chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if len(self) > REMEMBERED_WORDS:
            self.clear()
        parts = [b"".join(map(self.__getitem__, self.words(chunk.decode()))) for chunk in chunks]
        counts = np.array([len(part) for part in parts]) // self.dtype.itemsize
        return np.frombuffer(b"".join(parts), self.dtype), counts

    def words(self, text: str) -> list[str]:
        """Normalized words of a chunk."""
        if text.isascii():
            return text.translate(self.ascii).split()
        normalized = "".join(self.normalizer.normalize_str(piece) for piece in _pieces(text))
        return normalized.translate(self.isolate).split()

    def __missing__(self, word: str) -> bytes:
        # a word that is too long becomes [UNK], however long it is
        tokens = self.model.tokenize(word[: self.longest_word + 1])
        ids = b"".join([token.id.to_bytes(self.dtype.itemsize, sys.byteorder) for token in tokens])
        if len(word) <= self.longest_word:
            self[word] = ids
        return ids


class _Isolate(dict):
    """For str.translate: white space becomes a space, and what the pre-tokenizer sets apart stands between spaces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pre_tokenizer = tokenizer.pre_tokenizer

    def __missing__(self, code: int) -> str:
        character = chr(code)
        words = [word for word, _ in self.pre_tokenizer.pre_tokenize_str(f"a{character}a")]
        self[code] = character if len(words) == 1 else " ".join(["", *words[1:-1], ""])
        return self[code]


def _pieces(text: str) -> Iterator[str]:
    """Pieces for the normalizer, which looks over no border but those between a character and its marks.

    They begin with a character that is no mark, unless there are `NORMALIZED_AT_ONCE` marks in a row.
    """
    start = 0
    while len(text) - start > NORMALIZED_AT_ONCE:
        stop = start + NORMALIZED_AT_ONCE
        for place in range(stop, start, -1):
            if unicodedata.category(text[place])[0] in "LNPS":
                stop = place
                break
        yield text[start:stop]
        start = stop
    yield text[start:]
