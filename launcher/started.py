"""What has started this command: a user; a launcher, once per rank; or one that starts it once per machine. Pure.

mpirun, srun and torchrun start the command once per rank, and the process becomes that rank. Kubernetes' training
operator starts it once per pod, and the command starts the ranks of that pod. docs/clusters.md has the table of the
variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError

Starter = Literal["torchrun", "mpi", "slurm"]
# Who, the variable of the rank, the one that counts them, and one that only processes which they started have.
STARTERS: tuple[tuple[Starter, str, str, str], ...] = (
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"),
)
DEFAULT_PORT = "29500"  # torch's own


@dataclass(frozen=True)
class Node:
    """This machine among several, each of which starts its own ranks, as many as the others."""

    number: int  # of this machine, from 0
    count: int
    num_ranks: int | None  # on each; none: as on a single machine
    master_addr: str  # the machine of rank 0
    master_port: str


@dataclass(frozen=True)
class Rank:
    """This process as one of a run's ranks."""

    kind: Starter  # who has started it; torchrun: or another launcher that sets torch's variables
    number: int
    count: int  # of all ranks


def started_as_rank(environment: Mapping[str, str]) -> Rank | None:
    """The rank that this process is to become; None if nobody has started it as one."""
    if "RANK" in environment and "LOCAL_RANK" in environment:
        return Rank("torchrun", int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1")))
    for kind, number, count, own in STARTERS:
        if own in environment and environment.get(count, "1") != "1":
            return Rank(kind, int(environment[number]), int(environment[count]))
    return None


def started_on_nodes(environment: Mapping[str, str]) -> Node | None:
    """This machine among those that Kubernetes' training operator has started, by PET_* or RANK and WORLD_SIZE.

    Raises ConfigError for a number of machines that is not fixed, and where one variable lacks another.
    """
    if "PET_NNODES" not in environment and ("RANK" not in environment or "WORLD_SIZE" not in environment):
        return None
    count = environment.get("PET_NNODES") or environment["WORLD_SIZE"]
    if ":" in count:
        raise ConfigError(
            f"PET_NNODES={count}: the number of machines is not fixed, which torchrun can handle and this command "
            f"cannot: start it with torchrun --no-python millstream ..., or leave elasticPolicy out"
        )
    count_name = "PET_NNODES" if "PET_NNODES" in environment else "WORLD_SIZE"
    number = environment.get("PET_NODE_RANK") or environment.get("RANK", "" if count != "1" else "0")
    addr = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR", "" if count != "1" else "127.0.0.1")
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)) or not addr:
        raise ConfigError(
            f"{count_name}={count}, number of this machine (PET_NODE_RANK or RANK)={number or 'not set'}, MASTER_ADDR="
            f"{addr or 'not set'}: expected a count, a number below it, and the address of machine 0"
        )
    if count == "1":
        return None
    each = environment.get("PET_NPROC_PER_NODE", "")
    port = environment.get("PET_MASTER_PORT") or environment.get("MASTER_PORT") or DEFAULT_PORT
    return Node(int(number), int(count), int(each) if each.isdigit() else None, addr, port)
