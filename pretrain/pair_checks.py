"""All-reduce between every pair of hosts: gloo on CPUs, NCCL between the first GPU of each.

The rounds are those of a tournament: in each one every host has one partner, so n hosts take n - 1 rounds and all
links of a round are used at once, as in a run.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pretrain.host_facts import interfaces

CONNECT_SECONDS = 6.0
REACH_SECONDS = 3.0
PROBE_BYTES, LARGEST_BYTES = 1_000_000, 256_000_000
REPEATS = 3
NUM_LATENCIES = 20


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Each pair of 0 .. num_hosts - 1 once, in rounds in which nobody occurs twice (the circle method). Pure."""
    seats: list[int | None] = [*range(num_hosts), *([None] if num_hosts % 2 else [])]
    half = len(seats) // 2
    planned = []
    for _ in range(len(seats) - 1):
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        planned.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return planned


def own_address(first: str) -> str:
    """The address at which this host is reached: of the interface that is set, or that leads to the first host."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or ""
    if address := interfaces().get(chosen):
        return address
    family, kind, _, _, place = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


def unreachable(store: dist.Store, is_lower: bool, address: str) -> str | None:
    """Why the higher of a pair cannot connect to the lower one, None if it can; the same answer on both.

    gloo and NCCL would try for long and say less.
    """
    if is_lower:
        with socket.create_server(("", 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            store.set("listens", f"{address} {listener.getsockname()[1]}")
            return store.get("reached").decode() or None
    there, port = store.get("listens").decode().split()
    try:
        socket.create_connection((there, int(port)), timeout=REACH_SECONDS).close()
        problem = ""
    except OSError as error:
        problem = f"no connection to {there}:{port} ({error})"
    store.set("reached", problem)
    return problem or None


def measure_pair(
    store: dist.Store, lower: int, higher: int, me: int, address: str, seconds: float, on_gpu: bool
) -> dict[str, Any]:
    """GB/s (bytes of the tensor over the time of its all-reduce: for two hosts the bandwidth of the link) and the time
    of an all-reduce of 8 bytes in microseconds. Takes about `seconds`; a partner that cannot be reached is an "error".
    """
    own = dist.PrefixStore(f"pair/{lower}-{higher}", store)
    rank, wait = int(me == higher), timedelta(seconds=CONNECT_SECONDS)
    try:
        if problem := unreachable(own, me == lower, address):
            return {"error": problem}
        group = nccl(own, rank, wait) if on_gpu else dist.ProcessGroupGloo(own, rank, 2, wait)
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        small = torch.ones(2, device=device)
        all_reduce(group, small)  # connects
        latency = statistics.median(all_reduce(group, small) for _ in range(NUM_LATENCIES))
        all_reduce(group, torch.ones(PROBE_BYTES // 4, device=device))
        probe = all_reduce(group, torch.ones(PROBE_BYTES // 4, device=device))
        if me == lower:  # both have to take the same size
            fitting = int(PROBE_BYTES * seconds / (probe * (REPEATS + 1)))
            own.set("bytes", str(min(max(fitting, PROBE_BYTES), LARGEST_BYTES)))
        tensor = torch.ones(int(own.get("bytes")) // 4, device=device)
        times = [all_reduce(group, tensor) for _ in range(REPEATS)]
    except RuntimeError as error:  # DistError and its kinds too
        return {"error": str(error).splitlines()[0]}
    return {"gb_s": tensor.nbytes / statistics.median(times) / 1e9, "latency_us": latency * 1e6}


def nccl(store: dist.Store, rank: int, wait: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = wait
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def all_reduce(group: Any, tensor: torch.Tensor) -> float:
    """The seconds it takes."""
    began = time.perf_counter()
    group.allreduce([tensor]).wait()
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
