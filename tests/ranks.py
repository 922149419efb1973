"""Starts the ranks of a test on this machine: real processes, gloo, ZeRO-3 on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start_ranks(num_ranks: int, words: list[str], logs: Path) -> list[subprocess.Popen[bytes]]:
    """Start `python WORDS` once per rank, one core each; rank n writes into logs/rank-n.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        with (logs / f"rank-{rank}.log").open("ab") as log:
            processes.append(
                subprocess.Popen([sys.executable, *words], env=environment, cwd=ROOT, stdout=log, stderr=log)
            )
    return processes


def finish(processes: list[subprocess.Popen[bytes]], timeout_seconds: float = 300) -> list[int]:
    """Wait for all ranks; those still running at the end of the time are killed. Returns their exit codes."""
    deadline = time.monotonic() + timeout_seconds
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill(processes)
    return [process.wait() for process in processes]


def run_ranks(num_ranks: int, words: list[str], logs: Path) -> None:
    """Run to the end; a rank that fails fails the test with its output."""
    codes = finish(start_ranks(num_ranks, words, logs))
    outputs = [(logs / f"rank-{rank}.log").read_text(errors="replace")[-3000:] for rank in range(num_ranks)]
    assert codes == [0] * num_ranks, f"exit codes {codes}\n" + "\n".join(outputs)


def kill_when(processes: list[subprocess.Popen[bytes]], happened: Callable[[], bool], number: int) -> list[int]:
    """Send signal `number` to every rank as soon as `happened()`; returns the exit codes."""
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, "the ranks did not come that far in time"
        assert any(process.poll() is None for process in processes), "the ranks ended before"
        time.sleep(0.02)
    for process in processes:
        process.send_signal(number)
    return finish(processes)


def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
