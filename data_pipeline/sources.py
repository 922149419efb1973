"""Sources -> files -> pieces -> documents. The order is that of the sources, files of a folder sorted.

    files = find_files(sources)
    pieces = [piece for file in files for piece in scan(file, settings, piece_bytes)]
    for index, document in read_pieces(pieces, settings, skipped): ...

A piece is what one process reads: its documents do not depend on how the file was cut.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from configs.schema import BuildConfig
from data_pipeline import files as local
from data_pipeline import readers
from data_pipeline.files import open_bytes
from data_pipeline.readers import Document, Piece
from data_pipeline.shards import DataError

__all__ = ["DOCSTRINGS", "Document", "Piece", "find_files", "open_bytes", "read_piece", "read_pieces", "scan", "stamp"]

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DOCSTRINGS = "docstrings:"
Skipped = Callable[[int, str], None]  # told of a broken record: the index of its piece, what is wrong
Skipped = Callable[[int, str], None]  # (index of the piece, what is wrong and where)
READERS = {
    "docstrings": (readers.scan_docstrings, readers.read_docstrings),
    "lines": (readers.scan_lines, readers.read_lines),
    "text": (readers.scan_text, readers.read_text),
    "parquet": (readers.scan_parquet, readers.read_parquet),
    "datasets": (readers.scan_datasets, readers.read_datasets),
}


def find_files(sources: list[str]) -> list[str]:
    """The files that `sources` (files, globs, folders, `docstrings:`) stand for. Raises DataError for one of none."""
    if not sources:
        raise DataError("data.build.sources is empty; give files, for example data.build.sources=[corpus.jsonl]")
    found = []
    for source in sources:
        if source == DOCSTRINGS:
            found.append(source)
            continue
        matches = sorted(glob.glob(source, recursive=True)) or ([source] if Path(source).exists() else [])
        if not matches:
            raise DataError(f"data.build.sources: {source}: no such file or folder, and as a glob it matches nothing")
        for match in matches:
            found += _expand(Path(match))
    return found


def stamp(file: str) -> str:
    """What a change of the file would change: its size and time of modification."""
    return "" if file == DOCSTRINGS else local.stamp(file)


def size_of(file: str) -> int:
    """Bytes of the file or folder, for planning and progress."""
    return readers.DOCSTRINGS_BYTES if file == DOCSTRINGS else local.size_of(file)


def scan(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """Cut `file` into pieces of about `piece_bytes` of text; none if it is empty.

    Raises DataError if it cannot be read, is not what its name says, is damaged, or has not the text's column.
    """
    with _naming(file):
        before = stamp(file)
        pieces = READERS[_format(file)][0](file, settings, piece_bytes)
        _check_unchanged(file, before)
    return [replace(piece, stamp=before) for piece in pieces]


def read_piece(piece: Piece, settings: BuildConfig, skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of one piece; see `read_pieces`."""
    return (document for _, document in read_pieces([piece], settings, skipped))


def read_pieces(
    pieces: list[Piece], settings: BuildConfig, skipped: Skipped | None = None
) -> Iterator[tuple[int, Document]]:
    """(index of the piece, document) of all that are not blank; pieces of one file in order cost one pass over it.

    A broken record raises DataError naming file and line, or, with `skipped`, is reported to it, with the index of its
    piece, and passed over. A file that was changed since it was scanned raises DataError in any case.
    """
    first = 0
    while first < len(pieces):
        last = first + 1
        while last < len(pieces) and _follows(pieces[last - 1], pieces[last]):
            last += 1
        file, run = pieces[first].file, pieces[first:last]
        with _naming(file):
            _check_unchanged(file, run[0].stamp)
            try:
                for index, records in READERS[_format(file)][1](run, settings):
                    for record in records:
                        if isinstance(record, str):
                            _broken(first + index, record, skipped)
                        elif record.text and not record.text.isspace():
                            yield first + index, record
            except DataError:
                _check_unchanged(file, run[0].stamp)  # if it was changed, that is the news
                raise
            _check_unchanged(file, run[0].stamp)
        first = last


def read_documents(files: list[str], text_key: str, skipped: Callable[[str], None] | None) -> Iterator[Document]:
    """All documents of `files` that are not blank; see `read_pieces`."""
    settings = BuildConfig(text_key=text_key, on_error="skip" if skipped else "stop")
    report = None if skipped is None else lambda index, message: skipped(message)
    for file in files:
        for _, document in read_pieces(scan(file, settings, 1 << 62), settings, report):
            yield document


def _broken(index: int, message: str, skipped: Skipped | None) -> None:
    if skipped is None:
        raise DataError(f"{message}, or set data.build.on_error=skip")
    skipped(index, message)


def _follows(piece: Piece, other: Piece) -> bool:
    return other.file == piece.file and other.start >= piece.stop


def _check_unchanged(file: str, before: str) -> None:
    if before and (now := stamp(file)) != before:
        raise DataError(f"{file}: was changed while it was read (it had {before}, now {now}); build again")


class _naming:
    """Turns errors of the system into a DataError that names the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, OSError):
            raise DataError(f"{self.file}: cannot be read ({error.strerror or error})") from error


def _format(file: str) -> str:
    if file == DOCSTRINGS:
        return "docstrings"
    if file.endswith(".txt"):
        return "text"
    if file.endswith(".parquet"):
        return "parquet"
    return "datasets" if Path(file).is_dir() else "lines"


def _expand(path: Path) -> list[str]:
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
        return [str(path)]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return [str(path)]  # a `datasets` dataset saved to disk
    inside = sorted(str(file) for file in path.rglob("*") if file.name.endswith(SUFFIXES))
    if not inside:
        raise DataError(f"{path}: holds no file of a known kind ({', '.join(SUFFIXES)})")
    return inside
