"""`millstream prove loss` on small configurations: what is right passes, and each planted fault is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.compiler import what_compile_lacks
from configs.load import ConfigError
from launcher import prove_loss
from tests.conftest import ROOT

BUILD = """
run_dir: unused
data:
  dir: {folder}/{name}
  build:
    sources: ["{folder}/text.jsonl"]
    validation_fraction: 0.1
    tokenizer: {{type: {tokenizer}, vocab_size: 300}}
    num_workers: 1
"""
CONFIG = """
run_dir: {folder}/runs/mine
model: {{architecture: {architecture}, preset: nano, num_layers: 2, hidden_size: 32, num_heads: 2, dropout: 0.1}}
data: {{dir: {folder}/{name}}}
train: {{seq_len: 48, global_batch_size: 64, micro_batch_size: 8, precision: fp32, optimizer: {{lr: 1e-2}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """gpt.yaml and bert.yaml, on datasets of short documents of various lengths."""
    folder = tmp_path_factory.mktemp("prove")
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "river", "stone", "bird", "king", "runs.", "sings."]
    texts = [" ".join(rng.choice(words, rng.integers(2, 30))) for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for architecture, tokenizer in (("gpt", "byte_bpe"), ("bert", "wordpiece")):
        values = {"folder": folder, "name": architecture, "tokenizer": tokenizer, "architecture": architecture}
        (folder / "build.yaml").write_text(BUILD.format(**values))
        subprocess.run([sys.executable, "-m", "data_pipeline.build", str(folder / "build.yaml")], cwd=ROOT, check=True)
        (folder / f"{architecture}.yaml").write_text(CONFIG.format(**values))
    return folder


def prove(file: Path, *words: str, ranks: int) -> tuple[int, str]:
    """Exit code and output of the command."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launcher.cli", "prove", "loss", str(file), "--ranks", str(ranks), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdicts(output: str) -> dict[str, str]:
    """By run, of the table."""
    lines = [line for line in output.splitlines() if line.endswith(("  ok", "  DIFFERS", "  differs, too"))]
    return {line.split("  ")[0]: line.rsplit("  ", 1)[1] for line in lines}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_setting_that_changes_the_training_is_named_and_all_else_is_one_training(folder):
    autocast = "deepspeed={torch_autocast: {enabled: true, dtype: bfloat16}}"
    code, output = prove(folder / "gpt.yaml", autocast, ranks=2)
    found = verdicts(output)
    assert found.pop("2 ranks, ZeRO 3, deepspeed: section") == "DIFFERS", output
    assert "2 ranks, ZeRO 3, compiled" in found or what_compile_lacks()
    assert len(found) >= 12 and set(found.values()) == {"ok"}, output
    assert "culprit: 2 ranks, ZeRO 3, deepspeed: section\n  step " in output
    assert "look at: its keys: torch_autocast" in output
    assert code == 1
    assert list((folder / "runs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("architecture", "fault", "culprit"),
    [("bert", "average", "accumulation, 2 x 4 samples"), ("gpt", "leak", "rows of many documents")],
)
def test_a_planted_fault_is_found_and_named(folder, architecture, fault, culprit, monkeypatch, capfd):
    monkeypatch.setattr(prove_loss, "PROGRAM", "tests.launcher.faulty_loop")
    monkeypatch.setattr(prove_loss, "what_compile_lacks", lambda: "a minute, which this test does not have")
    monkeypatch.setenv("FAULT", fault)
    assert prove_loss.prove_loss(str(folder / f"{architecture}.yaml"), [], num_ranks=1) == 1
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith(f"culprit: {culprit}")]


@pytest.mark.parametrize("value", ["1", "many"])
def test_one_step_is_refused_because_it_would_not_show_the_update(value):
    with pytest.raises(ConfigError, match=f"steps={value}"):
        prove_loss.read_steps([f"steps={value}"])
