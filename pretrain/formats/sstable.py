"""Tables of sorted keys, as LevelDB and TensorFlow's checkpoint indexes have them: `read` and `write`.

A file is blocks, each with a byte for its compression (0: none) and a masked CRC-32C behind it, and a footer of 48
bytes that says where the block of blocks is. A block is entries (bytes shared with the key before, further bytes of the
key, bytes of the value; then both), and places where a key is written in full. Compressed blocks are not read:
TensorFlow writes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pretrain.formats.crc32c import masked
from pretrain.formats.weights import FormatError

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_BYTES = 48
TRAILER_BYTES = 5
BLOCK_BYTES = 1 << 16


def read(file: Path) -> dict[bytes, bytes]:
    """All entries of a table. Raises FormatError naming the file where a byte is not what its checksum says."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise FormatError(f"{file}: cannot be read ({error}); expected the index of a TensorFlow checkpoint") from error
    footer = content[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or footer[-8:] != MAGIC:
        raise FormatError(
            f"{file}: does not end as an index of a TensorFlow checkpoint does; it was cut, copy it again"
        )
    try:
        _, _, place = _handle(footer, 0)
        start, size, _ = _handle(footer, place)
        entries: dict[bytes, bytes] = {}
        for _, handle in _entries(_block(file, content, start, size)):
            start, size, _ = _handle(handle, 0)
            entries.update(_entries(_block(file, content, start, size)))
    except (IndexError, ValueError) as error:
        raise FormatError(f"{file}: is damaged ({error}); copy it again") from error
    return entries


def write(file: Path, entries: dict[bytes, bytes]) -> None:
    content, index = bytearray(), {}
    block: dict[bytes, bytes] = {}

    def close(block: dict[bytes, bytes]) -> bytes:
        """Append a block; returns where it is."""
        packed = _packed(block)
        start = len(content)
        trailed = packed + b"\0"
        content.extend(trailed + masked(trailed).to_bytes(4, "little"))
        return varint(start) + varint(len(packed))

    for key in sorted(entries):
        block[key] = entries[key]
        if sum(map(len, block.values())) > BLOCK_BYTES:
            index[key] = close(block)
            block = {}
    if block:
        index[max(block)] = close(block)
    footer = close({}) + close(index)
    content.extend(footer.ljust(FOOTER_BYTES - len(MAGIC), b"\0") + MAGIC)
    file.write_bytes(content)


def varint(value: int) -> bytes:
    """7 bits a byte, the lowest first; the highest bit says that there are more."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def read_varint(content: bytes, place: int) -> tuple[int, int]:
    """The number at `place` and the place behind it. Raises IndexError at the end, ValueError for more than 64 bits."""
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _handle(content: bytes, place: int) -> tuple[int, int, int]:
    start, place = read_varint(content, place)
    size, place = read_varint(content, place)
    return start, size, place


def _block(file: Path, content: bytes, start: int, size: int) -> bytes:
    trailed = content[start : start + size + 1]
    checksum = content[start + size + 1 : start + size + TRAILER_BYTES]
    if len(trailed) != size + 1 or masked(trailed).to_bytes(4, "little") != checksum:
        raise FormatError(
            f"{file}: its block at byte {start}, of {size} bytes, is damaged (its CRC-32C does not fit); copy it again"
        )
    if trailed[-1]:
        raise FormatError(
            f"{file}: its blocks are compressed (kind {trailed[-1]}), expected none; write the checkpoint again with "
            f"TensorFlow 1.2 or later"
        )
    return trailed[:-1]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    num_restarts = int.from_bytes(block[-4:], "little")
    end, place, key = len(block) - 4 - 4 * num_restarts, 0, b""
    if end < 0:
        raise ValueError(f"{num_restarts} restarts in a block of {len(block)} bytes")
    while place < end:
        shared, place = read_varint(block, place)
        more, place = read_varint(block, place)
        size, place = read_varint(block, place)
        if shared > len(key) or place + more + size > end:
            raise ValueError("an entry goes beyond its block")
        key = key[:shared] + block[place : place + more]
        yield key, block[place + more : place + more + size]
        place += more + size


def _packed(block: dict[bytes, bytes]) -> bytes:
    content, restarts = bytearray(), []
    for key, value in block.items():  # every key in full: an index of a model is small
        restarts.append(len(content))
        content.extend(varint(0) + varint(len(key)) + varint(len(value)) + key + value)
    restarts = restarts or [0]
    for number in (*restarts, len(restarts)):
        content.extend(number.to_bytes(4, "little"))
    return bytes(content)
