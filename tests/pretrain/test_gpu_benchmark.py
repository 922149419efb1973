"""All code of `benchmarks/gpu.py` runs here, so that the first minutes on a GPU are not lost to a typing error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu as benchmark
from configs.model_sizes import model_shape
from configs.schema import ModelConfig
from tests.conftest import ROOT


def test_correctness_of_all_kernels_passes_and_names_shape_dtype_and_error(kernels):
    rows = benchmark.correctness(
        {"norm": [(5, 1), (3, 72)], "embeddings": [(9, 16)], "rotary": [(9, 6)], "mlp": [(5, 7)], "loss": [(7, 103)]}
    )
    assert len(rows) == 3 * (2 * 4 + 1 + 1 + 3 + 1)
    assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}


def test_a_kernel_that_leaves_something_unwritten_does_not_pass(kernels, monkeypatch):
    monkeypatch.setattr(benchmark.native, "launch", lambda *_: None)
    rows = benchmark.correctness({"norm": [(3, 8)], "embeddings": [], "rotary": [], "mlp": [], "loss": []})
    assert not any(row["passed"] for row in rows)


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)])
def test_mfu_is_of_the_data_sheets_peak(name, peak, monkeypatch):
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert benchmark.peak_flops() == peak


@pytest.mark.parametrize("job", benchmark.JOBS + benchmark.TINY_JOBS)
def test_the_models_that_are_trained_exist(job):
    config = ModelConfig(architecture=job["architecture"], preset=job["preset"], **job.get("model", {}))
    assert model_shape(config, None, job["seq_len"]).max_seq_len >= job["seq_len"]


def test_times_on_a_gpu_are_the_median_of_events_after_three_warm_ups(monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def elapsed_time(self, later):
            return later.at - self.at

    calls = []

    def run():
        calls.append(Event.now)
        Event.now += 5.0 if len(calls) > 3 else 100.0

    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert benchmark.milliseconds(run) == 5.0 and len(calls) == benchmark.REPEATS + 3


def test_what_the_sanitizer_finds_is_in_the_table(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: $2"\n[ $2 = memcheck ] || exit 9\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert benchmark.sanitizer() == [
        {"tool": "memcheck", "exit_code": 0, "result": "========= ERROR SUMMARY: memcheck"},
        {"tool": "racecheck", "exit_code": 9, "result": "========= ERROR SUMMARY: racecheck"},
    ]


def test_a_contestant_that_fails_is_an_entry_of_the_table(kernels):
    case = next(benchmark.cases(torch.device("cpu"), torch.bfloat16, benchmark.TINY_SHAPES))
    case.contestants["peer"] = lambda *_: 1 / 0
    row = benchmark.timed(case, "peer", 1.0)
    assert row["failed"] == "ZeroDivisionError: division by zero"
    assert "forward_ms" in benchmark.timed(case, "ours", 1.0)


@pytest.mark.slow
def test_all_parts_run_and_leave_json_and_a_table(tmp_path):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["kernels"] for row in found["training"]] == ["on", "off"]
    assert all(row["tokens_per_second"] > 0 for row in found["training"])
    assert found["training"][0]["profile"] and "profile" not in found["training"][1]
    assert not any("failed" in row for row in found["kernels"])
    assert "## kernels" in (tmp_path / "gpu.md").read_text()
