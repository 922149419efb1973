"""How far a build is: a bar for each phase on a terminal, a line for each phase elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

POLL_SECONDS = 0.5  # between two looks at which files are there
MOST_SHARE = 0.05  # of the time is spent looking: a folder may be large, and its file system slow
OTHER_COLUMNS = 60  # width of all but the bar
LINE_SECONDS = 60  # between two lines about one phase where there is no terminal
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class Progress:
    """Bars with MB/s and the time a phase still needs; lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Bars(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description:10}"),
            BarColumn(max(10, min(40, console.width - OTHER_COLUMNS))),
            _Said(amounts),
            _Said(time_left),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(
        self, title: str, total: int | None = None, folder: Path | None = None, sizes: Mapping[str, int] | None = None
    ) -> Iterator[Callable[[int], None]]:
        """A bar up to `total` bytes, or one without an end; advanced by the yielded function.

        It is also advanced by the files that appear in `folder`; sizes: how many bytes each name counts for. A phase of
        0 bytes is over: it is not shown.
        """
        if total == 0:
            yield lambda amount: None
            return
        number = self.bars.add_task(title, total=total, has_amount=total is not None)
        bar = self.bars.tasks[-1]
        ended = threading.Event()
        watching = (bar, folder, dict(sizes or {}), ended)
        watcher = threading.Thread(target=self._watch, args=watching, daemon=True)
        watcher.start()
        try:
            yield lambda amount: self.bars.advance(number, amount)
        finally:
            ended.set()
            watcher.join()
        self.bars.update(number, total=total or 1, completed=total or 1)
        self.bars.stop_task(number)
        if self.bars.disable:
            self.say(f"{title}: {describe(bar)}")

    def _watch(self, bar: Task, folder: Path | None, missing: dict[str, int], ended: threading.Event) -> None:
        wait, last_line = POLL_SECONDS, time.monotonic()
        while not ended.wait(wait):
            before = time.monotonic()
            if folder is not None:
                there = {entry.name for entry in os.scandir(folder)} & missing.keys()
                self.bars.advance(bar.id, sum(map(missing.pop, there)))
            if self.bars.disable and before - last_line >= LINE_SECONDS:
                self.say(f"{bar.description}: {describe(bar)}")
                last_line = before
            wait = max(POLL_SECONDS, (time.monotonic() - before) / MOST_SHARE)


class _Said(ProgressColumn):
    """What a function says about a task."""

    def __init__(self, say: Callable[[Task], str]) -> None:
        super().__init__()
        self.say = say

    def render(self, task: Task) -> Text:
        return Text(self.say(task), no_wrap=True)


def describe(task: Task) -> str:
    """How far a phase is, for a line of its own."""
    said = [amounts(task), duration(task.elapsed or 0.0), "" if task.finished else time_left(task)]
    return ", ".join(part for part in said if part)


def amounts(task: Task) -> str:
    """done/all of it, and how much of it a second since the phase began."""
    if not task.fields["has_amount"]:
        return ""
    total = task.total or 0
    unit, name = next((size, name) for size, name in UNITS if total >= size or size == 1000)
    done = f"{task.completed / unit:,.1f}/{total / unit:,.1f} {name}"
    return f"{done}, {task.completed / max(task.elapsed or 0.0, 1e-3) / 1e6:,.1f} MB/s"


def time_left(task: Task) -> str:
    """What is left at the speed so far; of a phase that is over, or has no end, what it took."""
    seconds = task.elapsed or 0.0
    if task.finished or not task.total:
        return duration(seconds)
    return f"{duration(seconds * (task.total - task.completed) / task.completed)} left" if task.completed else ""


def duration(seconds: float) -> str:
    """7.1 s, 4 min 12 s, or 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
