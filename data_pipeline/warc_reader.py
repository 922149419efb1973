"""Reader of web archives: the text of WET files' records, the HTML of WARC files' pages; see readers.py.

A record starts anywhere in the decompressed content, as a line does: a piece is a range of that content from the start
of a record to the start of another. Where records are members of a .gz, as is the custom, each can be reached at once.
HTML stays HTML: making text of it is the work of a later stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.files import blocks
from data_pipeline.readers import Batches, Document, Piece, Record, too_long

HTML_TYPES = ("text/html", "application/xhtml+xml")


def scan_warc(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """Pieces of at least `piece_bytes` of content; the whole file is passed over, which finds whether it is whole."""
    content = Content(file)
    pieces: list[Piece] = []
    start, frame = 0, (0, 0)
    for record in _records(file, content):
        position = record.stream_pos
        if position - start >= piece_bytes:
            pieces.append(Piece(file, start, position, position - start, 0, *frame))
            start, frame = position, content.frame_of(position)
        length = record.content_length
        if record.consume() != length:
            raise DataError(f"{file}: is cut off in the record at byte {position} of its content; copy it again")
    content.pass_over(1 << 62)
    end = content.position
    if end and not content.last.endswith((b"\r\n\r\n", b"\n\n")):  # two empty lines end a record
        raise DataError(f"{file}: is cut off at byte {end} of its content; copy it again")
    if end > start:
        pieces.append(Piece(file, start, end, end - start, 0, *frame))
    return pieces


def read_warc(pieces: list[Piece], settings: BuildConfig) -> Batches:
    index, piece = 0, pieces[0]
    content = Content(piece.file, piece.frame_at, piece.frame_start)
    content.pass_over(piece.start)
    for record in _records(piece.file, content):
        position = record.stream_pos
        while index < len(pieces) and position >= pieces[index].stop:
            index += 1
        if index == len(pieces):
            return
        if position >= pieces[index].start and (found := _record(record, piece.file, position, settings)) is not None:
            yield index, [found]


class Content:
    """The decompressed content of a file as a stream that knows its position and where the last frames began."""

    def __init__(self, file: str, frame_at: int = 0, frame_start: int = 0) -> None:
        self.blocks, self.rest, self.position = blocks(file, frame_at), memoryview(b""), frame_start
        self.last = b""  # the last bytes that were read
        self.frames = [(frame_at, frame_start)]  # (byte of the file, byte of the content) of frames begun

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none only at the end."""
        while not self.rest:
            frame_at, block = next(self.blocks, (0, b""))
            if not block:
                return b""
            if frame_at != self.frames[-1][0]:
                self.frames.append((frame_at, self.position))
            self.rest = memoryview(block)
        data, self.rest = bytes(self.rest[:size]), self.rest[size:]
        self.position += len(data)
        self.last = (self.last + data)[-4:] if len(data) < 4 else data[-4:]
        return data

    def pass_over(self, position: int) -> None:
        while self.position < position and self.read(min(position - self.position, 1 << 18)):
            pass

    def frame_of(self, position: int) -> tuple[int, int]:
        """The last frame that begins at or before `position`; positions asked for do not go back."""
        while len(self.frames) > 1 and self.frames[1][1] <= position:
            del self.frames[0]
        return self.frames[0]


def _records(file: str, content: Any) -> Iterator[Any]:
    from fastwarc.warc import ArchiveIterator

    try:
        yield from ArchiveIterator(content, parse_http=False, stream_detect=False)
    except OSError as error:
        raise DataError(f"{file}: is damaged or no web archive ({error}); copy it again") from error


def _record(record: Any, file: str, position: int, settings: BuildConfig) -> Record | None:
    """What a record of the archive gives: text, HTML, a fault, or None if it is of a kind that holds neither."""
    from fastwarc.warc import WarcRecord, WarcRecordType

    place = f"{file}: byte {position}"
    if record.record_type not in (WarcRecordType.conversion, WarcRecordType.response):
        return None
    if record.content_length > settings.max_document_bytes:
        return f"{place}: {too_long(settings)}"
    if record.record_type == WarcRecordType.conversion:
        try:
            return Document(record.reader.read().decode("utf-8"), place)
        except UnicodeDecodeError as error:
            return f"{place}: is not UTF-8 ({error}); remove the record"
    answer = WarcRecord()  # a copy: a fault in the encoding of a page is this record's, not the archive's
    answer.init_headers(record_type=WarcRecordType.response)
    answer.set_bytes_content(record.reader.read())
    answer.is_http = True
    try:
        answer.parse_http(auto_decode="all")
        if answer.http_content_type not in HTML_TYPES or answer.http_headers.status_code != 200:
            return None
        page = _read_up_to(answer.reader, settings.max_document_bytes + 1)
    except OSError as error:
        return f"{place}: holds no readable answer of a web server ({error}); remove the record"
    if len(page) > settings.max_document_bytes:
        return f"{place}: {too_long(settings)}"
    return Document(_decode(page, answer.http_charset), place)


def _read_up_to(reader: Any, limit: int) -> bytes:
    """The content of a reader, or its first bytes, at least `limit`: what a small record unfolds to has no bound."""
    page = bytearray()
    while len(page) < limit and (block := reader.read(1 << 16)):
        page += block
    return bytes(page)


def _decode(page: bytes, charset: str | None) -> str:
    """The page as text, by the charset of the HTTP header, else of the page itself, else by its statistics."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    encoding = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    return bytes_to_str(page, encoding or detect_encoding(page, from_html_meta=True) or "utf-8")
