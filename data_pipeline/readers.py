"""One reader per format: `scan_X` cuts a file into pieces, `read_X` gives the documents of pieces of one file.

Here are jsonl, txt and docstrings; table_readers.py has parquet and `datasets`, warc_reader.py has web archives.
Every reader passes over its file once, forward, in memory that does not depend on the file's size, and gives documents
in batches; in the place of one it cannot use stands a sentence saying what is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, groupby
from operator import itemgetter
from typing import Any

import orjson

from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.files import BLOCK_BYTES, blocks, check_magic, compression, open_raw

DOCSTRINGS = "docstrings:"
DOCSTRINGS_BYTES = 25_000_000  # about; known only after all installed packages were read


@dataclass(slots=True)  # not frozen, which would take four times as long to make: short documents feel it
class Document:
    text: str
    place: str  # where it came from: file, or file: byte or row


Record = Document | str  # or what is wrong with one: place, found, cure
Batches = Iterator[tuple[int, Sequence[Record]]]  # (index of the piece, some of its records)


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read by itself."""

    file: str
    start: int  # byte of the decompressed content at which a line or web record starts; parquet, datasets: row
    stop: int  # the same, exclusive
    num_bytes: int  # of text, about
    first_line: int = 0  # lines: the number of the line at `start`; 0: not known
    frame_at: int = 0  # a byte of the file from which it can be decompressed,
    frame_start: int = 0  # and the byte of the content there; at most `start`
    stamp: str = ""  # the file's size and time when it was scanned


# ---- jsonl, plain and compressed


def scan_lines(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """Pieces of at least `piece_bytes`. A compressed file is passed over, which also finds whether it is whole."""
    if compression(file):
        return _scan_by_reading(file, settings, piece_bytes)
    with open_raw(file) as opened:
        if not opened.seekable():
            return _scan_by_reading(file, settings, piece_bytes)
        check_magic(file, opened.read(4))
        size = opened.seek(0, os.SEEK_END)
        starts = [0] if size else []
        while starts and (start := _line_start(opened, starts[-1] + piece_bytes, size)) < size:
            starts.append(start)
    ends = [*starts[1:], size]
    return [Piece(file, a, b, b - a, int(a == 0), a, a) for a, b in zip(starts, ends, strict=bool(starts))]


def _line_start(opened: Any, at: int, size: int) -> int:
    """The first byte at or after `at` at which a line starts; `size` if there is none."""
    if at >= size:
        return size
    opened.seek(at - 1)
    at -= 1
    while block := opened.read1(BLOCK_BYTES):  # one range of a remote file, not more
        if (found := block.find(b"\n")) >= 0:
            return at + found + 1
        at += len(block)
    return size


def _scan_by_reading(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    pieces: list[Piece] = []
    position = start = frame_start = frame_at = line_start = 0
    line = first_line = 1
    frame = (0, 0)

    def close(stop: int) -> None:
        if stop > start:
            pieces.append(Piece(file, start, stop, stop - start, first_line, *frame))

    for block_frame, block in blocks(file):
        if block_frame != frame_at:
            frame_at, frame_start = block_frame, position
        done = 0
        while (cut := block.find(b"\n", max(done, start + piece_bytes - 1 - position))) >= 0:
            line += block.count(b"\n", done, cut + 1)
            done = cut + 1
            close(position + done)
            start, first_line, frame = position + done, line, (frame_at, frame_start)
        line += block.count(b"\n", done)
        if (last := block.rfind(b"\n")) >= 0:
            line_start = position + last + 1
        position += len(block)
        if position - line_start > settings.max_document_bytes and settings.on_error == "stop":
            raise DataError(f"{file}:{line}: {too_long(settings)}, or set data.build.on_error=skip")
    close(position)
    return pieces


def read_lines(pieces: list[Piece], settings: BuildConfig) -> Batches:
    loads, key = orjson.loads, settings.text_key
    for index, group in groupby(_slices(pieces), key=itemgetter(0)):
        piece, offset, number = pieces[index], pieces[index].start, 0  # number: lines of the piece before this batch
        for lines, num_bytes in _split((block for _, block in group), settings.max_document_bytes):
            if not lines:
                yield index, [f"{_place(piece, number, offset, settings.on_error)}: {too_long(settings)}"]
                offset, number = offset + num_bytes, number + 1
                continue
            starts = list(accumulate([len(line) + 1 for line in lines], initial=offset))
            try:  # all lines at once: half of the time that a loop with the checks inside takes
                texts = [loads(line)[key] for line in lines]
                good = set(map(type, texts)) == {str}
            except (ValueError, KeyError, TypeError, IndexError):
                good = False
            if good:
                places = [f"{piece.file}: byte {start}" for start in starts]
                records: list[Record] = list(map(Document, texts, places))
            else:
                records = list(_one_by_one(piece, lines, starts, number, settings))
            offset, number = offset + num_bytes, number + len(lines)
            texts = []
            lines.clear()  # one may be very long, and is not needed beside its text
            yield index, records


def _one_by_one(
    piece: Piece, lines: list[bytes | bytearray], starts: list[int], number: int, settings: BuildConfig
) -> Iterator[Record]:
    """The records of lines of which at least one is blank, broken, or fine but not for the fast parser (NaN)."""
    for line_number, line, start in zip(count(number), lines, starts, strict=False):
        try:
            text = orjson.loads(line)[settings.text_key]
        except (ValueError, KeyError, TypeError, IndexError):
            text = None
        wrong = ""
        if type(text) is not str:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not line or line.isspace():
                continue
            text, wrong = _parse(line, settings.text_key)
        if wrong:
            yield f"{_place(piece, line_number, start, settings.on_error)}: {wrong}"
        else:
            yield Document(text, f"{piece.file}: byte {start}")


def _parse(line: bytes | bytearray, key: str) -> tuple[str, str]:
    """(text, what is wrong) of a line; one of the two is empty."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 ({error}); convert the file to UTF-8"
    except (ValueError, RecursionError) as error:
        return "", f"is not valid JSON ({error}); repair or remove the line"
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        if isinstance(record, dict) and key in record:
            found = f"{key}: {json.dumps(text)[:50]}"
        return "", f"has no text under `{key}` (found: {found}); set data.build.text_key"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"holds half of a surrogate pair, which is not UTF-8 ({error}); repair or remove the line"
    return text, ""


def _slices(pieces: list[Piece]) -> Iterator[tuple[int, bytes]]:
    """(index of the piece, its next bytes), in one pass over the file."""
    file, position, index = pieces[0].file, pieces[0].frame_start, 0
    for _, block in blocks(file, pieces[0].frame_at):
        end = position + len(block)
        while pieces[index].start < end:
            piece = pieces[index]
            if data := block[max(piece.start - position, 0) : piece.stop - position]:
                yield index, data
            if piece.stop > end:
                break
            index += 1
            if index == len(pieces):
                return
        position = end
    raise DataError(f"{file}: ends at byte {position} of its content, before {pieces[-1].stop}; it was changed")


def _split(blocks: Iterator[bytes], limit: int) -> Iterator[tuple[list[bytes | bytearray], int]]:
    """(lines without their ends, bytes with the ends); a line longer than `limit` comes alone, as an empty list."""
    held = bytearray()  # the beginning of a line; grows where it lies, which a long line feels
    num_held = 0
    for block in blocks:
        lines: list[bytes | bytearray] = [*block.split(b"\n")]
        if len(lines) > 1:
            num_bytes = num_held + len(block) - len(lines[-1])
            first = num_held + len(lines[0])
            if first <= limit:
                held += lines[0]
            lines[0], rest = held, lines.pop()
            held, num_held = bytearray(), 0
            if num_bytes <= limit:
                yield lines, num_bytes
            else:
                for size, line in zip([first, *map(len, lines[1:])], lines, strict=True):
                    yield ([line] if size <= limit else []), size + 1
        else:
            rest = block
        num_held += len(rest)
        if num_held <= limit:
            held += rest
        else:
            held = bytearray()
    if num_held:
        yield ([held] if num_held <= limit else []), num_held


def _place(piece: Piece, number: int, at: int, on_error: str) -> str:
    """file:line of the piece's line `number`, which starts at the byte `at`.

    If it is not known how many lines are before the piece, they are counted when this ends the build; else the byte has
    to do.
    """
    first = piece.first_line
    if not first and on_error == "skip":
        return f"{piece.file}: byte {at}"
    if not first:
        first, position = 1, 0
        for _, block in blocks(piece.file):
            first += block.count(b"\n", 0, max(piece.start - position, 0))
            position += len(block)
            if position >= piece.start:
                break
    return f"{piece.file}:{first + number}"


def too_long(settings: BuildConfig) -> str:
    return (
        f"is longer than data.build.max_document_bytes={settings.max_document_bytes}; "
        f"set it higher, cut or remove the document"
    )


# ---- txt


def scan_text(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """One piece: a text file is one document."""
    with open_raw(file) as opened:
        if not opened.seekable():
            return [Piece(file, 0, size, size) for size in [sum(len(block) for _, block in blocks(file))]]
        check_magic(file, opened.read(4))
        size = opened.seek(0, os.SEEK_END)
    return [Piece(file, 0, size, size)]


def read_text(pieces: list[Piece], settings: BuildConfig) -> Batches:
    file = pieces[0].file
    if pieces[0].stop > settings.max_document_bytes:
        yield 0, [f"{file}: {too_long(settings)}"]
        return
    with open_raw(file) as opened:
        content = opened.read()
    try:
        yield 0, [Document(content.decode("utf-8").removeprefix("\ufeff"), file)]
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield 0, [f"{file}:{line}: is not UTF-8 (byte 0x{content[error.start]:02x}); convert the file to UTF-8"]


# ---- docstrings of the installed packages


def scan_docstrings(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """One piece: what is where is known only after all packages were read."""
    return [Piece(file, 0, 1, DOCSTRINGS_BYTES)]


def read_docstrings(pieces: list[Piece], settings: BuildConfig) -> Batches:
    from data_pipeline import docstrings

    for text, place in docstrings.read_docstrings():
        yield 0, [Document(text, place)]
