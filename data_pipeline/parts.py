"""How a build is divided: sources -> pieces -> parts, written down once in the plan of the build's working directory.

A part is a stretch of the corpus of a few megabytes of text. It is what a worker does at once, what is kept when a
build is killed, and what is handed to other machines. Where the cuts are depends on the sources alone, never on the
number of workers, and so does everything that is made from parts.

    .building-NAME/               beside the dataset directory NAME; removed when that is finished
        plan.json                 this plan
        clean/part-00000.*        cleaned text, signatures for finding duplicates, what each stage did
        drop/part-00000.npy       which of its documents are duplicates
        tokenizer/                the tokenizer's files
        tokens/part-00000.npz     token ids and document lengths of both splits
        dataset/                  the finished shards, renamed to NAME at the end
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from configs.schema import CleanConfig, PretrainConfig
from data_pipeline.shards import writing
from data_pipeline.sources import Piece

SMALLEST_PART_BYTES, LARGEST_PART_BYTES = 2 << 20, 256 << 20  # of text
NUM_PARTS = 128  # of a corpus between those two sizes: enough for an even load, few enough for few files
COMPRESSION = 3  # text is about this much larger than its .gz or .zst file; decides sizes of parts only
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Part:
    """A stretch of the corpus; `held_out` if it comes from data.build.validation_sources."""

    pieces: list[Piece]
    held_out: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of text, about."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """A build: its settings and its parts, in order. `work` is the working directory that all its files are in."""

    work: Path
    built_from: str  # of the settings and sources, see build.source_fingerprint
    config: PretrainConfig
    stamps: dict[str, str]  # file -> its size and time, or ETag, when it was scanned
    parts: list[Part]

    @property
    def has_clean_pass(self) -> bool:
        """Whether text is cleaned or compared before it is tokenized, and so written down in between."""
        build = self.config.data.build
        return build.clean != CleanConfig() or build.deduplicate.exact or build.deduplicate.near

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
        return self.work / "tokens" / f"part-{part:05d}.npz"

    @property
    def tokenizer_dir(self) -> Path:
        return self.work / "tokenizer"

    @property
    def dataset(self) -> Path:
        return self.work / "dataset"

    def save(self) -> None:
        content = {
            "built_from": self.built_from,
            "config": json.loads(self.config.model_dump_json()),
            "stamps": self.stamps,
            "parts": [
                {"held_out": part.held_out, "pieces": [dataclasses.astuple(piece) for piece in part.pieces]}
                for part in self.parts
            ],
        }
        with writing(self.work / "plan.json") as file:
            file.write(json.dumps(content).encode())


@lru_cache(maxsize=1)
def load_plan(work: Path) -> Plan:
    """The plan of a working directory; kept, since every task of a worker asks for the same one."""
    content = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    parts = [Part([Piece(*piece) for piece in part["pieces"]], part["held_out"]) for part in content["parts"]]
    config = PretrainConfig.model_validate(content["config"])
    return Plan(work, content["built_from"], config, content["stamps"], parts)


def piece_bytes(sizes: dict[str, int]) -> int:
    """How much text a part should have, given each file's size in bytes."""
    total = sum(size * (COMPRESSION if file.endswith((".gz", ".zst")) else 1) for file, size in sizes.items())
    return min(max(total // NUM_PARTS, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)


def group(pieces: Iterable[Piece], part_bytes: int, held_out: bool) -> Iterator[Part]:
    """Join neighbouring pieces until a part has `part_bytes`: small files share one."""
    together: list[Piece] = []
    size = 0
    for piece in pieces:
        together.append(piece)
        size += piece.num_bytes
        if size >= part_bytes:
            yield Part(together, held_out)
            together, size = [], 0
    if together:
        yield Part(together, held_out)


def runs(parts: list[Part], todo: list[int], num_workers: int) -> list[list[int]]:
    """Divide the numbers of the parts to do into tasks of neighbours.

    The k-th part of a compressed file can only be reached through all that is before it, so neighbours in one file stay
    together, two tasks a worker: with more of them, much would be decompressed several times, with fewer, workers
    would be idle at the end.
    """
    size = max(1, -(-len(todo) // (2 * num_workers)))
    tasks: list[list[int]] = []
    for number in todo:
        last = tasks[-1] if tasks else None
        neighbours = last is not None and last[-1] == number - 1 and parts[number].held_out == parts[last[-1]].held_out
        if last is not None and neighbours and len(last) < size:
            last.append(number)
        else:
            tasks.append([number])
    return tasks
