"""Runs `pretrain/probe.py` on this machine's ranks for `millstream plan --probe`; about half a minute."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from launcher.local import Signals, default_num_ranks, run_local
from launcher.plan_job import Job
from launcher.plan_probe import Depth, Probe
from launcher.plan_time import hardware_flops_per_token

SECONDS = 5.0  # of steps, at each depth
STEP_SECONDS = 1.5  # that a step of the deeper model may take, about


def measure(config: str, overrides: list[str], job: Job, on_cpu: bool) -> Probe:
    """What `job`, which `config` and `overrides` describe, does with few layers on this machine.

    On as many ranks as the job has, if there are so many cores or GPUs. Raises ConfigError where the probe fails.
    """
    num_ranks = min(job.num_gpus, (os.cpu_count() or 1) if on_cpu else default_num_ranks())
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    print(f"probing this machine with {num_ranks} rank{'s' * (num_ranks > 1)}: half a minute", file=sys.stderr)
    accumulations = "1,2" if job.accumulation > 1 else "1"
    with tempfile.TemporaryDirectory(prefix="millstream-probe-") as folder:

        def run(layers: int, *words: str) -> dict[str, Any]:
            own = (f"layers={layers}", f"accumulations={accumulations}", *words)
            return _run(config, overrides, job, num_ranks, Path(folder), *own)

        low, most = depths(job.shape.num_layers)
        shallow = run(low, "tiny=1")
        high = deepest(job, low, most, STEP_SECONDS / shallow["seconds_1"])
        deep = run(high)
    return Probe(num_ranks, on_cpu, shallow["context_bytes"], _depth(low, shallow), _depth(high, deep))


def depths(num_layers: int) -> tuple[int, int]:
    """Layers of the two models that are measured: a sixth, at least one, and two thirds of the whole model's."""
    low = max(1, num_layers // 6)
    return low, max(low + 1, -(-2 * num_layers // 3))


def deepest(job: Job, low: int, most: int, times: float) -> int:
    """The most layers, from `low` + 1 to `most`, whose step has no more than so many times the work of `low` layers'.

    The output layer's work is in both: of a small model with a large vocabulary it is the greater part of a step, and
    two depths that are close to each other would say little of a layer.
    """

    def work(num_layers: int) -> float:
        return hardware_flops_per_token(replace(job, shape=replace(job.shape, num_layers=num_layers)))

    return max((high for high in range(low + 1, most + 1) if work(high) <= times * work(low)), default=low + 1)


def _run(config: str, overrides: list[str], job: Job, num_ranks: int, folder: Path, *words: str) -> dict[str, Any]:
    out = folder / "measured.json"
    out.unlink(missing_ok=True)
    changed = [
        f"train.micro_batch_size={job.micro_batch_size}",
        f"zero.stage={job.stage}",
        f"model.activation_checkpointing={'true' if job.checkpointing else 'false'}",
        f"run_dir={folder / 'run'}",
    ]
    own = [f"out={out}", f"vocab_size={job.shape.vocab_size}", f"seconds={SECONDS}", *words]
    outcome = run_local(
        "pretrain.probe", ["--config", config, *overrides, *changed, *own], num_ranks, folder, Signals()
    )
    if outcome.code or not out.exists():
        raise ConfigError(f"--probe: the short run has failed with exit code {outcome.code}; its output is above")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def _depth(layers: int, found: dict[str, Any]) -> Depth:
    one = found["seconds_1"]
    return Depth(layers, one, found.get("seconds_2", 2 * one), found["peak_bytes"])
