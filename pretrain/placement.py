"""Which rank this process is and where the first one listens, from what a launcher left in the environment.

`placement` is a function of the environment alone. torch's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT: our launcher, deepspeed, torchrun) go first; then those of mpirun (Open MPI; MPICH and Intel MPI) and of
srun. mpirun before srun, because inside of a SLURM job mpirun starts its own daemons by srun, and their variables are
inherited. Where mpirun has started ranks on several machines and nothing says which one is the first, the ranks find
out by MPI itself (`mpi_meeting`).
"""

from __future__ import annotations

import re
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below those that Linux hands out to clients, from 32768 on
USUAL_PORT = "29500"  # torch's own default


@dataclass(frozen=True)
class Placement:
    """One process among those of a run, as strings for the environment."""

    rank: str
    world_size: str
    local_rank: str  # among those of its machine
    local_world_size: str
    master_addr: str  # the machine of rank 0; empty: see `mpi_meeting`
    master_port: str

    def variables(self) -> dict[str, str]:
        """What torch.distributed and deepspeed read."""
        return {name.upper(): value for name, value in vars(self).items()}


def complete(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch's variables lack under launchers that set RANK: LOCAL_RANK and LOCAL_WORLD_SIZE. Pure.

    Without LOCAL_RANK a rank is alone on its machine, as a pod of Kubernetes' training operator; the deepspeed launcher
    calls the other one LOCAL_SIZE.
    """
    if "LOCAL_RANK" not in environment:
        return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if "LOCAL_WORLD_SIZE" not in environment and "LOCAL_SIZE" in environment:
        return {"LOCAL_WORLD_SIZE": environment["LOCAL_SIZE"]}
    return {}


def placement(environment: Mapping[str, str]) -> Placement | None:
    """Where this process is, by what mpirun or srun says; None if neither has started it. Pure.

    MASTER_ADDR and MASTER_PORT stay where they are set.
    """
    if "OMPI_COMM_WORLD_RANK" in environment:
        names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _of_mpirun(environment, names, environment.get("PMIX_NAMESPACE", ""))
    if is_mpich(environment):
        return _of_mpirun(environment, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"], "")
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:  # a batch script itself has no step
        return _of_srun(environment)
    return None


def is_mpich(environment: Mapping[str, str]) -> bool:
    """Whether MPICH's or Intel MPI's mpirun has started this process."""
    return "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment


def _of_mpirun(environment: Mapping[str, str], names: list[str], job: str) -> Placement:
    rank, world_size, local_rank, local_world_size = (environment[name] for name in names)
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_JOB_NODELIST", ""))
    if not host and world_size == local_world_size:
        host = "127.0.0.1"
    port = environment.get("MASTER_PORT") or (_port(job) if job else USUAL_PORT)
    return Placement(rank, world_size, local_rank, local_world_size, host, port)


def _of_srun(environment: Mapping[str, str]) -> Placement:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    tasks = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    return Placement(
        environment["SLURM_PROCID"],
        environment["SLURM_STEP_NUM_TASKS"],
        environment["SLURM_LOCALID"],
        str(tasks[int(environment["SLURM_NODEID"])]),
        environment.get("MASTER_ADDR") or first_host(nodes),
        environment.get("MASTER_PORT") or _port(f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"),
    )


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `gpu[007-012,020],cpu1` has gpu007 first. Empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""


def expand_counts(counts: str) -> list[int]:
    """SLURM's tasks of each node: `2(x3),1` is 2, 2, 2, 1."""
    expanded = []
    for part in counts.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        expanded += [int(number)] * int(times or 1)
    return expanded


def _port(job: str) -> str:
    """The same on all ranks of a job, another one for the next: ports that an ended run used stay closed a while."""
    return str(FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS)


def address(host: str) -> str:
    """`host`, or the address that SLURM has for a node whose name is not known as that of a machine."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return host
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found[1] if found else host
