"""Watches the ranks that this machine's launcher started, from outside: who stands still, and who is it that is behind.

What it reads and what it says is in configs/phases.py and configs/stalls.py. Every rank watches over itself too, but a
process that is stopped, or held up outside of Python, cannot.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from configs.phases import QuietTime, Ring, read_ring, ring_path, stacks_path


class Watch:
    """Over the rings of one start of a run. Make it before the ranks: it removes what an earlier start left.

    Where other machines start ranks of the run by themselves, `first_rank` is the first one of this machine; what is
    called a rank here counts from there.
    """

    def __init__(
        self, run_dir: Path, num_ranks: int, stall_seconds: int | None, first_rank: int = 0, world_size: int = 0
    ) -> None:
        self.run_dir, self.num_ranks, self.stall_seconds = run_dir, num_ranks, stall_seconds
        self.first_rank, self.world_size = first_rank, world_size or num_ranks
        if self.world_size == num_ranks:
            shutil.rmtree(run_dir / "ranks", ignore_errors=True)
        for rank in range(first_rank, first_rank + num_ranks):
            ring_path(run_dir, rank).unlink(missing_ok=True)
            stacks_path(run_dir, rank).unlink(missing_ok=True)
        self._interval = min(2.0, (stall_seconds or 0) / 20)
        self._quiet = QuietTime(self._interval + 0.1)
        self._next = 0.0

    def ring(self, rank: int) -> Ring | None:
        return read_ring(ring_path(self.run_dir, self.first_rank + rank))

    def stalled(self, running: list[int]) -> float | None:
        """The seconds for which the quietest of these ranks has made no mark, if they are too many; else none.

        While bytes of a checkpoint reach the disk, on any of them, none is quiet. A rank that has not opened its ring
        counts from the first call on. Cheap: it looks every few calls only.
        """
        if self.stall_seconds is None or time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self._interval
        rings = {rank: self.ring(rank) for rank in running}
        written = sum(ring.num_bytes for ring in rings.values() if ring)
        quiet = self._quiet.look({rank: (ring.num_marks if ring else -1) + written for rank, ring in rings.items()})
        longest = max(quiet.values(), default=0.0)
        return longest if longest >= self.stall_seconds else None
