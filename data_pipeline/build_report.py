"""What a build says about the dataset it made: `stages.json`, beside the manifest, and the lines at its end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.part_tokens import read_index
from data_pipeline.parts import SPLITS, Plan
from data_pipeline.progress import duration
from data_pipeline.shards import read_manifest
from data_pipeline.tally import Tally

MOST_SOURCES = 200  # are listed by their names; where there are more files, their folders are
SHOWN_REASONS = 3  # of each stage, on the terminal; the card has all


def summary(plan: Plan) -> dict[str, Any]:
    """Everything that is known about the dataset besides its tokens; plain JSON, the same for any number of workers.

    stages: name -> Tally, in order; duplicates: counts; sources: file or folder -> files, documents, characters,
    licence; splits: name -> documents, tokens, longest, lengths (see part_tokens.write_tokens); tokenizer: see
    tokenizer_report; settings: data.build as it was. What a stage has seen and not dropped is what the next one has
    seen. The documents of the splits are those that `tokenize` has kept and, with split_by=tail, one more for each that
    was cut in two.
    """
    settings = plan.config.data.build
    tallies: dict[str, Tally] = {}
    sources = Sources(settings.licences)
    splits = {name: {"documents": 0, "tokens": 0, "longest": 0, "lengths": {}} for name in SPLITS}
    for number in range(plan.num_parts):
        report = json.loads(plan.report(number).read_text(encoding="utf-8"))
        index = read_index(plan.tokens(number))
        for name, content in (*report["tallies"].items(), ("tokenize", index["tally"])):
            tallies.setdefault(name, Tally()).add(Tally.from_json(content))
        for file, (documents, characters) in report["sources"].items():
            sources.add(file, documents, characters)
        for name in SPLITS:
            splits[name] = add_counts(splits[name], index["splits"][name])
    return {
        "stages": {name: tally.to_json() for name, tally in tallies.items()},
        "duplicates": json.loads(plan.duplicates.read_text()) if plan.duplicates.exists() else None,
        "sources": sources.to_json(),
        "splits": splits,
        "tokenizer": json.loads(plan.tokenizer_report.read_text(encoding="utf-8")),
        "settings": json.loads(settings.model_dump_json(exclude={"num_workers", "engine", "slurm", "on_error"})),
    }


class Sources:
    """Counts of each file or, where there are more than MOST_SOURCES, of the folders they are in."""

    def __init__(self, licences: dict[str, str]) -> None:
        self.licences = licences
        self.counts: dict[str, list[int]] = {}  # name -> files, documents, characters
        self.found: dict[str, set[str]] = {}  # name -> licences
        self.depth: int | None = None  # how much of a name is kept, in folders; none: all
        self.last = ""

    def add(self, file: str, documents: int, characters: int) -> None:
        """Of a part; the parts of one file come one after the other."""
        self._add(file, [int(file != self.last), documents, characters], {licence(self.licences, file)})
        self.last = file
        while len(self.counts) > MOST_SOURCES and self.depth != 0:
            self.depth = self.depth - 1 if self.depth else max(name.count("/") for name in self.counts)
            counts, found = self.counts, self.found
            self.counts, self.found = {}, {}
            for name in counts:
                self._add(name, counts[name], found[name])

    def _add(self, name: str, more: list[int], licences: set[str]) -> None:
        if self.depth is not None and name.count("/") >= self.depth:
            name = "/".join(name.split("/")[: self.depth]) + "/" if self.depth else "all files"
        counts = self.counts.setdefault(name, [0, 0, 0])
        counts[:] = [a + b for a, b in zip(counts, more, strict=True)]
        self.found.setdefault(name, set()).update(licences)

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "files": counts[0],
                "documents": counts[1],
                "characters": counts[2],
                "licence": ", ".join(sorted(self.found[name])),
            }
            for name, counts in self.counts.items()
        }


def licence(licences: dict[str, str], file: str) -> str:
    """The licence given for `file`: of the longest key of data.build.licences that its name holds."""
    fitting = [key for key in licences if key in file]
    return licences[max(fitting, key=len)] if fitting else "not given"


def add_counts(total: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The counts of a split (see part_tokens.write_tokens) with those of a later part."""
    lengths = Counter({int(low): count for low, count in total["lengths"].items()})
    lengths.update({int(low): count for low, count in more["lengths"].items()})
    return {
        "documents": total["documents"] + more["documents"],
        "tokens": total["tokens"] + more["tokens"],
        "longest": max(total["longest"], more["longest"]),
        "lengths": dict(sorted(lengths.items())),
    }


def print_result(root: Path, seconds: float, console: Console) -> None:
    """The dataset's size, what each stage dropped, and how long it took."""
    content = json.loads((root / "train" / "stages.json").read_text(encoding="utf-8"))
    lines = []
    for name in SPLITS:
        manifest = read_manifest(root / name)
        lines.append(f"{root / name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    for name, tally in content["stages"].items():
        if dropped := sorted(tally["dropped"].items(), key=lambda item: -item[1]):
            reasons = [f"{count:,} {reason}" for reason, count in dropped[:SHOWN_REASONS]]
            others = sum(count for _, count in dropped[SHOWN_REASONS:])
            more = [f"{others:,} for {len(dropped) - SHOWN_REASONS} other reasons"] if others else []
            lines.append(f"dropped by {name}: {sum(tally['dropped'].values()):,} ({'; '.join([*reasons, *more])})")
        if broken := tally["examples"].get("broken record"):
            lines.append(f"  for example {broken[0]}")
    if content["duplicates"]:
        counts = content["duplicates"]
        lines.append(f"dropped as duplicates: {counts['exact']:,} exact, {counts['near']:,} near")
    lines.append(f"built in {duration(seconds)}; {root / 'train' / 'card.html'} describes it")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
