"""A shard file in memory (its layout: see shards.py), no block of which is used before its checksum was compared."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.store import unreadable, wrong_size

BLOCK_BYTES = 1 << 14  # one checksum: 0.05 % more bytes; a row of 1,024 tokens needs one or two blocks
TOKEN_SHIFT = {2: 13, 4: 12}  # bytes of a token -> s, so that token i is in block i >> s


class MappedShard:
    """A shard file in memory; its blocks are compared with their checksums when they are first used."""

    def __init__(self, file: BinaryIO, entry: dict[str, Any], dtype: np.dtype, remedy: str) -> None:
        self.file, self.remedy = file.name, remedy
        self.num_tokens: int = entry["tokens"]
        stat = os.fstat(file.fileno())
        if stat.st_size != entry["bytes"]:
            raise DataError(wrong_size(self.file, stat.st_size, entry, remedy))
        try:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(unreadable(self.file, error, remedy)) from error
        content = np.frombuffer(self.map, np.uint8)
        ends_at, sums_at = _layout(entry, dtype.itemsize)
        self.tokens = content[: self.num_tokens * dtype.itemsize].view(dtype)
        self.tokens_view = self.tokens.data
        self.ends = content[ends_at:sums_at].view(np.int64)  # uint64 in the file; none is so large
        self.ends_view = self.ends.data
        self.sums = content[sums_at:].view(np.uint64).data
        self.body = content[:sums_at].data
        self.checked = bytearray(len(self.sums))  # per block: 1 when it was found to be intact
        self.token_shift = TOKEN_SHIFT[dtype.itemsize]
        self.ends_block = ends_at // BLOCK_BYTES  # the first one with document ends
        self.sum_of_sums: str = entry["sums_xxh3_128"]
        self.are_sums_checked = self.are_ends_checked = False
        self.inode, self.used = stat.st_ino, True  # used: since the cache was last told

    def will_need(self, low: int, high: int) -> None:
        """Have the system begin to read what `tokens_of` will touch, so that several reads are under way at once."""
        if not self.are_sums_checked:
            self._begin_to_read(self.ends_block, -(-len(self.map) // BLOCK_BYTES))
        self._begin_to_read(low >> self.token_shift, (high - 1 >> self.token_shift) + 1)

    def tokens_of(self, low: int, high: int) -> np.ndarray:
        """Tokens [low, high) of this shard, low < high; a view."""
        self.used = True
        self._check_blocks(low >> self.token_shift, (high - 1 >> self.token_shift) + 1)
        return self.tokens[low:high]

    def starts(self, low: int, high: int) -> np.ndarray:
        """Indices in [low, high) at which a document starts, int64: 0, and where the one before ends."""
        ends = self.ends if self.are_ends_checked else self.checked_ends()
        # Python's bisect on a memoryview is three times as fast as numpy's search for one value
        left = bisect_left(self.ends_view, low)
        found = ends[left : bisect_left(self.ends_view, high, left, min(left + high - low, len(ends)))]
        return np.concatenate([[0], found]) if low == 0 < high else found

    def checked_ends(self) -> np.ndarray:
        """Where each document ends, (documents,) int64; all are checked at once."""
        self._check_blocks(self.ends_block, len(self.checked))
        self.are_ends_checked = True
        return self.ends

    def faults(self) -> list[str]:
        """A message for every stretch of damaged blocks. Raises DataError if the checksums themselves are damaged."""
        self._check_sums()
        messages, first = [], 0
        for block in range(len(self.sums)):
            if self._is_intact(block):
                first = block + 1
            elif block + 1 == len(self.sums) or self._is_intact(block + 1):
                messages.append(self._damaged(first, block + 1))
        return messages

    def _begin_to_read(self, first: int, stop: int) -> None:
        start = first * BLOCK_BYTES
        self.map.madvise(mmap.MADV_WILLNEED, start, min(stop * BLOCK_BYTES, len(self.map)) - start)

    def _check_sums(self) -> None:
        if xxhash.xxh3_128_hexdigest(self.sums) != self.sum_of_sums:
            start, end = len(self.body), len(self.map) - 1
            raise DataError(f"{self.file}: is damaged between bytes {start} and {end}; {self.remedy}")
        self.are_sums_checked = True

    def _check_blocks(self, first: int, stop: int) -> None:
        if not self.are_sums_checked:
            self._check_sums()
        block = self.checked.find(0, first, stop)
        while block >= 0:
            if not self._is_intact(block):
                raise DataError(self._damaged(block, block + 1))
            self.checked[block] = 1
            block = self.checked.find(0, block, stop)

    def _is_intact(self, block: int) -> bool:
        start = block * BLOCK_BYTES
        return xxhash.xxh3_64_intdigest(self.body[start : start + BLOCK_BYTES]) == self.sums[block]

    def _damaged(self, first: int, stop: int) -> str:
        start, end = first * BLOCK_BYTES, min(stop * BLOCK_BYTES, len(self.body))
        return f"{self.file}: is damaged between bytes {start} and {end - 1}; {self.remedy}"


def _layout(entry: dict[str, Any], itemsize: int) -> tuple[int, int]:
    """Where in its file a shard's document ends start, and where its checksums do, in bytes."""
    ends_at = -(-entry["tokens"] * itemsize // 8) * 8
    return ends_at, ends_at + 8 * entry["documents"]
