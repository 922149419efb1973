"""Which rank the others wait for, and in which phase: from the ranks' rings, one line a minute in stragglers.jsonl.

In training with all ranks in step everybody is as slow as the slowest, and a rank that waits spends as long in a phase
as one that works, so durations do not tell them apart. What does is who comes late: all make the same marks in the same
order; a rank that is slow in a phase makes the next mark later than the others, who then catch up to it, by waiting,
never beyond. So the growth of a rank's lateness behind the median, as far as it is behind, is added up by phase.
Clocks of hosts differ: how far a rank is off when all leave a sum together (the mark after `reduce`) is taken away.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.phases import Ring, read_rings

FILE = "stragglers.jsonl"
LINE_SECONDS = 60.0
LOOK_SECONDS = 10.0  # a ring holds the last seconds only


@dataclass
class Tally:
    """Seconds by which each rank fell behind in each phase, added up over several looks at the rings."""

    behind: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0
    seconds: float = 0.0  # that these steps took
    last_step: int = 0
    _counted: float = 0.0  # marks before that time have been counted

    def add(self, rings: Sequence[Ring | None]) -> None:
        """Count the steps of which every rank's ring has all marks, and that no earlier look has counted."""
        if not rings or any(ring is None for ring in rings):
            return
        steps = [whole_steps(ring.marks) for ring in rings if ring]
        common = [
            step
            for step, marks in steps[0].items()
            if marks[0][0] > self._counted
            and all([phase for _, phase in of.get(step, [])] == [phase for _, phase in marks] for of in steps)
        ]
        offsets = clock_offsets([[of[step] for step in common] for of in steps])
        for step in common:
            self._add_step([of[step] for of in steps], offsets)
            self.last_step = step + 1
            self._counted = steps[0][step][0][0]

    def _add_step(self, marks: Sequence[Sequence[tuple[float, str]]], offsets: Sequence[float]) -> None:
        """marks: of each rank, (time, phase), the last one being the first of the next step."""
        before = [0.0] * len(marks)
        for place in range(len(marks[0])):
            times = [of[place][0] - offset for of, offset in zip(marks, offsets, strict=True)]
            middle = statistics.median_low(times)
            late = [max(0.0, time - middle) for time in times]
            if place:
                phase = marks[0][place - 1][1]
                for rank, (now, then) in enumerate(zip(late, before, strict=True)):
                    if len(marks) == 1:
                        now = marks[0][place][0] - marks[0][place - 1][0]
                    self.behind[rank, phase] += max(0.0, now - then)
            before = late
        self.num_steps += 1
        self.seconds += marks[0][-1][0] - marks[0][0][0]


def whole_steps(marks: Sequence[tuple[float, int, str]]) -> dict[int, list[tuple[float, str]]]:
    """Of each step that has an end, (time, phase) of its marks and of the first one after it. Pure.

    The oldest step may lack its first marks, so it is left out; so are start and end of a run.
    """
    found: dict[int, list[tuple[float, str]]] = {}
    begins = [place for place in range(1, len(marks)) if marks[place][1] != marks[place - 1][1]]
    for begin, end in pairwise(begins):
        phases = [(time, phase) for time, _, phase in marks[begin : end + 1]]
        if not {"start", "end"} & {phase for _, phase in phases}:
            found[marks[begin][1]] = phases
    return found


def clock_offsets(marks: Sequence[Sequence[Sequence[tuple[float, str]]]]) -> list[float]:
    """Of each rank, how far its clock is before the median's: seen when all leave `reduce` together. Pure.

    marks: of each rank, of each step, as in `whole_steps`.
    """
    seen: list[list[float]] = [[] for _ in marks]
    for step in zip(*marks, strict=True):
        for place in range(1, len(step[0])):
            if step[0][place - 1][1] == "reduce":
                middle = statistics.median_low([of[place][0] for of in step])
                for rank, of in enumerate(step):
                    seen[rank].append(of[place][0] - middle)
    return [statistics.median(each) if each else 0.0 for each in seen]


def slowest(tally: Tally) -> dict[str, Any] | None:
    """{"step", "rank", "phase", "seconds", "step_seconds", "num_steps"}: who fell behind most, a step, and in what.

    Of a run of one rank its longest phase and the seconds in it. None if no step was seen. Pure.
    """
    if not tally.num_steps or not tally.behind:
        return None
    (rank, phase), seconds = max(tally.behind.items(), key=lambda each: each[1])
    return {
        "step": tally.last_step,
        "rank": rank,
        "phase": phase,
        "seconds": round(seconds / tally.num_steps, 6),
        "step_seconds": round(tally.seconds / tally.num_steps, 6),
        "num_steps": tally.num_steps,
    }


def memory_bytes(rings: Sequence[Ring | None]) -> int | None:
    """Resident memory of the largest rank of this machine, without what it has started; none if none can be seen."""
    host, page, sizes = socket.gethostname(), os.sysconf("SC_PAGE_SIZE"), []
    for ring in rings:
        if ring is not None and ring.host == host:
            try:
                sizes.append(int(Path(f"/proc/{ring.pid}/statm").read_text().split()[1]) * page)
            except (OSError, ValueError, IndexError):
                continue
    return max(sizes, default=None)


def report_each_minute(run_dir: Path, world_size: int, more: Callable[[], dict[str, Any]]) -> None:
    """Append a line a minute, for ever: the work of a thread of rank 0. `more`: what else a line is to have.

    A disk that cannot be written costs lines, not the run.
    """
    tally, last = Tally(), time.monotonic()
    while True:
        time.sleep(LOOK_SECONDS)
        rings = read_rings(run_dir, world_size)
        tally.add(rings)
        if time.monotonic() - last < LINE_SECONDS:
            continue
        last = time.monotonic()
        if found := slowest(tally):
            append_line(run_dir, found | {"memory_bytes": memory_bytes(rings)} | more())
        tally = Tally(_counted=tally._counted)


def append_line(run_dir: Path, values: dict[str, Any]) -> None:
    """In one write, with the time in front."""
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        with (run_dir / FILE).open("ab", buffering=0) as file:
            file.write((json.dumps(now | values) + "\n").encode())
    except OSError:
        return
