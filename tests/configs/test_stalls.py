"""Who is behind when a run stands still, from what is seen of each rank."""

from __future__ import annotations

from pathlib import Path

from configs.phases import Ring
from configs.stalls import LARGEST_TABLE, Seen, behind, headline, main_stack, report

WAITING = (
    'File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce',
    'File "/y/train.py", line 2 in train',
)
FETCHING = ('File "/x/deepspeed/utils/nvtx.py", line 1 in f', 'File "/x/deepspeed/runtime/zero/p.py", line 2 in wait')
COMPUTING = ('File "/x/torch/nn/functional.py", line 1 in linear', 'File "/y/train.py", line 2 in train')


def seen(rank: int, num_marks: int, phase: str = "forward", state: str = "running", stack: tuple = WAITING) -> Seen:
    marks = ((1000.0 + rank, 41, "data"), (1001.0 + rank, 42, phase))
    return Seen(rank, Ring(rank, 3, 100 + rank, 1, 900.0, "node", num_marks, marks), state, stack)


def ranks_behind(*ranks: Seen) -> list[int]:
    return [rank.rank for rank in behind(list(ranks))[0]]


def test_fewest_marks_are_behind():
    assert ranks_behind(seen(0, 12, "reduce"), seen(1, 11, "data", stack=COMPUTING), seen(2, 12, "reduce")) == [1]


def test_stopped_or_lost_process_is_the_cause_wherever_it_stands():
    assert ranks_behind(seen(0, 11), seen(1, 12, state="stopped", stack=()), seen(2, 12)) == [1]
    assert ranks_behind(seen(0, 12), seen(1, 12, state="stopped", stack=()), seen(2, 11, state="gone", stack=())) == [2]


def test_rank_without_a_ring_is_behind_those_that_wait_for_it_at_the_start():
    assert ranks_behind(seen(0, 1, "start"), Seen(1, None, "unknown"), seen(2, 1, "start")) == [1]
    assert "made no mark at all" in headline([seen(0, 1), Seen(1, None, "unknown")], 600)


def test_at_the_same_mark_the_one_outside_of_a_collective_is_behind():
    assert ranks_behind(seen(0, 12), seen(1, 12, stack=FETCHING), seen(2, 12, stack=COMPUTING)) == [2]


def test_at_the_same_mark_the_one_that_gives_no_stack_is_behind():
    assert ranks_behind(seen(0, 12), seen(1, 12, state="elsewhere", stack=()), seen(2, 12, stack=COMPUTING)) == [1]


def test_finished_ranks_are_not_behind():
    assert ranks_behind(seen(0, 50, "end", stack=COMPUTING), seen(1, 49, "end", state="finished", stack=())) == [0]


def test_nobody_is_named_when_all_wait_in_the_same_collective():
    suspects, why = behind([seen(0, 12), seen(1, 12)])
    assert len(suspects) == 2 and why.startswith("no rank is behind")
    assert "all ranks are in phase forward of step 42" in headline([seen(0, 12), seen(1, 12)], 600)


def test_report_has_phase_step_time_table_last_marks_and_stack():
    text = report([seen(0, 12, "reduce"), seen(1, 11, "data", stack=COMPUTING)], 600.4, Path("runs/x"))
    assert text.startswith(
        "the run has stood still for 600 s: rank 1 is behind, in phase data of step 42, since 00:16:42"
    )
    assert "0     node  100  42    reduce  00:16:41     running  waits in a collective" in text
    assert "1     node  101  42    data    00:16:42     running  <- behind" in text
    assert "last marks of rank 1: step 41: data 1.00 s; step 42: data\n" in text
    assert COMPUTING[0] in text and WAITING[0] not in text and "runs/x/ranks/rank-*.stacks" in text


def test_table_of_a_thousand_ranks_is_short_and_has_the_one_behind():
    ranks = [seen(rank, 12) for rank in range(1000)]
    ranks[777] = seen(777, 11, "data", stack=COMPUTING)
    text = report(ranks, 600, Path("runs/x"))
    assert len(text.splitlines()) < LARGEST_TABLE + 20
    assert "and 967 more ranks" in text and "  777   node" in text


def test_main_threads_frames_of_the_last_dump_are_found():
    dumps = (
        "Current thread 0x00000000000000ab (most recent call first):\n"
        '  File "old.py", line 1 in old\n'
        "\n"
        "Thread 0x00000000000000cd (most recent call first):\n"
        '  File "threading.py", line 1 in run\n'
        "\n"
        "Thread 0x00000000000000ab [python] (most recent call first):\n"
        "  Garbage-collecting\n"
        '  File "inner.py", line 1 in inner\n'
        '  File "outer.py", line 2 in outer\n'
        "\n"
        "Current thread 0x00000000000000ef (most recent call first):\n"
        '  File "watchdog.py", line 3 in watch\n'
    )
    assert main_stack(dumps, 0xAB) == ('File "inner.py", line 1 in inner', 'File "outer.py", line 2 in outer')
