"""The dataset directory: flat token ids in shards, described by a manifest that is written last. Format 2.

    manifest.json                 dtype, vocabulary, fingerprints, the shards and all other files with their checksums
    shard-00000.tokens            three parts, each starting at a multiple of 8 bytes:
                                    token ids of all its documents, one after the other: uint16, or uint32 for
                                      vocabularies over 65,536
                                    where each document ends, in tokens: uint64
                                    xxh3_64 of each block of 16 KiB of all that is before: uint64
    tokenizer.json, ...           the tokenizer's own files in Hugging Face layout, and what else the build leaves

Shards are memory-mapped when they are first used, so opening costs nothing and a batch touches only the blocks it
needs. A block is compared with its checksum when it is first touched, the checksums with the manifest when the shard
is, and the last line of the manifest holds the checksum of all lines before it: no byte is ever used unchecked. Without
a manifest a directory is unfinished and is not read.
"""

from __future__ import annotations

import json
import mmap
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from configs.schema import CacheConfig
from data_pipeline.errors import DataError

FORMAT = 2
BLOCK_BYTES = 1 << 14  # one checksum: 0.05 % more bytes; a row of 1,024 tokens needs one or two blocks
LARGEST_UINT16_VOCABULARY = 65_536
WRITE_TOKENS = 1 << 20  # converted and written at once
READ_BYTES = 1 << 22
WRITING = ".writing-"  # how the names of unfinished files start
AGAIN = "copy it again or build the dataset again"


class Dataset:
    """A finished dataset directory: its shards are one long row of tokens. Damaged data raises DataError, always.

    `path` is a local folder with the tokenizer's files; `open_shard` opens the file of a manifest entry.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], open_shard: Callable[[dict[str, Any]], BinaryIO]) -> None:
        self.path, self.manifest, self._open_shard = path, manifest, open_shard
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.dtype = np.dtype(manifest["dtype"])
        self.shards: list[dict[str, Any]] = manifest["shards"]
        counts = np.fromiter((shard["tokens"] for shard in self.shards), np.int64, len(self.shards))
        self.shard_starts: list[int] = [0, *np.cumsum(counts).tolist()]  # first token of each shard, and num_tokens
        self._mapped: list[MappedShard | None] = [None] * len(self.shards)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), (stop - start,), in `dtype`; a read-only view if they are in one shard."""
        parts = [self._shard(shard).tokens_of(low, high) for shard, low, high in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Row i is the tokens [starts[i], starts[i] + length): (n, length), in `dtype`. starts: (n,), integers."""
        shard_starts, mapped = self.shard_starts, self._mapped
        rows = np.empty((len(starts), length), self.dtype)
        for row, start in enumerate(starts.tolist()):
            number = bisect_right(shard_starts, start) - 1
            low = start - shard_starts[number]
            shard = mapped[number] if 0 <= start < self.num_tokens else None
            if shard is None or low + length > shard.num_tokens:  # first use, over a shard's end, or an error
                rows[row] = self.tokens(start, start + length)
                continue
            if not shard.is_checked(low, low + length):
                shard.check(low, low + length)
            rows[row] = shard.tokens[low : low + length]
        return rows

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Indices in [start, stop) at which a document starts, int64, ascending."""
        parts = [np.empty(0, np.int64)]
        for number, low, high in self._pieces(start, stop):
            parts.append(self._shard(number).starts(low, high) + self.shard_starts[number])
        return np.concatenate(parts)

    def document_starts_many(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where documents start in the windows [starts[i], starts[i] + length): (rows, columns), both int64.

        starts: (n,), integers. A document starts at column c of window r for each (r, c); ascending.
        """
        found = [self.document_starts(start, start + length) - start for start in starts.tolist()]
        rows = np.repeat(np.arange(len(found)), [len(columns) for columns in found])
        return rows, np.concatenate([np.empty(0, np.int64), *found])

    def _shard(self, number: int) -> MappedShard:
        shard = self._mapped[number]
        if shard is None:
            entry = self.shards[number]
            with self._open_shard(entry) as file:
                shard = MappedShard(file, entry, self.dtype)
            self._mapped[number] = shard
        return shard

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last + 1 within the shard) of every shard that [start, stop) touches."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a dataset of {self.num_tokens}")
        number = bisect_right(self.shard_starts, start) - 1
        while number < len(self.shards) and self.shard_starts[number] < stop:
            first, after = self.shard_starts[number], self.shard_starts[number + 1]
            yield number, max(start, first) - first, min(stop, after) - first
            number += 1


class MappedShard:
    """A shard file in memory; its blocks are compared with their checksums when they are first used."""

    def __init__(self, file: BinaryIO, entry: dict[str, Any], dtype: np.dtype) -> None:
        self.file = file.name
        self.num_tokens: int = entry["tokens"]
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise DataError(_wrong_size(self.file, size, entry["bytes"]))
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        ends_at, sums_at = _layout(entry, dtype.itemsize)
        self.tokens = content[: self.num_tokens * dtype.itemsize].view(dtype)
        self.ends = content[ends_at:sums_at].view(np.int64)  # uint64 in the file; none is so large
        self.sums = content[sums_at:].view(np.uint64).data
        self.body = content[:sums_at].data
        self.checked = bytearray(len(self.sums))  # per block: 1 when it was found to be intact
        self.shift = (BLOCK_BYTES // dtype.itemsize).bit_length() - 1  # token index >> shift: its block
        self.ends_block = ends_at // BLOCK_BYTES  # the first one with document ends
        if xxhash.xxh3_128_hexdigest(self.sums) != entry["sums_xxh3_128"]:
            raise DataError(f"{self.file}: bytes {sums_at} to {size - 1} are damaged; {AGAIN}")

    def tokens_of(self, low: int, high: int) -> np.ndarray:
        """Tokens [low, high) of this shard; a view."""
        self.check(low, high)
        return self.tokens[low:high]

    def starts(self, low: int, high: int) -> np.ndarray:
        """Indices in [low, high) at which a document starts, int64; the first starts at 0, the others at ends."""
        if self.checked.find(0, self.ends_block) >= 0:
            self._check_blocks(self.ends_block, len(self.checked))
        left, right = self.ends.searchsorted([low, high])
        found = self.ends[left:right]
        return found if low else np.concatenate([[0], found])

    def is_checked(self, low: int, high: int) -> bool:
        """Whether all blocks of the tokens [low, high) are known to be intact. high > low."""
        return self.checked.find(0, low >> self.shift, (high - 1 >> self.shift) + 1) < 0

    def check(self, low: int, high: int) -> None:
        if high > low:
            self._check_blocks(low >> self.shift, (high - 1 >> self.shift) + 1)

    def _check_blocks(self, first: int, stop: int) -> None:
        block = self.checked.find(0, first, stop)
        while block >= 0:
            start = block * BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(self.body[start : start + BLOCK_BYTES]) != self.sums[block]:
                end = min(start + BLOCK_BYTES, len(self.body)) - 1
                raise DataError(f"{self.file}: is damaged between bytes {start} and {end}; {AGAIN}")
            self.checked[block] = 1
            block = self.checked.find(0, block, stop)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.uint32)


def write_shard(path: Path, pieces: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> dict[str, Any]:
    """Write one shard and return its manifest entry; only one piece at a time is in memory.

    pieces: (tokens, lengths) of some documents: tokens (sum of lengths,) of any integer type, lengths (documents,), in
    tokens, none 0. Raises DataError for an id outside of the vocabulary.
    """
    dtype = token_dtype(vocab_size)
    ends: list[np.ndarray] = []
    num_tokens = 0
    with writing(path) as file:
        body = _SummedFile(file)
        for tokens, lengths in pieces:
            if len(lengths) and (lengths.min() < 1 or lengths.sum() != len(tokens)):
                raise ValueError(f"{path}: {len(tokens)} tokens in documents of {lengths} tokens")
            for start in range(0, len(tokens), WRITE_TOKENS):
                body.write(_checked_ids(tokens[start : start + WRITE_TOKENS], vocab_size, path).astype(dtype))
            ends.append(np.cumsum(lengths, dtype=np.uint64) + np.uint64(num_tokens))
            num_tokens += len(tokens)
        if not num_tokens:
            raise ValueError(f"{path}: no tokens to write")
        body.write(np.zeros(-num_tokens * dtype.itemsize % 8, np.uint8))
        for part in ends:
            body.write(part)
        sums = body.sums()
        file.write(sums)
        body.digest.update(sums)
    return {
        "file": path.name,
        "documents": sum(len(part) for part in ends),
        "tokens": num_tokens,
        "bytes": body.num_bytes + len(sums),
        "xxh3_128": body.digest.hexdigest(),
        "sums_xxh3_128": xxhash.xxh3_128_hexdigest(sums),
    }


def write_manifest(
    directory: Path, shards: list[dict[str, Any]], vocab_size: int, tokenizer_fingerprint: str, built_from: str
) -> None:
    """Finish a dataset directory: nothing in it may change from now on.

    `built_from` identifies the settings and sources, for a later build to compare.
    """
    for leftover in directory.glob(f"{WRITING}*"):  # of a build that was killed
        leftover.unlink()
    names = {shard["file"] for shard in shards} | {"manifest.json"}
    content = {
        "format": FORMAT,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "built_from": built_from,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "shards": shards,
        "files": [_entry(path) for path in sorted(directory.iterdir()) if path.name not in names],
    }
    content["fingerprint"] = _fingerprint(content)
    text = json.dumps(content, indent=1).removesuffix("\n}").encode()
    with writing(directory / "manifest.json") as file:
        file.write(text + _last_lines(text))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, every byte of it checked. Raises DataError."""
    path = directory / "manifest.json"
    if not directory.is_dir():
        raise DataError(f"{directory}: no such dataset directory; make it with `millstream data build CONFIG`")
    if not path.is_file():
        raise DataError(f"{directory}: has no manifest.json, so it is unfinished; run `millstream data build` again")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, place: str) -> dict[str, Any]:
    """The manifest in the bytes of a manifest.json; `place` is where they are from. Raises DataError."""
    try:
        manifest = json.loads(content)
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: is damaged ({error}); {AGAIN}") from error
    if found != FORMAT:
        raise DataError(f"{place}: is of format {found}, this version reads {FORMAT}; build the dataset again")
    text = content[: content.rfind(b",")]
    if content != text + _last_lines(text):
        raise DataError(f"{place}: was changed after the build (its checksum does not fit); {AGAIN}")
    for entry in manifest["shards"] + manifest["files"]:
        if "/" in entry["file"] or entry["file"] in ("", ".", ".."):
            raise DataError(f"{place}: names {entry['file']}, which is outside of the directory; {AGAIN}")
    return manifest


def open_dataset(directory: str | Path, cache: CacheConfig | None = None) -> Dataset:
    """Open a dataset directory; its shards are opened and checked when they are first used.

    Raises DataError for a damaged manifest or tokenizer, and later, naming the shard, when damaged data are asked for.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for entry in manifest["files"]:
        check_file(directory / entry["file"], entry)

    def open_shard(entry: dict[str, Any]) -> BinaryIO:
        try:
            return (directory / entry["file"]).open("rb")
        except OSError as error:
            raise DataError(f"{directory / entry['file']}: cannot be read ({error.strerror}); {AGAIN}") from error

    return Dataset(directory, manifest, open_shard)


def check_file(path: Path, entry: dict[str, Any]) -> None:
    """Compare a whole file with its manifest entry. Raises DataError."""
    try:
        found = _entry(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
    if found["bytes"] != entry["bytes"]:
        raise DataError(_wrong_size(path, found["bytes"], entry["bytes"]))
    if found["xxh3_128"] != entry["xxh3_128"]:
        raise DataError(
            f"{path}: is damaged or was changed after the build (xxh3_128 {found['xxh3_128']}, the manifest says "
            f"{entry['xxh3_128']}); {AGAIN}"
        )


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """`with writing(path) as file`: what is written to `file` appears at `path` complete and on disk, or never."""
    aside = path.with_name(f"{WRITING}{uuid.uuid4().hex[:12]}-{path.name}")  # no other writer's
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _SummedFile:
    """Writes to `file` and keeps the checksum of all that is written and those of its blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, xxhash.xxh3_128(), 0
        self._sums: list[int] = []
        self._block = xxhash.xxh3_64()  # of the block that is not full yet

    def write(self, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array).view(np.uint8).data
        self.file.write(content)
        self.digest.update(content)
        while len(content):
            part = content[: BLOCK_BYTES - self.num_bytes % BLOCK_BYTES]
            self._block.update(part)
            self.num_bytes += len(part)
            content = content[len(part) :]
            if self.num_bytes % BLOCK_BYTES == 0:
                self._close_block()

    def sums(self) -> bytes:
        if self.num_bytes % BLOCK_BYTES:
            self._close_block()
        return np.array(self._sums, np.uint64).tobytes()

    def _close_block(self) -> None:
        self._sums.append(self._block.intdigest())
        self._block.reset()


def _checked_ids(ids: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(f"{path}: token id {low if low < 0 else high} does not fit the vocabulary of {vocab_size}")
    return ids


def _layout(entry: dict[str, Any], itemsize: int) -> tuple[int, int]:
    """Where in its file a shard's document ends start, and where its checksums do, in bytes."""
    ends_at = -(-entry["tokens"] * itemsize // 8) * 8
    return ends_at, ends_at + 8 * entry["documents"]


def _entry(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"file": path.name, "bytes": size, "xxh3_128": digest.hexdigest()}


def _wrong_size(file: str | Path, found: int, expected: int) -> str:
    return f"{file}: has {found} bytes, the manifest says {expected}: it is truncated or was changed; {AGAIN}"


def _fingerprint(manifest: dict[str, Any]) -> str:
    """Of the tokens and their tokenizer: not of `built_from` and of reports among `files`, which name paths."""
    content = {key: value for key, value in manifest.items() if key not in ("built_from", "files")}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _last_lines(text: bytes) -> bytes:
    """What ends a manifest that starts with `text`: the checksum of all of it, so that no byte can change unnoticed."""
    return f',\n "checksum": "{xxhash.xxh3_128_hexdigest(text)}"\n}}\n'.encode()
