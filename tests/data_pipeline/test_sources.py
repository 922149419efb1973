"""Reading text files of every kind; a broken record is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_pipeline.shards import DataError
from data_pipeline.sources import find_files, read_documents

TEXTS = ["first text", "zweiter Text, größer", "三番目\nwith a second line"]


def lines(key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def read(*sources: str | Path, key: str = "text", skipped=None) -> list[str]:
    return [d.text for d in read_documents(find_files([str(s) for s in sources]), key, skipped)]


def error_of(*sources: str | Path, key: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(*sources, key=key)
    return str(caught.value)


def test_jsonl_plain_gzip_and_zstandard_give_the_same_texts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines()))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert read(tmp_path / name) == TEXTS


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_parquet_gives_its_column(tmp_path):
    parquet.write_table(pa.table({"body": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", key="body") == TEXTS
    assert "has no column `text` (found: body, n)" in error_of(tmp_path / "a.parquet")


def test_datasets_on_disk_gives_its_column(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == TEXTS
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "several")
    assert "holds several splits (train)" in error_of(tmp_path / "several")
    assert read(tmp_path / "several/train") == TEXTS


def test_folders_and_globs_are_read_in_sorted_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(tmp_path) == read(f"{tmp_path}/*.txt") == ["a", "b"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": " \\n "}\n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["x"]


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nalso fine\nnot \xe9 fine\n")
    message = error_of(tmp_path / "a.txt")
    assert f"{tmp_path}/a.txt:3: is not UTF-8 (byte 0xe9)" in message and "on_error=skip" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"body": "x"}', "has no text under `text` (found: body)"),
        (b'{"text": 5}', "has no text under `text`"),
        (b'["text"]', "has no text under `text` (found: list)"),
        (b'{"text": "\\ud800"}', "is not UTF-8"),
    ],
)
def test_broken_jsonl_line_is_named_or_skipped_and_counted(tmp_path, line, expected):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    message = error_of(file)
    assert message.startswith(f"{file}:2: ") and expected in message
    skipped: list[str] = []
    assert read(file, skipped=skipped.append) == ["before", "after"]
    assert len(skipped) == 1 and f"{file}:2" in skipped[0]


def test_sources_that_do_not_exist_or_are_of_an_unknown_kind_are_named(tmp_path):
    assert "no such file or folder" in error_of(tmp_path / "none*.txt")
    (tmp_path / "a.docx").write_text("x")
    assert "unknown kind of file; known: .txt" in error_of(tmp_path / "a.docx")
    (tmp_path / "empty").mkdir()
    assert "holds no file of a known kind" in error_of(tmp_path / "empty")
    assert "data.build.sources is empty" in error_of()


def test_compressed_files_of_several_frames_are_read_to_the_end(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()) * 3)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines()) * 3)
    assert read(tmp_path / "a.jsonl.gz") == read(tmp_path / "b.jsonl.zst") == TEXTS * 3


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_file_that_is_cut_off_or_damaged_is_named(tmp_path, kind):
    whole = gzip.compress(lines()) if kind == "gz" else zstandard.ZstdCompressor().compress(lines())
    file = tmp_path / f"a.jsonl.{kind}"
    for length in range(1, len(whole)):
        file.write_bytes(whole[:length])
        assert f"{file}: is cut off" in error_of(file)
    file.write_bytes(b"not compressed at all")
    assert f"{file}: is damaged" in error_of(file)
