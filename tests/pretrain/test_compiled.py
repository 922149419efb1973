"""Compiled blocks: the same training within rounding, the same run after a resume, a clear word without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from configs.compiler import what_compile_lacks
from configs.load import ConfigError
from configs.schema import ModelConfig, PretrainConfig
from pretrain.models import build_model
from pretrain.models.compiled import use_uncompiled
from tests.launcher.small_run import command, make_config
from tests.ranks import ROOT

needs_compiler = pytest.mark.skipif(what_compile_lacks() is not None, reason="no C++ compiler")
CLOCKS = ("tokens_per_second", "step_seconds", "save_wait_seconds")


def model(architecture: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    small = {"preset": "nano", "num_layers": 2, "hidden_size": 32, "num_heads": 2}
    return build_model(ModelConfig(architecture=architecture, **small, **settings), 64, 16)


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    loss = sum(model(**batch).values())
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_compiled_blocks_train_as_they_are_written_within_rounding_and_evaluate_bitwise_the_same(architecture):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (3, 16), generator=rng)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "segment_ids": (torch.arange(16) // 7 + 1).expand(3, 16)}
    plain, compiled = model(architecture), model(architecture, compile=True)
    for expected, found in zip(loss_and_gradients(plain, batch), loss_and_gradients(compiled, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.eval()(ids), compiled.eval()(ids), rtol=0, atol=0)

    called: list[torch.Tensor] = []
    compiled.train().blocks[1].mlp.up.register_forward_hook(lambda *arguments: called.append(arguments[2]))
    use_uncompiled(compiled)
    for expected, found in zip(
        loss_and_gradients(plain.train(), batch), loss_and_gradients(compiled, batch), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(called) == 1


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_is_bitwise_the_same_resumed_and_verified_with_dropout_and_checkpointing(tmp_path):
    config = make_config(tmp_path)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = ["model.compile=true", "model.activation_checkpointing=true", "model.dropout=0.1", "train.num_steps=4"]
    run(config, whole, *settings, "checkpoint.every_steps=2")
    shutil.copytree(whole / "checkpoints" / "step-00000002", resumed / "checkpoints" / "step-00000002")
    run(config, resumed, *settings, "guard.verify_every_steps=1")
    assert [line["step"] for line in lines(resumed)] == [3, 4]
    assert lines(resumed) == lines(whole)[-2:]


def run(config: Path, run_dir: Path, *words: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(config, run_dir, *words, num_ranks=1), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def lines(run_dir: Path) -> list[dict]:
    """Of the training steps, without what a clock measures."""
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line.keys() - set(CLOCKS)} for line in found if "loss" in line]


def test_a_missing_compiler_is_named_with_the_cure(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"model.compile=true.*no no-such-compiler.*install g\+\+.*compile=false"):
        model("gpt", compile=True)


def test_batches_without_padding_are_not_compiled():
    values = {"run_dir": "x", "model": {"architecture": "bert", "compile": True}, "data": {"unpad": True}}
    with pytest.raises(ValueError, match=r"model.compile=true with data.unpad=true"):
        PretrainConfig.model_validate(values)
