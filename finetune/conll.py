"""Readers of tagged sentences: CoNLL columns and CoNLL-U."""

from __future__ import annotations

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


def read_sentences(path: Path, column: int | None) -> list[Sentence]:
    """The sentences of a file; a name with `.conllu` in it is CoNLL-U, everything else CoNLL columns.

    `column` counts from 0, -1 is the last one, which CoNLL's default is; that of CoNLL-U is UPOS. Compressed files
    end in .gz or .zst. Raises DataError naming file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open_bytes(str(path)) as file:
        try:
            lines = file.read().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 (byte {error.start}); convert it") from None
    is_conllu = ".conllu" in path.name
    tag_column = column if column is not None else UPOS if is_conllu else -1
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    document = 0
    for number, line in enumerate([*lines, ""], 1):
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
        word, tag = _word_and_tag(fields, tag_column, 1 if is_conllu else 0, f"{path}:{number}")
        words.append(word)
        tags.append(tag)
    if not sentences:
        raise DataError(f"{path}: holds no sentences")
    return sentences


def _word_and_tag(fields: list[str], column: int, word_column: int, place: str) -> tuple[str, str]:
    count = len(fields)
    if not -count <= column < count or column % count == word_column:
        raise DataError(
            f"{place}: has {count} columns and the tag should be in number {column} (from 0, the word is number "
            f"{word_column}); set tagging.column, and separate sentences by empty lines"
        )
    word, tag = fields[word_column], fields[column]
    if not word or not tag:
        raise DataError(f"{place}: the {'word' if not word else 'tag'} is empty; give it one, such as _")
    return word, tag
