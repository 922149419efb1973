"""Starts the ranks of a run on this machine.

It sets the same variables as the deepspeed launcher and torchrun, so the started module does not know the difference
(`deepspeed pretrain/train.py --config CONFIG` works as well). It is our own because the deepspeed launcher imports
deepspeed in two processes, one after the other, before the first rank starts, and because after a failure it shows the
output of all ranks at once instead of the first one's traceback.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 20  # between SIGTERM and SIGKILL for the ranks that are left after one has failed
TRACEBACK_LINES = 30


def default_num_ranks() -> int:
    """One per visible GPU, or one on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    return max(1, count_gpus())


def count_gpus() -> int:
    """GPUs of this machine, asked without importing torch; 0 without an NVIDIA driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run_local(module: str, words: list[str], num_ranks: int, logs: Path) -> int:
    """Run `python -m module words` once per rank and wait; returns 0, or the exit code of the first rank that failed.

    Rank 0 writes to the terminal, the others to logs/rank-N.log. When a rank fails, the others are ended and the end of
    its output is shown. SIGINT, SIGTERM and SIGUSR1 are passed on to all ranks.
    """
    environment = rank_environment(num_ranks)
    logs.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in range(num_ranks):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", module, *words]
        if rank == 0:
            ranks.append(subprocess.Popen(command, env=own, process_group=0))
        else:
            with log_file(logs, rank).open("wb") as log:
                ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, process_group=0))
    # The ranks have process groups of their own: Ctrl-C comes from the terminal here alone, and reaches them once.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: pass_on(ranks, received))
    return wait(ranks, logs)


def rank_environment(num_ranks: int) -> dict[str, str]:
    """This process's variables with those of a run of `num_ranks` on this machine added; what is set stays."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    if not count_gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    return environment


def wait(ranks: list[subprocess.Popen[bytes]], logs: Path) -> int:
    """Wait for all ranks; after the first failure the others get SIGTERM, and SIGKILL after GRACE_SECONDS."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)
    if codes[failed] in {128 + number for number in STOP_SIGNALS}:  # all were asked to stop
        return max(rank.wait() for rank in ranks)
    pass_on(ranks, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    pass_on(ranks, signal.SIGKILL)
    show_failure(failed, ranks[failed].returncode, logs)
    code = ranks[failed].returncode
    return code if code > 0 else 128 - code


def show_failure(rank: int, code: int, logs: Path) -> None:
    print(f"\nrank {rank} failed first, with exit code {code}", file=sys.stderr)
    if rank:  # rank 0 wrote to the terminal already
        lines = log_file(logs, rank).read_text(errors="replace").splitlines()
        print(f"the end of {log_file(logs, rank)}:", *lines[-TRACEBACK_LINES:], sep="\n  ", file=sys.stderr)


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def pass_on(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
