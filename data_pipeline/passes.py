"""What workers do in a build: clean parts, tokenize parts, assemble shards. Called by name through an engine.

Each function takes the working directory and numbers, and leaves files there (see parts.py), each complete or not there
at all. What is there already was made by the same plan and is not made again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
import zstandard

from configs.schema import BuildConfig
from data_pipeline import tokenizer as tokenizers
from data_pipeline.clean import Stage, clean, make_stages
from data_pipeline.dedupe import signatures
from data_pipeline.parts import SPLITS, Plan, load_plan
from data_pipeline.shards import write_shard, writing
from data_pipeline.sources import Document, Piece, open_bytes, read_pieces, scan
from data_pipeline.tally import Tally

BATCH_CHARACTERS = 1 << 20  # text that is compared or tokenized at once
ZSTD_LEVEL_1 = zstandard.ZstdCompressor(level=1)  # 300 MB/s a core, half as much to read and write


@dataclass(frozen=True)
class Report:
    """What reading and cleaning found in one part."""

    sources: dict[str, list[int]] = field(default_factory=dict)  # file -> [documents, characters]
    tallies: dict[str, Tally] = field(default_factory=lambda: {"read": Tally()})  # stage -> its counts

    def write(self, path: Path) -> None:
        write_json(path, {"sources": self.sources, "tallies": {k: v.to_json() for k, v in self.tallies.items()}})


def clean_parts(work: Path, numbers: list[int]) -> None:
    """Run the stages over these parts; leaves each one's text, signatures (where duplicates go) and report."""
    plan = load_plan(work)
    settings = plan.config.data.build
    stages = make_stages(settings.clean)
    compares = settings.deduplicate.exact or settings.deduplicate.near
    for number, documents, report in read_parts(plan, numbers):
        report.tallies.update({stage.name: Tally() for stage in stages})
        rows: list[np.ndarray] = []
        compared = compares and not plan.parts[number].held_out
        with writing(plan.clean_text(number)) as raw, ZSTD_LEVEL_1.stream_writer(raw, closefd=False) as file:
            for batch in _batches(_cleaned(documents, stages, report.tallies)):
                file.write(b"".join(orjson.dumps({"text": d.text, "place": d.place}) + b"\n" for d in batch))
                if compared:
                    rows.append(signatures([document.text for document in batch], settings.deduplicate))
        if compared:
            with writing(plan.signatures(number)) as file:
                np.save(file, np.concatenate(rows) if rows else signatures([], settings.deduplicate))
        report.write(plan.report(number))


def scan_file(number: int, file: str, settings: BuildConfig, piece_bytes: int) -> tuple[int, list[Piece]]:
    """(number, pieces) of the file that is the `number`-th of the sources."""
    return number, scan(file, settings, piece_bytes)


def token_parts(work: Path, numbers: list[int]) -> None:
    """Tokenize these parts, as they were read or cleaned, without the duplicates."""
    plan = load_plan(work)
    made_at = (plan.tokenizer_dir / "tokenizer.json").stat().st_mtime_ns
    encode_flat, end = _encoder(plan.tokenizer_dir, made_at, plan.config.model.architecture == "bert")
    sources: Iterable[tuple[int, Iterator[Document], Report | None]]
    if plan.has_clean_pass:
        sources = ((number, read_clean(plan, number), None) for number in numbers)
    else:
        sources = read_parts(plan, numbers)
    for number, documents, report in sources:
        batches = {name: _Batches(encode_flat, end) for name in SPLITS}
        for document in documents:
            for name, text in split(document.text, plan.config.data.build, plan.parts[number].held_out):
                batches[name].add(text)
        arrays: dict[str, np.ndarray] = {}
        for name in SPLITS:
            arrays[f"{name}_tokens"], arrays[f"{name}_lengths"] = batches[name].finish()
        if report is not None:
            report.write(plan.report(number))
        with writing(plan.tokens(number)) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def assemble_shard(
    work: Path, split_name: str, number: int, slices: list[tuple[int, int, int]], vocab_size: int
) -> None:
    """Write one shard from `slices`: (part, first document, last + 1) of the split's documents."""
    plan = load_plan(work)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part, first, after in slices:
            with np.load(plan.tokens(part)) as arrays:
                lengths, tokens = arrays[f"{split_name}_lengths"], arrays[f"{split_name}_tokens"]
            starts = np.concatenate([[0], np.cumsum(lengths)])
            yield tokens[starts[first] : starts[after]], lengths[first:after]

    directory = plan.dataset / split_name
    directory.mkdir(parents=True, exist_ok=True)
    entry = write_shard(directory / f"shard-{number:05d}.tokens", pieces(), vocab_size)
    write_json(shard_entry(plan, split_name, number), entry)


def shard_entry(plan: Plan, split_name: str, number: int) -> Path:
    """The manifest's entry of a finished shard, kept until the manifest is written."""
    return plan.work / "shards" / f"{split_name}-{number:05d}.json"


def read_parts(plan: Plan, numbers: list[int]) -> Iterator[tuple[int, Iterator[Document], Report]]:
    """(number, documents, report) of these parts, in one pass over each file; the report is complete after them."""
    settings = plan.config.data.build
    pieces = [piece for number in numbers for piece in plan.parts[number].pieces]
    part_of_piece = [number for number in numbers for _ in plan.parts[number].pieces]
    reports = {number: Report() for number in numbers}

    def skipped(index: int, message: str) -> None:
        tally = reports[part_of_piece[index]].tallies["read"]
        tally.seen += 1
        tally.drop("broken record", message)

    found = read_pieces(pieces, settings, skipped if settings.on_error == "skip" else None)
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

    for number in numbers:
        yield number, documents(number, reports[number]), reports[number]


def _cleaned(documents: Iterable[Document], stages: list[Stage], tallies: dict[str, Tally]) -> Iterator[Document]:
    for document in documents:
        text = clean(document.text, stages, tallies)
        if text:
            yield Document(text, document.place)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about BATCH_CHARACTERS."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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


def split(text: str, settings: BuildConfig, held_out: bool) -> list[tuple[str, str]]:
    """[(split, text)]: a whole document by a hash of its text, or cut in two, its tail for validation."""
    if held_out:
        return [("validation", text)]
    if settings.validation_sources:
        return [("train", text)]
    if settings.split_by == "tail":
        cut = int(len(text) * (1 - settings.validation_fraction))
        return [("train", text[:cut]), ("validation", text[cut:])]
    share = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
    return [("validation" if share < settings.validation_fraction else "train", text)]


def write_json(path: Path, content: object) -> None:
    with writing(path) as file:
        file.write(json.dumps(content).encode())


class _Batches:
    """Collects texts of one split and tokenizes them a megabyte at a time."""

    def __init__(self, encode_flat: Any, end: int | None) -> None:
        self.encode_flat, self.end = encode_flat, end
        self.texts: list[str] = []
        self.size = 0
        self.tokens: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.size += len(text)
        if self.size >= BATCH_CHARACTERS:
            self.encode()

    def encode(self) -> None:
        tokens, lengths = self.encode_flat(self.texts, self.end)
        self.tokens.append(tokens)
        self.lengths.append(lengths[lengths > 0])
        self.texts, self.size = [], 0

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, lengths) of all documents that have tokens."""
        self.encode()
        return np.concatenate(self.tokens), np.concatenate(self.lengths)


@lru_cache(maxsize=1)
def _encoder(tokenizer_dir: Path, made_at: int, is_bert: bool) -> tuple[Any, int | None]:
    """The encoder of a tokenizer's folder and the id that ends a document; made once in every worker.

    made_at: the time of the folder's tokenizer, for a process that sees several builds.
    """
    tokenizer = tokenizers.load_tokenizer(tokenizer_dir)
    return tokenizers.flat_encoder(tokenizer), None if is_bert else tokenizers.end_of_text_id(tokenizer)
