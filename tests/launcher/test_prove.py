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
from launcher.prove import other_ranks, read_steps, tolerances_elsewhere
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


@pytest.mark.parametrize("value", ["3", "1001", "many"])
def test_steps_without_a_middle_or_beyond_the_run_are_refused(value):
    with pytest.raises(ConfigError, match=f"steps={value}"):
        read_steps([f"steps={value}"], small())


def test_losses_are_not_compared_across_ranks_where_there_is_dropout():
    config = PretrainConfig(run_dir="runs/x", model={"dropout": 0.1})
    assert set(tolerances_elsewhere(config)) == {"lr", "tokens", "sample_ids"}


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
    assert "resumed on 2 ranks, 8 steps" in done.stdout and "resumed on 1 ranks, 8 steps" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
