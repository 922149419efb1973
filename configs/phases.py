"""What each rank is doing: a small ring of marks in `run_dir/ranks/rank-00003.phases`, written by it, read by all.

A mark says that a phase of a step begins. Every rank makes the same marks in the same order, so the number of marks a
rank has made says how far it is: the others wait for the one with the fewest. Steps would not do: a run that rolls
back, and fine-tuning with its next seed, count them anew.

The file is one page of memory, mapped: a mark is four stores and a look at the clock (0.2 us), nothing is flushed, and
what was stored survives the process, however it ends. All of it is 64-bit integers in the machine's byte order:

    words 0..6     MAGIC, rank, world size, process id, ident of the main thread, start (ns since 1970), number of marks
    words 7..15    host name, UTF-8, padded with zeros
    words 16..     CAPACITY records of 3 words: time (ns since 1970), step, index into PHASES; mark n is in record
                   n % CAPACITY
    the last word  bytes of checkpoints that are safe on the disk; threads of the rank add to it

The number of marks is stored last, in one store, so a reader never takes a record for the newest that is half written.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# In the order of a step, for people: `reduce` is a sum over all ranks, `end` is all that comes after the last step.
PHASES = ("start", "data", "forward", "backward", "reduce", "step", "evaluate", "save", "end")
PAGE = 4096  # bytes
HEADER_WORDS = 16
HOST_WORDS = slice(7, 16)
COUNT = 6
NUM_BYTES = PAGE // 8 - 1
CAPACITY = (NUM_BYTES - HEADER_WORDS) // 3
MAGIC = int.from_bytes(b"phases01", "little") & (2**63 - 1)

Mark = Callable[[str, int], None]  # (phase, step): that phase of the step from `step` to `step + 1` begins now


@dataclass(frozen=True)
class Ring:
    """What one rank's file said when it was read."""

    rank: int
    world_size: int
    pid: int
    main_thread: int  # threading's ident of it, as in dumps of faulthandler
    started: float  # seconds since 1970, as are the times below
    host: str
    num_marks: int
    marks: tuple[tuple[float, int, str], ...]  # the newest ones, fewer than CAPACITY, oldest first: time, step, phase
    num_bytes: int = 0  # of checkpoints, that are on the disk

    @property
    def since(self) -> float:
        return self.marks[-1][0] if self.marks else self.started

    @property
    def step(self) -> int:
        return self.marks[-1][1] if self.marks else 0

    @property
    def phase(self) -> str:
        return self.marks[-1][2] if self.marks else "start"


def ring_path(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / "ranks" / f"rank-{rank:05d}.phases"


def stacks_path(run_dir: str | Path, rank: int) -> Path:
    """Where a rank writes its Python stacks when it is asked for them (SIGUSR2) or has stood still."""
    return Path(run_dir) / "ranks" / f"rank-{rank:05d}.stacks"


def open_ring(path: Path, rank: int, world_size: int) -> memoryview:
    """Make the ring of this process, in place of an earlier one; returns its words, int64, mapped.

    It appears complete. The folder must exist; raises OSError where it cannot be written.
    """
    header = [MAGIC, rank, world_size, os.getpid(), threading.main_thread().ident or 0, time.time_ns(), 0]
    host = socket.gethostname().encode()[:72].ljust(72, b"\0")
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    aside.write_bytes((struct.pack("=7q", *header) + host).ljust(PAGE, b"\0"))
    aside.rename(path)
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), PAGE)).cast("q")


def marker(words: memoryview) -> Mark:
    """The function that marks in a ring that `open_ring` made; for one thread only."""
    numbers = {phase: number for number, phase in enumerate(PHASES)}
    now = time.time_ns

    def mark(phase: str, step: int) -> None:
        count = words[COUNT]
        place = HEADER_WORDS + count % CAPACITY * 3
        words[place], words[place + 1], words[place + 2] = now(), step, numbers[phase]
        words[COUNT] = count + 1

    return mark


def byte_counter(path: Path) -> Callable[[int], None]:
    """The function that adds bytes to the ring at `path`, for any thread; without a ring it does nothing."""
    try:
        with path.open("r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), PAGE)).cast("q")
    except OSError:
        return lambda num_bytes: None

    def count(num_bytes: int) -> None:
        words[NUM_BYTES] += num_bytes  # of two threads one may be lost; what matters is that the number moves

    return count


def no_mark(phase: str, step: int) -> None:
    """The `Mark` of a process whose phases nobody reads: it belongs to no run directory."""


def read_ring(path: Path) -> Ring | None:
    """The ring at `path`; None if there is none or if it is none of ours.

    The rank goes on while its page is copied, in no order that is known. So of the copy those marks are taken that were
    finished before it began, and of them not those that may have been written over before it had ended.
    """
    try:
        with path.open("rb", buffering=0) as file:
            while True:
                before, content, after = (os.pread(file.fileno(), PAGE, 0) for _ in range(3))
                if not len(before) == len(content) == len(after) == PAGE:
                    return None
                words = memoryview(content).cast("q")
                if words[0] != MAGIC:
                    return None
                count, count_after = (memoryview(page).cast("q")[COUNT] for page in (before, after))
                kept = range(max(0, count_after + 1 - CAPACITY), count)
                if kept or count <= 0:
                    break
    except OSError:
        return None
    rank, world_size, pid, main_thread, started = words[1:COUNT]
    host = bytes(words[HOST_WORDS]).rstrip(b"\0").decode(errors="replace")
    marks = []
    for number in kept:
        when, step, phase = words[(place := HEADER_WORDS + number % CAPACITY * 3) : place + 3]
        if not 0 <= phase < len(PHASES):
            return None
        marks.append((when / 1e9, step, PHASES[phase]))
    return Ring(rank, world_size, pid, main_thread, started / 1e9, host, count, tuple(marks), words[NUM_BYTES])


def read_rings(run_dir: str | Path, world_size: int) -> list[Ring | None]:
    """Of every rank of a run of `world_size`; those that an earlier run of another size left behind are none."""
    rings = [read_ring(ring_path(run_dir, rank)) for rank in range(world_size)]
    return [ring if ring and ring.world_size == world_size else None for ring in rings]


def bytes_written(run_dir: str | Path, world_size: int) -> int:
    """Of checkpoints, by all ranks. While it grows, those who wait for a slow disk do not stand still."""
    return sum(ring.num_bytes for ring in read_rings(run_dir, world_size) if ring)


class QuietTime:
    """For how long each rank has made no mark, counted only while the watcher itself was running.

    A machine that was suspended, or a job that was stopped as a whole, is therefore not taken for a stall.
    """

    def __init__(self, interval_seconds: float) -> None:
        self._longest = 3 * interval_seconds  # that one look may add
        self._last = time.monotonic()
        self._num_marks: dict[int, int] = {}
        self._quiet: dict[int, float] = {}

    def look(self, num_marks: dict[int, int]) -> dict[int, float]:
        """Given each rank's number of marks now, the seconds for which each number has stayed the same."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, self._longest), now
        for rank, number in num_marks.items():
            same = self._num_marks.get(rank) == number
            self._quiet[rank] = self._quiet.get(rank, 0.0) + passed if same else 0.0
        self._num_marks = dict(num_marks)
        return {rank: self._quiet[rank] for rank in num_marks}
