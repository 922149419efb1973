"""Bytes of a file, decompressed in blocks; damage and false names are noticed."""

from __future__ import annotations

import gzip
import os

import pytest
import zstandard

from data_pipeline import files
from data_pipeline.errors import DataError

CONTENT = b"".join(b"line %d\n" % number for number in range(200))
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress}


def content_of(file) -> bytes:
    with files.open_bytes(str(file)) as opened:
        return opened.read()


def error_of(file) -> str:
    with pytest.raises(DataError) as caught:
        content_of(file)
    return str(caught.value)


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_files_of_several_frames_are_read_to_the_end(tmp_path, kind):
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(b"".join(COMPRESS[kind](CONTENT[i : i + 100]) for i in range(0, len(CONTENT), 100)))
    assert content_of(file) == CONTENT


@pytest.mark.parametrize("kind", COMPRESS)
def test_content_can_be_read_from_every_frame_on(tmp_path, kind):
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(COMPRESS[kind](CONTENT) + COMPRESS[kind](b"second") + COMPRESS[kind](b"third"))
    frames = {frame: position for position, (frame, _) in enumerate(files.blocks(str(file)))}
    rests = [b"".join(block for _, block in files.blocks(str(file), frame)) for frame in frames]
    assert rests == [CONTENT + b"secondthird", b"secondthird", b"third"]


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_file_that_is_cut_off_anywhere_is_named(tmp_path, kind):
    whole = COMPRESS[kind](b"some content, some more content")
    file = tmp_path / f"a.jsonl.{kind}"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert f"{file}: is cut off" in error_of(file)


def test_flipped_bit_in_a_gzip_file_is_noticed(tmp_path):
    whole = bytearray(gzip.compress(CONTENT))
    file = tmp_path / "a.jsonl.gz"
    for position in range(20, len(whole)):  # past the header, which holds a time that nothing checks
        damaged = whole.copy()
        damaged[position] ^= 1
        file.write_bytes(damaged)
        assert str(file) in error_of(file)


@pytest.mark.parametrize("kind", COMPRESS)
def test_what_is_not_compressed_at_all_is_damaged(tmp_path, kind):
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(b"not compressed at all")
    assert f"{file}: is damaged" in error_of(file)


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [
        ("a.jsonl.zst", gzip.compress(CONTENT), "is a gzip file by its first bytes; rename it to end in .gz"),
        ("a.jsonl.gz", zstandard.compress(CONTENT), "is a zstandard file by its first bytes; rename it to end in .zst"),
        ("a.jsonl", gzip.compress(CONTENT), "is a gzip file by its first bytes; rename it to end in .gz"),
        ("a.txt", b"PAR1 and so on", "is a parquet file by its first bytes; rename it to end in .parquet"),
    ],
)
def test_file_of_another_kind_than_its_name_says_is_refused(tmp_path, name, content, cure):
    (tmp_path / name).write_bytes(content)
    assert cure in error_of(tmp_path / name)


def test_highly_compressed_content_comes_in_blocks_of_bounded_size(tmp_path):
    compressor = zstandard.ZstdCompressor()
    file = tmp_path / "zeros.jsonl.zst"
    with open(file, "wb") as opened, compressor.stream_writer(opened) as writer:
        for _ in range(300):
            writer.write(bytes(1 << 20))
    sizes = [len(block) for _, block in files.blocks(str(file))]
    assert sum(sizes) == 300 << 20
    assert max(sizes) <= 129 << 20 < sum(sizes)


def test_open_bytes_gives_lines(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(CONTENT))
    with files.open_bytes(str(tmp_path / "a.jsonl.zst")) as lines:
        assert list(lines) == CONTENT.splitlines(keepends=True)


def test_stamp_tells_size_and_time_apart(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(1, 1_700_000_000_000_000_001))
    stamps = {files.stamp(str(file))}
    os.utime(file, ns=(1, 1_700_000_000_000_000_002))  # a nanosecond later
    stamps.add(files.stamp(str(file)))
    file.write_text("three")
    os.utime(file, ns=(1, 1_700_000_000_000_000_002))
    stamps.add(files.stamp(str(file)))
    assert len(stamps) == 3


def test_size_and_stamp_of_a_folder_are_of_its_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_bytes(bytes(3))
    (tmp_path / "b").write_bytes(bytes(4))
    before = files.stamp(str(tmp_path))
    assert files.size_of(str(tmp_path)) == 7
    (tmp_path / "in/a").write_bytes(bytes(2))
    assert files.stamp(str(tmp_path)) != before
