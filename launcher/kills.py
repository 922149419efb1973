"""Kills ranks of a run at a random moment of its life: `draw` says when and who, `Killer` does it.

A moment is either some seconds after the start, which falls into the imports, the meeting of the ranks or the loading
of a checkpoint; or in some step; or in some save. A save has two marks: at the first the checkpoint is copied and its
writing begins, at the second it gets its manifest and its name, and those before it are removed. Steps and saves are
seen in the rings of phases (configs/phases.py), so the ranks that are killed are the launcher's own and know nothing.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.phases import Ring, read_ring, ring_path
from launcher.local import Process, Signals
from launcher.watch import Watch

POLL_SECONDS = 0.002
KINDS: tuple[Literal["start", "step", "save"], ...] = ("start", "step", "save")
SHARES = (1, 2, 2)  # of the kinds among the moments
SAVE_MARKS = 4  # of the two saves that fall into two intervals
SAVE_STEPS = 3.0  # so long after a mark at most, in steps


@dataclass(frozen=True)
class Moment:
    """`seconds` after the start, or after this start's step or mark of a save number `number` (from 1) has begun."""

    kind: Literal["start", "step", "save"]
    number: int
    seconds: float
    rank: int | None  # none: all of them at once


@dataclass
class Life:
    """What was seen of a run between one start and its end."""

    killed: tuple[int, ...] = ()  # ranks that were running when they were killed
    first_step: int | None = None  # from which it went on; none: it did not come so far
    seconds_to_first_step: float = 0.0  # since its start


def draw(numbers: random.Random, num_ranks: int, every_steps: int, start_seconds: float, step_seconds: float) -> Moment:
    """A random moment in the life of a run that saves every `every_steps`; one rank or all, equally likely. Pure.

    Of a run that begins its first step `start_seconds` after its start. A life lasts two intervals of saves at most.
    After a mark of a save the sooner the likelier: small files are written in milliseconds.
    """
    (kind,) = numbers.choices(KINDS, SHARES)
    rank = numbers.choice([None, numbers.randrange(num_ranks)])
    if kind == "start":
        return Moment(kind, 0, numbers.uniform(0, start_seconds), rank)
    if kind == "step":
        return Moment(kind, numbers.randint(1, 2 * every_steps), numbers.uniform(0, step_seconds), rank)
    seconds = SAVE_STEPS * step_seconds * numbers.random() ** 3
    return Moment(kind, numbers.randint(1, SAVE_MARKS), seconds, rank)


class Killer(Signals):
    """Watches one start of the run in `run_dir` and, with a moment, sends SIGKILL when it has come."""

    def __init__(self, run_dir: Path, num_ranks: int, num_steps: int, moment: Moment | None) -> None:
        super().__init__()
        self.run_dir, self.num_ranks, self.num_steps, self.moment = run_dir, num_ranks, num_steps, moment
        self.life = Life()
        self._saves: set[tuple[float, int, str]] = set()  # the marks of saves so far
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def go_to(self, ranks: list[Process], watch: Watch) -> None:
        super().go_to(ranks, watch)
        self._thread = threading.Thread(target=self._observe, args=[ranks, time.time()], daemon=True)
        self._thread.start()

    def end(self) -> Life:
        """The ranks have ended; returns what was seen."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        return self.life

    def _observe(self, ranks: list[Process], began: float) -> None:
        due = began + self.moment.seconds if self.moment and self.moment.kind == "start" else None
        watched = (self.moment.rank if self.moment else None) or 0
        while not self._ended.wait(POLL_SECONDS):
            if ring := read_ring(ring_path(self.run_dir, watched)):
                self._look(ring, began)
                if due is None and self._has_come(ring):
                    due = time.time() + (self.moment.seconds if self.moment else 0.0)
            if due is not None and time.time() >= due:
                self._kill(ranks)
                return

    def _look(self, ring: Ring, began: float) -> None:
        self._saves.update(mark for mark in ring.marks if mark[2] == "save")
        if self.life.first_step is None:
            for when, step, phase in ring.marks:
                if phase != "start":
                    self.life.first_step, self.life.seconds_to_first_step = step, when - began
                    return

    def _has_come(self, ring: Ring) -> bool:
        if self.moment is None or self.life.first_step is None:
            return False
        if self.moment.kind == "save":
            return len(self._saves) >= self.moment.number
        # After the last step there is one more mark, "end", of step num_steps.
        return ring.step >= min(self.life.first_step + self.moment.number - 1, self.num_steps)

    def _kill(self, ranks: list[Process]) -> None:
        wanted = [rank for rank in range(self.num_ranks) if self.moment and self.moment.rank in (None, rank)]
        running = [rank for rank in wanted if ranks[rank].poll() is None]
        for rank in running:
            ranks[rank].send_signal(signal.SIGKILL)
        self.life.killed = tuple(running)
