"""Readers of tables: parquet, and `datasets` saved to disk. A piece is a range of rows; see readers.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.files import open_raw
from data_pipeline.readers import Batches, Document, Piece, Record, too_long

BATCH_BYTES = 1 << 22  # of text decoded at once, about
MAX_BATCH_ROWS = 1024


def scan_parquet(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """Pieces by the file's own index: row groups, together or divided."""
    pieces: list[Piece] = []
    with _open_parquet(file, settings.text_key) as opened:
        row = start = 0
        filled = 0.0
        for rows, num_bytes in _row_groups(opened, settings.text_key):
            left, each = rows, num_bytes / max(rows, 1)
            while left:
                take = min(left, max(1, -int(-(piece_bytes - filled) // max(each, 1e-9))))
                row, left, filled = row + take, left - take, filled + take * each
                if filled >= piece_bytes:
                    pieces.append(Piece(file, start, row, int(filled)))
                    start, filled = row, 0.0
        if row > start:
            pieces.append(Piece(file, start, row, int(filled)))
    return pieces


def read_parquet(pieces: list[Piece], settings: BuildConfig) -> Batches:
    """Reads from the first row group that is needed, page by page."""
    file, key = pieces[0].file, settings.text_key
    with _open_parquet(file, key) as opened:
        groups = _row_groups(opened, key)
        number = row = 0
        while number < len(groups) and row + groups[number][0] <= pieces[0].start:
            row, number = row + groups[number][0], number + 1
        rows, num_bytes = (sum(column) for column in zip(*groups, strict=True))
        batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * rows // max(num_bytes, 1)))
        index = 0
        for batch in opened.iter_batches(
            batch_rows, row_groups=list(range(number, len(groups))), columns=[key], use_threads=False
        ):
            while index < len(pieces) and pieces[index].start < row + len(batch):
                first, after = max(pieces[index].start, row), min(pieces[index].stop, row + len(batch))
                if after > first:
                    yield index, _records(file, batch.column(0)[first - row : after - row], first, settings)
                if pieces[index].stop > row + len(batch):
                    break
                index += 1
            if index == len(pieces):
                return
            row += len(batch)


def scan_datasets(folder: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """Pieces of equal numbers of rows."""
    loaded = _load_dataset(folder, settings.text_key)
    each = loaded.data.nbytes / max(len(loaded), 1)
    rows = max(1, int(piece_bytes / max(each, 1e-9)))
    ranges = [(start, min(start + rows, len(loaded))) for start in range(0, len(loaded), rows)]
    return [Piece(folder, start, stop, int((stop - start) * each)) for start, stop in ranges]


def read_datasets(pieces: list[Piece], settings: BuildConfig) -> Batches:
    loaded = _load_dataset(pieces[0].file, settings.text_key)
    batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * len(loaded) // max(loaded.data.nbytes, 1)))
    for index, piece in enumerate(pieces):
        for start in range(piece.start, piece.stop, batch_rows):
            table = loaded[start : min(start + batch_rows, piece.stop)]
            column = table.column(settings.text_key).combine_chunks()
            yield index, _records(piece.file, column, start, settings)


@contextmanager
def _open_parquet(file: str, key: str) -> Iterator[Any]:
    """pyarrow's ParquetFile, read from disk or by ranges; what a server only streams is copied to a temporary file."""
    import pyarrow
    from pyarrow import parquet

    with open_raw(file) as raw, tempfile.TemporaryFile() as copied:
        if not raw.seekable():
            shutil.copyfileobj(raw, copied)
        try:
            with parquet.ParquetFile(raw if raw.seekable() else copied, buffer_size=BATCH_BYTES) as opened:
                _check_column(file, key, opened.schema_arrow)
                yield opened
        except pyarrow.ArrowException as error:
            raise DataError(f"{file}: is damaged or no parquet file ({error}); copy it again") from error


def _row_groups(opened: Any, key: str) -> list[tuple[int, int]]:
    """(rows, bytes of the text's column) of each row group."""
    groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
    if not groups:
        return []
    names = [groups[0].column(number).path_in_schema for number in range(groups[0].num_columns)]
    column = names.index(key)
    return [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]


def _load_dataset(folder: str, key: str) -> Any:
    """The text's column of a dataset saved to disk, as arrow tables."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(folder)
    except (ValueError, KeyError, IndexError, FileNotFoundError) as error:
        raise DataError(f"{folder}: is empty or no whole dataset of `datasets` ({error}); save it again") from error
    if isinstance(loaded, DatasetDict):
        raise DataError(f"{folder}: holds several splits ({', '.join(loaded)}); name one of them: {folder}/SPLIT")
    _check_column(folder, key, loaded.features.arrow_schema)
    return loaded.select_columns([key]).with_format("arrow")


def _check_column(file: str, key: str, schema: Any) -> None:
    import pyarrow.types as types

    if key not in schema.names:
        raise DataError(f"{file}: has no column `{key}` (found: {', '.join(schema.names)}); set data.build.text_key")
    kind = schema.field(key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(f"{file}: column `{key}` holds {kind}, not text; set data.build.text_key")


def _records(file: str, column: Any, first_row: int, settings: BuildConfig) -> list[Record]:
    """The records of an arrow array of strings, the first of which is in the row `first_row`, counted from 0."""
    places = [f"{file}: row {row}" for row in range(first_row + 1, first_row + len(column) + 1)]
    if column.null_count == 0 and column.nbytes <= settings.max_document_bytes:
        try:
            return list(map(Document, column.to_pylist(), places))
        except UnicodeDecodeError:
            pass
    return [_record(value, place, settings) for value, place in zip(column, places, strict=True)]


def _record(value: Any, place: str, settings: BuildConfig) -> Record:
    if not value.is_valid:
        return f"{place}: has no text under `{settings.text_key}` (found: null); fill or remove the row"
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return f"{place}: is not UTF-8 ({error}); convert the text to UTF-8"
    if len(text) * 4 > settings.max_document_bytes and len(text.encode()) > settings.max_document_bytes:
        return f"{place}: {too_long(settings)}"
    return Document(text, place)
