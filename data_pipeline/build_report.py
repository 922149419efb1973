"""What a build shows while it runs, and what it says about the dataset it made: `stages.json`, beside the manifest."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import (
    Progress as Bars,
)

from data_pipeline.parts import SPLITS, Plan
from data_pipeline.shards import read_manifest
from data_pipeline.tally import Tally

POLL_SECONDS = 0.5  # between two looks at which parts are finished
STAGES = ("read", "html", "mojibake", "unicode", "language", "quality", "decontaminate", "pii")  # in this order


class Progress:
    """One bar for each phase of a build, with MB/s and the time it still needs; lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        bytes_columns = (DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Bars(
            SpinnerColumn(), TextColumn("{task.description:10}"), BarColumn(), *bytes_columns, console=console,
            disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def phase(
        self, title: str, total: int | None, files: dict[Path, int] | None = None
    ) -> Iterator[Callable[[int], None]]:
        """A bar up to `total`; advanced by the yielded function, or by each of `files` (path -> size) that appears."""
        bar = self.bars.add_task(title, total=total)
        if files is None:
            yield lambda amount: self.bars.advance(bar, amount)
        else:
            ended = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(bar, dict(files), ended), daemon=True)
            watcher.start()
            try:
                yield lambda amount: None
            finally:
                ended.set()
                watcher.join()
        self.bars.update(bar, total=total or 1, completed=total or 1)

    def _watch(self, bar: Any, missing: dict[Path, int], ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            for path in [path for path in missing if path.exists()]:
                self.bars.advance(bar, missing.pop(path))


def summary(plan: Plan, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Everything that is known about the dataset besides its tokens; plain JSON, the same for any number of workers.

    stages: name -> Tally; duplicates: counts; sources: file -> documents, characters, licence; splits: name ->
    documents, tokens and the histogram of lengths ({power of two: documents of at least that many tokens and fewer
    than twice as many}); tokenizer: see tokenizer_report; settings: data.build as it was.
    """
    settings = plan.config.data.build
    tallies: dict[str, Tally] = {}
    sources: dict[str, list[int]] = {}
    for number in range(len(plan.parts)):
        report = json.loads(plan.report(number).read_text(encoding="utf-8"))
        for name, content in report["tallies"].items():
            tallies.setdefault(name, Tally()).add(Tally.from_json(content))
        for file, (documents, characters) in report["sources"].items():
            counts = sources.setdefault(file, [0, 0])
            counts[0] += documents
            counts[1] += characters
    return {
        "stages": {name: tallies[name].to_json() for name in STAGES if name in tallies},
        "duplicates": json.loads(plan.duplicates.read_text()) if plan.duplicates.exists() else None,
        "sources": {
            file: {"documents": counts[0], "characters": counts[1], "licence": licence(settings.licences, file)}
            for file, counts in sources.items()
        },
        "splits": {name: lengths(plan, name) for name in SPLITS},
        "tokenizer": tokenizer,
        "settings": json.loads(settings.model_dump_json(exclude={"num_workers", "engine", "slurm", "on_error"})),
    }


def licence(licences: dict[str, str], file: str) -> str | None:
    """The licence given for `file`: of the longest key of data.build.licences that its name holds."""
    fitting = [key for key in licences if key in file]
    return licences[max(fitting, key=len)] if fitting else None


def lengths(plan: Plan, split_name: str) -> dict[str, Any]:
    counts: Counter[int] = Counter()
    documents = tokens = longest = 0
    for number in range(len(plan.parts)):
        with np.load(plan.tokens(number)) as arrays:
            found = arrays[f"{split_name}_lengths"]
        if len(found):
            documents, tokens, longest = (
                documents + len(found),
                tokens + int(found.sum()),
                max(longest, int(found.max())),
            )
            powers, times = np.unique(np.frexp(found.astype(np.float64))[1] - 1, return_counts=True)
            counts.update({2 ** int(power): int(time) for power, time in zip(powers, times, strict=True)})
    return {"documents": documents, "tokens": tokens, "longest": longest, "lengths": dict(sorted(counts.items()))}


def print_result(root: Path, seconds: float, console: Console) -> None:
    """The dataset's size, what each stage dropped, and how long it took."""
    content = json.loads((root / "train" / "stages.json").read_text(encoding="utf-8"))
    for name in SPLITS:
        manifest = read_manifest(root / name)
        console.print(
            f"{root / name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens", highlight=False
        )
    for name, tally in content["stages"].items():
        for reason, count in sorted(tally["dropped"].items(), key=lambda item: -item[1]):
            console.print(f"dropped by {name}: {count:,} ({reason})", highlight=False, markup=False)
        if broken := tally["examples"].get("broken record"):
            console.print(f"  for example {broken[0]}", highlight=False, markup=False)
    if content["duplicates"]:
        counts = content["duplicates"]
        console.print(f"dropped as duplicates: {counts['exact']:,} exact, {counts['near']:,} near", highlight=False)
    console.print(f"built in {seconds:.1f} s; {root / 'train' / 'card.html'} describes it", highlight=False)
