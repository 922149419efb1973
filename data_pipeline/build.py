"""Raw text -> a dataset directory: `millstream data build CONFIG [key=value ...]`.

Documents are read once, in order, split by a hash of their text, encoded by a pool of processes and written shard by
shard in the order they were read, so the result does not depend on the number of processes. The manifest comes last.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from configs.load import ConfigError, load_pretrain
from configs.schema import BuildConfig, PretrainConfig
from data_pipeline import tokenizer as tokenizers
from data_pipeline.dedupe import KEPT, mask_duplicates
from data_pipeline.shards import DataError, read_manifest, write_manifest, write_shard
from data_pipeline.sources import DOCSTRINGS, Document, find_files, read_documents

SPLITS = ("train", "validation")
CHUNK_CHARACTERS = 1 << 20  # what a worker gets at once


def main() -> int:
    try:
        if len(sys.argv) < 2:
            raise ConfigError("usage: millstream data build CONFIG [key=value ...]")
        build(load_pretrain(sys.argv[1], sys.argv[2:]), Console())
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def build(config: PretrainConfig, console: Console) -> None:
    """Build `data.dir`/train and /validation. Raises DataError; a finished dataset is never overwritten."""
    settings, root = config.data.build, Path(config.data.dir)
    files = find_files(settings.sources)
    held_out = find_files(settings.validation_sources) if settings.validation_sources else []
    built_from = source_fingerprint(config, files + held_out)
    if is_finished(root, built_from):
        console.print(f"{root} is already built from these sources and settings", highlight=False)
        return
    started = time.monotonic()
    skipped: list[str] = []
    on_error = skipped.append if settings.on_error == "skip" else None

    def documents() -> Iterator[tuple[str, str]]:
        """(split, text) of every document, in order."""
        found: Iterable[Document] = read_documents(files, settings.text_key, on_error)
        if settings.deduplicate.exact or settings.deduplicate.near:
            found = list(found)
            mask = mask_duplicates((document.text for document in found), settings.deduplicate)
            found = [document for document, code in zip(found, mask, strict=True) if code == KEPT]
        yield from split(found, settings)
        for document in read_documents(held_out, settings.text_key, on_error):
            yield "validation", document.text

    aside = root.with_name(f".writing-{root.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        console.print(f"tokenizer: {settings.tokenizer.type}", highlight=False)
        texts = (text for name, text in documents() if name == "train")
        tokenizer = tokenizers.make_tokenizer(settings.tokenizer, texts, aside)
        tokenizers.save_tokenizer(tokenizer, aside, config.model.max_seq_len or config.train.seq_len)
        end = None if config.model.architecture == "bert" else tokenizers.end_of_text_id(tokenizer)
        writers = {name: ShardWriter(aside, name, settings.shard_tokens, tokenizer.get_vocab_size()) for name in SPLITS}
        for name, ids in encode(documents(), aside, settings.num_workers, console):
            writers[name].add(ids if end is None else np.append(ids, end))
        finish(writers, tokenizers.fingerprint(tokenizer), built_from, skipped)
        if root.exists():
            shutil.rmtree(root)  # unfinished: `is_finished` has refused anything else
        aside.rename(root)
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error}); make room or choose another data.dir") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report(root, skipped, time.monotonic() - started, console)


def source_fingerprint(config: PretrainConfig, files: list[str]) -> str:
    """Of all that decides what is written: the build settings, the kind of model, each file's size and time."""
    settings = config.data.build.model_dump(exclude={"num_workers"})
    stats = [(file, *_stat(Path(file))) for file in files if file != DOCSTRINGS]
    return xxhash.xxh3_128_hexdigest(repr((settings, config.model.architecture, files, stats)).encode())


def is_finished(root: Path, built_from: str) -> bool:
    """Whether `root` holds this very dataset; DataError if it holds another one, or things that are not ours."""
    manifests = [root / name / "manifest.json" for name in SPLITS]
    if all(manifest.is_file() for manifest in manifests):
        if all(read_manifest(manifest.parent)["built_from"] == built_from for manifest in manifests):
            return True
        raise DataError(
            f"{root}: holds a dataset built from other sources or settings; choose another data.dir, or remove it first"
        )
    if root.exists() and any(path.name not in SPLITS for path in root.iterdir()):
        raise DataError(f"{root}: is not empty and not a dataset; choose another data.dir")
    return False


def split(documents: Iterable[Document], settings: BuildConfig) -> Iterator[tuple[str, str]]:
    """(split, text): whole documents by a hash of their text, or the tail of each document as validation."""
    for document in documents:
        text = document.text
        if settings.validation_sources:
            yield "train", text
        elif settings.split_by == "tail":
            cut = int(len(text) * (1 - settings.validation_fraction))
            yield "train", text[:cut]
            yield "validation", text[cut:]
        else:
            share = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
            yield ("validation" if share < settings.validation_fraction else "train"), text


def encode(
    documents: Iterator[tuple[str, str]], tokenizer_dir: Path, num_workers: int | None, console: Console
) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of every document, in order, encoded by `num_workers` processes (none: one per core)."""
    num_workers = num_workers or len(os.sched_getaffinity(0))
    columns = (TextColumn("tokenize"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, shown="")
        num_bytes, started = 0, time.monotonic()
        for names, arrays, size in _encode_chunks(chunks(documents), tokenizer_dir, num_workers):
            num_bytes += size
            speed = num_bytes / 1e6 / (time.monotonic() - started)
            progress.update(task, shown=f"{num_bytes / 1e6:,.1f} MB, {speed:.1f} MB/s")
            yield from zip(names, arrays, strict=True)


Chunk = list[tuple[str, str]]
Encoded = tuple[list[str], list[np.ndarray], int]


def chunks(documents: Iterable[tuple[str, str]]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for name, text in documents:
        chunk.append((name, text))
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunks(work: Iterator[Chunk], tokenizer_dir: Path, num_workers: int) -> Iterator[Encoded]:
    if num_workers == 1:
        _start_worker(tokenizer_dir)
        yield from map(_encode_chunk, work)
        return
    # spawn: a fork would copy the threads' locks of the tokenizer that was just trained
    with multiprocessing.get_context("spawn").Pool(num_workers, _start_worker, (tokenizer_dir,)) as pool:
        yield from pool.imap(_encode_chunk, work)


_worker: dict[str, Callable[[list[str]], list[np.ndarray]]] = {}  # of a pool's process: its encoder


def _start_worker(tokenizer_dir: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker["encode"] = tokenizers.encoder(tokenizers.load_tokenizer(tokenizer_dir))


def _encode_chunk(chunk: Chunk) -> Encoded:
    texts = [text for _, text in chunk]
    return [name for name, _ in chunk], _worker["encode"](texts), sum(len(text.encode()) for text in texts)


class ShardWriter:
    """Collects the documents of one split and closes a shard whenever `shard_tokens` are reached."""

    def __init__(self, root: Path, name: str, shard_tokens: int, vocab_size: int) -> None:
        self.directory, self.shard_tokens, self.vocab_size = root / name, shard_tokens, vocab_size
        self.directory.mkdir()
        self.documents: list[np.ndarray] = []
        self.num_tokens = 0
        self.shards: list[dict[str, object]] = []

    def add(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        self.documents.append(ids)
        self.num_tokens += len(ids)
        if self.num_tokens >= self.shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        if self.documents:
            path = self.directory / f"shard-{len(self.shards):05d}.tokens"
            pieces = ((ids, np.array([len(ids)])) for ids in self.documents)
            self.shards.append(write_shard(path, pieces, self.vocab_size))
            self.documents, self.num_tokens = [], 0


def finish(writers: dict[str, ShardWriter], tokenizer_fingerprint: str, built_from: str, skipped: list[str]) -> None:
    """Close the shards, copy the tokenizer into both datasets and write the manifests."""
    for writer in writers.values():
        writer.close_shard()
    if not any(writer.shards for writer in writers.values()):
        raise DataError(f"the sources hold no text at all ({len(skipped)} broken records were skipped)")
    for name, writer in writers.items():
        if not writer.shards:
            raise DataError(
                f"no document fell into the {name} split: the corpus is too small to be split by documents; set "
                f"data.build.validation_fraction higher, or data.build.split_by=tail, or data.build.validation_sources"
            )
    for writer in writers.values():
        for file in writer.directory.parent.iterdir():
            if file.is_file():
                shutil.copy(file, writer.directory)
        write_manifest(writer.directory, writer.shards, writer.vocab_size, tokenizer_fingerprint, built_from)
    for file in list(next(iter(writers.values())).directory.parent.iterdir()):
        if file.is_file():
            file.unlink()


def report(root: Path, skipped: list[str], seconds: float, console: Console) -> None:
    for name in SPLITS:
        manifest = read_manifest(root / name)
        console.print(
            f"{root / name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens", highlight=False
        )
    for message in skipped[:5]:
        console.print(f"skipped: {message}", highlight=False, markup=False)
    if skipped:
        console.print(f"{len(skipped)} broken records skipped", highlight=False)
    console.print(f"built in {seconds:.1f} s", highlight=False)


def _stat(path: Path) -> tuple[int, int]:
    if path.is_dir():
        inside = [file.stat() for file in sorted(path.rglob("*")) if file.is_file()]
        return sum(stat.st_size for stat in inside), max((stat.st_mtime_ns for stat in inside), default=0)
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


if __name__ == "__main__":
    sys.exit(main())
