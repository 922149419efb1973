"""What a build does, in order: raw text -> a dataset directory.

The files of the sources are found and cut into parts (corpus.py, parts.py); workers clean, compare and tokenize parts
and assemble shards (passes.py) on whatever engine there is (engines.py). What is written does not depend on who did
what, or how often the build was killed: finished parts are files in a working directory beside the dataset, and only
missing ones are made. The dataset appears in one rename, complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from configs.load import ConfigError
from configs.schema import PretrainConfig
from data_pipeline import passes
from data_pipeline import tokenizer as tokenizers
from data_pipeline.build_report import print_result, summary
from data_pipeline.card import data_card
from data_pipeline.corpus import Corpus, clear, find_corpus, make_plan
from data_pipeline.dedupe import find_duplicates
from data_pipeline.engines import Run, default_workers, open_engine, run_here
from data_pipeline.language import load_model
from data_pipeline.part_text import clean_text, write_json
from data_pipeline.part_tokens import cut_shards
from data_pipeline.parts import SPLITS, Plan, has_stages, most_workers, runs
from data_pipeline.progress import Progress
from data_pipeline.shards import DataError, read_manifest, token_dtype, write_manifest, writing
from data_pipeline.store import LOCK, locked
from data_pipeline.tally import EXAMPLE_CHARACTERS

Workers = AbstractContextManager[tuple[Run, int]]  # who runs tasks, and how many they are


def build(config: PretrainConfig, console: Console, engine: tuple[Run, int] | None = None) -> None:
    """Build `data.dir`/train and /validation. Raises DataError; a finished dataset is never overwritten.

    `engine`: who runs the tasks, and with how many workers; none: what data.build says.
    """
    settings = config.data.build
    root = place_of(config.data.dir)
    work = root.with_name(f".building-{root.name}")
    corpus = find_corpus(config)
    started = time.monotonic()
    try:
        with alone(root), Progress(console) as progress:
            if is_finished(root, corpus.built_from):
                progress.say(f"{root} is already built from these sources and settings")
                clear(work)
                return
            num_workers = min(default_workers(settings), most_workers(corpus.text_bytes, settings))

            def open_workers() -> Workers:
                return open_engine(settings, work, num_workers) if engine is None else nullcontext(engine)

            finish(*make(work, config, corpus, open_workers, progress), root)
    except (OSError, MemoryError) as error:
        kept = "finished parts are kept, the same command goes on from them"
        if isinstance(error, MemoryError):
            raise DataError(
                f"{root}: memory ran out; {kept}. With fewer data.build.num_workers it needs less"
            ) from error
        cure = f"make room; {kept}" if error.errno == errno.ENOSPC else f"mend it or choose another data.dir; {kept}"
        raise DataError(f"{root}: cannot be written ({error}); {cure}") from error
    print_result(root, time.monotonic() - started, console)


def place_of(directory: str) -> Path:
    """Where the dataset goes: data.dir without links, dots and a slash at its end. Raises ConfigError, DataError."""
    if "://" in directory:
        raise ConfigError(f"data.dir={directory}: is an address; build into a folder and copy that to the address")
    try:
        root = Path(directory).expanduser().resolve()
        is_mount, is_other = root.is_mount(), root.exists() and not root.is_dir()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise DataError(f"data.dir={directory}: cannot be reached ({error}); choose another data.dir") from error
    if is_mount:
        raise DataError(f"{root}: is a mount point, which cannot be renamed to; choose a folder in it: {root}/corpus")
    if is_other:
        raise DataError(f"{root}: is a file; choose another data.dir")
    return root


def is_finished(root: Path, built_from: str) -> bool:
    """Whether `root` holds this very dataset; DataError if it holds another one, or things that are not ours."""
    manifests = [root / name / "manifest.json" for name in SPLITS]
    if all(manifest.is_file() for manifest in manifests):
        cure = "choose another data.dir, or remove it first"
        try:
            known = [read_manifest(manifest.parent)["built_from"] for manifest in manifests]
        except DataError as error:
            raise DataError(f"{root}: holds another dataset ({error}); {cure}") from error
        if known == [built_from] * len(known):
            return True
        raise DataError(f"{root}: holds a dataset built from other sources or settings; {cure}")
    if root.exists() and any(path.name not in SPLITS for path in root.iterdir()):
        raise DataError(f"{root}: is not empty and not a dataset; choose another data.dir")
    return False


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keep others from writing `root`; the lock is the kernel's and goes with this process, however it ends."""
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root.with_name(f"{LOCK}{root.name}")
    try:
        with locked(path, wait=False) as lock:
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
    except BlockingIOError:
        holder = path.read_text() if path.exists() else ""
        raise DataError(
            f"{root}: another build is writing it ({holder or 'just started'}); wait for it, or choose another data.dir"
        ) from None


def make(
    work: Path, config: PretrainConfig, corpus: Corpus, open_workers: Callable[[], Workers], progress: Progress
) -> tuple[Plan, Tokenizer]:
    """All that takes long: from the sources to finished shards in the working directory.

    Three times workers begin anew, without what the ones before have in memory: the models and test sets of the stages,
    and half a gigabyte that the training of a tokenizer leaves. What needs no workers, starts none.
    """
    with ThreadPoolExecutor(1) as aside:
        if not has_stages(config.data.build):  # nothing else takes long, and as much memory
            aside.submit(load_model)
        with open_workers() as (run, num_workers):
            plan = make_plan(work, config, corpus, run, progress)
            if plan.has_clean_pass:
                do_parts(plan, "clean", passes.clean_parts, plan.report, run, num_workers, progress)
            if plan.compares:
                drop_duplicates(plan, run, progress)
        if not plan.tokenizer_dir.exists():
            with open_workers() as (run, _), progress.phase("tokenizer"):
                for _ in (run_here if corpus.tokenizer else run)(passes.make_tokenizer, [(work, corpus.tokenizer)]):
                    pass
        with open_workers() as (run, num_workers):
            loading = aside.submit(passes.load_for_report, plan)
            do_parts(plan, "tokenize", passes.token_parts, plan.tokens, run, num_workers, progress)
            corpus.refuse_changed()
            tokenizer, write_report = loading.result()
            reporting = aside.submit(write_report)
            make_shards(plan, tokenizer.get_vocab_size(), run, progress)
            reporting.result()
        return plan, tokenizer


def do_parts(
    plan: Plan, title: str, function: Any, result: Any, run: Run, num_workers: int, progress: Progress
) -> None:
    """Run a pass over all parts whose `result(part)` does not exist yet."""
    todo = [number for number in range(plan.num_parts) if not result(number).exists()]
    reads_sources = function is passes.clean_parts or not plan.has_clean_pass
    reach = plan.reach if reads_sources else [0] * plan.num_parts
    tasks = [(plan.work, numbers) for numbers in runs(todo, plan.sizes, reach, plan.num_own, num_workers)]
    sizes = {result(number).name: plan.sizes[number] for number in todo}
    with progress.phase(title, sum(sizes.values()), result(0).parent, sizes):
        for _ in run(function, tasks):
            pass


def drop_duplicates(plan: Plan, run: Run, progress: Progress) -> None:
    """Leave a mask for every part that is compared; the first document of those that say the same stays."""
    settings = plan.config.data.build.deduplicate
    if plan.duplicates.exists():
        return

    def run_numbers(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
        return run(function, [(number,) for number in numbers])

    with progress.phase("duplicates"):
        files = [plan.signatures(number) for number in range(plan.num_own)]
        found = find_duplicates(files, settings, plan.duplicates.parent, run_numbers)
    examples = {
        kind: [[clean_text(plan, *row)[:EXAMPLE_CHARACTERS] for row in pair] for pair in pairs]
        for kind, pairs in found.examples.items()
    }
    write_json(plan.duplicates, {"exact": found.exact, "near": found.near, "examples": examples})


def make_shards(plan: Plan, vocab_size: int, run: Run, progress: Progress) -> None:
    """Cut the tokens of each split into shards.

    Raises DataError where a split has no document.
    """
    token_files = [plan.tokens(number) for number in range(plan.num_parts)]
    limit = plan.config.data.build.shard_tokens
    shards = {name: list(cut_shards(token_files, name, limit)) for name in SPLITS}
    if not any(shards.values()):
        raise DataError("the sources hold no text at all" + skipped_records(plan))
    for name in SPLITS:
        if not shards[name]:
            raise DataError(
                f"no document fell into the {name} split: the corpus is too small to be split by documents; set "
                f"data.build.validation_fraction higher, or data.build.split_by=tail, or data.build.validation_sources"
                + skipped_records(plan)
            )
    tasks: list[tuple] = []
    missing = 0
    for name in SPLITS:
        for number, (stretches, num_tokens) in enumerate(shards[name]):
            if not passes.shard_entry(plan, name, number).exists():
                tasks.append((plan.work, name, number, stretches, vocab_size))
                missing += num_tokens
    token_bytes = token_dtype(vocab_size).itemsize
    with progress.phase("shards", missing * token_bytes) as advance:
        for num_tokens in run(passes.assemble_shard, tasks):
            advance(num_tokens * token_bytes)


def skipped_records(plan: Plan) -> str:
    broken = 0
    for number in range(plan.num_parts):
        report = json.loads(plan.report(number).read_text())
        broken += report["tallies"]["read"]["dropped"].get("broken record", 0)
    return f" ({broken} broken records were skipped)" if broken else ""


def finish(plan: Plan, tokenizer: Tokenizer, root: Path) -> None:
    """Add tokenizer, reports and manifests to the shards, and give the dataset its name."""
    content = summary(plan)
    card = data_card(content).encode()
    vocab_size, fingerprint = tokenizer.get_vocab_size(), tokenizers.fingerprint(tokenizer)
    for name in SPLITS:
        directory = plan.dataset / name
        tokenizers.copy_tokenizer(plan.tokenizer_dir, directory)
        count = len(list(directory.glob("shard-*.tokens")))
        entries = [json.loads(passes.shard_entry(plan, name, number).read_text()) for number in range(count)]
        write_json(directory / "stages.json", content)
        with writing(directory / "card.html") as file:
            file.write(card)
        write_manifest(directory, entries, vocab_size, fingerprint, plan.built_from)
    if root.exists():
        shutil.rmtree(root)  # unfinished: `is_finished` has refused anything else
    plan.dataset.rename(root)
    clear(plan.work)
