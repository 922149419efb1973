"""Random moments, and the thread that kills when they have come; the ranks are stand-ins."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

from configs.phases import marker, open_ring, ring_path
from launcher.kills import SAVE_MARKS, SAVE_STEPS, Killer, Moment, draw
from launcher.watch import Watch


def test_moments_are_those_of_the_seed_and_of_all_kinds():
    moments = [draw(random.Random(seed), 2, 5, 7.0, 0.1) for seed in range(300)]
    assert moments == [draw(random.Random(seed), 2, 5, 7.0, 0.1) for seed in range(300)]
    assert {moment.kind for moment in moments} == {"start", "step", "save"}
    assert {moment.rank for moment in moments} == {None, 0, 1}
    for moment in moments:
        number, seconds = {"start": (0, 7.0), "step": (10, 0.1), "save": (SAVE_MARKS, SAVE_STEPS * 0.1)}[moment.kind]
        assert min(number, 1) <= moment.number <= number and 0 <= moment.seconds <= seconds


@pytest.fixture
def ranks():
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def marks(tmp_path):
    """The function of each of two ranks that marks."""
    watch = Watch(tmp_path, 2, None)
    (tmp_path / "ranks").mkdir()
    return watch, [marker(open_ring(ring_path(tmp_path, rank), rank, 2)) for rank in (0, 1)]


def start(run_dir, ranks, watch, moment: Moment | None) -> Killer:
    killer = Killer(run_dir, 2, 20, moment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # pytest's again
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    killer.go_to(ranks, watch)
    return killer


def is_alive(process) -> bool:
    time.sleep(0.1)
    return process.poll() is None


def test_rank_is_killed_in_the_step_it_was_to_be_killed_in_and_no_other_rank(tmp_path, ranks, marks):
    watch, (first, second) = marks
    killer = start(tmp_path, ranks, watch, Moment("step", 3, 0.0, rank=1))
    for step in (10, 11):
        second("data", step)
    first("data", 12)
    assert is_alive(ranks[1])
    second("data", 12)
    assert ranks[1].wait(5) == -signal.SIGKILL and is_alive(ranks[0])
    life = killer.end()
    assert (life.killed, life.first_step) == ((1,), 10)


def test_all_ranks_are_killed_where_the_second_save_begins(tmp_path, ranks, marks):
    watch, (first, _) = marks
    killer = start(tmp_path, ranks, watch, Moment("save", 3, 0.0, rank=None))
    for phase, step in (("start", 0), ("data", 4), ("save", 5), ("data", 5), ("save", 5), ("data", 9)):
        first(phase, step)
    assert is_alive(ranks[0])
    first("save", 10)
    assert [process.wait(5) for process in ranks] == [-signal.SIGKILL] * 2
    assert killer.end().killed == (0, 1)


def test_start_is_killed_without_any_mark(tmp_path, ranks, marks):
    killer = start(tmp_path, ranks, marks[0], Moment("start", 0, 0.2, rank=0))
    assert ranks[0].wait(5) == -signal.SIGKILL
    life = killer.end()
    assert (life.killed, life.first_step) == ((0,), None)


def test_life_that_ends_before_the_moment_is_no_kill(tmp_path, ranks, marks):
    watch, (first, _) = marks
    killer = start(tmp_path, ranks, watch, Moment("step", 50, 0.0, rank=None))
    first("data", 4)
    assert is_alive(ranks[0])
    assert killer.end().killed == () and killer.life.first_step == 4


def test_the_mark_after_the_last_step_is_a_moment_too(tmp_path, ranks, marks):
    watch, (first, _) = marks
    killer = start(tmp_path, ranks, watch, Moment("step", 8, 0.0, rank=0))
    first("data", 18)
    first("end", 20)
    assert ranks[0].wait(5) == -signal.SIGKILL
    killer.end()
