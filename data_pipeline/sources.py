"""Sources -> files -> pieces -> documents. The order is that of the sources, files of a folder sorted.

    files = find_files(sources)
    pieces = [piece for file in files for piece in scan(file, settings, piece_bytes)]
    for index, document in read_pieces(pieces, settings, skipped): ...

A piece is what one process reads: its documents do not depend on how the file was cut.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from configs.schema import BuildConfig
from data_pipeline import files, readers, remote_sources, table_readers, warc_reader
from data_pipeline.errors import DataError
from data_pipeline.files import open_bytes
from data_pipeline.readers import DOCSTRINGS, Document, Piece

__all__ = [
    "DOCSTRINGS",
    "Document",
    "Piece",
    "Skipped",
    "find_files",
    "open_bytes",
    "read_piece",
    "read_pieces",
    "refuse_repeated",
    "scan",
    "size_of",
    "stamp",
]

FORMATS = {  # ending of the name -> how to cut and how to read such a file
    ".txt": (readers.scan_text, readers.read_text),
    ".jsonl": (readers.scan_lines, readers.read_lines),
    ".jsonl.gz": (readers.scan_lines, readers.read_lines),
    ".jsonl.zst": (readers.scan_lines, readers.read_lines),
    ".parquet": (table_readers.scan_parquet, table_readers.read_parquet),
    ".warc": (warc_reader.scan_warc, warc_reader.read_warc),
    ".warc.gz": (warc_reader.scan_warc, warc_reader.read_warc),
    ".warc.zst": (warc_reader.scan_warc, warc_reader.read_warc),
    ".wet": (warc_reader.scan_warc, warc_reader.read_warc),
    ".wet.gz": (warc_reader.scan_warc, warc_reader.read_warc),
    ".wet.zst": (warc_reader.scan_warc, warc_reader.read_warc),
}
SUFFIXES = tuple(FORMATS)
KNOWN = ", ".join(SUFFIXES)
Skipped = Callable[[int, str], None]  # told of a broken record: the index of its piece, what is wrong and where
Blank = Callable[[int, str], None]  # told of a document without text: the index of its piece, its place


def find_files(sources: list[str]) -> list[str]:
    """The files that `sources` stand for: files, folders, globs, addresses, `datasets` on disk, `docstrings:`.

    Raises DataError for a source of nothing, for a file of an unknown kind, and for one that is found twice.
    """
    if not sources:
        raise DataError("data.build.sources is empty; give files, for example data.build.sources=[corpus.jsonl]")
    found: list[str] = []
    for source in sources:
        if source == DOCSTRINGS:
            found.append(source)
        elif remote_sources.is_remote(source):
            with _naming(source):
                matches = remote_sources.find(source, SUFFIXES)
            found += _without_twins(source, [_known(match) for match in matches])
        else:
            found += _without_twins(source, _find_local(source))
    refuse_repeated(found)
    return found


def refuse_repeated(found: list[str]) -> None:
    """Raises DataError if two of these files are the same one, by any name: its text would count twice."""
    # Hashes alone: names and numbers of millions of files would take hundreds of megabytes.
    hashes = np.fromiter((hash(_identity(file)) for file in found), np.int64, len(found))
    _, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = firsts[inverse]
    for number in np.flatnonzero(firsts < np.arange(len(found))).tolist():
        file, earlier = found[number], found[firsts[number]]
        if _identity(file) == _identity(earlier):
            other = "named twice" if earlier == file else f"the same file as {earlier}"
            raise DataError(f"{file}: is {other} in the sources; to repeat a text use data.mixture and its epochs")


def _identity(file: str) -> object:
    """What two names of one file have in common."""
    if file == DOCSTRINGS or remote_sources.is_remote(file):
        return file
    with _naming(file):
        status = os.stat(file)
    return status.st_dev, status.st_ino


def size_of(file: str) -> int:
    """Bytes of the file as it lies there, compressed or not; 0 if a server does not say."""
    with _naming(file):
        return readers.DOCSTRINGS_BYTES if file == DOCSTRINGS else files.size_of(file)


def stamp(file: str) -> str:
    """What a change of the file would change: size and time, at an address size and ETag. Empty for `docstrings:`."""
    with _naming(file):
        return "" if file == DOCSTRINGS else files.stamp(file)


def scan(file: str, settings: BuildConfig, piece_bytes: int) -> list[Piece]:
    """Cut `file` into pieces of about `piece_bytes` of text; none if it is empty.

    Compressed files are passed over once, others are touched at the cuts. Raises DataError if the file cannot be read,
    is not what its name says, is damaged or cut off, or lacks the column `settings.text_key`.
    """
    before = stamp(file)
    with _naming(file):
        pieces = _format(file)[0](file, settings, piece_bytes)
    _refuse_changed(file, before)
    return [replace(piece, stamp=before) for piece in pieces]


def read_piece(piece: Piece, settings: BuildConfig, skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of one piece; see `read_pieces`."""
    return (document for _, document in read_pieces([piece], settings, skipped))


def read_pieces(
    pieces: list[Piece], settings: BuildConfig, skipped: Skipped | None = None, blank: Blank | None = None
) -> Iterator[tuple[int, Document]]:
    """(index of the piece, document) of all that are not blank; pieces of one file in order cost one pass over it.

    A broken record raises DataError naming file and line, or, with `skipped`, is reported to it and passed over. A file
    that was changed since it was scanned raises DataError in any case.
    """
    settings = settings.model_copy(update={"on_error": "stop" if skipped is None else "skip"})
    first = 0
    while first < len(pieces):
        last = first + 1
        while last < len(pieces) and _follows(pieces[last - 1], pieces[last]):
            last += 1
        for index, record in _read_file(pieces[first:last], settings):
            if isinstance(record, str):
                if skipped is None:
                    raise DataError(f"{record}, or set data.build.on_error=skip")
                skipped(first + index, record)
            elif record.text and not record.text.isspace():
                yield first + index, record
            elif blank is not None:
                blank(first + index, record.place)
        first = last


def _follows(piece: Piece, other: Piece) -> bool:
    return other.file == piece.file and other.start >= piece.stop


def _read_file(pieces: list[Piece], settings: BuildConfig) -> Iterator[tuple[int, readers.Record]]:
    """The records of pieces of one file, which must be the file that was scanned before and after."""
    file, before = pieces[0].file, pieces[0].stamp
    _refuse_changed(file, before)
    try:
        with _naming(file):
            for index, records in _format(file)[1](pieces, settings):
                for record in records:
                    yield index, record
    except DataError:
        _refuse_changed(file, before)  # then that is the reason
        raise
    _refuse_changed(file, before)


def _refuse_changed(file: str, before: str) -> None:
    if before and (now := stamp(file)) != before:
        raise DataError(f"{file}: was changed during the build ({before}; now {now}); start the build again")


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors of the system become a DataError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file}: is not there (any more); put it back or change data.build.sources") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ImportError as error:
        raise DataError(f"{file}: a package to read it is missing ({error}); install it") from error


def _format(file: str) -> tuple[Callable, Callable]:
    if file == DOCSTRINGS:
        return readers.scan_docstrings, readers.read_docstrings
    if _is_dataset(file):
        return table_readers.scan_datasets, table_readers.read_datasets
    _known(file)
    return next(format for suffix, format in FORMATS.items() if files.name(file).endswith(suffix))


def _is_dataset(folder: str) -> bool:
    """Whether this is a dataset saved by `datasets`, with or without splits."""
    names = ("dataset_info.json", "dataset_dict.json")
    return not remote_sources.is_remote(folder) and any(os.path.exists(os.path.join(folder, name)) for name in names)


def _find_local(source: str) -> list[str]:
    # a file whose name looks like a glob is meant as itself
    matches = [source] if os.path.lexists(source) else sorted(glob.glob(source, recursive=True))
    if not matches and "://" in source:
        raise DataError(f"{source}: unknown kind of address; known: {', '.join(remote_sources.SCHEMES)}")
    if not matches:
        raise DataError(f"data.build.sources: {source}: no such file or folder, and as a glob it matches nothing")
    found = []
    for match in matches:
        if not os.path.isdir(match):
            found.append(_regular(_known(match)))
        elif _is_dataset(match):
            found.append(match)
        elif "**" not in source:  # a glob over all folders finds their files by itself
            found += _inside(match)
    return found


def _known(file: str) -> str:
    if not files.name(file).endswith(SUFFIXES):
        raise DataError(f"{file}: unknown kind of file; known: {KNOWN}")
    return file


def _regular(file: str) -> str:
    with _naming(file):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise DataError(f"{file}: is a pipe, socket or device; only files can be read again, as a build must")
    return file


def _inside(folder: str) -> list[str]:
    """Files of known kinds in a folder and those below it, through links to folders too, without hidden ones."""
    found, visited = [], set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(path)) in visited:
            folders.clear()  # a link back
        elif _is_dataset(path):
            folders.clear()
            found.append(path)
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]
            wanted = [name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
            found += [_regular(os.path.join(path, name)) for name in wanted]
        visited.add(real)
    if not found:
        raise DataError(f"{folder}: holds no file of a known kind ({KNOWN})")
    return sorted(found, key=lambda file: file.replace("/", "\0"))  # folder by folder


def _without_twins(source: str, found: list[str]) -> list[str]:
    """`found`, unless it holds a file and its compressed copy, as zstd leaves them: the text would count twice."""
    names = set(found)
    for file in found:
        for twin in (f"{file}.gz", f"{file}.zst"):
            if twin in names:
                raise DataError(f"{source}: holds both {file} and {twin}; remove one, or name what is to be read")
    return found
