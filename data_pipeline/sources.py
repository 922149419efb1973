"""Raw text -> documents, from files of several formats. The order is that of the sources, files of a folder sorted."""

from __future__ import annotations

import glob
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from data_pipeline.shards import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DOCSTRINGS = "docstrings:"


@dataclass(frozen=True)
class Document:
    text: str
    place: str  # where it came from: file, or file:line


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


def read_documents(files: list[str], text_key: str, skipped: Callable[[str], None] | None) -> Iterator[Document]:
    """All non-empty documents of `files`.

    A broken record raises DataError naming file and line, or, with `skipped`, is reported to it and passed over.
    """
    for file in files:
        for document in _read_file(file, text_key, skipped):
            if document.text and not document.text.isspace():
                yield document


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


def _read_file(file: str, text_key: str, skipped: Callable[[str], None] | None) -> Iterator[Document]:
    if file == DOCSTRINGS:
        from data_pipeline.docstrings import read_docstrings

        for text, place in read_docstrings():
            yield Document(text, place)
    elif file.endswith(".txt"):
        yield from _read_text(file, skipped)
    elif file.endswith(".parquet"):
        yield from _read_parquet(file, text_key)
    elif Path(file).is_dir():
        yield from _read_datasets(file, text_key)
    else:
        yield from _read_jsonl(file, text_key, skipped)


def _read_text(file: str, skipped: Callable[[str], None] | None) -> Iterator[Document]:
    content = Path(file).read_bytes()
    try:
        yield Document(content.decode("utf-8"), file)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        _broken(f"{file}:{line}: is not UTF-8 (byte 0x{content[error.start]:02x}); convert the file to UTF-8", skipped)


def _read_jsonl(file: str, text_key: str, skipped: Callable[[str], None] | None) -> Iterator[Document]:
    with open_bytes(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            place = f"{file}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
                text = record[text_key]
                text.encode("utf-8")  # json may hold half of a surrogate pair, which is not text
            except UnicodeError as error:
                _broken(f"{place}: is not UTF-8 ({error}); convert the file to UTF-8", skipped)
            except ValueError as error:
                _broken(f"{place}: is not valid JSON ({error}); repair or remove the line", skipped)
            except (KeyError, TypeError, AttributeError):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                _broken(f"{place}: has no text under `{text_key}` (found: {keys}); set data.build.text_key", skipped)
            else:
                yield Document(text, place)


def open_bytes(file: str) -> io.BufferedIOBase:
    """Open a file for reading bytes; .gz and .zst are decompressed. Reading a damaged one raises DataError."""
    if file.endswith((".gz", ".zst")):
        return io.BufferedReader(_Decompressed(file), buffer_size=1 << 20)
    return open(file, "rb")


class _Decompressed(io.RawIOBase):
    """The content of a compressed file; unlike the libraries' readers it notices a .zst that was cut off."""

    def __init__(self, file: str) -> None:
        self.file, self.opened = file, open(file, "rb")  # noqa: SIM115 - closed by close()
        self.blocks = self._blocks()
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = block
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size

    def close(self) -> None:
        self.opened.close()
        super().close()

    def _blocks(self) -> Iterator[bytes]:
        """Decompressed blocks of all frames (.zst) or members (.gz), one after the other."""
        decompressor = None
        try:
            while data := self.opened.read(1 << 18):
                while data:
                    decompressor = decompressor or self._decompressor()
                    yield decompressor.decompress(data)
                    data = decompressor.unused_data
                    if decompressor.eof:
                        decompressor = None
        except (zstandard.ZstdError, zlib.error) as error:
            raise DataError(f"{self.file}: is damaged ({error}); copy or compress it again") from error
        if decompressor is not None:
            raise DataError(f"{self.file}: is cut off in the middle of the compressed data; copy it again")

    def _decompressor(self) -> Any:
        if self.file.endswith(".gz"):
            return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header and checksum
        return zstandard.ZstdDecompressor().decompressobj()


def _read_parquet(file: str, text_key: str) -> Iterator[Document]:
    import pyarrow.parquet as parquet

    opened = parquet.ParquetFile(file)
    if text_key not in opened.schema_arrow.names:
        raise DataError(f"{file}: has no column `{text_key}` (found: {', '.join(opened.schema_arrow.names)})")
    row = 0
    for batch in opened.iter_batches(columns=[text_key], batch_size=1024):
        for value in batch.column(0).to_pylist():
            row += 1
            yield Document(value or "", f"{file}: row {row}")


def _read_datasets(folder: str, text_key: str) -> Iterator[Document]:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(folder)
    if isinstance(loaded, DatasetDict):
        raise DataError(f"{folder}: holds several splits ({', '.join(loaded)}); name one of them: {folder}/SPLIT")
    if text_key not in loaded.column_names:
        raise DataError(f"{folder}: has no column `{text_key}` (found: {', '.join(loaded.column_names)})")
    for number, value in enumerate(loaded[text_key]):
        yield Document(value or "", f"{folder}: row {number + 1}")


def _broken(message: str, skipped: Callable[[str], None] | None) -> None:
    if skipped is None:
        raise DataError(f"{message}, or set data.build.on_error=skip")
    skipped(message)
