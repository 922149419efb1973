"""Best-fit packing: rows that hold whole documents (Ding et al. 2024, "Fewer truncations improve language modeling").

Concatenate-and-chunk cuts a document wherever a row ends. Here a document of at most seq_len tokens stays whole; a
longer one is cut into pieces of seq_len and a rest. Rests and short documents are packed into rows of seq_len, longest
first, each into the row with the least room that is enough (best-fit decreasing); what stays free is padding.

Which document goes where has to be known before the first batch: the plan, three arrays that are made once per dataset
and seq_len, kept on disk and memory-mapped. It is made for some million tokens at a time, so memory stays small, and
never across the end of a large shard. Within such a chunk, documents of equal length are packed together, as Krell et
al. (2021) pack a histogram: the work depends on the number of different lengths, and the rows are those of plain
best-fit decreasing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.shards import WRITING, Dataset

FORMAT = 1
CHUNK_TOKENS = 1 << 23  # packed at once, at least: even with one token a document this takes 0.6 GB
CHUNK_ROWS = 1024  # and at least so many rows: the last rows of a chunk are emptier than the others
ARRAYS = {"first_pieces": np.int64, "starts": np.int64, "lengths": np.int32}


@dataclass(frozen=True)
class Plan:
    """Row r holds the pieces [first_pieces[r], first_pieces[r + 1]), one after the other.

    A piece is the tokens [starts[p], starts[p] + min(lengths[p], seq_len)) of the dataset; where its document goes on
    after it, lengths[p] is seq_len + 1, and the last token's target is the next one.
    """

    seq_len: int
    first_pieces: np.ndarray  # (rows + 1,) int64
    starts: np.ndarray  # (pieces,) int64
    lengths: np.ndarray  # (pieces,) int32
    block_starts: np.ndarray  # (blocks + 1,) int64: the first row of each run of shards that share no row with others

    @property
    def num_rows(self) -> int:
        return len(self.first_pieces) - 1


def open_plan(dataset: Dataset, seq_len: int, folder: Path) -> Plan:
    """The plan of a dataset, made and written to `folder` unless it is there.

    Several processes may call this at once: one makes it, the others wait. Raises DataError for a damaged plan, and
    where it cannot be written.
    """
    path = folder / f"{dataset.fingerprint}-{seq_len}"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(path.with_name(f"{path.name}.lock")) as alone:
                if alone:
                    _remove_leftovers(path)
                if not path.exists():  # no other process made it meanwhile
                    _write_plan(dataset, seq_len, path)
    except OSError as error:
        raise DataError(
            f"{folder}: the plan of best-fit packing cannot be written ({error.strerror}); make room or write access "
            f"there, set data.cache.dir to another folder, or use data.packing=concatenate"
        ) from error
    return _read_plan(path, seq_len)


def packing_report(dataset: Dataset, seq_len: int) -> dict[str, Any]:
    """What both packings do to a dataset: {"documents", "tokens", "concatenate": ..., "best_fit": ...}.

    For each packing "rows", "truncated", the share of documents that lie in more than one row, and "padding", the share
    of the rows' places that hold nothing.
    """
    cut, long, rows = 0, 0, 0
    for first, stop in _groups(dataset, seq_len):
        for starts, lengths in _documents(dataset, first, stop, _chunk_tokens(seq_len)):
            cut += int(np.count_nonzero(starts // seq_len != (starts + lengths - 1) // seq_len))
            long += int(np.count_nonzero(lengths > seq_len))
            rows += int((lengths // seq_len).sum()) + best_fit(lengths % seq_len, seq_len)[1]
    documents = max(1, dataset.num_documents)
    return {
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "concatenate": {"rows": (dataset.num_tokens - 1) // seq_len, "truncated": cut / documents, "padding": 0.0},
        "best_fit": {
            "rows": rows,
            "truncated": long / documents,
            "padding": 1 - dataset.num_tokens / max(1, rows * seq_len),
        },
    }


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each item, (n,) int64, and the number of rows; lengths (n,), in [0, capacity]; row -1 for length 0.

    Pure. Row by row the same free places as best-fit decreasing, item by item.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    counts[0] = 0
    fills, num_rows = _fill_rows(counts, capacity)
    rows = np.full(len(lengths), -1, dtype=np.int64)
    if fills:
        first_row, num_filled, per_row = np.array(fills, dtype=np.int64).T
        num_items = num_filled * per_row
        fill = np.repeat(np.arange(len(fills)), num_items)  # of each item, longest first
        number = np.arange(len(fill)) - (np.cumsum(num_items) - num_items)[fill]
        rows[order[: len(fill)]] = first_row[fill] + number // per_row[fill]
    return rows, num_rows


def _fill_rows(counts: np.ndarray, capacity: int) -> tuple[list[tuple[int, int, int]], int]:
    """Best-fit decreasing over a histogram: (first row, number of rows, items in each of them), and all rows.

    counts[l]: items of length l. The fills come in the order of the items, longest first. Equal rows are kept as one
    group; an item goes to the group with the least room that is enough, and then so do the next of its length, until
    that row is full: it is now the one with the least room.
    """
    fills: list[tuple[int, int, int]] = []
    groups: dict[int, list[tuple[int, int]]] = {}  # room left -> (first row, number of rows)
    rooms: list[int] = []  # the keys of groups, ascending
    num_rows = 0

    def keep(first: int, number: int, room: int) -> None:
        if room not in groups:
            insort(rooms, room)
        groups.setdefault(room, []).append((first, number))

    for length in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[length])
        while count:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                room, first, number = capacity, num_rows, -(-count // (capacity // length))
                num_rows += number
            else:
                room = rooms[place]
                first, number = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[place]
            per_row = room // length
            if full := min(number, count // per_row):
                fills.append((first, full, per_row))
                keep(first, full, room - per_row * length)
                first, number, count = first + full, number - full, count - full * per_row
            if number and count:  # fewer than a row takes
                fills.append((first, 1, count))
                keep(first, 1, room - count * length)
                first, number, count = first + 1, number - 1, 0
            if number:
                keep(first, number, room)
    return fills, num_rows


def pieces_of(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack documents, given by first token and length, both (n,) int64. Pure.

    Returns the pieces of each row (rows,), and the pieces' starts and lengths as in `Plan`, row after row.
    """
    num_whole, rest = np.divmod(lengths, seq_len)
    document = np.repeat(np.arange(len(starts)), num_whole)
    number = np.arange(len(document)) - (np.cumsum(num_whole) - num_whole)[document]
    whole_starts = starts[document] + number * seq_len
    whole_lengths = np.minimum(seq_len + 1, starts[document] + lengths[document] - whole_starts)
    rows, num_rows = best_fit(rest, seq_len)
    order = np.argsort(rows, kind="stable")[np.count_nonzero(rest == 0) :]
    return (
        np.concatenate([np.ones(len(document), np.int64), np.bincount(rows[order], minlength=num_rows)]),
        np.concatenate([whole_starts, (starts + num_whole * seq_len)[order]]),
        np.concatenate([whole_lengths, rest[order]]),
    )


def _chunk_tokens(seq_len: int) -> int:
    return max(CHUNK_TOKENS, CHUNK_ROWS * seq_len)


def _groups(dataset: Dataset, seq_len: int) -> Iterator[tuple[int, int]]:
    """Token ranges of consecutive shards: one, or as many small ones as make up a chunk."""
    first = 0
    for stop in dataset.shard_starts[1:]:
        if stop - first >= _chunk_tokens(seq_len) or stop == dataset.num_tokens:
            yield first, stop
            first = stop


def _documents(dataset: Dataset, first: int, stop: int, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First tokens and lengths, (n,) int64, of the documents in [first, stop), about `chunk` tokens at once."""
    num_chunks = max(1, (stop - first) // chunk)
    edges = [first + (stop - first) * number // num_chunks for number in range(num_chunks + 1)]
    pending = np.empty(0, np.int64)  # the document that goes on in the next chunk
    for number in range(num_chunks):
        starts = np.concatenate([pending, dataset.document_starts(edges[number], edges[number + 1])])
        if number == num_chunks - 1:
            starts = np.append(starts, stop)
        yield starts[:-1], np.diff(starts)
        pending = starts[-1:]


def _write_plan(dataset: Dataset, seq_len: int, path: Path) -> None:
    aside = path.with_name(f"{WRITING}{path.name}-{uuid.uuid4().hex[:12]}")
    aside.mkdir()
    try:
        writers = {name: _ArrayWriter(aside / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        writers["first_pieces"].write(np.zeros(1))
        block_starts = [0]
        for first, stop in _groups(dataset, seq_len):
            for starts, lengths in _documents(dataset, first, stop, _chunk_tokens(seq_len)):
                sizes, piece_starts, piece_lengths = pieces_of(starts, lengths, seq_len)
                writers["first_pieces"].write(writers["starts"].length + np.cumsum(sizes))
                writers["starts"].write(piece_starts)
                writers["lengths"].write(piece_lengths)
            block_starts.append(writers["first_pieces"].length - 1)
        hashes = {f"{name}.npy": writer.close() for name, writer in writers.items()}
        content = {"format": FORMAT, "seq_len": seq_len, "block_starts": block_starts, "files": hashes}
        with (aside / "plan.json").open("w", encoding="utf-8") as file:
            json.dump(content | {"checksum": _checksum(content)}, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            aside.rename(path)
        except OSError:
            if not path.exists():  # else another process, which we could not lock out, was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """What processes that were killed have left of this plan."""
    for leftover in path.parent.glob(f"{WRITING}{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _read_plan(path: Path, seq_len: int) -> Plan:
    try:
        content = json.loads((path / "plan.json").read_bytes())
        if content.pop("checksum") != _checksum(content) or content["format"] != FORMAT:
            raise ValueError("its checksum does not fit")
        for name, expected in content["files"].items():
            if _hash(path / name) != expected:
                raise ValueError(f"the checksum of {name} does not fit")
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: the plan of best-fit packing is damaged ({error}); remove it, it is made anew"
        ) from error
    return Plan(seq_len, **arrays, block_starts=np.array(content["block_starts"], dtype=np.int64))


class _ArrayWriter:
    """Writes a .npy file of one dimension whose length is known only at the end."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self.file = path.open("wb")
        self._write_header()

    def write(self, values: np.ndarray) -> None:
        self.file.write(values.astype(self.dtype).data)
        self.length += len(values)

    def close(self) -> str:
        """Finish the file; returns its hash."""
        self.file.seek(0)
        self._write_header()  # as long as the first one: numpy leaves room for the length to grow
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return _hash(self.path)

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[bool]:
    """Holds a lock on the file `path`; the system releases it when its holder ends, however it does.

    Yields False on a file system without locks: then each process makes a plan of its own, and the first one stays.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
