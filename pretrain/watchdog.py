"""Marks of this rank for those who watch the run, and the watching itself where no launcher of ours does it.

`watch` opens the rank's ring (configs/phases.py) and makes the process answer SIGUSR2 with its Python stacks, which
works while the main thread is inside of C. A thread looks at the ring from within: when it has stood still for too
long, and no rank's checkpoint comes any further on its disk either, the first rank to notice reports who is behind,
from the files of all ranks, and every rank leaves with exit code 124. The launcher does the same from outside, earlier,
and for ranks that cannot (a stopped process has stopped threads); the thread is what ends a run under the deepspeed
launcher or SLURM. Rank 0 has another thread, which reports once a minute who is slow (configs/stragglers.py).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import BinaryIO

import torch

from configs import stalls
from configs.load import ConfigError
from configs.phases import COUNT, Mark, QuietTime, bytes_written, marker, open_ring, ring_path, stacks_path
from configs.stragglers import report_each_minute

WATCHED = "MILLSTREAM_WATCHED"  # set by our launcher: it is the first to act, this is for the case that it is gone
LAUNCHER_SECONDS = 60  # it gets


def watch(run_dir: str, rank: int, world_size: int, stall_seconds: int | None) -> Mark:
    """Open this rank's ring in `run_dir` and watch over it; returns the function that marks.

    With `stall_seconds` none nobody ends the run, but the launcher's and anybody's SIGUSR2 is still answered. Raises
    ConfigError where `run_dir` cannot be written.
    """
    ring, stacks = ring_path(run_dir, rank), stacks_path(run_dir, rank)
    try:
        ring.parent.mkdir(parents=True, exist_ok=True)
        file = stacks.open("wb")
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)
        words = open_ring(ring, rank, world_size)
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written ({error}); choose a directory you can write to"
        ) from error
    if stall_seconds is not None:
        patience = stall_seconds + (LAUNCHER_SECONDS if WATCHED in os.environ else 0)
        watching = (words, file, Path(run_dir), world_size, patience)
        threading.Thread(target=_end_when_quiet, args=watching, name="watchdog", daemon=True).start()
    if rank == 0:
        arguments = (Path(run_dir), world_size, device)
        threading.Thread(target=report_each_minute, args=arguments, name="stragglers", daemon=True).start()
    mark = marker(words)
    mark("start", 0)
    return mark


def device() -> dict[str, int | str]:
    """This rank's GPU and what it has had allocated there at most, for a line of stragglers.jsonl; empty on a CPU."""
    if not torch.cuda.is_initialized():
        return {}
    return {"gpu_bytes": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}


def _end_when_quiet(words: memoryview, stacks: BinaryIO, run_dir: Path, world_size: int, patience: float) -> None:
    interval = min(5.0, patience / 20)
    began, quiet, num_bytes = time.time(), QuietTime(interval), 0
    while True:
        seconds, of_writes = quiet.look({0: words[COUNT], 1: num_bytes}).values()
        if seconds >= patience and of_writes >= patience / 2:
            break
        if seconds >= patience / 2:  # it may wait for a rank whose disk is slow; before, nobody's files are read
            num_bytes = bytes_written(run_dir, world_size)
        time.sleep(interval)
    faulthandler.dump_traceback(file=stacks, all_threads=True)
    arguments = (run_dir, world_size, seconds, began + patience / 2)
    reporting = threading.Thread(target=_report, args=arguments, daemon=True)
    reporting.start()
    reporting.join(stalls.REPORT_SECONDS)  # no longer: run_dir may be what does not answer
    os._exit(stalls.EXIT_CODE)  # not sys.exit: the main thread does not answer


def _report(run_dir: Path, world_size: int, seconds: float, earliest: float) -> None:
    """Print and keep the report, if this rank is the first to notice; the others wait until it is written."""
    path = stalls.report_path(run_dir)
    if _is_first(path, earliest):
        time.sleep(stalls.ANSWER_SECONDS)  # for the ranks of other machines: they notice by themselves
        stalls.tell(run_dir, world_size, seconds)
    while not path.stat().st_size:
        time.sleep(0.2)


def _is_first(path: Path, earliest: float) -> bool:
    """Whether this process is the one that makes the file; one from before `earliest` is an earlier run's."""
    try:
        if path.stat().st_mtime < earliest:
            path.unlink()
    except FileNotFoundError:
        pass
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
