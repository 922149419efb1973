"""Run directories as runs leave them, made without running anything, for tests of what shows a run."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from configs.phases import CAPACITY, HEADER_WORDS, MAGIC, PAGE, PHASES, ring_path

CONFIG = "run_dir: {run_dir}\ntrain:\n  num_steps: {num_steps}\n"


def make_run(run_dir: Path, steps: int = 40, num_steps: int = 100, floor: float = 2.0) -> Path:
    """config.yaml and a metrics.jsonl of `steps` steps, with an evaluation every ten and a checkpoint every twenty."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(CONFIG.format(run_dir=run_dir, num_steps=num_steps))
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            if step:
                file.write(json.dumps(step_line(step, floor)) + "\n")
            if step % 10 == 0:
                held_out = floor + 4.1 * math.exp(-step / 15)
                file.write(json.dumps({"step": step, "eval_loss": held_out, "eval_perplexity": 9.0}) + "\n")
    for step in range(20, steps + 1, 20):
        folder = run_dir / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    return run_dir


def step_line(step: int, floor: float = 2.0) -> dict[str, float]:
    wave = math.sin(step * 1.7) * 0.05
    return {
        "step": step,
        "loss": floor + 4 * math.exp(-step / 15) + wave,
        "lr": 1e-3 * min(1.0, step / 10),
        "grad_norm": 1.0 + wave,
        "tokens": step * 4096,
        "tokens_per_second": 20000.0 * (1 + wave),
        "step_seconds": 0.2,
    }


def make_ring(
    run_dir: Path,
    rank: int,
    world_size: int,
    marks: Sequence[tuple[float, int, str]],
    pid: int | None = None,
    host: str | None = None,
    started: float | None = None,
) -> None:
    """The ring of a rank: by default of this process, which is alive. marks: (seconds since 1970, step, phase)."""
    path = ring_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.time() if started is None else started
    header = [MAGIC, rank, world_size, os.getpid() if pid is None else pid, 0, int(started * 1e9), len(marks)]
    page = bytearray(struct.pack("=7q", *header) + (host or socket.gethostname()).encode().ljust(72, b"\0"))
    page = page.ljust(PAGE, b"\0")
    for number, (seconds, step, phase) in enumerate(marks):
        place = (HEADER_WORDS + number % CAPACITY * 3) * 8
        struct.pack_into("=3q", page, place, int(seconds * 1e9), step, PHASES.index(phase))
    path.write_bytes(page)


def dead_pid() -> int:
    """A number that was a process's a moment ago."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid
