"""Which rank the others wait for, and in which phase: from the ranks' rings, one line a minute in stragglers.jsonl.

In training with all ranks in step everybody is as slow as the slowest, so step times say nothing. What differs is where
the time goes: the slow rank spends it in a phase of work, the others in `reduce`, waiting for it. So a phase's seconds
a step are compared over the ranks, and the largest excess over their median names rank and phase. With ZeRO-3 the
gathers of weights are inside of `forward` and `backward`: there all ranks wait with the slow one, and the excess of a
rank that computes slowly is small. Durations of one rank come from one clock, so clocks of hosts need not agree.
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
from pathlib import Path
from typing import Any

from configs.phases import Ring, read_rings

FILE = "stragglers.jsonl"
LINE_SECONDS = 60.0
LOOK_SECONDS = 10.0  # a ring holds the last seconds only
WORK = ("data", "forward", "backward", "step", "evaluate", "save")  # phases that are not mere waiting


@dataclass
class Tally:
    """Seconds in each phase of each rank, added up over several looks at the rings."""

    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: dict[int, set[int]] = field(default_factory=dict)
    _ends: dict[int, float] = field(default_factory=dict)  # up to when a rank's marks have been counted

    def add(self, rings: Sequence[Ring | None]) -> None:
        """Count what is new in the rings; a mark lasts until the next one, so the newest waits for the next look."""
        for ring in rings:
            if ring is None or not ring.marks:
                continue
            counted = self._ends.get(ring.rank, 0.0)
            for (when, step, phase), (until, _, _) in zip(ring.marks, ring.marks[1:], strict=False):
                if when >= counted and phase not in ("start", "end"):
                    phases = self.seconds.setdefault(ring.rank, defaultdict(float))
                    phases[phase] += until - when
                    self.steps.setdefault(ring.rank, set()).add(step)
            self._ends[ring.rank] = ring.marks[-1][0]

    def clear(self) -> None:
        self.seconds, self.steps = {}, {}


def slowest(tally: Tally) -> dict[str, Any] | None:
    """{"rank", "phase", "seconds", "median_seconds", "step", "num_steps"}: the largest excess over the ranks' median.

    Seconds are those a step. Of a run of one rank the longest phase, without a median. None if no step was seen. Pure.
    """
    ranks = sorted(rank for rank, steps in tally.steps.items() if steps)
    if not ranks:
        return None
    found: list[tuple[float, int, str, float, float]] = []
    for phase in WORK:
        means = {rank: tally.seconds[rank].get(phase, 0.0) / len(tally.steps[rank]) for rank in ranks}
        median = statistics.median(means.values()) if len(ranks) > 1 else 0.0
        rank = max(ranks, key=lambda each: means[each])
        found.append((means[rank] - median, rank, phase, means[rank], median))
    _, rank, phase, seconds, median = max(found, key=lambda each: each[0])
    steps = tally.steps[rank]
    return {
        "step": max(steps) + 1,
        "rank": rank,
        "phase": phase,
        "seconds": round(seconds, 6),
        "median_seconds": round(median, 6) if len(ranks) > 1 else None,
        "num_steps": len(steps),
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
        tally.clear()


def append_line(run_dir: Path, values: dict[str, Any]) -> None:
    """In one write, with the time in front."""
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        with (run_dir / FILE).open("ab", buffering=0) as file:
            file.write((json.dumps(now | values) + "\n").encode())
    except OSError:
        return
