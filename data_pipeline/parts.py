"""How a build is divided: sources -> pieces -> parts, written down once in the build's working directory.

A part is a stretch of the corpus of a few megabytes of text. It is what a worker does at once, what is kept when a
build is killed, and what is handed to other machines. Where the cuts are depends on the sources alone, never on the
number of workers, and so does everything that is made from parts.

    .building-NAME/               beside the dataset directory NAME; removed when that is finished
        begun                     of which build this is the working directory
        scan/files-00000.jsonl    the pieces of some of the sources' files
        parts.jsonl, plan.json    this plan; each part is a line, read when it is needed: there may be millions of files
        clean/part-00000.*        cleaned text, signatures for finding duplicates, what each stage did
        duplicates/               which documents of each part are duplicates
        tokenizer/                the tokenizer's files
        encoder.json              what workers make its encoder of, see passes.make_tokenizer
        tokens/part-00000.tokens  token ids and document lengths of both splits
        dataset/                  the finished shards, renamed to NAME at the end
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import orjson

from configs.schema import BuildConfig, CleanConfig, PretrainConfig
from data_pipeline.shards import writing
from data_pipeline.sources import DOCSTRINGS, Piece

LAYOUT = 3  # of the working directory; what another version has left is not gone on with
SMALLEST_PART_BYTES, LARGEST_PART_BYTES = 2 << 20, 256 << 20  # of text
NUM_PARTS = 128  # of a corpus between those two sizes: enough for an even load, few enough for few files
MOST_PIECES = 1 << 14  # of a part: opening that many small files takes a few seconds, and their names a few MB
COMPRESSION = 3  # text is about this much larger than its .gz or .zst file; decides sizes of parts only
SAMPLED_PARTS = 64  # samples for the tokenizer and its report are the beginnings of that many parts, spread evenly
PASSING_SPEED = 12  # how many times faster text is decompressed than it is read and tokenized
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Plan:
    """A build: its settings and its parts, in order. `work` is the working directory that all its files are in."""

    work: Path
    built_from: str  # of the settings and sources, see corpus.source_fingerprint
    config: PretrainConfig
    num_own: int  # the first parts are of data.build.sources, the others of validation_sources: held out
    sizes: list[int]  # bytes of text of each part, about
    reach: list[int]  # bytes to be decompressed before each part's first one
    offsets: list[int]  # byte of parts.jsonl at which each part's line begins

    @property
    def num_parts(self) -> int:
        return len(self.sizes)

    def pieces(self, part: int) -> list[Piece]:
        with (self.work / "parts.jsonl").open("rb") as file:
            file.seek(self.offsets[part])
            return [Piece(*fields) for fields in orjson.loads(file.readline())]

    def is_held_out(self, part: int) -> bool:
        return part >= self.num_own

    @cached_property
    def sampled(self) -> list[int]:
        """The parts of the sources that samples are taken from."""
        return list(range(0, self.num_own, -(-self.num_own // SAMPLED_PARTS) or 1))

    @property
    def has_clean_pass(self) -> bool:
        """Whether text is written down before it is tokenized."""
        return has_stages(self.config.data.build)

    @property
    def compares(self) -> bool:
        """Whether duplicates are looked for."""
        return self.config.data.build.deduplicate.exact or self.config.data.build.deduplicate.near

    def clean_text(self, part: int) -> Path:
        return self.work / "clean" / f"part-{part:05d}.jsonl.zst"

    def signatures(self, part: int) -> Path:
        return self.work / "clean" / f"part-{part:05d}.signatures.npy"

    def report(self, part: int) -> Path:
        """What reading and cleaning the part found; written last of its files that have text."""
        return self.work / "clean" / f"part-{part:05d}.json"

    def drop_mask(self, part: int) -> Path:
        """Which documents of a cleaned part are duplicates; the parts that are compared are the first ones."""
        return self.work / "duplicates" / "masks" / f"part-{part:06d}.npy"

    @property
    def duplicates(self) -> Path:
        """How many duplicates there are, with examples; written last of that step's files."""
        return self.work / "duplicates" / "summary.json"

    def tokens(self, part: int) -> Path:
        return self.work / "tokens" / f"part-{part:05d}.tokens"

    @property
    def tokenizer_dir(self) -> Path:
        return self.work / "tokenizer"

    @property
    def encoder(self) -> Path:
        return self.work / "encoder.json"

    @property
    def tokenizer_report(self) -> Path:
        return self.work / "tokenizer_report.json"

    @property
    def dataset(self) -> Path:
        return self.work / "dataset"

    def save(self) -> None:
        content = {
            "built_from": self.built_from,
            "config": json.loads(self.config.model_dump_json()),
            "num_own": self.num_own,
            "sizes": self.sizes,
            "reach": self.reach,
            "offsets": self.offsets,
        }
        with writing(self.work / "plan.json") as file:
            file.write(json.dumps(content).encode())
        load_plan.cache_clear()


@lru_cache(maxsize=1)
def load_plan(work: Path) -> Plan:
    """The plan of a working directory; kept, since every task of a worker asks for the same one."""
    content = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    content["config"] = PretrainConfig.model_validate(content["config"])
    return Plan(work, **content)


def save_plan(
    work: Path, built_from: str, config: PretrainConfig, own: Iterable[Piece], held_out: Iterable[Piece], size: int
) -> Plan:
    """Group the pieces of the sources, and those of validation_sources, into parts of `size` bytes; write the plan."""
    sizes: list[int] = []
    reach: list[int] = []
    offsets: list[int] = []
    num_own = 0
    with writing(work / "parts.jsonl") as file:
        for pieces in (own, held_out):
            num_own = len(sizes)
            for part in group(pieces, size):
                sizes.append(sum(piece.num_bytes for piece in part))
                reach.append(part[0].start - part[0].frame_start)
                offsets.append(file.tell())
                file.write(orjson.dumps([fields_of(piece) for piece in part]) + b"\n")
    plan = Plan(work, built_from, config, num_own, sizes, reach, offsets)
    plan.save()
    return plan


def fields_of(piece: Piece) -> tuple:
    """For `Piece(*fields)`; dataclasses.astuple takes ten times as long."""
    return tuple(vars(piece).values())


def text_bytes(file: str, size: int) -> int:
    """About how much text is in a file of `size` bytes."""
    return size * COMPRESSION if file != DOCSTRINGS and file.endswith((".gz", ".zst")) else size


def part_bytes(total: int) -> int:
    """How much text a part of a corpus of `total` bytes of text should have."""
    return min(max(total // NUM_PARTS, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)


def has_stages(build: BuildConfig) -> bool:
    """Whether text is cleaned or compared before it is tokenized."""
    return build.clean != CleanConfig() or build.deduplicate.exact or build.deduplicate.near


def most_workers(total: int, build: BuildConfig) -> int:
    """With more of them a corpus of `total` bytes of text would take longer; with one, it is done in this process.

    To start workers takes half a second, in which one could clean 2 MB or tokenize 8 MB.
    """
    return max(1, total // (SMALLEST_PART_BYTES if has_stages(build) else 4 * SMALLEST_PART_BYTES))


def group(pieces: Iterable[Piece], part_bytes: int) -> Iterator[list[Piece]]:
    """Join neighbouring pieces until a part has `part_bytes`, or very many of them: small files share one."""
    together: list[Piece] = []
    size = 0
    for piece in pieces:
        together.append(piece)
        size += piece.num_bytes
        if size >= part_bytes or len(together) == MOST_PIECES:
            yield together
            together, size = [], 0
    if together:
        yield together


def runs(todo: list[int], sizes: list[int], reach: list[int], num_own: int, num_workers: int) -> list[list[int]]:
    """Divide the numbers of the parts to do into tasks of neighbours.

    sizes and reach: bytes of each part, and bytes to be decompressed before its first one. Small tasks keep all workers
    busy to the end, so there are up to 16 a worker. But the last part of a large compressed file can only be reached
    through all that is before it: where that is more than a small task, there is one task a worker, and what it passes
    over counts as work.
    """
    total = sum(sizes[number] for number in todo)
    passed_over = (num_workers - 1) / 2 * max((reach[number] for number in todo), default=0) / PASSING_SPEED
    small, large = total / (16 * num_workers), (total + passed_over) / num_workers
    least = total / (2 * num_workers)  # of text in a task that has much to pass over
    tasks: list[list[int]] = []
    filled = 0.0
    for number in todo:
        begins = not tasks or tasks[-1][-1] != number - 1 or number == num_own
        if begins or filled >= large or (filled >= small and reach[number] <= small):
            tasks.append([])
            filled = min(reach[number] / PASSING_SPEED, large - least)
        tasks[-1].append(number)
        filled += sizes[number]
    return tasks
