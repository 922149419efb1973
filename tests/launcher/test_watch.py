"""The launcher's look from outside: who counts as standing still."""

from __future__ import annotations

import time

import pytest

from configs.phases import byte_counter, marker, open_ring, ring_path
from launcher.watch import Watch


@pytest.fixture
def passes(monkeypatch):
    """A function that lets seconds pass, without waiting."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def let_pass(seconds: float) -> None:
        nonlocal now
        now += seconds

    return let_pass


def test_rank_that_waits_for_a_slow_disk_is_not_standing_still_while_bytes_move(tmp_path, passes):
    watch = Watch(tmp_path, 2, 10)
    (tmp_path / "ranks").mkdir()
    marks = [marker(open_ring(ring_path(tmp_path, rank), rank, 2)) for rank in (0, 1)]
    for mark in marks:
        mark("save", 5)
    wrote = byte_counter(ring_path(tmp_path, 1))
    for _ in range(60):  # rank 1 writes for 30 seconds, rank 0 waits for it
        wrote(1000)
        assert watch.stalled([0, 1]) is None
        passes(0.5)
    seconds = []
    for _ in range(60):  # then the disk hangs
        seconds.append(watch.stalled([0, 1]))
        passes(0.5)
    assert seconds[:19] == [None] * 19 and next(found for found in seconds if found) >= 10


def test_rank_that_makes_no_mark_stands_still_whatever_the_others_do(tmp_path, passes):
    watch = Watch(tmp_path, 2, 10)
    (tmp_path / "ranks").mkdir()
    marks = [marker(open_ring(ring_path(tmp_path, rank), rank, 2)) for rank in (0, 1)]
    found = []
    for step in range(60):
        marks[0]("data", step)
        found.append(watch.stalled([0, 1]))
        passes(0.5)
    assert found[:19] == [None] * 19 and any(found)
