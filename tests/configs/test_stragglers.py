"""Who the others wait for: from marks of real rings, made without ranks."""

from __future__ import annotations

import json
import threading
import time

from configs import stragglers
from configs.phases import read_rings
from configs.stragglers import Tally, memory_bytes, slowest
from tests.launcher.run_directories import make_ring

STEP = {"data": 0.01, "reduce": 0.05, "forward": 0.1, "backward": 0.2, "step": 0.02}


def rings(folder, steps, *slow, collective=("reduce", "backward"), clocks=None):
    """Of ranks that take `slow[rank]` = {phase: seconds} instead of STEP's, and wait for each other in `collective`."""
    work = [STEP | own for own in slow]
    now = [1000.0] * len(work)
    marks = [[] for _ in work]
    for step in steps:
        for phase in STEP:
            for rank, own in enumerate(work):
                marks[rank].append((now[rank] + (clocks or [0] * len(work))[rank], step, phase))
                now[rank] += own[phase]
            if phase in collective:  # nobody leaves before the last has come
                now = [max(now)] * len(work)
    for rank, own in enumerate(marks):
        make_ring(folder, rank, len(slow), own)
    return read_rings(folder, len(slow))


def test_slow_rank_and_its_phase_are_named_though_all_take_the_same_time(tmp_path):
    tally = Tally()
    tally.add(rings(tmp_path, range(20), {}, {}, {"data": 0.09}, {}))
    found = slowest(tally)
    assert found is not None
    assert (found["rank"], found["phase"], found["num_steps"], found["step"]) == (2, "data", 18, 19)
    assert abs(found["seconds"] - 0.08) < 1e-3 and abs(found["step_seconds"] - 0.46) < 1e-3


def test_rank_that_waits_inside_of_a_long_phase_is_not_blamed(tmp_path):
    tally = Tally()
    tally.add(rings(tmp_path, range(20), {}, {"forward": 0.13}))  # the other one waits for it in backward
    found = slowest(tally)
    assert found is not None and (found["rank"], found["phase"]) == (1, "forward")


def test_clock_that_is_wrong_is_not_taken_for_lateness(tmp_path):
    tally = Tally()
    slow = {"forward": 0.13}
    tally.add(rings(tmp_path, range(20), {}, {}, slow, {}, clocks=[0.0, 5.0, -3.0, 0.2]))
    found = slowest(tally)
    assert found is not None and (found["rank"], found["phase"]) == (2, "forward")
    assert abs(found["seconds"] - 0.03) < 1e-3


def test_steps_are_counted_once_over_several_looks(tmp_path):
    tally = Tally()
    tally.add(rings(tmp_path, range(10), {}, {"data": 0.3}))
    before = dict(tally.behind)
    tally.add(read_rings(tmp_path, 2))
    assert tally.behind == before
    tally.add(rings(tmp_path, range(20), {}, {"data": 0.3}))
    assert tally.num_steps == 18  # the first may lack marks, the last has no end


def test_single_rank_has_its_longest_phase_and_no_median(tmp_path):
    tally = Tally()
    tally.add(rings(tmp_path, range(5), {}))
    found = slowest(tally)
    assert found is not None and (found["rank"], found["phase"]) == (0, "backward")
    assert abs(found["seconds"] - 0.2) < 1e-3


def test_nothing_is_said_before_the_first_step_or_without_rings(tmp_path):
    tally = Tally()
    make_ring(tmp_path, 0, 2, [(1.0, 0, "start"), (5.0, 0, "start")])
    tally.add(read_rings(tmp_path, 2))
    assert slowest(tally) is None and memory_bytes([None]) is None


def test_line_a_minute_has_time_slowest_rank_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(stragglers, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(stragglers, "LINE_SECONDS", 0.05)
    rings(tmp_path, range(10), {}, {"forward": 0.4})
    more = {"gpu_bytes": 7}
    threading.Thread(target=stragglers.report_each_minute, args=(tmp_path, 2, lambda: more), daemon=True).start()
    deadline = time.monotonic() + 10
    while not (tmp_path / stragglers.FILE).exists() or not (tmp_path / stragglers.FILE).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    line = json.loads((tmp_path / stragglers.FILE).read_text().splitlines()[0])
    assert (line["rank"], line["phase"], line["gpu_bytes"]) == (1, "forward", 7)
    assert line["time"].startswith("20") and line["memory_bytes"] > 1_000_000
