"""Raw text -> a dataset directory: `millstream data build CONFIG [key=value ...]`, or the same under `mpirun -np N`.

The sources are cut into parts (parts.py); workers clean, compare and tokenize parts and assemble shards (passes.py) on
whatever engine there is (engines.py). What is written does not depend on who did what, or how often the build was
killed: finished parts are files in a working directory beside the dataset, and only missing ones are made. The dataset
appears in one rename, complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console

from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline import passes
from data_pipeline import tokenizer as tokenizers
from data_pipeline.build_report import Progress, print_result, summary
from data_pipeline.card import data_card
from data_pipeline.dedupe import find_duplicates
from data_pipeline.engines import Run, mpi_world_size, open_engine, open_mpi
from data_pipeline.language import identify
from data_pipeline.parts import SPLITS, Plan, group, load_plan, piece_bytes, runs
from data_pipeline.shards import DataError, read_manifest, write_manifest
from data_pipeline.sources import Document, Piece, find_files, refuse_repeated, size_of, stamp
from data_pipeline.tally import EXAMPLE_CHARACTERS
from data_pipeline.tokenizer_report import tokenizer_report

REPORTED_CHARACTERS = 1 << 19  # the tokenizer's report is of about that much text,
LONGEST_REPORTED = 1 << 11  # and of the beginnings of long documents
SAMPLED_PARTS = 64  # a tokenizer is trained on the beginnings of that many parts, spread evenly


def main() -> int:
    try:
        if len(sys.argv) < 2:
            raise ConfigError("usage: millstream data build CONFIG [key=value ...]")
        config = load_pretrain(sys.argv[1], sys.argv[2:])
        if mpi_world_size() == 1:
            build(config, Console())
            return 0
        with open_mpi() as engine:
            if engine is not None:
                build(config, Console(), engine)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def build(config: PretrainConfig, console: Console, engine: tuple[Run, int] | None = None) -> None:
    """Build `data.dir`/train and /validation. Raises DataError; a finished dataset is never overwritten.

    `engine`: who runs the tasks, and with how many workers; none: what data.build.engine says.
    """
    root = Path(config.data.dir)
    corpus = find_corpus(config)
    started = time.monotonic()
    work = root.with_name(f".building-{root.name}")
    try:
        with locked(work, root), Progress(console) as progress:
            if is_finished(root, corpus.built_from):
                progress.say(f"{root} is already built from these sources and settings")
                shutil.rmtree(work)
                return
            with nullcontext(engine) if engine else open_engine(config.data.build, work) as (run, num_workers):
                plan = make(work, config, corpus, run, num_workers, progress)
            finish(plan, root)
    except OSError as error:
        kept = "finished parts are kept, the same command goes on from them"
        cure = f"make room; {kept}" if error.errno == errno.ENOSPC else f"mend it or choose another data.dir; {kept}"
        raise DataError(f"{root}: cannot be written ({error}); {cure}") from error
    print_result(root, time.monotonic() - started, console)


@dataclass(frozen=True)
class Corpus:
    """What a build reads: the sources' files, those of data.build.validation_sources, and how they were found."""

    files: list[str]
    held_out: list[str]
    stamps: dict[str, str]  # file -> size and time, or ETag
    built_from: str  # fingerprint of these and of the settings

    @property
    def all(self) -> list[str]:
        return [*self.files, *self.held_out]


def find_corpus(config: PretrainConfig) -> Corpus:
    """Find the files and look at their sizes and times. Raises DataError for a source that is not there."""
    settings = config.data.build
    files = find_files(settings.sources)
    held_out = find_files(settings.validation_sources) if settings.validation_sources else []
    refuse_repeated([*files, *held_out])
    stamps = {file: stamp(file) for file in [*files, *held_out]}
    return Corpus(files, held_out, stamps, source_fingerprint(config, stamps))


def source_fingerprint(config: PretrainConfig, stamps: dict[str, str]) -> str:
    """Of all that decides what is written: the build settings, the kind of model, each file's size and time."""
    settings = config.data.build.model_dump(exclude={"num_workers", "engine", "slurm", "on_error"})
    vocabulary = settings["tokenizer"]["path"]
    inside = sorted(map(str, Path(vocabulary).iterdir())) if vocabulary and Path(vocabulary).is_dir() else []
    tests = config.data.build.clean.decontaminate
    read = {file: stamp(file) for file in [*inside, *tests] if Path(file).is_file()}
    return xxhash.xxh3_128_hexdigest(repr((settings, config.model.architecture, stamps, read)).encode())


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


@contextmanager
def locked(work: Path, root: Path) -> Iterator[None]:
    """Keep other builds out of `work`; the lock is the kernel's and goes with this process, however it ends."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise DataError(
                    f"{root}: another build is writing it ({lock.read() or 'just started'}); wait for it, or choose "
                    f"another data.dir"
                ) from None
            if not (work / "lock").exists() or not os.path.samestat(os.fstat(lock.fileno()), (work / "lock").stat()):
                continue  # that build finished meanwhile and took its directory with it
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield
            return


def make(work: Path, config: PretrainConfig, corpus: Corpus, run: Run, num_workers: int, progress: Progress) -> Plan:
    """All that takes long: from the sources to finished shards in the working directory."""
    plan = make_plan(work, config, corpus, run, progress)
    if plan.has_clean_pass:
        do_parts(plan, "clean", passes.clean_parts, plan.report, run, num_workers, progress)
    drop_duplicates(plan, run, progress)
    tokenizer = make_tokenizer(plan, progress)
    do_parts(plan, "tokenize", passes.token_parts, plan.tokens, run, num_workers, progress)
    if changed := [file for file in corpus.all if stamp(file) != corpus.stamps[file]]:
        raise DataError(f"{changed[0]}: was changed while it was read; run the same command again, it starts over")
    make_shards(plan, tokenizer.get_vocab_size(), run, progress)
    return plan


def make_plan(work: Path, config: PretrainConfig, corpus: Corpus, run: Run, progress: Progress) -> Plan:
    """The plan that a killed build has left, if it is for the same sources and settings, or a new one."""
    load_plan.cache_clear()
    if (work / "plan.json").exists():
        plan = replace(load_plan(work), config=config)  # on_error may be another one now
        if plan.built_from == corpus.built_from:
            plan.save()
            load_plan.cache_clear()
            return plan
        progress.say("the sources or settings are not those of the build that was begun here; starting over")
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    sizes = {file: size_of(file) for file in corpus.all}
    size = piece_bytes(sizes)
    tasks = [(number, file, config.data.build, size) for number, file in enumerate(corpus.all)]
    pieces: list[list[Piece]] = [[]] * len(tasks)
    with progress.phase("scan", sum(sizes.values())) as advance:
        for number, found in run(passes.scan_file, tasks):
            pieces[number] = found
            advance(sizes[corpus.all[number]])
    own, held_out = pieces[: len(corpus.files)], pieces[len(corpus.files) :]
    parts = [*group(chain.from_iterable(own), size, False), *group(chain.from_iterable(held_out), size, True)]
    for folder in ("clean", "tokens", "shards", "dataset"):
        (work / folder).mkdir()
    plan = Plan(work, corpus.built_from, config, corpus.stamps, parts)
    plan.save()
    load_plan.cache_clear()
    return plan


def do_parts(
    plan: Plan, title: str, function: Any, result: Any, run: Run, num_workers: int, progress: Progress
) -> None:
    """Run a pass over all parts whose `result(part)` does not exist yet."""
    todo = [number for number in range(len(plan.parts)) if not result(number).exists()]
    sizes = {result(number): plan.parts[number].num_bytes for number in todo}
    with progress.phase(title, sum(sizes.values()), sizes):
        for _ in run(function, [(plan.work, numbers) for numbers in runs(plan.parts, todo, num_workers)]):
            pass


def drop_duplicates(plan: Plan, run: Run, progress: Progress) -> None:
    """Leave a mask for every part that is compared; the first document of those that say the same stays."""
    settings = plan.config.data.build.deduplicate
    if not (settings.exact or settings.near) or plan.duplicates.exists():
        return

    def run_numbers(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
        return run(function, [(number,) for number in numbers])

    with progress.phase("duplicates", None):
        files = [plan.signatures(number) for number, part in enumerate(plan.parts) if not part.held_out]
        found = find_duplicates(files, settings, plan.duplicates.parent, run_numbers)
    examples = {
        kind: [[passes.clean_text(plan, *row)[:EXAMPLE_CHARACTERS] for row in pair] for pair in pairs]
        for kind, pairs in found.examples.items()
    }
    passes.write_json(plan.duplicates, {"exact": found.exact, "near": found.near, "examples": examples})


def make_tokenizer(plan: Plan, progress: Progress) -> Any:
    """Load or train the tokenizer; its folder in the working directory is complete or not there."""
    if plan.tokenizer_dir.exists():
        return tokenizers.load_tokenizer(plan.tokenizer_dir)
    settings, train = plan.config.data.build.tokenizer, plan.config.train
    aside = plan.work / ".writing-tokenizer"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with progress.phase("tokenizer", None):
        tokenizer = tokenizers.make_tokenizer(settings, sample_texts(plan, settings.sample_bytes), aside)
    longest = max([train.seq_len, *(phase.seq_len for phase in train.phases)])
    tokenizers.save_tokenizer(tokenizer, aside, plan.config.model.max_seq_len or longest)
    aside.rename(plan.tokenizer_dir)
    return tokenizer


def sample_texts(plan: Plan, wanted: int) -> Iterator[str]:
    """Texts of the train split, about `wanted` characters: all of it, or the beginnings of parts spread evenly."""
    numbers = [number for number, part in enumerate(plan.parts) if not part.held_out]
    of_each = wanted
    if sum(plan.parts[number].num_bytes for number in numbers) > wanted:
        numbers = numbers[:: -(-len(numbers) // SAMPLED_PARTS)]
        of_each = wanted // len(numbers)
    for documents in part_documents(plan, numbers):
        size = 0
        for document in documents:
            for name, text in passes.split(document.text, plan.config.data.build, held_out=False):
                if name == "train" and text:
                    yield text
                    size += len(text)
            if size >= of_each:
                break


def part_documents(plan: Plan, numbers: list[int]) -> Iterator[Iterator[Document]]:
    """The documents of each of these parts; a file with several of them is passed over once."""
    if plan.has_clean_pass:
        yield from (passes.read_clean(plan, number) for number in numbers)
        return
    for _, of_file in groupby(numbers, key=lambda number: plan.parts[number].pieces[0].file):
        yield from (documents for _, documents, _ in passes.read_parts(plan, list(of_file)))


def make_shards(plan: Plan, vocab_size: int, run: Run, progress: Progress) -> None:
    """Cut the tokens of each split into shards. Raises DataError where a split has no document."""
    plans = {name: shard_slices(plan, name) for name in SPLITS}
    if not any(plans.values()):
        raise DataError("the sources hold no text at all" + skipped_records(plan))
    for name in SPLITS:
        if not plans[name]:
            raise DataError(
                f"no document fell into the {name} split: the corpus is too small to be split by documents; set "
                f"data.build.validation_fraction higher, or data.build.split_by=tail, or data.build.validation_sources"
                + skipped_records(plan)
            )
    tasks = [
        (plan.work, name, number, slices, vocab_size)
        for name in SPLITS
        for number, slices in enumerate(plans[name])
        if not passes.shard_entry(plan, name, number).exists()
    ]
    with progress.phase("shards", len(tasks)) as advance:
        for _ in run(passes.assemble_shard, tasks):
            advance(1)


def shard_slices(plan: Plan, name: str) -> list[list[tuple[int, int, int]]]:
    """For each shard of a split the (part, first document, last + 1) it is made of.

    A shard ends with the first document that brings it to data.build.shard_tokens.
    """
    limit = plan.config.data.build.shard_tokens
    shards: list[list[tuple[int, int, int]]] = []
    open_shard: list[tuple[int, int, int]] = []
    filled = 0
    for number in range(len(plan.parts)):
        with np.load(plan.tokens(number)) as arrays:
            ends = np.cumsum(arrays[f"{name}_lengths"])
        first, before = 0, 0
        while first < len(ends):
            last = int(np.searchsorted(ends, before + limit - filled))
            after = min(last + 1, len(ends))
            open_shard.append((number, first, after))
            filled += int(ends[after - 1]) - before
            first, before = after, int(ends[after - 1])
            if filled >= limit:
                shards.append(open_shard)
                open_shard, filled = [], 0
    return [*shards, open_shard] if open_shard else shards


def skipped_records(plan: Plan) -> str:
    broken = 0
    for number in range(len(plan.parts)):
        report = json.loads(plan.report(number).read_text())
        broken += report["tallies"]["read"]["dropped"].get("broken record", 0)
    return f" ({broken} broken records were skipped)" if broken else ""


def finish(plan: Plan, root: Path) -> None:
    """Add tokenizer, reports and manifests to the shards, and give the dataset its name."""
    tokenizer = tokenizers.load_tokenizer(plan.tokenizer_dir)
    texts = (text[:LONGEST_REPORTED] for text in sample_texts(plan, REPORTED_CHARACTERS))
    labelled = ((identify(text)[0], text) for text in texts)
    content = summary(plan, tokenizer_report(tokenizer, labelled))
    for name in SPLITS:
        directory = plan.dataset / name
        shutil.copytree(plan.tokenizer_dir, directory, dirs_exist_ok=True)
        count = len(list(directory.glob("shard-*.tokens")))
        entries = [json.loads(passes.shard_entry(plan, name, number).read_text()) for number in range(count)]
        passes.write_json(directory / "stages.json", content)
        (directory / "card.html").write_text(data_card(content), encoding="utf-8")
        write_manifest(
            directory, entries, tokenizer.get_vocab_size(), tokenizers.fingerprint(tokenizer), plan.built_from
        )
    if root.exists():
        shutil.rmtree(root)  # unfinished: `is_finished` has refused anything else
    plan.dataset.rename(root)
    shutil.rmtree(plan.work)


if __name__ == "__main__":
    sys.exit(main())
