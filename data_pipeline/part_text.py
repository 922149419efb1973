"""The text of parts: as it is read from the sources, or as it was cleaned and written down; its splits, and samples.

A cleaned part is a file of JSON lines, {"text", "place"}, and perhaps a mask that says which of them are duplicates.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import orjson
import xxhash

from configs.schema import BuildConfig
from data_pipeline.parts import Plan
from data_pipeline.shards import writing
from data_pipeline.sources import Document, Piece, open_bytes, read_pieces
from data_pipeline.tally import Tally

HASHED_CHARACTERS = 1 << 20  # of a long text, at once


@dataclass(frozen=True)
class Report:
    """What reading and cleaning found in one part."""

    sources: dict[str, list[int]] = field(default_factory=dict)  # file -> [documents, characters]
    tallies: dict[str, Tally] = field(default_factory=lambda: {"read": Tally()})  # stage -> its counts

    def write(self, path: Path) -> None:
        write_json(path, {"sources": self.sources, "tallies": {k: v.to_json() for k, v in self.tallies.items()}})


def read_parts(plan: Plan, numbers: Iterable[int]) -> Iterator[tuple[int, Iterator[Document], Report]]:
    """(number, documents, report) of these parts, in one pass over each file; the report is complete after them."""
    together: list[tuple[int, list[Piece]]] = []
    for number in numbers:
        pieces = plan.pieces(number)
        if together and together[-1][1][-1].file != pieces[0].file:
            yield from _read_together(plan, together)
            together = []
        together.append((number, pieces))
    if together:
        yield from _read_together(plan, together)


def _read_together(
    plan: Plan, parts: list[tuple[int, list[Piece]]]
) -> Iterator[tuple[int, Iterator[Document], Report]]:
    """As `read_parts`, for parts that end and begin in the same file."""
    settings = plan.config.data.build
    pieces = [piece for _, of_part in parts for piece in of_part]
    part_of_piece = [number for number, of_part in parts for _ in of_part]
    reports = {number: Report() for number, _ in parts}

    def dropped(reason: str, index: int, message: str) -> None:
        tally = reports[part_of_piece[index]].tallies["read"]
        tally.seen += 1
        tally.drop(reason, message)

    broken = partial(dropped, "broken record") if settings.on_error == "skip" else None
    found = read_pieces(pieces, settings, broken, partial(dropped, "no text"))
    ahead: list[tuple[int, Document]] = []  # the first document of a later part

    def documents(number: int, report: Report) -> Iterator[Document]:
        for index, document in itertools.chain(ahead, found):
            ahead.clear()
            if part_of_piece[index] < number:  # the rest of a part that was left
                continue
            if part_of_piece[index] > number:
                ahead.append((index, document))
                return
            report.tallies["read"].seen += 1
            counts = report.sources.setdefault(pieces[index].file, [0, 0])
            counts[0] += 1
            counts[1] += len(document.text)
            yield document

    for number, report in reports.items():
        yield number, documents(number, report), report


def read_clean(plan: Plan, number: int) -> Iterator[Document]:
    """The documents of a cleaned part, without duplicates."""
    mask_file = plan.drop_mask(number)
    dropped = np.load(mask_file) if mask_file.exists() else None
    with open_bytes(str(plan.clean_text(number))) as lines:
        for row, line in enumerate(lines):
            if dropped is None or not dropped[row]:
                record = orjson.loads(line)
                yield Document(record["text"], record["place"])


def clean_text(plan: Plan, number: int, row: int) -> str:
    """One document of a cleaned part, duplicates counted."""
    with open_bytes(str(plan.clean_text(number))) as lines:
        return orjson.loads(next(itertools.islice(lines, row, None)))["text"]


def sample_texts(plan: Plan, wanted: int) -> Iterator[str]:
    """Texts of the train split, about `wanted` characters: all of it, or the beginnings of parts spread evenly."""
    numbers: Iterable[int] = range(plan.num_own)
    of_each = wanted
    if sum(plan.sizes[: plan.num_own]) > wanted:
        numbers = plan.sampled
        of_each = wanted // len(plan.sampled)
    if plan.has_clean_pass:
        parts = (read_clean(plan, number) for number in numbers)
    else:
        parts = (documents for _, documents, _ in read_parts(plan, numbers))
    for documents in parts:
        size = 0
        for document in documents:
            for name, text in split(document.text, plan.config.data.build, held_out=False):
                if name == "train":
                    yield text
                    size += len(text)
            if size >= of_each:
                break


def split(text: str, settings: BuildConfig, held_out: bool) -> list[tuple[str, str]]:
    """[(split, text)]: a whole document by a hash of its text, or cut in two, its tail for validation."""
    if held_out:
        return [("validation", text)]
    if settings.validation_sources:
        return [("train", text)]
    if settings.split_by == "tail":
        cut = int(len(text) * (1 - settings.validation_fraction))
        return [(name, part) for name, part in (("train", text[:cut]), ("validation", text[cut:])) if part]
    share = _hash(text) / 2**64
    return [("validation" if share < settings.validation_fraction else "train", text)]


def _hash(text: str) -> int:
    if len(text) <= HASHED_CHARACTERS:
        return xxhash.xxh3_64_intdigest(text.encode())
    digest = xxhash.xxh3_64()
    for start in range(0, len(text), HASHED_CHARACTERS):
        digest.update(text[start : start + HASHED_CHARACTERS].encode())
    return digest.intdigest()


def write_json(path: Path, content: object) -> None:
    with writing(path) as file:
        file.write(json.dumps(content).encode())
