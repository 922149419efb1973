"""A tiny GPT on its own dataset, started with the `millstream` command, for tests of what goes wrong with a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.phases import read_ring, ring_path
from tests.conftest import ROOT

WORDS = ["the", "a", "sun", "moon", "river", "stone", "bird", "king", "runs", "sings", "under", "near", "slowly"]
CONFIG = """
run_dir: {folder}/unused
model: {{preset: nano, num_layers: 2, hidden_size: 32, num_heads: 2}}
data:
  dir: {folder}/data
  build:
    sources: [{folder}/text.jsonl]
    validation_fraction: 0.1
    tokenizer: {{type: byte_bpe, vocab_size: 300}}
    shard_tokens: 4000
    num_workers: 1
train: {{num_steps: 1000000, seq_len: 32, global_batch_size: 8, micro_batch_size: 2}}
eval: {{every_steps: 1000000, num_samples: 8}}
checkpoint: {{every_steps: 1000000}}
log: {{tensorboard: false}}
"""


def make_config(folder: Path) -> Path:
    """Write a configuration whose run never ends by itself, and build its dataset."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) + "." for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder))
    build = [sys.executable, "-m", "data_pipeline.build", str(config)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return config


def start(config: Path, run_dir: Path, *overrides: str, num_ranks: int = 2) -> subprocess.Popen[str]:
    """`millstream pretrain CONFIG --ranks N run_dir=...`, on CPU cores; what it prints is in its pipes."""
    return subprocess.Popen(
        command(config, run_dir, *overrides, num_ranks=num_ranks),
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(config: Path, run_dir: Path, *overrides: str, num_ranks: int = 2) -> list[str]:
    words = ["pretrain", str(config), "--ranks", str(num_ranks), f"run_dir={run_dir}", *overrides]
    return [sys.executable, "-m", "launcher.cli", *words]


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str] | None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert process is None or process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)


def has_reached(run_dir: Path, step: int, rank: int = 0) -> Callable[[], bool]:
    """Whether the rank is in this step or beyond."""

    def reached() -> bool:
        ring = read_ring(ring_path(run_dir, rank))
        return ring is not None and ring.step >= step

    return reached


def pid_of(run_dir: Path, rank: int) -> int:
    ring = read_ring(ring_path(run_dir, rank))
    assert ring is not None
    return ring.pid


def losses(run_dir: Path) -> list[float]:
    """Of the steps in metrics.jsonl, in their order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
