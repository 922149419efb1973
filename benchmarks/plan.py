"""Predicted against real memory and step time: `python -m benchmarks.plan [--only NAME ...] [--gpu h100-80g]`.

For each configuration `millstream plan --probe` predicts the peak memory of the largest rank and the seconds of a step;
then `millstream pretrain` really trains it for a few steps, on random tokens, and its processes are watched: the peak
of their resident memory (VmHWM) and the median of the steps' seconds in metrics.jsonl. The probe has at most two thirds
of the layers. With --gpu it does the same on this machine's GPUs, where memory is what nvidia-smi shows of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.hardware import CPU, NETWORKS, gpu
from configs.load import load_pretrain
from configs.phases import read_ring, ring_path
from data_pipeline.shards import write_manifest, write_shard
from launcher.plan import make_plan
from launcher.plan_job import count_parameters, make_cluster, make_job
from launcher.plan_measure import measure

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS, WARMUP_STEPS = 14, 2
DOCUMENT_TOKENS, VALIDATION_SAMPLES = 300, 8


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    stage: int
    vocab_size: int
    model: dict[str, Any]
    seq_len: int
    micro_batch_size: int
    accumulation: int = 1
    precision: str = "bf16"


def _model(layers: int, hidden: int, heads: int, seq: int, **more: Any) -> dict[str, Any]:
    return {
        "preset": "gpt2", "num_layers": layers, "hidden_size": hidden, "num_heads": heads, "max_seq_len": seq, **more
    }  # fmt: skip


def _bert(layers: int, hidden: int, heads: int, seq: int) -> dict[str, Any]:
    return _model(layers, hidden, heads, seq, architecture="bert", preset="base")


CASES = (
    Case("5M, stage 1", 1, 1, 4096, _model(6, 256, 4, 128), 128, 16),
    Case("5M, stage 3, 2 ranks", 2, 3, 4096, _model(6, 256, 4, 128), 128, 16),
    Case("5M, fp32, stage 0", 1, 0, 4096, _model(6, 256, 4, 128), 128, 16, precision="fp32"),
    Case("23M, stage 2, 2 ranks", 2, 2, 8192, _model(6, 512, 8, 256), 256, 4),
    Case("23M, stage 3", 1, 3, 8192, _model(6, 512, 8, 256), 256, 4),
    Case("23M, stage 1, 2 ranks, 2 micro batches", 2, 1, 8192, _model(6, 512, 8, 256), 256, 4, 2),
    Case("40M, stage 3, 2 ranks", 2, 3, 16384, _model(10, 512, 8, 256), 256, 4),
    Case("40M, stage 2, checkpointing", 1, 2, 16384, _model(10, 512, 8, 256, activation_checkpointing=True), 256, 8),
    # Chosen after the table of a CPU and the probe were made: nothing was set by looking at these.
    Case("27M, stage 1, 1,024 tokens", 1, 1, 32768, _model(8, 384, 6, 1024), 1024, 2),
    Case("BERT 24M, stage 2, 2 ranks", 2, 2, 8192, _bert(6, 512, 8, 128), 128, 8),
    Case("BERT 17M, stage 3, 512 tokens", 1, 3, 8192, _bert(8, 384, 6, 512), 512, 4),
    Case("67M, stage 3, 2 ranks", 2, 3, 50257, _model(4, 768, 12, 512), 512, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of cases, or parts of them")
    parser.add_argument("--gpu", default=CPU, help="a row of configs/hardware.py: what this machine has")
    arguments = parser.parse_args()
    columns = (
        "configuration",
        "parameters",
        "memory: by the table, probed, real",
        "error",
        "step: probed, real",
        "error",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|", flush=True)
    errors: list[tuple[float, float]] = []
    for case in CASES:
        if not arguments.only or any(part in case.name for part in arguments.only):
            errors.append(compare(case, arguments.gpu))
    for index, name in enumerate(("memory", "step time")):
        found = [abs(error[index]) for error in errors]
        print(f"\n{name}: mean error {statistics.mean(found):.1%}, largest {max(found):.1%}")


def compare(case: Case, gpu_name: str) -> tuple[float, float]:
    """Print the line of a case; its errors of memory and time, predicted / real - 1."""
    with tempfile.TemporaryDirectory(prefix="millstream-plan-") as name:
        folder = Path(name)
        config_file = write_config(case, folder)
        on_cpu = gpu_name == CPU
        job = make_job(load_pretrain(config_file), case.vocab_size, case.ranks)
        row = gpu(gpu_name)
        cluster = make_cluster(case.ranks, 1, row, NETWORKS[row.network])
        probe = measure(str(config_file), [], job, on_cpu)
        probed = make_plan(job, cluster, probe, saves_before_end=False)
        by_table = make_plan(job, cluster, None, saves_before_end=False)
        peak, steps = train(config_file, folder / "run", case.ranks, on_cpu)
    seconds = statistics.median(steps[WARMUP_STEPS:])
    memory_error, time_error = probed.memory.total / peak - 1, probed.time.total / seconds - 1
    timed = steps[WARMUP_STEPS:]
    print(probe, file=sys.stderr)
    print(
        f"| {case.name} | {count_parameters(job) / 1e6:.1f} M "
        f"| {by_table.memory.total / 1e6:,.0f}, {probed.memory.total / 1e6:,.0f}, {peak / 1e6:,.0f} MB "
        f"(without the {probe.context_bytes / 1e6:,.0f} of a process: "
        f"{(probed.memory.total - probe.context_bytes) / (peak - probe.context_bytes) - 1:+.0%}) | {memory_error:+.1%} "
        f"| {probed.time.total * 1e3:.0f}, {seconds * 1e3:.0f} ms ({min(timed) * 1e3:.0f} - {max(timed) * 1e3:.0f}) "
        f"| {time_error:+.1%} |",
        flush=True,
    )
    return memory_error, time_error


def write_config(case: Case, folder: Path) -> Path:
    """A configuration of the case, and random tokens for it, for a BERT random words: its masks need a tokenizer."""
    batch = case.micro_batch_size * case.ranks * case.accumulation
    if case.model.get("architecture") == "bert":
        build_random_words(folder, case.vocab_size)
    else:
        write_random_tokens(folder, case, batch)
    train = {
        "num_steps": NUM_STEPS, "seq_len": case.seq_len, "global_batch_size": batch, "precision": case.precision,
        "micro_batch_size": case.micro_batch_size,
    }  # fmt: skip
    config = {
        "run_dir": str(folder / "run"), "model": case.model, "data": {"dir": str(folder / "data")}, "train": train,
        "zero": {"stage": case.stage}, "eval": {"num_samples": VALIDATION_SAMPLES, "every_steps": 1000},
        "checkpoint": {"every_steps": 1000},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def write_random_tokens(folder: Path, case: Case, batch: int) -> None:
    rng = np.random.default_rng(0)
    for split, samples in (("train", batch * 4), ("validation", 4 * VALIDATION_SAMPLES)):
        (folder / "data" / split).mkdir(parents=True)
        lengths = np.full(-(-samples * (case.seq_len + 1) // DOCUMENT_TOKENS) + 1, DOCUMENT_TOKENS)
        tokens = rng.integers(1, case.vocab_size, lengths.sum())
        tokens[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = 0
        entry = write_shard(folder / "data" / split / "shard-00000.tokens", [(tokens, lengths)], case.vocab_size)
        write_manifest(folder / "data" / split, [entry], case.vocab_size, "none", "random tokens")


def build_random_words(folder: Path, vocab_size: int) -> None:
    """A dataset of random words by `millstream data build`, with a WordPiece vocabulary of exactly `vocab_size`."""
    rng = np.random.default_rng(0)
    syllables = np.array([first + second for first in "bcdfghjklmnprst" for second in "aeiou"])
    words = ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(3 * vocab_size)]
    texts = (" ".join(rng.choice(words, DOCUMENT_TOKENS)) + "." for _ in range(1500))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = {"type": "wordpiece", "vocab_size": vocab_size}
    build = {"sources": [str(folder / "text.jsonl")], "validation_fraction": 0.1, "tokenizer": tokenizer}
    file = folder / "build.yaml"
    data = {"dir": str(folder / "data"), "build": build}
    file.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "data": data}), encoding="utf-8")
    command = [sys.executable, "-m", "launcher.cli", "data", "build", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{file}: the build failed:\n{done.stderr[-3000:]}")


def train(config: Path, run_dir: Path, ranks: int, on_cpu: bool) -> tuple[float, list[float]]:
    """Train with the command; peak bytes of the largest rank, and the seconds of each step."""
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if on_cpu else {}) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher.cli", "pretrain", str(config), "--ranks", str(ranks)]
    log = run_dir.parent / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        peak = 0.0
        while process.poll() is None:
            for rank in range(ranks):
                ring = read_ring(ring_path(run_dir, rank))
                if ring is not None:
                    peak = max(peak, resident_peak(ring.pid) if on_cpu else on_gpu(ring.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{config}: the run failed:\n{log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return peak, [line["step_seconds"] for line in lines if "step_seconds" in line]


def resident_peak(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024.0 * float(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # it has just ended
        return 0.0


def on_gpu(pid: int) -> float:
    """Bytes the process has on GPUs now, with torch's cache."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return sum(float(line.split(",")[1]) * 2**20 for line in lines if line.split(",")[0].strip() == str(pid))


if __name__ == "__main__":
    main()
