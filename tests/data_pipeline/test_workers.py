"""Processes that make steps ahead: they do the work, end with their rank, leave nothing, and may be lost."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.schema import PretrainConfig
from data_pipeline.errors import DataError
from data_pipeline.samples import open_samples
from data_pipeline.workers import STEPS_PER_WORKER, Ahead, Request, Slot, Worker, _anonymous_file
from tests.conftest import ROOT, stays_in_shared_memory
from tests.data_pipeline.token_datasets import gpt_config, lengths, write_dataset


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    write_dataset(tmp_path / "train", [lengths(1, 600)])
    return gpt_config(tmp_path)


def wait_until(happened: Callable[[], bool], seconds: float = 60, pause: float = 0.01) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(pause)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


class Counting:
    """What the rank makes itself, and how often."""

    def __init__(self, config: PretrainConfig) -> None:
        self.samples, self.made = open_samples(config, "train"), 0

    def __call__(self, request: Request) -> list[dict[str, np.ndarray]]:
        self.made += 1
        return list(self.samples.micro_batches(*request))


def same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def ready(config: PretrainConfig, number: int) -> tuple[Ahead, Counting]:
    make = Counting(config)
    ahead = Ahead(make, [Worker(config, "train") for _ in range(number)])
    wait_until(lambda: len(ahead._ready) == number)
    return ahead, make


def test_first_batch_does_not_wait_for_the_workers(config):
    make = Counting(config)
    began = time.perf_counter()
    ahead = Ahead(make, [Worker(config, "train") for _ in range(2)])
    ahead.get((0, 0, 1))
    assert time.perf_counter() - began < 0.2 and not ahead._ready
    ahead.close()


def test_workers_make_all_steps_but_the_first(config):
    ahead, make = ready(config, 2)
    batches = [ahead.get((step, 0, 1)) for step in range(30)]
    assert make.made == 1
    assert all(same(made, make((step, 0, 1))) for step, made in enumerate(batches))
    ahead.close()


def test_no_more_is_made_ahead_than_a_few_steps(config):
    ahead, _ = ready(config, 2)
    for step in (0, 1, 2, 50):
        ahead.get((step, 0, 1))
        assert all(len(worker.asked) <= STEPS_PER_WORKER for worker in ahead.workers) and not ahead._pending
    steps = itertools.count(51)

    def what_follows_is_asked_for() -> bool:
        step = next(steps)
        ahead.get((step, 0, 1))
        asked = {request for worker in ahead.workers for request in worker.asked}
        return asked == {(step + number, 0, 1) for number in range(1, 1 + 2 * STEPS_PER_WORKER)}

    wait_until(what_follows_is_asked_for)  # once the workers have answered what was asked before the jump
    ahead.close()


def test_batches_handed_out_stay_as_they_are(config):
    ahead, make = ready(config, 1)
    ahead.get((0, 0, 1))
    batches = [ahead.get((step, 0, 1)) for step in range(1, 9)]  # all of them come out of the same memory
    assert all(same(made, make((step, 0, 1))) for step, made in enumerate(batches, 1))
    for made in batches:
        for array in made[0].values():  # they belong to who asked for them
            array[...] = 0
    assert all(same(ahead.get((step, 0, 1)), make((step, 0, 1))) for step in range(9, 13))
    ahead.close()


def test_larger_steps_find_more_memory(config):
    ahead, make = ready(config, 1)
    for request in ((0, 0, 8), (1, 0, 8), (0, 0, 1), (1, 0, 1), (2, 0, 1)):  # 3, then 24 micro batches
        assert same(ahead.get(request), make(request))
    ahead.close()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_steps_that_become_longer_and_shorter_are_those_made_without_workers(tmp_path, num_workers):
    write_dataset(tmp_path / "train", [lengths(1, 2000)])
    phases = [{"from_step": step, "seq_len": seq_len} for step, seq_len in ((5, 64), (10, 8), (16, 200), (22, 16))]
    ahead, make = ready(gpt_config(tmp_path, train={"phases": phases}), num_workers)
    batches = [ahead.get((step, 0, 1)) for step in range(30)]
    assert make.made == 1
    assert all(same(made, make((step, 0, 1))) for step, made in enumerate(batches))
    ahead.close()


def test_requests_in_any_order_get_their_own_batches(config):
    ahead, make = ready(config, 2)
    rng = np.random.default_rng(1)
    step = 0
    for _ in range(200):
        step = step + 1 if rng.random() < 0.6 else int(rng.integers(0, 40))
        request = (step, 0, int(rng.choice([1, 1, 1, 2])))
        assert same(ahead.get(request), make(request))
    ahead.close()


def test_slot_is_mapped_anew_only_as_it_grows():
    file = _anonymous_file()
    writer, reader = Slot(os.dup(file), mmap.ACCESS_WRITE), Slot(file, mmap.ACCESS_READ)
    mappings = []
    for size in [*range(1000, 200_000, 1000), 10, 100_000]:
        batches = [{"a": np.full(size, size, np.int32), "b": np.arange(3)}, {"a": np.arange(size, dtype=np.uint16)}]
        assert same(reader.read(writer.write(batches)), batches)
        if not mappings or reader._memory is not mappings[-1]:
            mappings.append(reader._memory)
    assert len(mappings) < 10  # each at least twice as large as the one before
    writer.close()
    reader.close()


def test_lost_workers_are_replaced_by_the_rank_itself(config):
    ahead, make = ready(config, 2)
    batches = [ahead.get((step, 0, 1)) for step in range(3)]
    for worker in ahead.workers:
        os.kill(worker.pid, signal.SIGKILL)
    batches += [ahead.get((step, 0, 1)) for step in range(3, 20)]
    assert make.made > 10
    assert all(same(made, make((step, 0, 1))) for step, made in enumerate(batches))
    ahead.close()


def test_other_workers_take_over_what_a_lost_one_was_asked_for(config):
    ahead, make = ready(config, 2)
    batches = [ahead.get((step, 0, 1)) for step in range(5)]
    os.kill(ahead.workers[0].pid, signal.SIGKILL)
    batches += [ahead.get((step, 0, 1)) for step in range(5, 40)]
    assert make.made <= 1 + STEPS_PER_WORKER
    assert all(same(made, make((step, 0, 1))) for step, made in enumerate(batches))
    ahead.close()


@pytest.mark.parametrize("microseconds", [0, 100, 300])
def test_what_a_worker_killed_while_it_writes_leaves_is_not_read(config, microseconds):
    ahead, make = ready(config, 1)
    worker = ahead.workers[0]
    files = [slot.file for slot in worker._slots]
    batches = [ahead.get((0, 0, 1))]
    wait_until(lambda: os.fstat(files[-1]).st_size > 0, pause=0)  # it has begun to lay down the step after the next
    time.sleep(microseconds * 1e-6)
    os.kill(worker.pid, signal.SIGKILL)
    batches += [ahead.get((step, 0, 1)) for step in range(1, 6)]
    assert all(same(made, make((step, 0, 1))) for step, made in enumerate(batches))
    ahead.close()


def test_worker_that_cannot_start_leaves_the_work_to_the_rank(config):
    make = Counting(config)
    other = config.model_copy(update={"data": config.data.model_copy(update={"dir": "missing"})})
    ahead = Ahead(make, [Worker(other, "train")])
    assert all(same(ahead.get((step, 0, 1)), make((step, 0, 1))) for step in range(5))
    wait_until(lambda: not is_running(ahead.workers[0].pid))
    assert not ahead._ready and same(ahead.get((5, 0, 1)), make((5, 0, 1)))
    ahead.close()


def test_damage_that_a_worker_meets_is_the_ranks_error(tmp_path):
    write_dataset(tmp_path / "train", [lengths(1, 60_000)])  # hundreds of blocks: few were checked by the first step
    ahead, _ = ready(gpt_config(tmp_path), 1)
    ahead.get((0, 0, 1))
    file = tmp_path / "train/shard-00000.tokens"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size // 2))
    with pytest.raises(DataError, match=r"shard-00000.tokens: is damaged between bytes"):
        for step in range(1, 30):
            ahead.get((step, 0, 1))
    ahead.close()


def test_close_ends_the_processes_and_frees_their_memory(config):
    make = Counting(config)
    make((0, 0, 1))
    before = len(os.listdir("/proc/self/fd"))
    ahead = Ahead(make, [Worker(config, "train") for _ in range(2)])
    wait_until(lambda: len(ahead._ready) == 2)
    for step in range(5):
        ahead.get((step, 0, 1))
    assert len(os.listdir("/proc/self/fd")) > before and "millstream-batches" in Path("/proc/self/maps").read_text()
    ahead.close()
    assert not any(is_running(worker.pid) for worker in ahead.workers)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "millstream-batches" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_workers_end_with_their_rank_and_leave_nothing_in_shared_memory(config, how):
    shared = set(os.listdir("/dev/shm"))
    program = (
        "import os, signal, sys, time; from configs.schema import PretrainConfig\n"
        "from data_pipeline.workers import Ahead, Worker; from data_pipeline.samples import open_samples\n"
        "config = PretrainConfig.model_validate_json(sys.argv[1]); samples = open_samples(config, 'train')\n"
        "workers = [Worker(config, 'train') for _ in range(2)]\n"
        "ahead = Ahead(lambda request: list(samples.micro_batches(*request)), workers)\n"
        "while len(ahead._ready) < 2: time.sleep(0.01)\n"
        "for step in range(5): ahead.get((step, 0, 1))\n"
        "print(*[worker.pid for worker in ahead.workers], flush=True)\n"
        "if sys.argv[2] == 'SIGKILL': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, config.model_dump_json(), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and done.returncode == (-signal.SIGKILL if how == "SIGKILL" else 0), done.stderr
    wait_until(lambda: not any(is_running(pid) for pid in pids), 10)
    assert not stays_in_shared_memory(shared)


def test_signals_to_the_whole_group_do_not_end_the_workers(config):
    ahead, make = ready(config, 1)
    ahead.get((0, 0, 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(ahead.workers[0].pid, number)
    time.sleep(0.2)
    made = make.made
    for step in range(1, 10):
        ahead.get((step, 0, 1))
    assert make.made == made and is_running(ahead.workers[0].pid)
    ahead.close()
