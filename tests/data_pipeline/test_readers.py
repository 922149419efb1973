"""Lines and text files: any cutting gives the same documents, and what is broken is named by its line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import BuildConfig
from data_pipeline import files, readers
from data_pipeline.errors import DataError
from data_pipeline.sources import Document, read_pieces, scan

WHOLE = 1 << 62  # piece_bytes so large that a file is one piece
SKIP = BuildConfig(on_error="skip")
STOP = BuildConfig()
BROKEN = [
    (b'{"text": "cut', "is not valid JSON"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"body": "x"}', "has no text under `text` (found: body)"),
    (b'{"text": 5}', "has no text under `text` (found: text: 5)"),
    (b'{"text": null}', "has no text under `text` (found: text: null)"),
    (b'{"text": ["a"]}', 'has no text under `text` (found: text: ["a"])'),
    (b'["text"]', "has no text under `text` (found: list)"),
    (b'"text"', "has no text under `text` (found: str)"),
    (b"null", "has no text under `text` (found: NoneType)"),
    (b'{"text": "\\ud800"}', "holds half of a surrogate pair"),
    (b"\0\0\0\0", "is not valid JSON"),
    (b"[" * 100_000, "is not valid JSON"),
]


def write(file: Path, content: bytes, frame_bytes: int = 1 << 30) -> Path:
    """`content`, compressed as the file's name says, in frames or members of `frame_bytes` of content."""
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(file.suffix)
    if compress is not None:
        starts = range(0, max(len(content), 1), frame_bytes)
        content = b"".join(compress(content[start : start + frame_bytes]) for start in starts)
    file.write_bytes(content)
    return file


def read(file: Path, settings: BuildConfig = STOP, piece_bytes: int = WHOLE) -> tuple[list[Document], list[str]]:
    """(documents, what was said of broken records), piece by piece in one pass."""
    said: list[str] = []
    report = (lambda _, message: said.append(message)) if settings.on_error == "skip" else None
    pieces = scan(str(file), settings, piece_bytes)
    return [document for _, document in read_pieces(pieces, settings, report)], said


def texts(file: Path, settings: BuildConfig = STOP, piece_bytes: int = WHOLE) -> list[str]:
    return [document.text for document in read(file, settings, piece_bytes)[0]]


def error_of(file: Path, settings: BuildConfig = STOP, piece_bytes: int = WHOLE) -> str:
    with pytest.raises(DataError) as caught:
        read(file, settings, piece_bytes)
    return str(caught.value)


def reference(content: bytes) -> tuple[list[str], list[int]]:
    """(texts, numbers of broken lines) by the plainest way."""
    found, broken = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))["text"]
            text.encode("utf-8")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken.append(number)
        else:
            found += [text] if text.strip() else []
    return found, broken


texts_of_any_kind = st.text(max_size=30)
good_lines = st.builds(lambda text, escape: json.dumps({"n": 1, "text": text}, ensure_ascii=escape).encode("utf-8"),
                       texts_of_any_kind, st.booleans())  # fmt: skip
bad_lines = st.sampled_from([line for line, _ in BROKEN[:11]] + [b"", b"  ", b'{"text": "fine", "x": NaN}'])
line_lists = st.lists(st.one_of(good_lines, bad_lines), max_size=30)


@given(
    lines=line_lists,
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]),
    piece_bytes=st.integers(1, 300),
    frame_bytes=st.integers(20, 300),
    block_bytes=st.integers(1, 50),
    end=st.sampled_from([b"\n", b""]),
)
def test_any_cutting_gives_the_records_of_the_whole(lines, suffix, piece_bytes, frame_bytes, block_bytes, end):
    content = b"\n".join(lines) + end
    expected, broken = reference(content)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(files, "BLOCK_BYTES", block_bytes),
        patch.object(readers, "BLOCK_BYTES", block_bytes),
    ):
        file = write(Path(folder) / f"a{suffix}", content, frame_bytes)
        whole, said_of_whole = read(file, SKIP)
        pieces = scan(str(file), SKIP, piece_bytes)
        said: list[str] = []
        together = [found for _, found in read_pieces(pieces, SKIP, lambda _, message: said.append(message))]
        alone = [found for piece in pieces for _, found in read_pieces([piece], SKIP, lambda *_: None)]
    assert [document.text for document in whole] == expected
    assert together == alone == whole
    assert [message.split(":")[1] for message in said_of_whole] == [str(number) for number in broken]
    assert len(said) == len(broken)
    assert all(piece.num_bytes >= piece_bytes for piece in pieces[:-1])
    assert [piece.stop for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
    assert sum(piece.num_bytes for piece in pieces) == len(content)


@given(lines=line_lists, piece_bytes=st.integers(1, 300))
def test_plain_and_compressed_files_are_cut_at_the_same_lines(lines, piece_bytes):
    with tempfile.TemporaryDirectory() as folder:
        cuts = []
        for suffix in ("", ".gz", ".zst"):
            file = write(Path(folder) / f"a.jsonl{suffix}", b"\n".join(lines))
            cuts.append([(piece.start, piece.stop) for piece in scan(str(file), SKIP, piece_bytes)])
    assert cuts[0] == cuts[1] == cuts[2]


def test_index_tells_the_piece_of_each_document(tmp_path):
    file = write(tmp_path / "a.jsonl", b"".join(b'{"text": "%d"}\n' % number for number in range(100)))
    pieces = scan(str(file), STOP, 100)
    assert len(pieces) > 10
    for index, document in read_pieces(pieces, STOP):
        start = int(document.place.rpartition(" ")[2])
        assert pieces[index].start <= start < pieces[index].stop


def test_place_is_the_byte_at_which_the_line_starts(tmp_path):
    content = '{"text": "ä"}\n\n{"text": "b"}\n{"text": "c"}'.encode()
    for name in ("a.jsonl", "a.jsonl.zst"):
        for document in read(write(tmp_path / name, content))[0]:
            start = int(document.place.removeprefix(f"{tmp_path / name}: byte "))
            assert json.loads(content[start:].split(b"\n")[0])["text"] == document.text


def test_pieces_of_several_files_and_pieces_left_out_are_read_in_the_order_given(tmp_path):
    a = write(tmp_path / "a.jsonl.zst", b"".join(b'{"text": "a%d"}\n' % number for number in range(9)))
    b = write(tmp_path / "b.jsonl", b"".join(b'{"text": "b%d"}\n' % number for number in range(9)))
    of_a, of_b = scan(str(a), STOP, 1), scan(str(b), STOP, 1)
    pieces = [of_a[1], of_a[4], of_b[8], of_b[2], of_a[0]]
    found = [(index, document.text) for index, document in read_pieces(pieces, STOP)]
    assert found == [(0, "a1"), (1, "a4"), (2, "b8"), (3, "b2"), (4, "a0")]


def test_neighbouring_pieces_cost_one_pass_over_a_compressed_file(tmp_path):
    file = write(tmp_path / "a.jsonl.gz", b"".join(b'{"text": "%d"}\n' % number for number in range(1000)))
    pieces = scan(str(file), STOP, 100)
    with patch.object(readers, "blocks", wraps=files.blocks) as opened:
        assert len(list(read_pieces(pieces, STOP))) == 1000
    assert len(pieces) > 50 and opened.call_count == 1


def test_piece_of_a_file_of_many_frames_is_reached_without_what_is_before(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(100_000))
    file = write(tmp_path / "a.jsonl.zst", lines, frame_bytes=10_000)
    last = scan(str(file), STOP, 10_000)[-1]
    assert last.frame_at > 0.98 * file.stat().st_size and 0 <= last.start - last.frame_start <= 20_000
    assert [document.text for _, document in read_pieces([last], STOP)][-1] == "99999"


@pytest.mark.parametrize(("line", "expected"), BROKEN)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_broken_line_is_named_or_skipped_and_counted(tmp_path, line, expected, suffix):
    file = write(tmp_path / f"a{suffix}", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    for piece_bytes in (WHOLE, 1):
        message = error_of(file, piece_bytes=piece_bytes)
        assert message.startswith(f"{file}:2: ") and expected in message and "data.build.on_error=skip" in message
        documents, said = read(file, SKIP, piece_bytes)
        assert [document.text for document in documents] == ["before", "after"]
        assert len(said) == 1 and expected in said[0]


def test_wrong_text_key_names_the_keys_that_are_there(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"id": 1, "content": "x"}\n')
    assert "has no text under `text` (found: id, content); set data.build.text_key" in error_of(file)
    assert texts(file, BuildConfig(text_key="content")) == ["x"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a", "loss": NaN}', "a"),  # which Python writes and strict parsers refuse
        (b'{"text": "a", "other": "\\ud800"}', "a"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),  # a whole surrogate pair
        (b'{"text": "a\\u0000b"}', "a\0b"),  # NUL is a character; the unicode stage removes it
        (b'{"text": "a\xe2\x80\xa8b"}', "a\u2028b"),  # no line of a file ends there
        (b'{"text": "first", "text": "last"}', "last"),
        (b'\t {"text": "a"} \r', "a"),
    ],
)
def test_unusual_lines_that_are_fine(tmp_path, line, expected):
    assert texts(write(tmp_path / "a.jsonl", b'{"text": "x"}\n' + line + b"\n")) == ["x", expected]


def test_byte_order_marks_are_dropped(tmp_path):
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    assert texts(write(tmp_path / "a.jsonl", line + b'{"text": "b"}\n' + line)) == ["a", "b", "a"]
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbftext")) == ["text"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("last", [b"", b'{"text": "last"}'])
def test_ends_of_lines(tmp_path, end, last):
    content = b'{"text": "a"}' + end + b'{"text": "b"}' + end + last
    for piece_bytes in (WHOLE, 1):
        assert texts(write(tmp_path / "a.jsonl", content), STOP, piece_bytes) == ["a", "b"] + ["last"] * bool(last)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_empty_files_and_blank_documents_give_nothing(tmp_path, name):
    assert texts(write(tmp_path / name, b"")) == []
    assert texts(write(tmp_path / name, b"\n \n\t\n")) == []


def test_blank_texts_are_no_documents_and_no_errors(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"text": ""}\n{"text": " \\n "}\n{"text": "x"}\n')
    assert texts(file) == ["x"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("block_bytes", [7, 1 << 18])
def test_line_longer_than_the_limit_is_named_or_skipped(tmp_path, suffix, position, block_bytes):
    lines = [b'{"text": "a"}', b'{"text": "b"}']
    lines.insert(position, b'{"text": "' + b"x" * 100 + b'"}')
    settings = {"max_document_bytes": 100}
    for end in (b"", b"\n"):
        file = write(tmp_path / f"a{suffix}", b"\n".join(lines) + end)
        with patch.object(files, "BLOCK_BYTES", block_bytes):
            for piece_bytes in (WHOLE, 1):
                message = error_of(file, BuildConfig(**settings), piece_bytes)
                documents, said = read(file, BuildConfig(on_error="skip", **settings), piece_bytes)
                assert message.startswith(f"{file}:{position + 1}: is longer than data.build.max_document_bytes=100")
                assert [document.text for document in documents] == ["a", "b"]
                assert len(said) == 1 and "is longer than" in said[0]


def test_line_of_exactly_the_limit_is_fine(tmp_path):
    line = b'{"text": "' + b"x" * 88 + b'"}'
    assert len(line) == 100
    file = write(tmp_path / "a.jsonl", line + b"\n" + line + b"\n" + line)
    assert texts(file, BuildConfig(max_document_bytes=100)) == ["x" * 88] * 3


def test_overlong_line_of_a_compressed_file_is_found_by_the_scan(tmp_path):
    file = write(tmp_path / "a.jsonl.zst", b'{"text": "a"}\n' + b"x" * 1000)
    with pytest.raises(DataError, match=f"{file}:2: is longer than"):
        scan(str(file), BuildConfig(max_document_bytes=100), WHOLE)


def test_text_file_is_one_document(tmp_path):
    file = write(tmp_path / "a.txt", b"one\n\ntwo\n")
    assert read(file, STOP, 1) == ([Document("one\n\ntwo\n", str(file))], [])


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    file = write(tmp_path / "a.txt", b"fine\nalso fine\nnot \xe9 fine\n")
    message = error_of(file)
    assert f"{file}:3: is not UTF-8 (byte 0xe9)" in message and "on_error=skip" in message
    assert read(file, SKIP) == ([], [message.removesuffix(", or set data.build.on_error=skip")])


def test_text_file_longer_than_the_limit_is_not_read(tmp_path):
    file = write(tmp_path / "a.txt", b"x" * 101)
    with patch.object(Path, "read_bytes", side_effect=AssertionError):
        assert "a.txt: is longer than" in error_of(file, BuildConfig(max_document_bytes=100))
    assert texts(file, BuildConfig(max_document_bytes=101)) == ["x" * 101]


def test_docstrings_are_read_as_one_piece():
    pieces = scan("docstrings:", STOP, 1)
    assert len(pieces) == 1
    first = next(read_pieces(pieces, STOP))
    assert first[0] == 0 and len(first[1].text) >= 60


# Run by itself, so that its peak of memory is its own: prints MiB. (ru_maxrss would begin with the parent's.)
PEAK = r"""
import re, sys
from pathlib import Path
from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.sources import read_pieces, scan

file, on_error = sys.argv[1:]
settings = BuildConfig(on_error=on_error)
try:
    said = []
    report = (lambda _, message: said.append(message)) if on_error == "skip" else None
    pieces = scan(file, settings, 1 << 24)
    documents = sum(1 for _ in read_pieces(pieces, settings, report))
    print(documents, said)
except DataError as error:
    print(error)
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def run_alone(file: Path, on_error: str) -> tuple[str, int]:
    """(what was printed, peak of memory in MiB)."""
    done = subprocess.run([sys.executable, "-c", PEAK, file, on_error], capture_output=True, text=True, check=True)
    *printed, peak = done.stdout.splitlines()
    return "\n".join(printed), int(peak)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_line_of_a_gigabyte_is_named_within_little_memory(tmp_path, name):
    file = tmp_path / name
    if name.endswith(".zst"):
        with open(file, "wb") as opened, zstandard.ZstdCompressor().stream_writer(opened) as writer:
            writer.write(b'{"text": "short"}\n{"text": "')
            for _ in range(1024):
                writer.write(b"x" * (1 << 20))
            writer.write(b'"}\n{"text": "short"}\n')
    else:
        with open(file, "wb") as opened:
            opened.write(b'{"text": "short"}\n{"text": "')
            opened.seek(1 << 30, 1)  # a hole, read as zeros
            opened.write(b'"}\n{"text": "short"}\n')
    printed, peak = run_alone(file, "stop")
    assert f"{file}:2: is longer than data.build.max_document_bytes=128000000" in printed
    assert peak < 512
    printed, peak = run_alone(file, "skip")
    assert printed.startswith("2 [") and f"{file}:2: is longer than" in printed
    assert peak < 512


def test_tiny_documents_by_the_million_take_no_memory(tmp_path):
    peaks = {}
    for number in (10_000, 2_000_000):
        file = tmp_path / f"{number}.jsonl.zst"
        file.write_bytes(zstandard.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(number))))
        printed, peaks[number] = run_alone(file, "stop")
        assert printed == f"{number} []"
    assert peaks[2_000_000] - peaks[10_000] < 32


@pytest.mark.parametrize("repeats", [8, 200])
def test_reading_costs_little_beside_decompressing_and_parsing(tmp_path, repeats):
    """In seconds of this process, the best of several turns each: other work on the machine must not decide."""
    numbers = range(4_000_000 // (24 * repeats))
    lines = (json.dumps({"id": n, "text": f"line {n} of many lines. " * repeats}).encode() for n in numbers)
    file = str(write(tmp_path / "a.jsonl.zst", b"\n".join(lines)))
    pieces = scan(file, STOP, 1 << 20)

    def floor() -> None:
        content = b"".join(block for _, block in files.blocks(file))
        assert all(orjson.loads(line)["text"] for line in content.split(b"\n"))

    def reading() -> None:
        assert all(document.text for _, document in read_pieces(pieces, STOP))

    assert _seconds(reading) < 3 * _seconds(floor)


def _seconds(do: Callable[[], None]) -> float:
    times = []
    for _ in range(5):
        started = time.process_time()
        do()
        times.append(time.process_time() - started)
    return min(times)
