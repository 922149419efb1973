"""This process among the others: rank, device, process group, seeds and signals. Reads what any launcher leaves in the
environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without them the process is alone.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device

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

    def barrier(self) -> None:
        dist.barrier()


def start(timeout_minutes: int = 30) -> Runtime:
    """Join the process group: NCCL on GPUs, gloo on CPUs. A process without a launcher is a group of one."""
    environment = os.environ
    if "RANK" not in environment:
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and environment.get("DS_ACCELERATOR") != "cpu"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        # Without this, as many threads as cores run in every rank and they fight: half the speed at two ranks.
        if "OMP_NUM_THREADS" not in environment:
            local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Runtime(rank, world_size, local_rank, device)


def launch_arguments(description: str) -> tuple[str, list[str]]:
    """The configuration file and the overrides on the command line: `--config FILE [key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says the same")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    return arguments.config, arguments.overrides


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """Notes SIGINT, SIGTERM and SIGUSR1: the loop finishes its step, saves and ends. A second signal ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    def on_any_rank(self, runtime: Runtime) -> bool:
        """Whether some rank was asked to stop; every rank gets the same answer at the same step."""
        return bool(runtime.sum(torch.tensor(int(self.signal is not None))).item())


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
