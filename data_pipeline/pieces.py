"""Documents of tokens on their way into shards: piece after piece, so that a corpus of any size needs little memory.

A piece is some documents: their tokens (n,), one after the other, of any integer type, and their lengths (documents,),
int64, none 0 and n together. Every function here takes an iterator of them and hands on another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.shards import Dataset, write_shard

Pieces = Iterator[tuple[np.ndarray, np.ndarray]]
LONGEST_DOCUMENT = 1 << 28  # tokens, where documents have to be found by the id that ends them
PIECE_TOKENS = 1 << 20  # of a piece that is read from files, about


def end_with(pieces: Pieces, end: int) -> Pieces:
    """The same documents, each with the id `end` at its end: appended where it is not there."""
    for tokens, lengths in pieces:
        stops = np.cumsum(lengths)
        lacks_end = tokens[stops - 1] != end
        yield np.insert(tokens, stops[lacks_end], end), lengths + lacks_end


def count_inside(pieces: Pieces, end: int, counts: Counter[int]) -> Pieces:
    """The same pieces; counts[end] grows by how often `end` is in a document before its last token."""
    for tokens, lengths in pieces:
        is_end = tokens == end
        counts[end] += int(is_end.sum()) - int(is_end[np.cumsum(lengths) - 1].sum())
        yield tokens, lengths


def split_at(pieces: Pieces, end: int) -> Pieces:
    """The same tokens with a document ending after every id `end`, wherever the pieces' own documents end.

    Raises DataError where none ends for too long.
    """
    rest: list[np.ndarray] = []  # the begun document
    size = 0
    for tokens, _ in pieces:
        stops = np.flatnonzero(tokens == end) + 1
        if len(stops):
            yield np.concatenate([*rest, tokens[: stops[-1]]]), np.diff(size + stops, prepend=0)
            tokens, rest, size = tokens[stops[-1] :], [], 0
        rest.append(tokens)
        size += len(tokens)
        if size > LONGEST_DOCUMENT:
            raise DataError(f"the id {end} ends no document within {LONGEST_DOCUMENT:,} tokens; use documents=samples")
    if size:
        yield np.concatenate(rest), np.array([size])


def divide(pieces: Pieces, fraction: float, aside: BinaryIO) -> Pieces:
    """The documents but for about this fraction of them, which are written to `aside`, see `set_aside`.

    Which ones follows from a hash of a document's own tokens, so that one that comes twice is on one side only.
    """
    limit = int(fraction * 2**64)
    for tokens, lengths in pieces:
        content = np.ascontiguousarray(tokens).view(np.uint8).data
        stops = (np.cumsum(lengths) * tokens.itemsize).tolist()
        hashes = [
            xxhash.xxh3_64_intdigest(content[start:stop]) for start, stop in zip([0, *stops[:-1]], stops, strict=True)
        ]
        held_out = np.array([value < limit for value in hashes])
        is_of_these = np.repeat(held_out, lengths)
        if held_out.any():
            np.save(aside, tokens[is_of_these])
            np.save(aside, lengths[held_out])
        if not held_out.all():
            yield tokens[~is_of_these], lengths[~held_out]


def set_aside(aside: BinaryIO) -> Pieces:
    """The pieces that `divide` has written to a file, from its beginning."""
    size = aside.tell()
    aside.seek(0)
    while aside.tell() < size:
        yield np.load(aside), np.load(aside)


def pieces_of(dataset: Dataset, shard: int) -> Pieces:
    """The documents of a shard of a dataset; a piece's tokens are a view of the shard."""
    starts = np.concatenate([[0], np.cumsum(dataset.document_lengths(shard))]) + dataset.shard_starts[shard]
    for low, high in stretches(starts):
        yield dataset.tokens(int(starts[low]), int(starts[high])), np.diff(starts[low : high + 1])
    dataset.release(shard)


def stretches(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of documents that together have about PIECE_TOKENS, one stretch after the other.

    starts: (documents + 1,), where each starts and the last one ends, in tokens.
    """
    low = 0
    while low < len(starts) - 1:
        high = max(low + 1, int(np.searchsorted(starts, starts[low] + PIECE_TOKENS, "right")) - 1)
        yield low, high
        low = high


def write_shards(directory: Path, pieces: Pieces, shard_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    """Write the documents as shards and return their manifest entries.

    A shard ends with the first document that brings it to shard_tokens. Raises DataError for a token that is not in
    the vocabulary.
    """
    entries: list[dict[str, Any]] = []
    ahead: list[tuple[np.ndarray, np.ndarray]] = []  # what is left of a piece in which a shard has ended

    def one_shard() -> Pieces:
        missing = shard_tokens
        while missing > 0 and (piece := ahead.pop() if ahead else next(pieces, None)) is not None:
            tokens, lengths = piece
            stops = np.cumsum(lengths)
            number = min(int(np.searchsorted(stops, missing)) + 1, len(lengths))  # documents that this shard gets
            stop = int(stops[number - 1])
            if number < len(lengths):
                ahead.append((tokens[stop:], lengths[number:]))
            missing -= stop
            yield tokens[:stop], lengths[:number]

    for number in count():
        shard = one_shard()
        if (first := next(shard, None)) is None:
            return entries
        path = directory / f"shard-{number:05d}.tokens"
        entries.append(write_shard(path, chain([first], shard), vocab_size))
    return entries
