"""Parquet and `datasets` on disk: ranges of rows, whatever the row groups."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.sources import Document, Piece, read_pieces, scan

WHOLE = 1 << 62
STOP, SKIP = BuildConfig(), BuildConfig(on_error="skip")
TEXTS = ["first text", "zweiter Text, größer", "三番目\nwith a second line"]


def read(file: Path, settings: BuildConfig = STOP, piece_bytes: int = WHOLE) -> tuple[list[Document], list[str]]:
    said: list[str] = []
    report = (lambda _, message: said.append(message)) if settings.on_error == "skip" else None
    pieces = scan(str(file), settings, piece_bytes)
    return [document for _, document in read_pieces(pieces, settings, report)], said


def texts(file: Path, settings: BuildConfig = STOP, piece_bytes: int = WHOLE) -> list[str]:
    return [document.text for document in read(file, settings, piece_bytes)[0]]


def error_of(file: Path, settings: BuildConfig = STOP) -> str:
    with pytest.raises(DataError) as caught:
        read(file, settings)
    return str(caught.value)


def check_cutting(file: str, expected: list[Document], pieces: list[Piece]) -> None:
    """The pieces lie side by side and give the same documents together and each alone."""
    assert [piece.stop for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
    together = list(read_pieces(pieces, STOP))
    assert [document for _, document in together] == expected
    for index, piece in enumerate(pieces):
        alone = [document for _, document in read_pieces([piece], STOP)]
        assert alone == [document for number, document in together if number == index]
        rows = [int(document.place.rpartition(" ")[2]) for document in alone]
        assert all(piece.start < row <= piece.stop for row in rows)


@given(
    rows=st.lists(st.text(max_size=20), max_size=40),
    group_rows=st.integers(1, 20),
    piece_bytes=st.integers(1, 200),
)
def test_any_cutting_of_parquet_gives_the_rows_of_the_whole(rows, group_rows, piece_bytes):
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/a.parquet"
        parquet.write_table(pa.table({"text": pa.array(rows, pa.string())}), file, row_group_size=group_rows)
        expected = [Document(text, f"{file}: row {row}") for row, text in enumerate(rows, 1) if text.strip()]
        check_cutting(file, expected, scan(file, STOP, piece_bytes))


@pytest.mark.parametrize("piece_bytes", [1, 100, 1000, WHOLE])
@pytest.mark.parametrize("selected", [False, True])
def test_any_cutting_of_a_dataset_gives_the_rows_of_the_whole(tmp_path, piece_bytes, selected):
    rows = [f"text of row {number}" for number in range(300)]
    dataset = Dataset.from_dict({"text": rows, "n": list(range(300))})
    if selected:
        dataset, rows = dataset.select(range(299, -1, -3)), rows[299::-3]
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    file = str(tmp_path / "saved")
    expected = [Document(text, f"{file}: row {row}") for row, text in enumerate(rows, 1)]
    pieces = scan(file, STOP, piece_bytes)
    check_cutting(file, expected, pieces)
    if piece_bytes in (1, WHOLE):
        assert len(pieces) == (len(rows) if piece_bytes == 1 else 1)


def test_sizes_of_pieces_are_about_those_of_the_texts(tmp_path):
    rows = [f"{number:05d} " * 100 for number in range(1000)]
    table = pa.table({"text": rows, "other": ["x" * 5000] * 1000})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=130, use_dictionary=False)
    Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        pieces = scan(str(tmp_path / name), STOP, 60_000)
        assert 9 <= len(pieces) <= 11
        assert sum(piece.num_bytes for piece in pieces) == pytest.approx(600_000, rel=0.1)


def test_column_is_chosen_by_the_key(tmp_path):
    parquet.write_table(pa.table({"n": [1, 2, 3], "body": TEXTS}), tmp_path / "a.parquet")
    Dataset.from_dict({"n": [1, 2, 3], "body": TEXTS}).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert texts(tmp_path / name, BuildConfig(text_key="body")) == TEXTS
        message = error_of(tmp_path / name)
        assert f"{name}: has no column `text` (found: n, body); set data.build.text_key" in message
        assert f"{name}: column `n` holds int64, not text" in error_of(tmp_path / name, BuildConfig(text_key="n"))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_all_types_of_text_are_read(tmp_path, kind):
    column = pa.array(TEXTS * 2).cast(kind) if kind != pa.string_view() else pa.array(TEXTS * 2, kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", STOP, 1) == TEXTS * 2


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_null_is_no_text(tmp_path, name):
    rows = ["a", None, "", "b"]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    assert f"{name}: row 2: has no text under `text` (found: null)" in error_of(tmp_path / name)
    documents, said = read(tmp_path / name, SKIP)
    assert [document.text for document in documents] == ["a", "b"] and len(said) == 1


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    column = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet: row 2: is not UTF-8" in error_of(tmp_path / "a.parquet")
    documents, said = read(tmp_path / "a.parquet", SKIP)
    assert [document.text for document in documents] == ["a", "b"] and len(said) == 1


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_row_longer_than_the_limit_is_named_or_skipped(tmp_path, name):
    rows = ["a", "ä" * 51, "ä" * 50]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    assert f"{name}: row 2: is longer than" in error_of(tmp_path / name, BuildConfig(max_document_bytes=100))
    documents, said = read(tmp_path / name, BuildConfig(max_document_bytes=100, on_error="skip"))
    assert [document.text for document in documents] == ["a", "ä" * 50] and len(said) == 1


def test_empty_tables_give_nothing(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], [])
    Dataset.from_dict({"text": ["a"]}).select([]).save_to_disk(tmp_path / "saved")  # which `datasets` cannot load
    assert f"{tmp_path}/saved: is empty" in error_of(tmp_path / "saved")


def test_dataset_with_several_splits_is_refused_one_of_them_read(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "several")
    assert "several: holds several splits (train); name one of them" in error_of(tmp_path / "several")
    assert texts(tmp_path / "several/train") == TEXTS


def test_dataset_of_which_a_file_is_missing_is_named(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    assert f"{tmp_path}/saved: is empty or no whole dataset" in error_of(tmp_path / "saved")


def test_damaged_parquet_is_named_wherever_the_damage_is(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"text {n}" for n in range(1000)]}), file, compression="zstd")
    whole = file.read_bytes()
    for content in (b"", b"PAR1", b"no parquet at all", whole[:-1], whole[len(whole) // 2 :], whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert str(file) in error_of(file)
    file.write_bytes(whole[:100] + bytes(200) + whole[300:])
    assert str(file) in error_of(file)


def test_long_row_groups_are_decoded_in_small_batches(tmp_path):
    from data_pipeline import table_readers

    parquet.write_table(pa.table({"text": ["x" * 100_000] * 300}), tmp_path / "a.parquet", use_dictionary=False)
    pieces = scan(str(tmp_path / "a.parquet"), STOP, WHOLE)
    sizes = [sum(len(record.text) for record in records) for _, records in table_readers.read_parquet(pieces, STOP)]
    assert sum(sizes) == 30_000_000
    assert max(sizes) <= 2 * table_readers.BATCH_BYTES
