"""What a build reads: the files of its sources, how they were found, and how they are cut into parts.

There may be millions of files, so of each one only its name and two numbers stay in memory.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import xxhash
from tokenizers import Tokenizer

from configs.load import ConfigError
from configs.schema import CleanConfig, PretrainConfig
from data_pipeline import passes
from data_pipeline.engines import Run, run_here
from data_pipeline.minhash import choose_bands
from data_pipeline.parts import LAYOUT, Plan, load_plan, part_bytes, save_plan, text_bytes
from data_pipeline.progress import Progress
from data_pipeline.shards import DataError, writing
from data_pipeline.sources import Piece, find_files, refuse_repeated, size_of, stamp
from data_pipeline.store import WRITING
from data_pipeline.tokenizer import BERT_SPECIAL, end_of_text_id, is_bert, load_tokenizer

SCANNED_FILES = 1000  # by one task, or fewer if they are large
SCANNED_HERE = 128 << 20  # bytes of text; so much is passed over in less time than workers take to start
FOLDERS = ("scan", "clean", "tokens", "shards", "dataset")


@dataclass(frozen=True)
class Corpus:
    """The files of the sources and those of data.build.validation_sources, and their state when they were found."""

    files: list[str]
    num_own: int  # the first files are of the sources, the others held out
    sizes: array[int]  # of each file, in bytes; 0 where a server does not say
    stamps: array[int]  # a hash of each file's size and time, or ETag
    built_from: str  # fingerprint of all this and of the settings
    tokenizer: Tokenizer | None = None  # the pretrained one

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        return sum(map(text_bytes, self.files, self.sizes))

    def refuse_changed(self) -> None:
        """Raises DataError if a file is not what it was when the corpus was found."""
        for file, before in zip(self.files, self.stamps, strict=True):
            if _hash(stamp(file)) != before:
                raise DataError(f"{file}: was changed while it was read; run the same command again, it starts over")


def find_corpus(config: PretrainConfig) -> Corpus:
    """Find the files and look at their sizes and times. Raises DataError or ConfigError for what cannot be built."""
    settings = config.data.build
    tokenizer = check_settings(config)
    files = find_files(settings.sources)
    num_own = len(files)
    if settings.validation_sources:
        files += find_files(settings.validation_sources)
        refuse_repeated(files)
    digest = xxhash.xxh3_128()
    stamps = array("Q")
    for file in files:
        found = stamp(file)
        stamps.append(_hash(found))
        digest.update(f"{file}\0{found}\n".encode("utf-8", "surrogateescape"))
    sizes = array("Q", map(size_of, files))
    return Corpus(files, num_own, sizes, stamps, source_fingerprint(config, digest.hexdigest()), tokenizer)


def check_settings(config: PretrainConfig) -> Tokenizer | None:
    """What would fail only after hours fails now (see also `passes.check_stages`). Raises DataError or ConfigError.

    Returns the pretrained tokenizer, if that is asked for.
    """
    settings, for_bert, tokenizer = config.data.build, config.model.architecture == "bert", None
    if settings.tokenizer.type == "pretrained":
        if settings.tokenizer.path is None:
            raise ConfigError("data.build.tokenizer.path is missing: type pretrained needs the tokenizer's folder")
        tokenizer = load_tokenizer(Path(settings.tokenizer.path))
        if for_bert and not is_bert(tokenizer):
            raise DataError(
                f"{settings.tokenizer.path}: model.architecture=bert needs a tokenizer with {' '.join(BERT_SPECIAL)}"
            )
        if not for_bert:
            end_of_text_id(tokenizer)
    elif for_bert and settings.tokenizer.type != "wordpiece":
        raise ConfigError(
            f"data.build.tokenizer.type={settings.tokenizer.type}: for model.architecture=bert set wordpiece"
        )
    if settings.deduplicate.near:
        choose_bands(settings.deduplicate.similarity)
    for file in settings.clean.decontaminate:
        if not Path(file).is_file():
            raise DataError(f"{file}: no such file; correct data.build.clean.decontaminate")
    return tokenizer


def source_fingerprint(config: PretrainConfig, files: str) -> str:
    """Of all that decides what is written: the build settings, the kind of model, the state of all files read."""
    settings = config.data.build.model_dump(exclude={"num_workers", "engine", "slurm", "on_error"})
    vocabulary = settings["tokenizer"]["path"]
    inside = sorted(map(str, Path(vocabulary).iterdir())) if vocabulary and Path(vocabulary).is_dir() else []
    read = {file: stamp(file) for file in [*inside, *settings["clean"]["decontaminate"]] if Path(file).is_file()}
    return xxhash.xxh3_128_hexdigest(repr((settings, config.model.architecture, files, read)).encode())


def make_plan(work: Path, config: PretrainConfig, corpus: Corpus, run: Run, progress: Progress) -> Plan:
    """The plan that a killed build has left, if it is for the same sources and settings, or a new one.

    Raises DataError if `work` holds something that no build has left there.
    """
    load_plan.cache_clear()
    if not is_begun(work, corpus.built_from, progress):
        clear(work)
        work.mkdir()
        with writing(work / "begun") as file:
            file.write(_mark(corpus.built_from))
    for folder in FOLDERS:
        (work / folder).mkdir(exist_ok=True)
    if (work / "plan.json").exists():
        plan = replace(load_plan(work), config=config)  # on_error may be another one now
        plan.save()
        return plan
    if config.data.build.clean != CleanConfig():
        for _ in run(passes.check_stages, [(config.data.build.clean,)]):
            pass
    size = part_bytes(corpus.text_bytes)
    groups = scan_groups(corpus, size)
    tasks = [
        (work, number, corpus.files[first:after], config.data.build, size)
        for number, (first, after) in enumerate(groups)
    ]
    with progress.phase("scan", sum(corpus.sizes)) as advance:
        is_here = is_small(corpus) and config.data.build.engine == "processes"
        for number in (run_here if is_here else run)(passes.scan_files, tasks):
            first, after = groups[number]
            advance(sum(corpus.sizes[first:after]))
    num_own = sum(first < corpus.num_own for first, _ in groups)
    own, held_out = range(num_own), range(num_own, len(groups))
    return save_plan(work, corpus.built_from, config, scanned(work, own), scanned(work, held_out), size)


def is_small(corpus: Corpus) -> bool:
    """Whether this process scans the files as fast as workers that are still to be started."""
    is_here = not any("://" in file for file in corpus.files)
    return is_here and corpus.text_bytes <= SCANNED_HERE and len(corpus.files) <= SCANNED_FILES


def is_begun(work: Path, built_from: str, progress: Progress) -> bool:
    """Whether a build of this has left its work here."""
    if not (work / "begun").is_file():
        return False
    if (work / "begun").read_bytes() == _mark(built_from):
        return True
    progress.say("the sources or settings are not those of the build that was begun here; starting over")
    return False


def clear(work: Path) -> None:
    """Remove a working directory, if there is one; its mark last. Raises DataError if something else is there."""
    if not work.is_dir() or work.is_symlink():
        if os.path.lexists(work):
            raise DataError(f"{work}: is where the build works, but it is no folder; remove it")
        return
    inside = sorted(work.iterdir(), key=lambda path: path.name == "begun")
    unknown = [path.name for path in inside if not path.name.startswith(WRITING)]
    if unknown and unknown[-1] != "begun":
        raise DataError(f"{work}: is where the build works, but holds {unknown[0]}, which no build left; remove it")
    for path in inside:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.rmdir()


def scan_groups(corpus: Corpus, size: int) -> list[tuple[int, int]]:
    """(first file, last + 1) of neighbours that one task scans: about `size` bytes, or many small files."""
    groups: list[tuple[int, int]] = []
    first = filled = 0
    for number, num_bytes in enumerate(corpus.sizes):
        if number > first and (number == corpus.num_own or number - first == SCANNED_FILES or filled >= size):
            groups.append((first, number))
            first, filled = number, 0
        filled += num_bytes
    return [*groups, (first, len(corpus.files))]


def scanned(work: Path, groups: range) -> Iterator[Piece]:
    """The pieces of these groups of files, in order."""
    for number in groups:
        with passes.scanned(work, number).open("rb") as lines:
            for line in lines:
                yield Piece(*orjson.loads(line))


def _mark(built_from: str) -> bytes:
    return f"{built_from} {LAYOUT}\n".encode()


def _hash(stamp: str) -> int:
    return xxhash.xxh3_64_intdigest(stamp.encode())
