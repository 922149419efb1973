"""What workers do in a build: clean parts, tokenize parts, assemble shards. Called by name through an engine.

Each function takes the working directory and numbers, and leaves files there (see parts.py), each complete or not there
at all. What is there already was made by the same plan and is not made again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
import zstandard

from configs.schema import BuildConfig, CleanConfig
from data_pipeline import tokenizer as tokenizers
from data_pipeline.clean import Stage, clean, make_stages
from data_pipeline.encode import EncodeFlat
from data_pipeline.language import identify
from data_pipeline.minhash import signature_dtype, signatures
from data_pipeline.part_tokens import read_documents, read_index, write_index, write_tokens
from data_pipeline.parts import SPLITS, Plan, fields_of, load_plan
from data_pipeline.shards import write_shard, writing
from data_pipeline.sources import Document, Piece, open_bytes, read_pieces, scan
from data_pipeline.tally import Tally
from data_pipeline.tokenizer_report import tokenizer_report

BATCH_CHARACTERS = 1 << 20  # text that is compared or tokenized at once
REPORTED_CHARACTERS = 1 << 19  # the tokenizer's report is of about that much text,
LONGEST_REPORTED = 1 << 11  # and of the beginnings of long documents
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
    stages = _stages(settings.clean.model_dump_json())
    numbers = [number for number in numbers if not plan.report(number).exists()]  # some, if this was begun before
    for number, documents, report in read_parts(plan, numbers):
        report.tallies.update({stage.name: Tally() for stage in stages})
        with ExitStack() as files:
            compared = plan.compares and not plan.is_held_out(number)
            if compared:
                dtype = signature_dtype(settings.deduplicate)
                save_rows = files.enter_context(_saving_rows(plan.signatures(number), dtype))
            raw = files.enter_context(writing(plan.clean_text(number)))
            text = files.enter_context(ZSTD_LEVEL_1.stream_writer(raw, closefd=False))
            for batch in _batches(_cleaned(documents, stages, report.tallies)):
                for document in batch:
                    text.write(orjson.dumps({"text": document.text, "place": document.place}))
                    text.write(b"\n")
                if compared:
                    save_rows(signatures([document.text for document in batch], settings.deduplicate))
        report.write(plan.report(number))


def check_stages(config: CleanConfig) -> None:
    """Raises DataError or ConfigError for stages that cannot be made: an unknown language, a broken test set."""
    _stages(config.model_dump_json())


def scan_files(work: Path, group: int, files: list[str], settings: BuildConfig, piece_bytes: int) -> int:
    """Write the pieces of a group of files, a line each; returns the group's number."""
    path = scanned(work, group)
    if not path.exists():
        with writing(path) as file:
            for name in files:
                for piece in scan(name, settings, piece_bytes):
                    file.write(orjson.dumps(fields_of(piece)) + b"\n")
    return group


def scanned(work: Path, group: int) -> Path:
    return work / "scan" / f"files-{group:05d}.jsonl"


def token_parts(work: Path, numbers: list[int]) -> None:
    """Tokenize these parts, as they were read or cleaned, without the duplicates."""
    plan = load_plan(work)
    made_at = (plan.tokenizer_dir / "tokenizer.json").stat().st_mtime_ns
    encode, end = _encoder(plan.tokenizer_dir, made_at, plan.config.model.architecture == "bert")
    numbers = [number for number in numbers if not plan.tokens(number).exists()]
    sources: Iterable[tuple[int, Iterator[Document], Report | None]]
    if plan.has_clean_pass:
        sources = ((number, read_clean(plan, number), None) for number in numbers)
    else:
        sources = read_parts(plan, numbers)
    for number, documents, report in sources:
        tally = Tally()
        sample: list[str] = []  # for the tokenizer's report
        room = REPORTED_CHARACTERS // len(plan.sampled) if number in plan.sampled else 0
        texts = _splits(documents, plan.config.data.build, plan.is_held_out(number), tally)
        with writing(plan.tokens(number)) as file:
            index = write_tokens(file, _tokenized(_sampling(texts, room, sample), encode, end, tally))
            index |= {"tally": tally.to_json(), "sample": sample}
            if report is not None:
                report.write(plan.report(number))
            write_index(file, index)


def assemble_shard(
    work: Path, split_name: str, number: int, stretches: list[tuple[int, int, int]], vocab_size: int
) -> int:
    """Write one shard of `stretches`: (part, first document, last + 1) of the split's. Returns its tokens' number."""
    plan = load_plan(work)
    directory = plan.dataset / split_name
    directory.mkdir(parents=True, exist_ok=True)
    pieces = chain.from_iterable(
        read_documents(plan.tokens(part), split_name, first, after) for part, first, after in stretches
    )
    entry = write_shard(directory / f"shard-{number:05d}.tokens", pieces, vocab_size)
    write_json(shard_entry(plan, split_name, number), entry)
    return entry["tokens"]


def report_tokenizer(work: Path) -> int:
    """Write how the tokenizer fits the samples of the training text, by language. Returns 0: it writes no tokens."""
    plan = load_plan(work)
    if not plan.tokenizer_report.exists():
        texts = (text for number in plan.sampled for text in read_index(plan.tokens(number))["sample"])
        labelled = ((identify(text)[0], text) for text in texts)
        write_json(plan.tokenizer_report, tokenizer_report(tokenizers.load_tokenizer(plan.tokenizer_dir), labelled))
    return 0


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """For an engine: tasks of different functions at once."""
    return function(*arguments)


def shard_entry(plan: Plan, split_name: str, number: int) -> Path:
    """The manifest's entry of a finished shard, kept until the manifest is written."""
    return plan.work / "shards" / f"{split_name}-{number:05d}.json"


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
        for index, document in chain(ahead, found):
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


@contextmanager
def _saving_rows(path: Path, dtype: np.dtype) -> Iterator[Callable[[np.ndarray], None]]:
    """`save(rows)`, again and again: `path` becomes an .npy file of all of them, and memory holds none."""
    num_rows = 0

    def save(rows: np.ndarray) -> None:
        nonlocal num_rows
        file.write(np.ascontiguousarray(rows).view(np.uint8).data)
        num_rows += len(rows)

    def write_header() -> None:  # numpy leaves room in it for any number
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows,)}
        np.lib.format.write_array_header_1_0(file, header)

    with writing(path) as file:
        write_header()
        yield save
        file.seek(0)
        write_header()


def _tokenized(
    texts: Iterable[tuple[str, str]], encode: EncodeFlat, end: int | None, tally: Tally
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(split, tokens, lengths) of about a megabyte of text of one split at once; texts without tokens are dropped."""
    waiting: dict[str, list[str]] = {name: [] for name in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)

    def tokenize(name: str) -> tuple[str, np.ndarray, np.ndarray]:
        tokens, lengths = encode(waiting[name], end)
        kept = lengths > (end is not None)
        if not kept.all():
            for number in np.flatnonzero(~kept):
                tally.drop("no tokens", waiting[name][number])
            tokens, lengths = tokens[np.repeat(kept, lengths)], lengths[kept]
        waiting[name], sizes[name] = [], 0
        return name, tokens, lengths

    for name, text in texts:
        if len(text) >= BATCH_CHARACTERS and waiting[name]:
            yield tokenize(name)  # a very long one goes alone, which takes less memory
        waiting[name].append(text)
        sizes[name] += len(text)
        if sizes[name] >= BATCH_CHARACTERS:
            yield tokenize(name)
    yield from (tokenize(name) for name in SPLITS if waiting[name])


def _splits(
    documents: Iterable[Document], settings: BuildConfig, held_out: bool, tally: Tally
) -> Iterator[tuple[str, str]]:
    for document in documents:
        tally.seen += 1
        texts = split(document.text, settings, held_out)
        if len(texts) > 1:
            tally.found["cut in two"] += 1
        yield from texts


def _sampling(texts: Iterable[tuple[str, str]], room: int, sample: list[str]) -> Iterator[tuple[str, str]]:
    """The same texts; the beginnings of the first ones of the train split go to `sample`, up to `room` characters."""
    for name, text in texts:
        if room > 0 and name == "train":
            sample.append(text[:LONGEST_REPORTED])
            room -= len(sample[-1])
        yield name, text


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
        return [(name, part) for name, part in (("train", text[:cut]), ("validation", text[cut:])) if part]
    share = _hash(text) / 2**64
    return [("validation" if share < settings.validation_fraction else "train", text)]


def _hash(text: str) -> int:
    if len(text) <= BATCH_CHARACTERS:
        return xxhash.xxh3_64_intdigest(text.encode())
    digest = xxhash.xxh3_64()
    for start in range(0, len(text), BATCH_CHARACTERS):
        digest.update(text[start : start + BATCH_CHARACTERS].encode())
    return digest.intdigest()


def write_json(path: Path, content: object) -> None:
    with writing(path) as file:
        file.write(json.dumps(content).encode())


@lru_cache(maxsize=1)
def _stages(config: str) -> list[Stage]:
    """The stages for a CleanConfig's JSON; made once in every worker: they load models and test sets."""
    return make_stages(CleanConfig.model_validate_json(config))


@lru_cache(maxsize=1)
def _encoder(tokenizer_dir: Path, made_at: int, is_bert: bool) -> tuple[EncodeFlat, int | None]:
    """The encoder of a tokenizer's folder and the id that ends a document; made once in every worker.

    made_at: the time of the folder's tokenizer, for a process that sees several builds.
    """
    tokenizer = tokenizers.load_tokenizer(tokenizer_dir)
    return tokenizers.flat_encoder(tokenizer), None if is_bert else tokenizers.end_of_text_id(tokenizer)
