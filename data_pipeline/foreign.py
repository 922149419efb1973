"""Token datasets of other systems, read document by document: Megatron's indexed datasets and MosaicML's MDS.

Both layouts are read from their files alone, so neither system has to be installed, and nothing that is in such a file
is executed. A file may be cut off, damaged or made to deceive: what is read of it is bounded by its own size and
compared with the rest. What comes out are pieces, some documents at a time, in the type that a dataset keeps ids in.

    Megatron    PREFIX.idx: header, tokens of each sequence (int32), its first byte (int64), the first sequence of each
                document (int64). PREFIX.bin: all tokens, one after the other. A document is all its sequences.
    MDS         index.json: the shards, their columns and checksums. A shard: number of samples, where each starts
                (uint32), the samples. A sample: sizes of the columns without a fixed one (uint32), then all values.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import xxhash
import zstandard
from pydantic import BaseModel, NonNegativeInt, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.pieces import PIECE_TOKENS, Pieces, stretches
from data_pipeline.shards import token_dtype

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # texts -> their tokens, and how many each has
Advance = Callable[[int], None]  # told how many bytes of files were read since the last call
AnySized = TypeVar("AnySized", bound=Sized)

PIECE_DOCUMENTS = 1 << 14  # of a piece, at most
COPY_AGAIN = "copy it again or write it again"

MEGATRON_HEADER, MEGATRON_HEAD_BYTES = b"MMIDIDX\0\0", 34
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6, 7: floats, which are no ids
MDS_DTYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"
}  # fmt: skip
LARGEST_MDS_SHARD = 1 << 32  # bytes: places in it have 32 bits


def megatron_files(prefix: Path) -> tuple[Path, Path]:
    """(PREFIX.idx, PREFIX.bin); `prefix` may also be one of the two. Raises DataError where one is missing."""
    name = prefix.name.removesuffix(".bin").removesuffix(".idx")
    files = prefix.with_name(f"{name}.idx"), prefix.with_name(f"{name}.bin")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: there is no such file; give the path that the .idx and .bin have in common")
    return files


def read_megatron(prefix: Path, vocab_size: int, advance: Advance) -> Pieces:
    """The documents of PREFIX.idx and PREFIX.bin (megatron.core.datasets.indexed_dataset, version 1).

    Raises DataError naming the file.
    """
    index_file, tokens_file = megatron_files(prefix)
    dtype, lengths, first_bytes, bounds = _megatron_index(index_file)
    num_bytes, found = int(lengths.sum(dtype=np.int64)) * dtype.itemsize, tokens_file.stat().st_size
    if found != num_bytes:
        raise DataError(f"{tokens_file}: has {found} bytes, its index says {num_bytes}; {COPY_AGAIN}")
    stop = 0  # of the documents so far, in tokens
    with tokens_file.open("rb") as opened:
        for first in range(0, len(bounds) - 1, PIECE_DOCUMENTS):
            of_piece = bounds[first : first + PIECE_DOCUMENTS + 1]
            if (np.diff(of_piece) < 0).any() or of_piece[-1] > len(lengths):
                raise DataError(f"{index_file}: its documents do not follow each other; {COPY_AGAIN}")
            sequences = slice(int(of_piece[0]), int(of_piece[-1]))
            ends = stop + np.concatenate([[0], np.cumsum(lengths[sequences], dtype=np.int64)])
            if (first_bytes[sequences] != ends[:-1] * dtype.itemsize).any():
                raise DataError(f"{index_file}: its sequences do not follow each other; {COPY_AGAIN}")
            starts = ends[of_piece - of_piece[0]]
            for low, high in stretches(starts):
                tokens = np.fromfile(opened, dtype, int(starts[high] - starts[low]))
                if len(tokens) < starts[high] - starts[low]:
                    raise DataError(f"{tokens_file}: has become shorter while it was read; {COPY_AGAIN}")
                counts = np.diff(starts[low : high + 1])
                if len(tokens):
                    yield _fitting(tokens, vocab_size, tokens_file), counts[counts > 0]
                    advance(len(tokens) * dtype.itemsize)
            stop = int(ends[-1])


def _megatron_index(file: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(type of the tokens, tokens of each sequence, its first byte, first sequence of each document and the end)."""
    with file.open("rb") as opened:
        head = opened.read(MEGATRON_HEAD_BYTES)
    if len(head) < MEGATRON_HEAD_BYTES or not head.startswith(MEGATRON_HEADER):
        raise DataError(f"{file}: is not the index of a Megatron dataset, it starts with {head[:9]!r}")
    version, code, num_sequences, num_bounds = struct.unpack_from("<QBQQ", head, len(MEGATRON_HEADER))
    if version != 1 or code not in MEGATRON_DTYPES:
        raise DataError(
            f"{file}: is of version {version} with tokens of type {code}; known are version 1 and the types of "
            f"integers, {', '.join(map(str, MEGATRON_DTYPES))}"
        )
    expected, found = MEGATRON_HEAD_BYTES + 12 * num_sequences + 8 * num_bounds, file.stat().st_size
    if found not in (expected, expected + num_sequences):  # the latter with a mode for each sequence
        raise DataError(f"{file}: has {found} bytes, by its own numbers {expected}; {COPY_AGAIN}")
    if num_bounds < 1:
        raise DataError(f"{file}: holds no documents; {COPY_AGAIN}")
    content = np.memmap(file, np.uint8, "r", MEGATRON_HEAD_BYTES, (expected - MEGATRON_HEAD_BYTES,))
    lengths = content[: 4 * num_sequences].view("<i4")
    first_bytes = content[4 * num_sequences : 12 * num_sequences].view("<i8")
    bounds = content[12 * num_sequences :].view("<i8")
    if lengths.min(initial=0) < 0:
        raise DataError(f"{file}: has a sequence of {lengths.min()} tokens; {COPY_AGAIN}")
    if bounds[0] != 0 or bounds[-1] != num_sequences:
        raise DataError(f"{file}: its documents do not hold all its sequences; {COPY_AGAIN}")
    return np.dtype(MEGATRON_DTYPES[code]), lengths, first_bytes, bounds


class MdsFile(BaseModel):
    """What index.json says of a file."""

    basename: str
    bytes: NonNegativeInt
    hashes: dict[str, str] = {}


class MdsShard(BaseModel):
    """What index.json says of a shard. A size is None for columns whose values have different ones."""

    version: Literal[2]
    format: Literal["mds"]
    samples: NonNegativeInt
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[NonNegativeInt | None]
    raw_data: MdsFile
    zip_data: MdsFile | None = None
    compression: str | None = None


class MdsIndex(BaseModel):
    version: Literal[2]
    shards: list[MdsShard]


@dataclass(frozen=True)
class FoundShard:
    """A shard, the file that it is read from, and what that is compressed with."""

    file: Path
    described: MdsFile
    compression: str | None
    shard: MdsShard


def open_mds(folder: Path) -> list[FoundShard]:
    """The shards of a folder with an index.json. Raises DataError, also where a file is missing."""
    index_file = folder / "index.json"
    if not index_file.is_file():
        raise DataError(f"{folder}: has no index.json, so it is no MDS dataset; give the folder of one split")
    try:
        index = MdsIndex.model_validate_json(index_file.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"{index_file}: {place or 'content'}: {fault['msg']}; known is version 2 of MDS") from error
    return [_find_shard(folder, shard) for shard in index.shards]


def _find_shard(folder: Path, shard: MdsShard) -> FoundShard:
    for described in (shard.raw_data, shard.zip_data):
        if described is not None:
            path = PurePosixPath(described.basename)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(f"{folder / 'index.json'}: names {path}, which is outside of the folder")
            if os.path.isfile(folder / path):  # False also for a name that no file can have
                compression = None if described is shard.raw_data else shard.compression
                return FoundShard(folder / path, described, compression, shard)
    raise DataError(f"{folder / shard.raw_data.basename}: is missing, index.json names it; {COPY_AGAIN}")


def read_mds(
    shards: list[FoundShard], vocab_size: int, column: str, dtype: np.dtype | None, encode: Encode, advance: Advance
) -> Pieces:
    """The samples of the shards of `open_mds`, each a document.

    column: the one with ids, as arrays (`ndarray`) or as `bytes`, which are numbers of type `dtype`, or with text
    (`str`), which `encode` turns into ids. Raises DataError naming the file, and what there is instead.
    """
    for found in shards:
        encoding = _column_encoding(found, column)
        if encoding == "bytes" and dtype is None:
            raise DataError(
                f"{found.file}: column {column} holds bytes, which do not say what numbers they are; give the type "
                f"that they were written in, for example dtype=uint16"
            )
        for some in _batches(_mds_values(found, column, partial(_decode, encoding, dtype), advance)):
            if encoding == "str":
                tokens, lengths = encode(some)
            else:
                tokens = np.concatenate([_fitting(value, vocab_size, found.file) for value in some])
                lengths = np.array([len(value) for value in some], np.int64)
            if len(tokens):
                yield tokens, lengths[lengths > 0]


def _column_encoding(found: FoundShard, column: str) -> str:
    """What the column holds. Raises DataError for what cannot be ids."""
    names, encodings = found.shard.column_names, found.shard.column_encodings
    if not len(names) == len(encodings) == len(found.shard.column_sizes):
        raise DataError(f"{found.file}: index.json does not give each column an encoding and a size; {COPY_AGAIN}")
    if column not in names:
        raise DataError(f"{found.file}: has no column {column} but {', '.join(names)}; give column=NAME")
    encoding = encodings[names.index(column)]
    if encoding.partition(":")[0] not in ("ndarray", "bytes", "str"):
        raise DataError(f"{found.file}: column {column} holds {encoding}; known are ndarray and bytes of ids, and str")
    return encoding


def _mds_values(found: FoundShard, column: str, decode: Callable[[bytes], Any], advance: Advance) -> Iterator[Any]:
    """The decoded values of a column."""
    place = found.shard.column_names.index(column)
    for number, sample in enumerate(_mds_samples(found, advance)):
        try:
            value = decode(_mds_value(sample, found.shard.column_sizes, place))
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise DataError(f"{found.file}: sample {number}, column {column}: {error}; {COPY_AGAIN}") from error
        yield value


def _mds_samples(found: FoundShard, advance: Advance) -> Iterator[bytes]:
    """The encoded samples of a shard."""
    file, num_samples, num_bytes = found.file, found.shard.samples, found.shard.raw_data.bytes
    if not 4 * (num_samples + 2) <= num_bytes < LARGEST_MDS_SHARD:
        raise DataError(f"{file}: index.json says {num_samples} samples in {num_bytes} bytes, which cannot be")
    _check_mds_file(found)
    try:
        with file.open("rb") as opened, _decompressed(opened, found) as content:
            read = partial(_read_exactly, content)
            (count,) = struct.unpack("<I", read(4))
            if count != num_samples:
                raise DataError(f"{file}: has {count} samples, index.json says {num_samples}; {COPY_AGAIN}")
            places = np.frombuffer(read(4 * (count + 1)), "<u4").astype(np.int64)
            sizes = np.diff(places, prepend=4 * (count + 2))
            if sizes.min() < 0 or places[-1] != num_bytes:
                raise DataError(f"{file}: its samples do not follow each other; {COPY_AGAIN}")
            read(int(sizes[0]))  # what index.json says of the columns, once more
            done = 0
            for size in sizes[1:].tolist():
                yield read(size)
                if opened.tell() != done:
                    advance(opened.tell() - done)
                    done = opened.tell()
            if content.read(1):
                raise DataError(f"{file}: goes on after its last sample; {COPY_AGAIN}")
    except (OSError, EOFError, zstandard.ZstdError, zlib.error) as error:  # OSError: also of gzip and bz2
        raise DataError(f"{file}: is damaged or cannot be read ({error}); {COPY_AGAIN}") from error


def _check_mds_file(found: FoundShard) -> None:
    """Compare the file's size and checksums with what index.json says."""
    file, described = found.file, found.described
    if file.stat().st_size != described.bytes:
        raise DataError(f"{file}: has {file.stat().st_size} bytes, index.json says {described.bytes}; {COPY_AGAIN}")
    for name, expected in described.hashes.items():
        if name in xxhash.algorithms_available:
            digest = getattr(xxhash, name)()
        elif name in hashlib.algorithms_guaranteed and not name.startswith("shake"):
            digest = hashlib.new(name)
        else:
            continue  # mosaicml-streaming has no others
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise DataError(
                f"{file}: is damaged: its {name} is {digest.hexdigest()}, index.json says {expected}; {COPY_AGAIN}"
            )


def _decompressed(opened: BinaryIO, found: FoundShard) -> io.BufferedIOBase | BinaryIO:
    if found.compression is None:
        return opened
    algorithm = found.compression.partition(":")[0]
    if algorithm == "zstd":
        reader: Any = zstandard.ZstdDecompressor().stream_reader(opened, closefd=False)
        return io.BufferedReader(reader, 1 << 18)
    if algorithm == "gz":
        return gzip.GzipFile(fileobj=opened)
    if algorithm == "bz2":
        return bz2.BZ2File(opened)
    raise DataError(
        f"{found.file}: is compressed with {found.compression}; known are zstd, gz and bz2. Put the decompressed file "
        f"beside it, as {found.shard.raw_data.basename}"
    )


def _read_exactly(content: Any, size: int) -> bytes:
    found = content.read(size)
    if len(found) < size:
        raise EOFError("it ends too early")
    return found


def _mds_value(sample: bytes, column_sizes: list[int | None], place: int) -> bytes:
    """The value of column number `place` in an encoded sample. Raises ValueError, struct.error."""
    at, sizes = 0, []
    for fixed_size in column_sizes:
        if fixed_size:
            sizes.append(fixed_size)
        else:
            sizes += struct.unpack_from("<I", sample, at)
            at += 4
    if at + sum(sizes) != len(sample):
        raise ValueError(f"its columns have {at + sum(sizes)} bytes, the sample has {len(sample)}")
    return sample[at + sum(sizes[:place]) :][: sizes[place]]


def _decode(encoding: str, dtype: np.dtype | None, value: bytes) -> str | np.ndarray:
    """A value of a column. Raises ValueError, IndexError, OverflowError."""
    if encoding == "str":
        return value.decode()
    if encoding == "bytes":
        return np.frombuffer(value, dtype)
    _, *fixed = encoding.split(":")  # ndarray, ndarray:TYPE or ndarray:TYPE:SHAPE
    at = 0
    if fixed:
        name = fixed[0]
    else:
        name, at = MDS_DTYPES.get(value[0], f"type {value[0]}"), 1
    if name not in MDS_DTYPES.values():
        raise ValueError(f"arrays of {name} hold no ids, arrays of integers do")
    if len(fixed) > 1:
        shape = [int(size) for size in fixed[1].split(",")]
    else:  # first the number of dimensions << 2 | p, then their sizes, of 2^p bytes each
        num_dims, size_bytes = value[at] >> 2, 1 << (value[at] & 3)
        shape = np.frombuffer(value, f"<u{size_bytes}", num_dims, at + 1).tolist()
        at += 1 + num_dims * size_bytes
    return np.frombuffer(value, name, offset=at).reshape(shape).reshape(-1)


def _fitting(tokens: np.ndarray, vocab_size: int, file: Path) -> np.ndarray:
    """The tokens in a dataset's type. Raises DataError for one outside of the vocabulary."""
    for found in (tokens.min(initial=0), tokens.max(initial=0)):
        if not 0 <= found < vocab_size:
            raise DataError(
                f"{file}: holds the token id {found}, the tokenizer's vocabulary has {vocab_size}; give the tokenizer "
                f"that the tokens were made with, as tokenizer=DIR"
            )
    return tokens.astype(token_dtype(vocab_size))


def _batches(values: Iterable[AnySized]) -> Iterator[list[AnySized]]:
    """The values in lists of about PIECE_TOKENS tokens, or characters."""
    batch: list[AnySized] = []
    size = 0
    for value in values:
        batch.append(value)
        size += len(value)
        if size >= PIECE_TOKENS or len(batch) >= PIECE_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
