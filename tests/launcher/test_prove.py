"""`millstream prove resume`: one real proof, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from configs.load import ConfigError
from configs.schema import PretrainConfig
from launcher.prove import copy_as_of, other_ranks, read_steps, tolerances_elsewhere
from tests.ranks import ROOT

CONFIG = """
run_dir: {folder}/runs/mine
model: {{architecture: gpt, preset: nano, num_layers: 2, hidden_size: 32, num_heads: 2}}
data:
  dir: {folder}/data
  build:
    sources: ["{folder}/text.jsonl"]
    validation_fraction: 0.1
    tokenizer: {{type: byte_bpe, vocab_size: 300}}
    num_workers: 1
train: {{num_steps: 100, seq_len: 32, global_batch_size: 8, micro_batch_size: 2, precision: fp32}}
eval: {{num_samples: 8}}
log: {{tensorboard: false}}
"""


def small(**train) -> PretrainConfig:
    return PretrainConfig(run_dir="runs/x", train={"global_batch_size": 12, "micro_batch_size": 2, **train})


def test_the_other_number_of_ranks_is_the_nearest_that_divides_the_batch(monkeypatch):
    monkeypatch.setattr("launcher.prove.visible_devices", lambda: [])
    assert [other_ranks(small(), ranks) for ranks in (1, 2, 3)] == [2, 1, 2]


def test_the_other_number_of_ranks_divides_every_size_of_a_batch_that_grows(monkeypatch):
    monkeypatch.setattr("launcher.prove.visible_devices", lambda: [])
    ramped = small(batch_ramp={"start_size": 4, "increment": 4, "num_samples": 20})
    assert (other_ranks(small(), 4), other_ranks(ramped, 4)) == (3, 2)


@pytest.mark.parametrize("value", ["3", "1001", "many"])
def test_steps_without_a_middle_or_beyond_the_run_are_refused(value):
    with pytest.raises(ConfigError, match=f"steps={value}"):
        read_steps([f"steps={value}"], small())


def test_what_other_ranks_change_without_a_resume_is_allowed_fourfold_and_a_sum_its_rounding():
    expected = {step: {"loss": 4.0, "grad_norm": 1.0} for step in (1, 2)}
    anew = {1: {"loss": 4.0, "grad_norm": 1.0}, 2: {"loss": 4.0 * (1 + 1e-5), "grad_norm": 1.0}}
    config = small(precision="fp32", global_batch_size=32, seq_len=32)
    assert tolerances_elsewhere(config, expected, anew) == {"loss": pytest.approx(4e-5), "grad_norm": 2.0**-24 * 32}


def test_a_copy_as_of_a_step_has_nothing_of_later_ones(tmp_path):
    run_dir = tmp_path / "run"
    for step in (4, 8):
        (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run_dir / "trace").mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(9)))
    copy_as_of(4, run_dir, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "copy" / "trace").exists()
    lines = (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resume_is_proven_and_the_run_dir_not_touched(tmp_path):
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "river", "stone", "bird", "king", "runs", "sings"]
    lines = [json.dumps({"text": " ".join(rng.choice(words, 40))}) for _ in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(folder=tmp_path))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "data_pipeline.build", str(file)], cwd=ROOT, env=environment, check=True)
    command = [sys.executable, "-m", "launcher.cli", "prove", "resume", str(file), "--ranks", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resumed on 2 ranks, steps 5 to 8" in done.stdout and "resumed on 1 ranks, steps 5 to 8" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
