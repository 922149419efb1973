"""SentencePiece's unigram model (Kudo 2018) behind a table of chunks, with exactly the ids of `tokenizers`.

SentencePiece's own encoder is eight times faster than `tokenizers`, but it breaks ties between equally likely
segmentations another way ("!!!" "!!!!!" or "!!!!!" "!!!"), so that a text has other ids in transformers. Here it is
`tokenizers` that answers, once for each distinct chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.chunk_table import ChunkTable
from data_pipeline.encode import SEPARATOR, EncodeFlat, chunked_encoder, ordinary

# Classes of bytes: white space, the separator, printable ASCII, bytes of other characters, control characters.
_SPACE, _SEPARATOR, _PLAIN, _HIGH, _CONTROL = range(5)
_CLASS = np.full(256, _CONTROL, np.uint8)
_CLASS[list(b"\t\n\r ")] = _SPACE
_CLASS[ord("!") : ord("~") + 1] = _PLAIN
_CLASS[128:] = _HIGH
_CLASS[SEPARATOR] = _SEPARATOR
# First bytes of characters that neither are white space nor join a neighbour to a grapheme: letters of Latin, Greek and
# Cyrillic (two bytes), ideographs and Hangul syllables (three bytes). Grapheme by grapheme, text is normalized.
_LEADS_TWO = np.isin(np.arange(256), [*range(0xC3, 0xCC), 0xCE, 0xCF, 0xD0, 0xD1])
_LEADS_THREE = np.isin(np.arange(256), [*range(0xE4, 0xEA), 0xEB, 0xEC])


def unigram_encoder(tokenizer: Tokenizer, layout: dict[str, Any], dtype: np.dtype) -> EncodeFlat | None:
    """An encoder with the ids of `tokenizer`, or None unless `layout` is what `tokenizer._from_sentencepiece` makes."""
    before, normalizer = layout["pre_tokenizer"] or {}, layout["normalizer"] or {}
    if layout["model"]["type"] != "Unigram" or before.get("type") != "Metaspace":
        return None
    if before["replacement"] != "▁" or before["prepend_scheme"] != "always" or not before["split"]:
        return None
    steps = [step for step in normalizer.get("normalizers", []) if step["type"] != "Precompiled"]
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    if steps != [strip, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]:
        return None
    if any(tokenizer.normalizer.normalize_str(f"a{space}b") != "a b" for space in "\t\n\r "):
        return None
    asked = ordinary(tokenizer)
    model, normalize = asked.model, asked.normalizer.normalize_str

    def ids_of_chunk(text: str) -> list[int]:
        word = normalize(text)
        if word and " " not in word and "▁" not in word:  # one word: no need of all the rest
            return [token.id for token in model.tokenize(f"▁{word}")]
        return asked.encode(text, add_special_tokens=False).ids

    def ids_of(chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        found = [ids_of_chunk(chunk.decode()) for chunk in chunks]
        return np.array([index for ids in found for index in ids], dtype), np.array([len(ids) for ids in found])

    return chunked_encoder(cut, ChunkTable(ids_of, dtype))


def cut(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of chunks between white space. data: (bytes,) uint8.

    White space is a border only if the characters on both sides are known to have nothing to do with it; else it stays
    inside a chunk.
    """
    kind = _CLASS.take(data)
    is_space = kind == _SPACE
    edges = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    first, after = edges[0::2], edges[1::2]  # runs of white space
    border = _is_plain_before(data, kind, first) & _is_plain_from(data, kind, after)
    separators = np.flatnonzero(kind == _SEPARATOR)
    first = np.sort(np.concatenate([first[border], separators]))
    after = np.sort(np.concatenate([after[border], separators + 1]))
    starts, ends = after[:-1], first[1:]
    is_chunk = starts < ends
    return starts[is_chunk], ends[is_chunk]


def _is_plain_from(data: np.ndarray, kind: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether a plain character or the separator begins at each place, (places,) bool."""
    plain = (kind[places] == _PLAIN) | (kind[places] == _SEPARATOR)
    high = np.flatnonzero(kind[places] == _HIGH)
    lead = data[places[high]]
    plain[high] = _LEADS_TWO[lead] | _LEADS_THREE[lead] | _is_quote(data, places[high])
    return plain


def _is_plain_before(data: np.ndarray, kind: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether a plain character or the separator ends at each place, (places,) bool."""
    plain = (kind[places - 1] == _PLAIN) | (kind[places - 1] == _SEPARATOR)
    high = np.flatnonzero(kind[places - 1] == _HIGH)
    at = places[high]
    plain[high] = _LEADS_TWO[data[at - 2]] | _LEADS_THREE[data[at - 3]] | _is_quote(data, at - 3)
    return plain


def _is_quote(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Dashes, quotation marks, dots: U+2010 to U+2027."""
    third = data[np.minimum(places + 2, len(data) - 1)]
    return (data[places] == 0xE2) & (data[places + 1] == 0x80) & (third >= 0x90) & (third <= 0xA7)
