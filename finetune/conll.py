"""Readers of tagged sentences: CoNLL columns and CoNLL-U."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.shards import DataError
from data_pipeline.sources import open_bytes

UPOS = 3  # the column of CoNLL-U that is read where none is named
CONLLU_COLUMNS = 10
DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    words: list[str]
    tags: list[str]
    document: int  # the number of the document it is from; 0 where the file names none


def read_words(path: Path) -> list[Sentence]:
    """The sentences of a file whose tags, if it has any, are not looked at; each word gets the tag "".

    A .txt file has one sentence a line, its words between spaces. Raises DataError naming file and line.
    """
    if path.suffix != ".txt":
        return _sentences(path, lambda fields, place: "")
    sentences = [Sentence(line.split(), [""] * len(line.split()), 0) for line in _lines(path) if line.strip()]
    if not sentences:
        raise DataError(f"{path}: holds no sentences")
    return sentences


def read_sentences(path: Path, column: int | None) -> list[Sentence]:
    """The tagged sentences of a file; a name with `.conllu` in it is CoNLL-U, everything else CoNLL columns.

    `column` counts from 0, -1 is the last one, which CoNLL's default is; that of CoNLL-U is UPOS. Compressed files
    end in .gz or .zst. Raises DataError naming file and line.
    """
    tag_column = column if column is not None else UPOS if _is_conllu(path) else -1
    return _sentences(path, lambda fields, place: _tag(fields, tag_column, _word_column(path), place))


def _sentences(path: Path, tag_of: Callable[[list[str], str], str]) -> list[Sentence]:
    """The sentences of a file; `tag_of` gets the columns of a word and its place."""
    is_conllu = _is_conllu(path)
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    document = 0
    for number, line in enumerate([*_lines(path), ""], 1):
        line = line.rstrip("\r")
        if not line.strip():
            if words:
                sentences.append(Sentence(words, tags, document))
                words, tags = [], []
            continue
        if is_conllu and line.startswith("#"):
            document += line.removeprefix("#").strip().startswith("newdoc")
            continue
        fields = line.split("\t") if is_conllu or "\t" in line else line.split()
        if fields[0] == DOCUMENT:
            document += 1
            continue
        if is_conllu:
            if len(fields) != CONLLU_COLUMNS:
                raise DataError(
                    f"{path}:{number}: has {len(fields)} columns between tabs, CoNLL-U has {CONLLU_COLUMNS}"
                )
            if not fields[0].isdigit():  # 3-4: a word of several tokens, 3.1: one that is not in the text
                continue
        tags.append(tag_of(fields, f"{path}:{number}"))
        words.append(_word(fields, _word_column(path), f"{path}:{number}"))
    if not sentences:
        raise DataError(f"{path}: holds no sentences")
    return sentences


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open_bytes(str(path)) as file:
        try:
            return file.read().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 (byte {error.start}); convert it") from None


def _is_conllu(path: Path) -> bool:
    return ".conllu" in path.name


def _word_column(path: Path) -> int:
    return 1 if _is_conllu(path) else 0


def _word(fields: list[str], column: int, place: str) -> str:
    if not fields[column]:
        raise DataError(f"{place}: the word is empty; give it one, such as _")
    return fields[column]


def _tag(fields: list[str], column: int, word_column: int, place: str) -> str:
    count = len(fields)
    if not -count <= column < count or column % count == word_column:
        raise DataError(
            f"{place}: has {count} columns and the tag should be in number {column} (from 0, the word is number "
            f"{word_column}); set tagging.column, and separate sentences by empty lines"
        )
    if not fields[column]:
        raise DataError(f"{place}: the tag is empty; give it one, such as _")
    return fields[column]
