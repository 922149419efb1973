"""The bytes of a source file, plain or compressed, in blocks of bounded size.

A compressed file is a sequence of frames (.zst) or members (.gz), each of which can be decompressed by itself. `blocks`
says for every block where its frame begins, so that a later reader can start there.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import zstandard

from data_pipeline import remote_sources
from data_pipeline.errors import DataError

BLOCK_BYTES = 1 << 18  # of content handed on at once; larger is no faster, it only falls out of the cache
# Compressed bytes given to a decompressor at once. What comes out has no other limit: at worst a block of zstd turns 4
# bytes into 128 KiB, so 4 KiB become 128 MiB. Large pieces are no faster.
FEED_BYTES = 1 << 12
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", b"PAR1": "parquet"}
SUFFIX_OF = {"gzip": ".gz", "zstandard": ".zst", "parquet": ".parquet"}


def name(file: str) -> str:
    """What tells the format: the file itself, or the path of an address."""
    return urlsplit(file).path if remote_sources.is_remote(file) else file


def compression(file: str) -> str | None:
    """gzip, zstandard or None, by the file's name."""
    return "gzip" if name(file).endswith(".gz") else "zstandard" if name(file).endswith(".zst") else None


def open_raw(file: str) -> BinaryIO:
    """Open a file for reading its bytes as they are; `seekable()` is false at an address that knows no ranges."""
    if remote_sources.is_remote(file):
        return io.BufferedReader(remote_sources.RemoteFile(file), BLOCK_BYTES)
    return open(file, "rb")


def open_bytes(file: str) -> io.BufferedIOBase:
    """Open a file for reading bytes; .gz and .zst are decompressed. Reading a damaged one raises DataError."""
    return io.BufferedReader(_Blocks(block for _, block in blocks(file)), buffer_size=1 << 20)


def blocks(file: str, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """(byte of the file at which the frame begins, the next bytes of its content), to the end of the file.

    `at` is a byte of the file: where a frame begins, or anywhere in a plain file, whose blocks count as frames.
    Raises DataError for a compressed file that is damaged, cut off, or no compressed file at all.
    """
    with open_raw(file) as opened:
        _pass_over(opened, at)
        if compression(file) is None:
            while data := opened.read(BLOCK_BYTES):
                if at == 0:
                    check_magic(file, data)
                yield at, data
                at += len(data)
        else:
            yield from _decompressed(file, opened, at)


def check_magic(file: str, head: bytes) -> None:
    """Raises DataError if a file that begins with `head` is of another kind than its name says."""
    found = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if found and not name(file).endswith(SUFFIX_OF[found]):
        raise DataError(f"{file}: is a {found} file by its first bytes; rename it to end in {SUFFIX_OF[found]}")


def size_of(file: str) -> int:
    """Bytes of the file as it lies there; of a folder, of all files in it; 0 if a server does not say."""
    if remote_sources.is_remote(file):
        return remote_sources.stamp(file)[0] or 0
    return sum(stat.st_size for stat in _stats(file))


def stamp(file: str) -> str:
    """What a change of the file would change: size and time of modification, or a server's mark of the version."""
    if remote_sources.is_remote(file):
        size, version = remote_sources.stamp(file)
        return f"{size} bytes, version {version}"
    stats = _stats(file)
    newest = max((stat.st_mtime_ns for stat in stats), default=0)
    return f"{sum(stat.st_size for stat in stats)} bytes, modified at {newest // 10**9}.{newest % 10**9:09d}"


def _stats(file: str) -> list[os.stat_result]:
    if os.path.isdir(file):
        return [path.stat() for path in Path(file).rglob("*") if path.is_file()]
    return [os.stat(file)]


def _pass_over(opened: BinaryIO, num_bytes: int) -> None:
    if opened.seekable():
        opened.seek(num_bytes)
    while num_bytes > 0 and not opened.seekable() and (data := opened.read(min(num_bytes, BLOCK_BYTES))):
        num_bytes -= len(data)


def _decompressed(file: str, opened: BinaryIO, at: int) -> Iterator[tuple[int, bytes]]:
    """As `blocks`, of an open compressed file that stands at the byte `at`."""
    kind, decompressor, frame = compression(file), None, at
    held: list[bytes] = []  # content of this frame not handed on yet
    num_held = 0
    try:
        while data := opened.read(FEED_BYTES):
            if at == 0:
                check_magic(file, data)
            at += len(data)
            while data:
                if decompressor is None:
                    decompressor, frame = _decompressor(kind), at - len(data)
                content = decompressor.decompress(data)
                held.append(content)
                num_held += len(content)
                data = decompressor.unused_data
                if decompressor.eof:
                    decompressor = None
                if num_held and (decompressor is None or num_held >= BLOCK_BYTES):
                    yield frame, b"".join(held)
                    held, num_held = [], 0
    except (zstandard.ZstdError, zlib.error) as error:
        raise DataError(f"{file}: is damaged at about byte {at} ({error}); copy or compress it again") from error
    if decompressor is not None or at == 0:
        raise DataError(f"{file}: is cut off in the middle of the compressed data, at byte {at}; copy it again")


def _decompressor(kind: str | None) -> Any:
    if kind == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header and checksum
    return zstandard.ZstdDecompressor().decompressobj()


class _Blocks(io.RawIOBase):
    """Blocks as a file, for callers who read lines."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size
