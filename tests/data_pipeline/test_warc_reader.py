"""Web archives, written by warcio."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.sources import Document, read_pieces, scan

WHOLE = 1 << 62
STOP, SKIP = BuildConfig(), BuildConfig(on_error="skip")
NAMES = ["a.warc", "a.warc.gz", "a.warc.zst"]


class Archive:
    """Writes the records of an archive, each a member of its own if compressed."""

    def __init__(self, file: Path) -> None:
        self.file, self.out = file, io.BytesIO()
        self.writer = WARCWriter(self.out, gzip=file.name.endswith(".gz"))
        self.writer.write_record(self.writer.create_warcinfo_record(file.name, {"software": "test"}))

    def page(self, payload: bytes, content_type: str = "text/html", status: str = "200 OK", **headers: str) -> None:
        http = StatusAndHeaders(status, [("Content-Type", content_type), *headers.items()], protocol="HTTP/1.1")
        request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "x.org")], is_http_request=True)
        for kind, body, lines in (("request", b"", request), ("response", payload, http)):
            record = self.writer.create_warc_record("http://x.org/", kind, payload=io.BytesIO(body), http_headers=lines)
            self.writer.write_record(record)

    def text(self, payload: bytes) -> None:
        record = self.writer.create_warc_record(
            "http://x.org/", "conversion", payload=io.BytesIO(payload), warc_content_type="text/plain"
        )
        self.writer.write_record(record)

    def save(self) -> Path:
        content = self.out.getvalue()
        if self.file.suffix == ".zst":  # warcio writes none; as two frames
            half = len(content) // 2
            content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
        self.file.write_bytes(content)
        return self.file


def read(file: Path, settings: BuildConfig = STOP, piece_bytes: int = WHOLE) -> tuple[list[Document], list[str]]:
    said: list[str] = []
    report = (lambda _, message: said.append(message)) if settings.on_error == "skip" else None
    pieces = scan(str(file), settings, piece_bytes)
    return [document for _, document in read_pieces(pieces, settings, report)], said


def texts(file: Path) -> list[str]:
    return [document.text for document in read(file)[0]]


def error_of(file: Path, settings: BuildConfig = STOP) -> str:
    with pytest.raises(DataError) as caught:
        read(file, settings)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz", "a.warc.wet.gz", "a.wet.zst"])
def test_texts_of_wet_files(tmp_path, name):
    archive = Archive(tmp_path / name)
    expected = [f"Seite {number}: größer\nzweite Zeile" for number in range(20)]
    for text in [*expected, " \n"]:
        archive.text(text.encode())
    assert texts(archive.save()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_pages_of_warc_files_stay_html(tmp_path, name):
    archive = Archive(tmp_path / name)
    archive.page("<p>größer</p>".encode(), "text/html; charset=utf-8")
    archive.page(b"<html/>", "application/xhtml+xml")
    assert texts(archive.save()) == ["<p>größer</p>", "<html/>"]


def test_what_is_no_page_is_passed_over(tmp_path):
    archive = Archive(tmp_path / "a.warc.gz")
    archive.page(b"\x89PNG", "image/png")
    archive.page(b"{}", "application/json")
    archive.page(b"<p>not found</p>", status="404 Not Found")
    archive.page(b"<p>moved</p>", status="301 Moved Permanently")
    archive.page(b"<p>page</p>")
    assert read(archive.save(), SKIP) == ([Document("<p>page</p>", read(archive.file)[0][0].place)], [])


@pytest.mark.parametrize(
    ("page", "content_type"),
    [
        ("<p>größer</p>".encode("latin-1"), "text/html; charset=ISO-8859-1"),
        ("<p>größer</p>".encode("cp1252"), 'text/html; charset="windows-1252"'),
        ('<meta charset="iso-8859-1"><p>größer</p>'.encode("latin-1"), "text/html"),
        ('<meta charset="utf-8"><p>größer</p>'.encode(), "text/html"),
        ("\ufeff<p>größer</p>".encode("utf-16"), "text/html; charset=utf-16"),
        ("<p>größer</p>".encode("latin-1"), "text/html; charset=utf-8"),  # false, as it happens
        ("<p>größer</p>".encode(), "text/html; charset=no-such-thing"),
    ],
)
def test_pages_are_decoded_by_their_charset(tmp_path, page, content_type):
    archive = Archive(tmp_path / "a.warc.gz")
    archive.page(page, content_type)
    assert [text.endswith("<p>größer</p>") for text in texts(archive.save())] == [True]


def test_japanese_page_is_decoded_by_the_charset_it_names(tmp_path):
    archive = Archive(tmp_path / "a.warc.gz")
    archive.page('<meta charset="shift_jis"><p>日本語の文章</p>'.encode("shift_jis"))
    archive.page("<p>日本語の文章</p>".encode("euc_jp"), "text/html; charset=euc-jp")
    assert all("<p>日本語の文章</p>" in text for text in texts(archive.save()))


def test_transfer_and_content_encodings_are_undone(tmp_path):
    archive = Archive(tmp_path / "a.warc")
    archive.page(b"7\r\n<p>in t\r\n8\r\nwo</p>\r\n\r\n0\r\n\r\n", **{"Transfer-Encoding": "chunked"})
    archive.page(gzip.compress(b"<p>gzip</p>"), **{"Content-Encoding": "gzip"})
    assert texts(archive.save()) == ["<p>in two</p>\r\n", "<p>gzip</p>"]


@pytest.mark.parametrize("name", [*NAMES, "one_member.warc.gz"])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 5000])
def test_any_cutting_gives_the_records_of_the_whole(tmp_path, name, piece_bytes):
    archive = Archive(tmp_path / name.replace("one_member.warc.gz", "a.warc"))
    for number in range(40):
        archive.page(f"<p>{number} {'x' * 37 * number}</p>".encode())
    file = archive.save()
    if name.startswith("one_member"):
        file = tmp_path / name
        file.write_bytes(gzip.compress(archive.file.read_bytes()))
    whole = read(file)[0]
    pieces = scan(str(file), STOP, piece_bytes)
    together = list(read_pieces(pieces, STOP))
    assert len(whole) == 40 and len(pieces) > 5
    assert [document for _, document in together] == whole
    for index, piece in enumerate(pieces):
        alone = [document for _, document in read_pieces([piece], STOP)]
        assert alone == [document for number, document in together if number == index]
    assert all(piece.num_bytes >= piece_bytes for piece in pieces[:-1])


def test_records_that_are_members_are_reached_without_what_is_before(tmp_path):
    archive = Archive(tmp_path / "a.warc.gz")
    for number in range(40):
        archive.text(f"text {number}".encode())
    last = scan(str(archive.save()), STOP, 1)[-1]
    assert last.frame_start == last.start and last.frame_at > 0.9 * archive.file.stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_archive_that_is_cut_off_is_found_by_the_scan(tmp_path, name):
    archive = Archive(tmp_path / name)
    for number in range(3):
        archive.text(f"text {number} ".encode() * 50)
    whole = archive.save().read_bytes()
    for length in range(len(whole) // 2, len(whole), 7):
        archive.file.write_bytes(whole[:length])
        if ends_between_records(name, whole[:length]):
            continue  # nothing tells that there were more
        with pytest.raises(DataError, match=f"{archive.file}: is (cut off|damaged)"):
            scan(str(archive.file), STOP, WHOLE)


def ends_between_records(name: str, content: bytes) -> bool:
    if name == "a.warc.gz":
        try:
            content = gzip.decompress(content)
        except EOFError:
            return False
    return name != "a.warc.zst" and content.endswith(b"\r\n\r\n")


def test_what_is_no_archive_is_named(tmp_path):
    file = tmp_path / "a.warc"
    file.write_bytes(b"this is something else\n" * 10)
    assert f"{file}: is damaged or no web archive" in error_of(file)
    file.write_bytes(b"")
    assert read(file) == ([], [])


def test_broken_records_are_named_or_skipped(tmp_path):
    archive = Archive(tmp_path / "a.warc.gz")
    archive.text(b"before")
    archive.text(b"\xff\xfe")
    archive.text(b"x" * 101)
    archive.page(gzip.compress(b"x" * 100_000), **{"Content-Encoding": "gzip"})  # long only when decompressed
    archive.page(b"not gzip", **{"Content-Encoding": "gzip"})
    archive.text(b"after")
    archive.save()
    documents, said = read(archive.file, BuildConfig(max_document_bytes=1000, on_error="skip"))
    assert [document.text for document in documents] == ["before", "x" * 101, "after"]
    assert [message.split(": ", 2)[2].split("(")[0].strip() for message in said] == [
        "is not UTF-8", "is longer than data.build.max_document_bytes=1000; set it higher, cut or remove the document",
        "holds no readable answer of a web server",
    ]  # fmt: skip
    documents, said = read(archive.file, BuildConfig(max_document_bytes=100, on_error="skip"))
    assert [document.text for document in documents] == ["before", "after"] and len(said) == 4
    assert f"{archive.file}: byte " in error_of(archive.file) and "is not UTF-8" in error_of(archive.file)
