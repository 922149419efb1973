"""What workers do in a build: clean parts, tokenize parts, assemble shards. Called by name through an engine.

Each function takes the working directory and numbers, and leaves files there (see parts.py), each complete or not there
at all. What is there already was made by the same plan and is not made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
import zstandard
from tokenizers import Tokenizer

from configs.schema import BuildConfig, CleanConfig
from data_pipeline import tokenizer as tokenizers
from data_pipeline.byte_level import ranked_encoder
from data_pipeline.clean import Stage, clean, make_stages
from data_pipeline.encode import EncodeFlat
from data_pipeline.language import identify, load_model
from data_pipeline.minhash import signature_dtype, signatures
from data_pipeline.part_text import Report, read_clean, read_parts, sample_texts, split, write_json
from data_pipeline.part_tokens import read_documents, read_index, write_index, write_tokens
from data_pipeline.parts import SPLITS, Plan, fields_of, load_plan
from data_pipeline.shards import token_dtype, write_shard, writing
from data_pipeline.sources import Document, scan
from data_pipeline.tally import Tally
from data_pipeline.tokenizer_report import prepare_report

BATCH_CHARACTERS = 1 << 20  # text that is compared or tokenized at once
REPORTED_CHARACTERS = 1 << 19  # the tokenizer's report is of about that much text,
LONGEST_REPORTED = 1 << 11  # and of the beginnings of long documents,
IDENTIFIED = 200  # whose languages are told by so many characters: right in 98.3 % (benchmarks/clean.py)
ZSTD_LEVEL_1 = zstandard.ZstdCompressor(level=1)  # 300 MB/s a core, half as much to read and write


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
    encode, end = _encoder_of(plan)
    numbers = [number for number in numbers if not plan.tokens(number).exists()]
    sources: Iterable[tuple[int, Iterator[Document], Report | None]]
    if plan.has_clean_pass:
        sources = ((number, read_clean(plan, number), None) for number in numbers)
    else:
        sources = read_parts(plan, numbers)
    with ThreadPoolExecutor(1) as disk:  # brings a part to the disk while the next one is tokenized
        last: Future[None] | None = None
        for number, documents, report in sources:
            tally = Tally()
            sample: list[str] = []  # for the tokenizer's report
            room = REPORTED_CHARACTERS // len(plan.sampled) if number in plan.sampled else 0
            texts = _splits(documents, plan.config.data.build, plan.is_held_out(number), tally)
            with ExitStack() as files:
                file = files.enter_context(writing(plan.tokens(number)))
                index = write_tokens(file, _tokenized(_sampling(texts, room, sample), encode, end, tally))
                write_index(file, index | {"tally": tally.to_json(), "sample": sample})
                if last is not None:
                    last.result()
                last = disk.submit(_finish_part, files.pop_all(), report, plan.report(number))
        if last is not None:
            last.result()


def _finish_part(files: ExitStack, report: Report | None, path: Path) -> None:
    """Write the report, if there is one, then let the part's files appear."""
    with files:
        if report is not None:
            report.write(path)


def make_tokenizer(work: Path, loaded: Tokenizer | None = None) -> None:
    """Load or train the tokenizer, or take the `loaded` one; its folder in `work` is complete or not there.

    encoder.json, written before: the id that ends a document, the number of ids, and the tokens that tiktoken would
    need, as latin-1, with their ids; None if tiktoken is not certain to give the same ids. So workers do not prove it.
    """
    plan = load_plan(work)
    settings, train = plan.config.data.build.tokenizer, plan.config.train
    aside = work / ".writing-tokenizer"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    os.environ.pop("TOKENIZERS_PARALLELISM", None)  # workers set it; but no other one has work meanwhile
    tokenizer = tokenizers.make_tokenizer(settings, sample_texts(plan, settings.sample_bytes), aside, loaded)
    longest = max([train.seq_len, *(phase.seq_len for phase in train.phases)])
    tokenizers.save_tokenizer(tokenizer, aside, plan.config.model.max_seq_len or longest)
    end = None if plan.config.model.architecture == "bert" else tokenizers.end_of_text_id(tokenizer)
    ranks = tokenizers.proven_ranks(tokenizer)
    by_text = None if ranks is None else {token.decode("latin-1"): number for token, number in ranks.items()}
    with writing(plan.encoder) as file:
        file.write(orjson.dumps({"end": end, "num_ids": tokenizers.num_ids(tokenizer), "ranks": by_text}))
    aside.rename(plan.tokenizer_dir)


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


def load_for_report(plan: Plan) -> tuple[Tokenizer, Callable[[], None]]:
    """The plan's tokenizer, and a function that writes how it fits the samples of the training text, by language.

    All that does not depend on the text is loaded now, while workers tokenize.
    """
    tokenizer = tokenizers.load_tokenizer(plan.tokenizer_dir)
    if plan.tokenizer_report.exists():
        return tokenizer, lambda: None
    load_model()
    report = prepare_report(tokenizer, _encoder_of(plan)[0])

    def write_report() -> None:
        texts = (text for number in plan.sampled for text in read_index(plan.tokens(number))["sample"])
        write_json(plan.tokenizer_report, report((identify(text[:IDENTIFIED])[0], text) for text in texts))

    return tokenizer, write_report


def shard_entry(plan: Plan, split_name: str, number: int) -> Path:
    """The manifest's entry of a finished shard, kept until the manifest is written."""
    return plan.work / "shards" / f"{split_name}-{number:05d}.json"


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


@lru_cache(maxsize=1)
def _stages(config: str) -> list[Stage]:
    """The stages for a CleanConfig's JSON; made once in every worker: they load models and test sets."""
    return make_stages(CleanConfig.model_validate_json(config))


def _encoder_of(plan: Plan) -> tuple[EncodeFlat, int | None]:
    return _encoder(plan.encoder, plan.encoder.stat().st_mtime_ns, plan.tokenizer_dir)


@lru_cache(maxsize=1)
def _encoder(file: Path, made_at: int, tokenizer_dir: Path) -> tuple[EncodeFlat, int | None]:
    """The encoder of a tokenizer's folder and the id that ends a document; made once in every worker.

    made_at: the time of `file`, see `make_tokenizer`, for a process that sees several builds.
    """
    content = orjson.loads(file.read_bytes())
    if content["ranks"] is None:
        return tokenizers.flat_encoder(tokenizers.load_tokenizer(tokenizer_dir)), content["end"]
    ranks = {token.encode("latin-1"): number for token, number in content["ranks"].items()}
    return ranked_encoder(ranks, token_dtype(content["num_ids"])), content["end"]
