"""This process among the others: rank, device, process group, seeds and signals. Reads what any launcher leaves in the
environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or what srun and mpirun do (see `placement`);
without any of it the process is alone.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from configs.phases import Mark, no_mark
from pretrain.placement import Placement, address, complete, placement
from pretrain.watchdog import watch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 0.5  # launchers and terminals may both send a signal of the same occasion


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mark: Mark = no_mark  # mark(phase, step) notes in the run directory what this rank does; every rank does alike

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` (any shape, fp32 or fp64 or int64) over all ranks, on every rank."""
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total

    def gather(self, value: object) -> list[object]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on some rank; every rank gets the same answers."""
        return [number > 0 for number in self.sum(torch.tensor([int(flag) for flag in flags])).tolist()]

    def agree(self, numbers: Sequence[float], *flags: bool) -> tuple[list[float], list[bool]]:
        """Rank 0's `numbers`, and for each flag whether it is set on some rank; the same on every rank, in one sum."""
        of_first = numbers if self.is_first else [0.0] * len(numbers)
        totals = self.sum(torch.tensor([*of_first, *map(float, flags)], dtype=torch.float64)).tolist()
        return totals[: len(numbers)], [total > 0 for total in totals[len(numbers) :]]

    def barrier(self) -> None:
        dist.barrier()


def start(run_dir: str | None = None, stall_seconds: int | None = None) -> Runtime:
    """Join the process group: NCCL on GPUs, gloo on CPUs. A process without a launcher is a group of one.

    With a `run_dir`, a rank that makes no mark for `stall_seconds` ends the run; see `watchdog`. Until the loop begins
    there is nothing to save, so a signal ends the process at once.
    """
    faulthandler.enable()  # a crash inside of C prints the Python stacks
    environment = os.environ
    if "RANK" not in environment:
        place = placement(environment) or Placement("0", "1", "0", "1", "127.0.0.1", _free_port())
        if not place.master_addr:
            from pretrain.mpi_meeting import meeting  # it needs an MPI library, which only a run under mpirun has

            place = meeting(place)
        environment.update(replace(place, master_addr=address(place.master_addr)).variables())
    environment.update(complete(environment))
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: no traceback
    mark = no_mark if run_dir is None else watch(run_dir, rank, world_size, stall_seconds)
    on_gpu = torch.cuda.is_available() and environment.get("DS_ACCELERATOR") != "cpu"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        # Without this, as many threads as cores run in every rank and they fight: half the speed at two ranks.
        if "OMP_NUM_THREADS" not in environment:
            local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    # Longer than the watchdog's: it knows who is behind, the process group only knows that somebody is.
    timeout = timedelta(seconds=max(1800, 2 * (stall_seconds or 0)))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Runtime(rank, world_size, local_rank, device, mark)


def launch_arguments(description: str) -> tuple[str, list[str]]:
    """The configuration file and the overrides on the command line: `--config FILE [key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says the same")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    return arguments.config, arguments.overrides


def run(program: Callable[[], int]) -> NoReturn:
    """Run the program of a rank and end the process with the exit code that it returns; 1 after an unforeseen error."""
    try:
        exit_code = program()
    except Exception:
        traceback.print_exc()
        exit_code = 1
    end(exit_code)


def end(exit_code: int = 0) -> NoReturn:
    """End the process without taking the interpreter down; after success it leaves the process group first.

    gloo's threads free the tensors of the last collective whenever they come to it; one that does so while the
    interpreter goes down aborts the process ("terminate called without an active exception", exit code -6).
    """
    if exit_code == 0 and dist.is_initialized():  # after a failure another rank may be inside of a collective
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def seed_all(*parts: int) -> None:
    """Seed torch, numpy and Python from `parts`, for example (seed, step, rank).

    The loop calls it at every step, so dropout at step n is a function of n and there is no generator state to save.
    """
    seed = int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1: the loop finishes its step, saves and ends. A second signal ends at once.

    A handler of Python's runs when the main thread comes back from C, which may wait there for another rank or a disk.
    So the interpreter writes each signal's number into a pipe as it arrives, and a thread reads them.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=[reader], name="signals", daemon=True).start()

    def _listen(self, reader: int) -> None:
        noted = 0.0
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            if self.signal is None:
                self.signal, noted = number, time.monotonic()
            elif time.monotonic() - noted > SAME_REQUEST_SECONDS:
                os._exit(128 + number)  # not sys.exit: it would wait for the main thread and for what is being written

    def exit_code(self, runtime: Runtime) -> int:
        """128 + the signal that asked for the stop, the same on every rank; every rank calls it."""
        asked: list[Any] = runtime.gather(self.signal)
        return 128 + next(int(number) for number in [*asked, signal.SIGTERM] if number)

    @property
    def is_asked(self) -> bool:
        """Whether this rank was; every rank has to stop at the same step, so ask `Runtime.any`."""
        return self.signal is not None


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
