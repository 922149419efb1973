"""TensorFlow's checkpoints ("V2", tensor bundles), read and written without TensorFlow.

`PREFIX.index` is a table (sstable.py) of the tensors' names, with dtype, shape, place and masked CRC-32C of each;
`PREFIX.data-00000-of-00001` is their bytes, one after the other. Every byte that is used is covered by a checksum, and
neither file can name another one: the names of data files are made of their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.formats import sstable
from pretrain.formats.crc32c import masked
from pretrain.formats.sstable import read_varint, varint
from pretrain.formats.weights import FormatError

# Of tensorflow/core/framework/types.proto, those that a model's weights and counters have
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, as its index describes it."""

    name: str
    dtype: int  # TensorFlow's number
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int
    checksum: int


def open_bundle(prefix: Path) -> dict[str, Entry]:
    """The tensors of the checkpoint `PREFIX.index`, name -> entry. Raises FormatError; no tensor is read."""
    index = Path(f"{prefix}.index")
    entries = sstable.read(index)
    try:
        header = dict(_fields(entries.pop(b"")))
        num_shards = header.get(1, 1)
        if header.get(2, 0) != 0:
            raise ValueError("its numbers are big-endian, expected little-endian")
        if not isinstance(num_shards, int) or not 1 <= num_shards <= 99_999:
            raise ValueError(f"it has {num_shards!r} data files")
        return {key.decode(): _entry(prefix, key.decode(), value, num_shards) for key, value in entries.items()}
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise FormatError(f"{index}: is no index of a TensorFlow checkpoint ({error}); copy it again") from error


def _entry(prefix: Path, name: str, content: bytes, num_shards: int) -> Entry:
    numbers: dict[int, int] = {}
    shape: list[int] = []
    for field, value in _fields(content):
        if field == 7:
            raise ValueError(f"{name} is cut into slices; save it whole")
        if field == 2 and isinstance(value, bytes):
            dims = [dict(_fields(dim)).get(1, 0) for number, dim in _fields(value) if number == 2]  # type: ignore[arg-type]
            shape = [int(dim) for dim in dims]
        elif isinstance(value, int):
            numbers[field] = value
    shard = numbers.get(3, 0)
    if not 0 <= shard < num_shards:
        raise ValueError(f"{name} is in data file {shard} of {num_shards}")
    file = Path(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}")
    return Entry(
        name, numbers.get(1, 0), tuple(shape), file, numbers.get(4, 0), numbers.get(5, 0), numbers.get(6, 0)
    )  # fmt: skip


def read_tensor(entry: Entry) -> torch.Tensor:
    """Raises FormatError where the data file is cut or a byte of the tensor is not what the index says."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise FormatError(f"{entry.file}: {entry.name} has TensorFlow's dtype {entry.dtype}, expected one of {DTYPES}")
    if math.prod(entry.shape) * dtype.itemsize != entry.num_bytes:
        raise FormatError(f"{entry.file}: {entry.name}, {entry.shape}, has {entry.num_bytes} bytes: damaged index")
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            content = bytearray(file.read(entry.num_bytes))
    except (OSError, OverflowError) as error:
        raise FormatError(f"{entry.file}: cannot be read ({error}); the index names it, get both again") from error
    if len(content) != entry.num_bytes:
        size = entry.file.stat().st_size
        raise FormatError(
            f"{entry.file}: has {size} bytes, {entry.name} ends at {entry.offset + entry.num_bytes}; it was cut, "
            f"copy it again"
        )
    if masked(content) != entry.checksum:
        raise FormatError(f"{entry.file}: {entry.name} is damaged (its CRC-32C does not fit); copy the file again")
    if not content:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(entry.shape)


def write(prefix: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write `PREFIX.index` and its one data file; only one tensor is in memory at a time."""
    entries = {b"": _field(1, 1) + _bytes_field(3, _field(1, 1))}  # one data file, version 1
    offset = 0
    with Path(f"{prefix}.data-00000-of-00001").open("wb") as file:
        for name, tensor in tensors:
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            file.write(content)
            shape = b"".join(_bytes_field(2, _field(1, size)) for size in tensor.shape)
            entries[name.encode()] = (
                _field(1, NUMBERS[tensor.dtype]) + _bytes_field(2, shape) + _field(4, offset) + _field(5, len(content))
                + b"\x35" + masked(content).to_bytes(4, "little")
            )  # fmt: skip
            offset += len(content)
    sstable.write(Path(f"{prefix}.index"), entries)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer message: varints, fixed numbers, bytes.

    Raises IndexError or ValueError for what is none.
    """
    place = 0
    while place < len(content):
        tag, place = read_varint(content, place)
        kind, size = tag & 7, 0
        if kind == 0:
            value, place = read_varint(content, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = read_varint(content, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + size > len(content):
            raise ValueError("a field goes beyond its message")
        part = content[place : place + size]
        place += size
        yield tag >> 3, part if kind == 2 else int.from_bytes(part, "little")


def _field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value) if value else b""


def _bytes_field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content
