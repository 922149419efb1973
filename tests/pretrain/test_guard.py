"""Steps that are not finite, in real runs: they change nothing, are written down, and too many stop the run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.incidents import read_incidents
from configs.load import load_pretrain
from data_pipeline.stream import open_stream
from pretrain import checkpoint
from pretrain.checkpoint import Fragment
from pretrain.metrics import describe
from pretrain.models import build_model
from pretrain.saver import write_safetensors
from pretrain.state import TrainState
from tests.conftest import ROOT
from tests.launcher.small_run import make_config
from tests.ranks import run_ranks

POSITION = 40  # a row of the position table that only samples of 64 tokens look up, which only step 5 has
SETTINGS = (
    "train.num_steps=8",
    "train.phases=[{from_step: 4, seq_len: 64}, {from_step: 5, seq_len: 32}]",
    "checkpoint.every_steps=6",
    "eval.every_steps=8",
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "function",
    ["step_that_is_not_finite_changes_nothing", "infinite_loss_with_a_finite_gradient_changes_nothing"],
)
def test_at_every_stage(function, tmp_path):
    run_ranks(2, ["tests/pretrain/guard_on_ranks.py", function], tmp_path / "logs")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_config(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def poisoned(config) -> Path:
    """A run of 8 steps on 2 ranks from weights one of which is infinite."""
    run_dir = config.parent / "poisoned"
    write_poisoned_checkpoint(config, run_dir)
    pretrain(config, run_dir)
    return run_dir


def write_poisoned_checkpoint(config: Path, run_dir: Path) -> None:
    """The weights at the start of a run, as a checkpoint, with one infinite element."""
    settings = load_pretrain(config, list(SETTINGS))
    data = open_stream(settings, "train")
    torch.manual_seed(0)
    model = build_model(settings.model, data.vocab_size, settings.train.longest_seq_len)
    with torch.no_grad():
        model.position_embeddings.weight[POSITION, 0] = math.inf
    pieces = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        tensors = {"master": flat, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        pieces.append(Fragment(name, tuple(parameter.shape), 0, tensors))
    aside, target = (run_dir / "checkpoints" / name for name in (".writing", "step-00000000"))
    aside.mkdir(parents=True)
    tensors = {f"{key}/{piece.name}": tensor for piece in pieces for key, tensor in piece.tensors.items()}
    entry = write_safetensors(aside / "rank-00000.safetensors", tensors)
    files = {"rank-00000.safetensors": (entry, checkpoint.layout(pieces))}
    checkpoint.commit(aside, target, TrainState(), files, data.facts(0))
    data.close()


def pretrain(config: Path, run_dir: Path) -> None:
    words = ["-m", "pretrain.train", "--config", str(config), f"run_dir={run_dir}", *SETTINGS]
    run_ranks(2, words, config.parent / f"{run_dir.name}-logs")


def steps(run_dir: Path) -> dict[int, dict]:
    """The lines of metrics.jsonl by step, without what is measured with a clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds", "save_wait_seconds")
    return {line["step"]: {k: v for k, v in line.items() if k not in clock} for line in lines if "loss" in line}


@pytest.mark.distributed
def test_step_that_is_not_finite_is_skipped_and_logged_as_it_was_and_the_run_goes_on(poisoned):
    lines = steps(poisoned)
    assert [step for step, line in lines.items() if "skipped" in line] == [5]
    assert math.isnan(lines[5]["loss"]) and math.isnan(lines[5]["grad_norm"])
    assert all(math.isfinite(line["loss"]) for step, line in lines.items() if step != 5)
    assert list(lines) == list(range(1, 9)) and lines[8]["loss"] < lines[1]["loss"] - 0.1
    state = checkpoint.newest_valid(poisoned).state
    assert (state.step, state.updates, state.skipped, state.skipped_in_a_row) == (8, 7, 1, 0)


@pytest.mark.distributed
def test_incident_names_the_samples_of_every_rank(config, poisoned):
    (incident,) = read_incidents(poisoned)
    assert incident["kind"] == "non_finite" and incident["step"] == 5 and math.isnan(incident["loss"])
    data = open_stream(load_pretrain(config, list(SETTINGS)), "train")
    assert incident["sample_ids"] == [data.samples.sample_ids(4, rank, 2) for rank in range(2)]
    data.close()
    printed = (poisoned.parent / "poisoned-logs/rank-0.log").read_text()
    assert "NOT FINITE" in printed and "NO UPDATE" in printed


@pytest.mark.distributed
def test_run_resumed_after_a_skipped_step_is_bitwise_the_same(config, poisoned):
    run_dir = config.parent / "resumed"
    shutil.copytree(poisoned / "checkpoints/step-00000006", run_dir / "checkpoints/step-00000006")
    pretrain(config, run_dir)
    assert steps(run_dir) == {step: line for step, line in steps(poisoned).items() if step > 6}
    files = [run / "checkpoints/step-00000008/rank-00001.safetensors" for run in (run_dir, poisoned)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def diverged(config) -> tuple[Path, subprocess.CompletedProcess]:
    """A run whose learning rate makes weights that overflow, with restarts allowed."""
    run_dir = config.parent / "diverged"
    more = ("train.optimizer.lr=1e30", "guard.non_finite_limit=3", "launch.restarts=2", "train.num_steps=100")
    return run_dir, millstream("pretrain", str(config), "--ranks", "1", f"run_dir={run_dir}", *more)


def millstream(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "launcher.cli", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.distributed
def test_run_of_nothing_but_such_steps_stops_with_70_and_is_not_started_again(diverged):
    run_dir, ended = diverged
    assert ended.returncode == 70, ended.stderr[-3000:]
    lines = steps(run_dir)
    last = max(lines)
    assert [step for step, line in lines.items() if "skipped" in line] == [last - 2, last - 1, last]
    kinds = [incident["kind"] for incident in read_incidents(run_dir)]
    assert kinds == ["non_finite"] * 3 + ["guard_stopped"]
    assert "lower train.optimizer.lr" in ended.stderr and f"millstream replay {run_dir} {last}" in ended.stderr


@pytest.mark.distributed
def test_stopped_run_leaves_the_batch_and_the_weights_it_stopped_with(diverged):
    run_dir, _ = diverged
    last = max(steps(run_dir))
    about = json.loads((run_dir / "stopped/batch/batch.json").read_text())
    assert about["step"] == last - 1 and about["world_size"] == 1
    found = checkpoint.newest_valid(run_dir / "stopped")
    assert found.step == last - 1 and found.state.skipped_in_a_row == 2
    assert checkpoint.weights(found)("word_embeddings.weight").abs().max() > 1e29
    assert checkpoint.newest_valid(run_dir) is None, "weights that have diverged are no checkpoint of the run"


@pytest.mark.distributed
def test_step_that_stopped_a_run_is_replayed_with_its_batch_and_weights_and_names_the_first_module(diverged):
    run_dir, _ = diverged
    last = max(steps(run_dir))
    shown = millstream("replay", str(run_dir), str(last)).stdout
    assert "dumped when the run was stopped; the data pipeline makes the same now" in shown
    assert "rank 0, forward: first blocks.0.attention_norm (LayerNorm)" in shown
    found = json.loads((run_dir / f"stopped/replay/step-{last:08d}.json").read_text())
    assert math.isnan(found["losses"]["loss"]) and math.isnan(found["gradient_norms"]["blocks.0.mlp.up.weight"])
    assert found["modules_not_finite"][0]["was_given_finite"] and not found["weights_not_finite"]
    assert steps(run_dir).keys() == set(range(1, last + 1)), "a replay writes no metrics"


@pytest.mark.distributed
def test_any_step_is_replayed_bitwise_from_the_checkpoint_before_it(config, poisoned):
    shown = millstream("replay", str(poisoned), "8")
    assert "making 1 steps again, from step 6" in shown.stdout, shown.stderr[-2000:]
    found = json.loads((poisoned / "replay/step-00000008.json").read_text())
    line = steps(poisoned)[8]
    assert found["losses"]["loss"] == line["loss"] and found["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
    assert found["weights_not_finite"] == {"position_embeddings.weight": 1} and not found["modules_not_finite"]
    data = open_stream(load_pretrain(config, list(SETTINGS)), "train")
    names = [name for rank in range(2) for name in data.samples.sample_ids(7, rank, 2)]
    data.close()
    assert [[sample["source"], sample["sample"]] for sample in found["samples"]] == names
    losses = [sample["loss"] for sample in found["samples"]]
    assert sum(losses) / len(losses) == pytest.approx(line["loss"], rel=2e-3), "there is no dropout here"
    assert any(word in found["samples"][0]["text"] for word in ("river", "sun", "king"))
    assert checkpoint.newest_valid(poisoned).step == 8 and steps(poisoned)[8] == line


def test_terminal_says_that_there_was_no_update():
    shown = describe({"step": 3, "loss": 2.5, "grad_norm": math.inf, "skipped": 1})
    assert "NO UPDATE (gradient norm inf)" in shown


def test_state_of_an_older_checkpoint_is_read_and_an_unknown_value_is_not():
    older = {"step": 7, "updates": 6, "seconds": 1.5, "eval_loss": None}
    assert TrainState.from_json(older) == TrainState(7, 6, 1.5) and TrainState(7, 6).skipped == 1
    with pytest.raises(ValueError, match="expected"):
        TrainState.from_json(older | {"mood": 1})
    with pytest.raises(ValueError, match="expected"):
        TrainState.from_json({"step": 7})
