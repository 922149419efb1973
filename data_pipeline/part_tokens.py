"""The tokens of one part of a build, written and read block by block: memory depends neither on the part nor on it.

blocks      each some documents of one split: their lengths, (documents,) uint32, and their tokens one after the
            other, uint16 or uint32
an index    JSON, see `write_tokens`
its length  8 bytes, little-endian
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.parts import SPLITS

LENGTH_BYTES = 4  # of a document's length in the file


def write_tokens(file: BinaryIO, batches: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Write (split, tokens, lengths) after each other; lengths (documents,), none 0. Returns the index.

    dtype: of the tokens; blocks: [split, byte, documents, tokens] of each; splits: name -> documents, tokens, longest
    (in tokens) and the histogram of lengths: {power of two: documents of at least that many tokens and fewer than twice
    as many}. More may be added before `write_index` writes it.
    """
    blocks: list[tuple[str, int, int, int]] = []
    counts = {name: {"documents": 0, "tokens": 0, "longest": 0} for name in SPLITS}
    histograms: dict[str, Counter[int]] = {name: Counter() for name in SPLITS}
    dtype = np.dtype(np.uint16)
    for split, tokens, lengths in batches:
        if not len(lengths):
            continue
        dtype = tokens.dtype
        blocks.append((split, file.tell(), len(lengths), len(tokens)))
        file.write(lengths.astype(np.uint32).data)
        file.write(np.ascontiguousarray(tokens).data)
        of_split = counts[split]
        of_split["documents"] += len(lengths)
        of_split["tokens"] += len(tokens)
        of_split["longest"] = max(of_split["longest"], int(lengths.max()))
        powers, times = np.unique(np.frexp(lengths.astype(np.float64))[1] - 1, return_counts=True)
        histograms[split].update(dict(zip((1 << powers).tolist(), times.tolist(), strict=True)))
    splits = {name: {**counts[name], "lengths": dict(sorted(histograms[name].items()))} for name in SPLITS}
    return {"dtype": dtype.name, "blocks": blocks, "splits": splits}


def write_index(file: BinaryIO, index: dict[str, Any]) -> None:
    content = json.dumps(index).encode()
    file.write(content + len(content).to_bytes(8, "little"))


def read_index(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(-8, 2)
        size = int.from_bytes(file.read(8), "little")
        file.seek(-8 - size, 2)
        return json.loads(file.read(size))


def read_documents(path: Path, split: str, first: int, after: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of the documents [first, after) of a split, some at a time."""
    index = read_index(path)
    number = 0  # of the block's first document
    for name, at, documents, _ in index["blocks"]:
        if name != split:
            continue
        low, high = max(first - number, 0), min(after - number, documents)
        number += documents
        if low < high:
            lengths = _read(path, np.dtype(np.uint32), documents, at).astype(np.int64)
            start, stop = int(lengths[:low].sum()), int(lengths[:high].sum())
            dtype = np.dtype(index["dtype"])
            at += documents * LENGTH_BYTES + start * dtype.itemsize
            yield _read(path, dtype, stop - start, at), lengths[low:high]


def cut_shards(
    paths: Iterable[Path], split: str, shard_tokens: int
) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
    """The shards of a split: (number of the path, first document, last + 1) of each stretch, and tokens in all.

    A shard ends with the first document that brings it to `shard_tokens`. Only blocks in which one ends are looked at.
    """
    shard: list[tuple[int, int, int]] = []
    filled = 0
    for number, path in enumerate(paths):
        first = document = 0
        for name, at, documents, tokens in read_index(path)["blocks"]:
            if name != split:
                continue
            before = 0  # tokens of this block that are in finished shards
            if filled + tokens >= shard_tokens:
                stops = np.cumsum(_read(path, np.dtype(np.uint32), documents, at), dtype=np.int64)
                while (last := int(np.searchsorted(stops, before + shard_tokens - filled))) < documents:
                    filled += int(stops[last]) - before
                    yield [*shard, (number, first, document + last + 1)], filled
                    first, before = document + last + 1, int(stops[last])
                    shard, filled = [], 0
            filled += tokens - before
            document += documents
        if first < document:
            shard.append((number, first, document))
    if shard:
        yield shard, filled


def _read(path: Path, dtype: np.dtype, count: int, at: int) -> np.ndarray:
    return np.fromfile(path, dtype, count, offset=at)
