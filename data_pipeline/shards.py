"""The dataset directory: flat token ids in shards, described by a manifest that is written last. Format 2.

    manifest.json                 dtype, vocabulary, fingerprints, the id that ends documents and nothing else (null:
                                  none is known to), the shards and all other files with their checksums
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
import resource
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from configs.schema import CacheConfig
from data_pipeline.errors import DataError
from data_pipeline.manifest_check import LARGEST_UINT16_VOCABULARY, manifest_fault
from data_pipeline.mapped_shard import BLOCK_BYTES, TOKEN_SHIFT, MappedShard
from data_pipeline.remote_sources import SCHEMES, is_remote
from data_pipeline.store import (
    COPY_AGAIN,
    WRITING,
    Cache,
    Folder,
    check_file,
    describe,
    read_remote,
    writing,
)

FORMAT = 2
WRITE_TOKENS = 1 << 20  # converted and written at once
SLOW_SECONDS = 5e-4  # a row that takes longer came from a disk; in memory it is 10 us, with its checksum
OTHER_OPEN_FILES = 1000  # that a process may want beside the shards


class Dataset:
    """A finished dataset directory: its shards are one long row of tokens. Damaged data raises DataError, always.

    `path` is a local folder with the tokenizer's files and, unless the dataset is at an address, the shards.
    """

    def __init__(self, manifest: dict[str, Any], store: Folder | Cache) -> None:
        self.path, self.manifest, self._store = store.path, manifest, store
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        # The id that ends every document and occurs nowhere else; None: there is none, or nobody has looked
        self.document_end_id: int | None = manifest.get("document_end_id")
        self.dtype = np.dtype(manifest["dtype"])
        self.shards: list[dict[str, Any]] = manifest["shards"]
        counts = [shard["tokens"] for shard in self.shards]
        self.shard_starts: list[int] = [0, *accumulate(counts)]  # first token of each shard, and num_tokens
        # One more: what is before the first shard (index -1) and after the last one stays None
        self._mapped: list[MappedShard | None] = [None] * (len(counts) + 1)
        _allow_open_files(len(counts))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), (stop - start,), in `dtype`; a read-only view if they are in one shard."""
        parts = [self._shard(number).tokens_of(low, high) for number, low, high in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Row i is the tokens [starts[i], starts[i] + length): (n, length), in `dtype`. starts: (n,), integers."""
        shard_starts, mapped, shift = self.shard_starts, self._mapped, TOKEN_SHIFT[self.dtype.itemsize]
        rows: list[Any] = []  # what has a buffer
        is_short = 0 < length <= 1 << shift  # so that a row is in one block or two
        is_asked_for = False
        for start in starts.tolist():
            number = bisect_right(shard_starts, start) - 1
            low = start - shard_starts[number]
            last = low + length - 1
            shard = mapped[number]
            if shard is not None and is_short and last < shard.num_tokens:
                checked = shard.checked
                if checked[low >> shift] and checked[last >> shift]:
                    shard.used = True
                    rows.append(shard.tokens_view[low : last + 1])
                    continue
            before = time.perf_counter()  # first use of the shard or of a block, a row over its end, or an error
            rows.append(self.tokens(start, start + length))
            if time.perf_counter() - before > SLOW_SECONDS and not is_asked_for:
                self._ask_for(starts, length)
                is_asked_for = True
        # 8 x 1,025 ids from memory: 2.6 us; np.concatenate takes 4.5, np.stack 7.1
        return np.ndarray((len(starts), length), self.dtype, bytearray().join(rows))

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
        shard_starts, mapped = self.shard_starts, self._mapped
        found, firsts = [np.empty(0, np.int64)], []  # within a shard; index of that shard's first token
        for start in starts.tolist():
            number = bisect_right(shard_starts, start) - 1
            first = shard_starts[number]
            low = start - first
            shard = mapped[number]
            if shard is None or low + length > shard.num_tokens:
                found.append(self.document_starts(start, start + length))
                firsts.append(0)
            else:
                found.append(shard.starts(low, low + length))
                firsts.append(first)
        counts = [len(columns) for columns in found[1:]]
        rows = np.repeat(np.arange(len(starts)), counts)
        return rows, np.concatenate(found) - (starts - np.array(firsts, np.int64))[rows]

    def document(self, number: int) -> tuple[int, int]:
        """First token of a document and the one after its last."""
        within = number
        for shard, entry in enumerate(self.shards):
            if 0 <= within < entry["documents"]:
                ends, first = self._shard(shard).checked_ends(), self.shard_starts[shard]
                return first + (int(ends[within - 1]) if within else 0), first + int(ends[within])
            within -= entry["documents"]
        raise IndexError(f"a dataset of {self.num_documents} documents has no number {number}")

    def document_lengths(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, (documents,) int64."""
        return np.diff(self._shard(shard).checked_ends(), prepend=0)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to transfer these shards, the first ones first, as many at once as data.cache.prefetch_shards.

        Does not wait, and passes over what is on its way: call it again and again with what will be needed next.
        """
        self._store.prefetch(self.shards[number] for number in shards)

    def release(self, shard: int) -> None:
        """Unmap a shard that was read from end to end, so that its pages do not count as memory in use."""
        self._mapped[shard] = None

    def _shard(self, number: int) -> MappedShard:
        shard = self._mapped[number]
        if shard is None:
            if isinstance(self._store, Cache):
                self._let_go(self._store)
            entry = self.shards[number]
            with self._store.open(entry) as file:
                shard = MappedShard(file, entry, self.dtype, self._store.remedy)
            self._mapped[number] = shard
        shard.used = True
        return shard

    def _ask_for(self, starts: np.ndarray, length: int) -> None:
        """Begin to read all windows at once: from a cold disk eight rows then take little longer than two."""
        pieces = [piece for start in starts.tolist() for piece in self._pieces(start, start + length)]
        self.prefetch(number for number, _, _ in pieces if self._mapped[number] is None)
        for number, low, high in pieces:
            self._shard(number).will_need(low, high)

    def _let_go(self, cache: Cache) -> None:
        """Unmap shards that were removed from the cache: their bytes stay on the disk as long as they are mapped."""
        for number, shard in enumerate(self._mapped):
            if shard is not None:
                if not cache.is_current(shard.file, shard.inode, shard.used):
                    self._mapped[number] = None
                shard.used = False

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last + 1 within the shard) of every shard that [start, stop) touches."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a dataset of {self.num_tokens}")
        number = bisect_right(self.shard_starts, start) - 1
        while number < len(self.shards) and self.shard_starts[number] < stop:
            first, after = self.shard_starts[number], self.shard_starts[number + 1]
            yield number, max(start, first) - first, min(stop, after) - first
            number += 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.uint32)


def write_shard(path: Path, pieces: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> dict[str, Any]:
    """Write one shard and return its manifest entry; in memory are one piece and a few bytes for each document.

    pieces: (tokens, lengths) of some documents: tokens (sum of lengths,) of any integer type, lengths (documents,), in
    tokens, none 0. Raises DataError for an id outside of the vocabulary.
    """
    dtype = token_dtype(vocab_size)
    all_lengths: list[np.ndarray] = []
    end_ids: set[int | None] = set()
    num_tokens = num_documents = 0
    with writing(path) as file:
        body = _SummedFile(file)
        for tokens, lengths in pieces:
            if lengths.min(initial=1) < 1 or lengths.sum() != len(tokens):
                raise ValueError(f"{path}: a piece of {len(tokens)} tokens in documents of {lengths} tokens")
            if len(tokens) and None not in end_ids:
                end_ids.add(_document_end_id(tokens, lengths))
            for start in range(0, len(tokens), WRITE_TOKENS):
                body.write(_checked_ids(tokens[start : start + WRITE_TOKENS], vocab_size, path).astype(dtype))
            all_lengths.append(lengths.astype(np.min_scalar_type(lengths.max(initial=0))))
            num_tokens += len(tokens)
            num_documents += len(lengths)
        if not num_tokens:
            raise ValueError(f"{path}: no tokens to write")
        body.write(np.zeros(-num_tokens * dtype.itemsize % 8, np.uint8))
        end = 0
        for lengths in all_lengths:
            ends = end + np.cumsum(lengths, dtype=np.uint64)
            body.write(ends)
            end += int(lengths.sum(dtype=np.uint64))
        sums = body.sums()
        file.write(sums)
        body.digest.update(sums)
    return {
        "file": path.name,
        "documents": num_documents,
        "tokens": num_tokens,
        "bytes": body.num_bytes + len(sums),
        "xxh3_128": body.digest.hexdigest(),
        "sums_xxh3_128": xxhash.xxh3_128_hexdigest(sums),
        "document_end_id": end_ids.pop() if len(end_ids) == 1 else None,
    }


def write_manifest(
    directory: Path, shards: list[dict[str, Any]], vocab_size: int, tokenizer_fingerprint: str, built_from: str
) -> None:
    """Finish a dataset directory: nothing in it may change from now on.

    `shards` are the entries that `write_shard` returned; the dataset has the document_end_id that all of them have.
    `built_from` identifies the settings and sources, for a later build to compare.
    """
    for leftover in directory.glob(f"{WRITING}*"):  # of a build that was killed
        leftover.unlink()
    names = {shard["file"] for shard in shards} | {"manifest.json"}
    end_ids = {shard.get("document_end_id") for shard in shards}
    content = {
        "format": FORMAT,
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "built_from": built_from,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "document_end_id": end_ids.pop() if len(end_ids) == 1 else None,
        "shards": [{key: value for key, value in shard.items() if key != "document_end_id"} for shard in shards],
        "files": [describe(path) for path in sorted(directory.iterdir()) if path.name not in names],
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: is damaged ({error}); {COPY_AGAIN}") from error
    if found != FORMAT:
        raise DataError(f"{place}: is of format {found}, this version reads {FORMAT}; build the dataset again")
    text = content[: content.rfind(b",")]
    if content != text + _last_lines(text):
        raise DataError(f"{place}: was changed after the build (its checksum does not fit); {COPY_AGAIN}")
    if fault := manifest_fault(manifest):
        raise DataError(f"{place}: {fault}; {COPY_AGAIN}")
    return dict(manifest)


def open_dataset(directory: str | Path, cache: CacheConfig | None = None) -> Dataset:
    """Open a dataset directory, or one at an http(s):// or s3:// address through a cache (none: the default one).

    Its shards are opened, transferred and checked when they are first used. Raises DataError for a damaged manifest or
    tokenizer, and later, naming the shard, when damaged data are asked for.
    """
    store: Folder | Cache
    if is_remote(str(directory)):
        config, place = cache or CacheConfig(), f"{str(directory).rstrip('/')}/manifest.json"
        content = read_remote(place, config)
        manifest = parse_manifest(content, place)
        store = Cache(str(directory), config, manifest["checksum"])
        store.write_manifest(content)
        for entry in manifest["files"]:
            store.fetch(entry)
    elif "://" in str(directory):
        raise DataError(f"{directory}: datasets are read from a folder or an address that starts with {SCHEMES}")
    else:
        store = Folder(Path(directory))
        manifest = read_manifest(store.path)
    for entry in manifest["files"]:
        check_file(store.path / entry["file"], entry, store.remedy)
    return Dataset(manifest, store)


def verify_dataset(directory: Path, report: Callable[[int], None] | None = None) -> list[str]:
    """Read every byte of a dataset directory; all faults, each naming the file, the bytes and what to do.

    `report` gets the bytes read, piece by piece; together about as many as the directory has.
    """
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return [str(error)]
    dtype, faults = np.dtype(manifest["dtype"]), []
    for entry in manifest["shards"] + manifest["files"]:
        try:
            check_file(directory / entry["file"], entry, COPY_AGAIN, report)
        except DataError as error:
            where = _damaged_parts(directory, entry, dtype) if "tokens" in entry else []
            faults += where or [str(error)]
    expected = {entry["file"] for entry in manifest["shards"] + manifest["files"]} | {"manifest.json"}
    for path in sorted(directory.iterdir()):
        if path.name not in expected:
            faults.append(f"{path}: is not in the manifest; remove it, it does not belong to the dataset")
    return faults


def _damaged_parts(directory: Path, entry: dict[str, Any], dtype: np.dtype) -> list[str]:
    """Where a shard is damaged; one message that it cannot be told in more detail than the file if that is so."""
    try:
        with Folder(directory).open(entry) as file:
            return MappedShard(file, entry, dtype, COPY_AGAIN).faults()
    except DataError as error:
        return [str(error)]


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


def _allow_open_files(num_shards: int) -> None:
    """A mapping keeps its file open, and many systems allow 1,024 unless more are asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_shards + OTHER_OPEN_FILES
    if soft < needed and soft != resource.RLIM_INFINITY:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )


def _checked_ids(ids: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(f"{path}: token id {low if low < 0 else high} does not fit the vocabulary of {vocab_size}")
    return ids


def _document_end_id(tokens: np.ndarray, lengths: np.ndarray) -> int | None:
    """The id that ends each of these documents and occurs nowhere else in them, if there is one."""
    end = int(tokens[-1])
    if (tokens[np.cumsum(lengths) - 1] != end).any():
        return None
    parts = (tokens[start : start + WRITE_TOKENS] for start in range(0, len(tokens), WRITE_TOKENS))
    return end if sum(int(np.count_nonzero(part == end)) for part in parts) == len(lengths) else None


def _fingerprint(manifest: dict[str, Any]) -> str:
    """Of the tokens and their tokenizer: not of what follows from them, nor of `built_from` and `files`: paths."""
    content = {key: value for key, value in manifest.items() if key not in ("built_from", "files", "document_end_id")}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _last_lines(text: bytes) -> bytes:
    """What ends a manifest that starts with `text`: the checksum of all of it, so that no byte can change unnoticed."""
    return f',\n "checksum": "{xxhash.xxh3_128_hexdigest(text)}"\n}}\n'.encode()
