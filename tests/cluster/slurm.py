"""A SLURM cluster of two nodes on this machine: the real munged, slurmctld and slurmd, all of it in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
NUM_NODES, CORES_OF_NODE = 2, 2
START_SECONDS = 30

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait=5
MessageTimeout=4
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cores} RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""  # noqa: E501 - a node is a line


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and srun find the cluster; its daemons end with the context.

    Skips the test, naming the packages, where SLURM is missing or this is not root, whom the daemons need.
    """
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if missing:
        pytest.skip(f"no {', '.join(missing)} (Debian's packages)")
    if os.geteuid() != 0:
        pytest.skip("the SLURM daemons need root")
    for name in ("munge", "log", "state"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    key.parent.chmod(0o700)
    ports = free_ports(NUM_NODES + 1)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            host=socket.gethostname().partition(".")[0], folder=folder, port=ports[0], nodes=NUM_NODES,
            first=ports[1], last=ports[-1], cores=CORES_OF_NODE,
        )
    )  # fmt: skip
    environment = os.environ | {"SLURM_CONF": str(conf)}
    try:
        munge = folder / "munge"
        run = ["munged", "--force", f"--key-file={key}", f"--socket={munge}/sock", f"--pid-file={munge}/pid"]
        subprocess.run([*run, f"--log-file={munge}/log", f"--seed-file={munge}/seed"], check=True)
        subprocess.run(["slurmctld", "-f", str(conf)], check=True, env=environment)
        for node in range(1, NUM_NODES + 1):
            subprocess.run(["slurmd", "-f", str(conf), "-N", f"n{node}"], check=True, env=environment)
        wait_until_idle(environment)
        yield environment
    finally:
        end_jobs(environment)
        end(folder)


def free_ports(count: int) -> list[int]:
    """`count` ports in a row that nobody listens on."""
    for first in range(26_817, 28_000, count):
        ports = list(range(first, first + count))
        if all(is_free(port) for port in ports):
            return ports
    raise RuntimeError("no free ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_until_idle(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    states: list[str] = []
    while time.monotonic() < deadline:
        listed = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], env=environment, capture_output=True, text=True
        )
        states = listed.stdout.split()
        if states == ["idle"] * NUM_NODES:
            return
        time.sleep(0.2)
    raise RuntimeError(f"the nodes are {states} after {START_SECONDS} s")


def end_jobs(environment: dict[str, str]) -> None:
    """Cancel what a failed test has left: steps outlive the daemons."""
    listed = subprocess.run(["squeue", "-h", "-o", "%A"], env=environment, capture_output=True, text=True)
    if not (jobs := listed.stdout.split()):
        return
    subprocess.run(["scancel", *jobs], env=environment)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True).stdout.strip():
            return
        time.sleep(0.2)


def end(folder: Path) -> None:
    """End the daemons by the process ids they wrote, nodes first, then wait for them."""
    pids = []
    for file in [*folder.glob("slurmd.*.pid"), folder / "ctld.pid", folder / "munge" / "pid"]:
        if file.is_file():
            pid = int(file.read_text())
            pids.append(pid)
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
