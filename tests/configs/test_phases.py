"""The rings of phases: what is marked is read, by another process, at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import timeit

from configs import phases
from configs.phases import (
    CAPACITY,
    QuietTime,
    byte_counter,
    bytes_written,
    marker,
    open_ring,
    read_ring,
    read_rings,
    ring_path,
)
from tests.conftest import ROOT


def test_reader_sees_who_marked_and_the_newest_marks_in_order(tmp_path):
    mark = marker(open_ring(tmp_path / "ring", 3, 8))
    opened = read_ring(tmp_path / "ring")
    assert opened is not None and (opened.num_marks, opened.phase, opened.step) == (0, "start", 0)
    for step in range(100):
        for phase in ("data", "forward", "backward"):
            mark(phase, step)
    ring = read_ring(tmp_path / "ring")
    assert ring is not None
    assert (ring.rank, ring.world_size, ring.pid, ring.host) == (3, 8, os.getpid(), os.uname().nodename)
    assert (ring.num_marks, ring.step, ring.phase) == (300, 99, "backward")
    expected = [(step, phase) for step in range(100) for phase in ("data", "forward", "backward")]
    assert [(step, phase) for _, step, phase in ring.marks] == expected[1 - CAPACITY :]
    times = [when for when, _, _ in ring.marks]
    assert times == sorted(times) and abs(ring.since - time.time()) < 5


def test_marks_survive_a_kill(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from configs.phases import *\n"
        "mark = marker(open_ring(Path(sys.argv[1]), 0, 1))\n"
        "mark('save', 7)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "ring")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    ring = read_ring(tmp_path / "ring")
    assert ring is not None and (ring.num_marks, ring.phase, ring.step) == (1, "save", 7)


def test_reader_never_sees_a_mark_that_is_half_written(tmp_path):
    script = (
        "import sys; from pathlib import Path; from configs.phases import *\n"
        "mark = marker(open_ring(Path(sys.argv[1]), 0, 1))\n"
        "step = 0\n"
        "while True: step += 1; mark('forward' if step % 2 else 'backward', step)\n"
    )
    path = tmp_path / "ring"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT)
    try:
        while (ring := read_ring(path)) is None or not ring.num_marks:
            time.sleep(0.01)
        for _ in range(3000):
            ring = read_ring(path)
            assert ring is not None and ring.step >= ring.num_marks
            assert ring.phase == ("forward" if ring.step % 2 else "backward")
    finally:
        process.kill()
        process.wait()


def test_marking_costs_about_a_microsecond(tmp_path):
    mark = marker(open_ring(tmp_path / "ring", 0, 1))
    seconds = min(timeit.repeat(lambda: mark("forward", 5), number=20_000, repeat=5)) / 20_000
    assert seconds < 2e-6


def test_files_that_are_no_rings_of_this_run_are_none(tmp_path):
    (tmp_path / "ranks").mkdir()
    open_ring(ring_path(tmp_path, 0), 0, 3)
    open_ring(ring_path(tmp_path, 1), 1, 4)  # of an earlier run of another size
    ring_path(tmp_path, 2).write_bytes(b"x" * phases.PAGE)
    found = read_rings(tmp_path, 3)
    assert [ring is not None for ring in found] == [True, False, False]


def test_bytes_on_the_disk_are_counted_over_ranks_and_leave_the_marks_alone(tmp_path):
    (tmp_path / "ranks").mkdir()
    marks = [marker(open_ring(ring_path(tmp_path, rank), rank, 2)) for rank in (0, 1)]
    for step in range(CAPACITY):
        marks[1]("data", step)
    counters = [byte_counter(ring_path(tmp_path, rank)) for rank in (0, 1)]
    counters[0](5 << 30)
    counters[1](7)
    counters[1](1)
    ring = read_ring(ring_path(tmp_path, 1))
    assert ring is not None and (ring.num_bytes, ring.num_marks, ring.step) == (8, CAPACITY, CAPACITY - 1)
    assert [step for _, step, _ in ring.marks] == list(range(1, CAPACITY))
    assert bytes_written(tmp_path, 2) == (5 << 30) + 8


def test_bytes_of_a_process_without_a_ring_are_not_counted(tmp_path):
    byte_counter(ring_path(tmp_path, 0))(5)
    assert bytes_written(tmp_path, 1) == 0


def test_quiet_time_counts_only_while_the_watcher_runs(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    quiet = QuietTime(interval_seconds=1.0)
    assert quiet.look({0: 5, 1: 5}) == {0: 0.0, 1: 0.0}
    now += 1
    assert quiet.look({0: 5, 1: 6}) == {0: 1.0, 1: 0.0}
    now += 3600  # the machine slept
    assert quiet.look({0: 5, 1: 6}) == {0: 4.0, 1: 3.0}
    now += 1
    assert quiet.look({0: 6, 1: 6}) == {0: 0.0, 1: 4.0}
