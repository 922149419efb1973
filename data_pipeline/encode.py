"""Texts -> token ids, many documents at once, for tokenizers that do not look across certain places.

Documents are joined with a byte that no UTF-8 text has, cut into chunks, and the chunks are looked up together; so
tweets and books cost the same per byte. A long document is taken in pieces, so that memory does not grow with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from data_pipeline.chunk_table import PADDING, ChunkTable

SEPARATOR = 0xFF  # between documents; UTF-8 has no such byte
GROUP_BYTES = 1 << 19  # documents that are looked up together; characters of a long one that are taken at once

# Starts and ends of the chunks in (bytes,) uint8; `SEPARATOR` is its first byte and its last, and is in no chunk.
Cut = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# (texts, id that ends each of them or None) -> all ids one after the other, (tokens,) uint16 or uint32, and how many
# each text has, (texts,) int64, the end included.
EncodeFlat = Callable[[list[str], int | None], tuple[np.ndarray, np.ndarray]]

_BETWEEN = bytes([SEPARATOR])
UNICODE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # between [ ] of a pattern


def chunked_encoder(cut: Cut, table: ChunkTable) -> EncodeFlat:
    """An encoder that looks up what `cut` finds in `table`."""

    def encode_flat(texts: list[str], end: int | None) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[np.ndarray] = []
        lengths = np.zeros(len(texts), np.int64)
        for group, documents in _groups(texts, cut):
            ids, counts = _encode_group(group, cut, table)
            tokens.append(ids)
            np.add.at(lengths, documents, counts)
        return _with_ends(tokens, lengths, end, table.dtype)

    return encode_flat


def character_encoder(tokenizer: Tokenizer, layout: dict[str, Any], dtype: np.dtype) -> EncodeFlat | None:
    """An encoder for a vocabulary of single characters, or None if `layout`, tokenizer.json, is of another kind."""
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    if layout["model"]["type"] != "WordLevel" or layout["normalizer"] or layout["pre_tokenizer"] != split:
        return None
    ids_of_codes = np.full(0x110000, tokenizer.token_to_id(tokenizer.model.unk_token), dtype)
    for token, number in tokenizer.get_vocab().items():
        if len(token) == 1:
            ids_of_codes[ord(token)] = number

    def encode_flat(texts: list[str], end: int | None) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[np.ndarray] = []
        for group in _grouped(texts):
            text = "".join(group)
            for start in range(0, len(text), GROUP_BYTES):
                codes = np.frombuffer(text[start : start + GROUP_BYTES].encode("utf-32-le"), np.uint32)
                tokens.append(ids_of_codes[codes])
        return _with_ends(tokens, np.array([len(text) for text in texts], np.int64), end, dtype)

    return encode_flat


def plain_encoder(tokenizer: Tokenizer, dtype: np.dtype) -> EncodeFlat:
    """An encoder by `tokenizers` alone, for any tokenizer; special tokens in a text are text."""
    tokenizer = ordinary(tokenizer)

    def encode_flat(texts: list[str], end: int | None) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[np.ndarray] = []
        lengths: list[int] = []
        for group in _grouped(texts):
            for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
                tokens.append(np.array(encoding.ids, dtype))
                lengths.append(len(tokens[-1]))
        return _with_ends(tokens, np.array(lengths, np.int64), end, dtype)

    return encode_flat


def ordinary(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for text alone: special tokens are not looked for, nothing is cut off or filled up."""
    if all(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        model = tokenizer.model
        copy = Tokenizer(_without_special_pieces(tokenizer) if isinstance(model, models.Unigram) else model)
        if tokenizer.normalizer is not None:
            copy.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            copy.pre_tokenizer = tokenizer.pre_tokenizer
        return copy
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def _without_special_pieces(tokenizer: Tokenizer) -> models.Unigram:
    """The unigram model with a space in its special pieces, which no text has by then; else "</s>" would be a word."""
    layout = json.loads(tokenizer.to_str())
    special = {token["content"] for token in layout["added_tokens"]}
    pieces = [(f" {piece}" if piece in special else piece, score) for piece, score in layout["model"]["vocab"]]
    return models.Unigram(pieces, layout["model"]["unk_id"], layout["model"]["byte_fallback"])


def _with_ends(
    tokens: list[np.ndarray], lengths: np.ndarray, end: int | None, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    if end is not None and len(lengths) == 1:  # it may be very long: without another copy
        return np.concatenate([*tokens, np.array([end], dtype)]), lengths + 1
    flat = np.concatenate([np.zeros(0, dtype), *tokens])
    if end is None:
        return flat, lengths
    return np.insert(flat, np.cumsum(lengths), end), lengths + 1


def _groups(texts: list[str], cut: Cut) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Pieces of about `GROUP_BYTES` together, and the number of the text that each is from."""
    group: list[bytes] = []
    documents: list[int] = []
    size = 0
    for number, text in enumerate(texts):
        for piece in pieces(text, cut):
            group.append(piece.encode())
            documents.append(number)
            size += len(group[-1])
            if size >= GROUP_BYTES:
                yield group, np.array(documents)
                group, documents, size = [], [], 0
    if group:
        yield group, np.array(documents)


def pieces(text: str, cut: Cut) -> Iterator[str]:
    """The text in pieces that begin where `cut` finds a border, of about `GROUP_BYTES` characters if it finds some."""
    start, size = 0, GROUP_BYTES
    while len(text) - start > size:
        stop = start + size
        for begin in (stop - min(size, 1 << 12), start):  # mostly there is a border among the last characters
            if border := _last_border(text[begin:stop].encode(), cut):
                yield text[start : begin + border]
                start, size = begin + border, GROUP_BYTES
                break
        else:
            size *= 2
    yield text[start:] if start else text


def _last_border(content: bytes, cut: Cut) -> int:
    """Where the last chunk begins, in characters, if another is before it: then it surely begins there; else 0."""
    starts, _ = cut(np.frombuffer(b"".join([_BETWEEN, content, _BETWEEN]), np.uint8))
    return len(content[: starts[-1] - 1].decode()) if len(starts) > 1 else 0


def _grouped(texts: list[str]) -> Iterator[list[str]]:
    """Texts of about `GROUP_BYTES` characters together."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_group(group: list[bytes], cut: Cut, table: ChunkTable) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all pieces one after the other, and how many each has."""
    data = np.frombuffer(b"".join([_BETWEEN, _BETWEEN.join(group), _BETWEEN, bytes(PADDING)]), np.uint8)
    starts, ends = cut(data[:-PADDING])
    ids, counts = table.look_up(data, starts, ends)
    piece_ends = np.cumsum([len(piece) + 1 for piece in group])  # where the separators after the pieces are
    first_after = np.searchsorted(starts, piece_ends)
    ids_before = np.concatenate([[0], np.cumsum(counts)])[first_after]
    return ids, np.diff(ids_before, prepend=0)
