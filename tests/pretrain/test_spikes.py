"""Spikes of the loss: which loss is one; a real run that goes back to before it, passes batches over and goes on."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from configs.incidents import read_incidents
from configs.load import load_pretrain
from configs.schema import GuardConfig
from data_pipeline.stream import open_stream
from pretrain import checkpoint
from pretrain.spikes import LEAST, WINDOW, largest_usual, remember
from pretrain.state import TrainState, batch_number
from tests.launcher.small_run import CONFIG
from tests.ranks import ROOT, finish, run_ranks, start_ranks

PHRASE = "the sun and the moon. "
SETTINGS = (
    "train.num_steps=80",
    "train.optimizer.lr=2e-2",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=9",
    "eval.every_steps=80",
    "guard={spike_sigmas: 8, spike_rollback: true, spike_margin_steps: 9, spike_skip_batches: 6}",
)


def test_deviation_of_losses_that_are_independent_is_found_and_a_spike_among_them_does_not_move_it():
    rng = np.random.default_rng(0)
    windows = (3 + 0.1 * rng.standard_normal((1000, WINDOW))).tolist()
    assert np.mean([largest_usual(window, 5.0) for window in windows]) == pytest.approx(3 + 5 * 0.1, abs=0.02)
    usual = windows[0]
    assert largest_usual([*usual[:-2], 50.0, 60.0], 5.0) == pytest.approx(largest_usual(usual, 5.0), abs=0.1)


def test_usual_losses_are_practically_never_a_spike_and_a_jump_by_ten_deviations_is():
    rng = np.random.default_rng(1)
    losses = (3 + 0.1 * rng.standard_normal(20_000)).tolist()
    above = [loss > largest_usual(losses[n - WINDOW : n], 8.0) for n, loss in enumerate(losses) if n >= WINDOW]
    assert not any(above)
    assert all(largest_usual(losses[n - WINDOW : n], 5.0) < 4.0 for n in range(WINDOW, 2000))


def test_start_of_a_run_has_no_spikes_and_a_falling_loss_is_none():
    assert largest_usual([1.0] * (LEAST - 1), 3.0) == math.inf
    falling = [2 + 3 / (step + 1) for step in range(WINDOW)]
    assert falling[-1] < largest_usual(falling, 3.0) < 2.5


def test_window_holds_the_newest_finite_losses_and_gets_used_to_a_new_level():
    losses: tuple[float, ...] = ()
    for step in range(WINDOW + 5):
        losses = remember(losses, float(step))
    assert losses == tuple(map(float, range(5, WINDOW + 5)))
    assert remember(losses, math.nan) == losses
    for _ in range(WINDOW * 3 // 4):
        losses = remember(losses, 1000.0)
    assert largest_usual(losses, 3.0) >= 1000.0


def test_state_with_what_was_passed_over_is_read_back_and_numbers_the_batches_after_it():
    state = TrainState(30, 29, recent_losses=(1.5, 0.1 + 0.2), passed_over=((20, 6), (40, 9)))
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert state.batch == batch_number(30, state.passed_over) == 45 and TrainState(30).batch == 30


def test_going_back_without_a_limit_for_spikes_is_a_mistake():
    with pytest.raises(ValidationError, match="spike_sigmas is not set"):
        GuardConfig(spike_rollback=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A dataset of one phrase, over and over, and one document of noise that one of the steps 62 to 68 sees."""
    folder = tmp_path_factory.mktemp("spikes")
    noise = "".join(chr(code) for code in np.random.default_rng(0).integers(33, 64, 60))
    phrases = [json.dumps({"text": PHRASE * 12})] * 400
    (folder / "text.jsonl").write_text("\n".join([*phrases, json.dumps({"text": noise}), *phrases]))
    (folder / "held-out.jsonl").write_text("\n".join(phrases[:20]))
    file = folder / "config.yaml"
    text = CONFIG.format(folder=folder)
    file.write_text(text.replace("validation_fraction: 0.1", f"validation_sources: [{folder}/held-out.jsonl]"))
    build = [sys.executable, "-m", "data_pipeline.build", str(file)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    rows = rows_of_noise(file)
    seed = next(seed for seed in range(10_000) if is_seen_once(file, seed, rows))
    file.write_text(file.read_text().replace("train: {", f"train: {{seed: {seed}, "))
    return file


def rows_of_noise(config: Path) -> set[int]:
    """The samples with tokens that are rare in the dataset."""
    data = open_stream(load_pretrain(config), "train")
    num_steps = data.samples.phases[0].rows[0].num_rows // 8
    rows = {}
    for step in range(num_steps):
        tokens = np.concatenate([batch["tokens"].numpy() for batch in data.micro_batches(step, 0, 1)])
        rows.update(zip((sample for _, sample in data.samples.sample_ids(step, 0, 1)), tokens, strict=True))
    data.close()
    counts = np.bincount(np.concatenate(list(rows.values())).astype(np.int64))
    return {sample for sample, tokens in rows.items() if (counts[tokens.astype(np.int64)] < 20).sum() > 3}


def is_seen_once(config: Path, seed: int, rows: set[int]) -> bool:
    """Whether of the first 100 steps only one sees noise, one of 62 to 68 (as metrics.jsonl counts)."""
    data = open_stream(load_pretrain(config, [f"train.seed={seed}"]), "train")
    seen = [n + 1 for n in range(100) if rows & {sample for _, sample in data.samples.sample_ids(n, 0, 1)}]
    data.close()
    return len(seen) == 1 and 62 <= seen[0] <= 68


def words(config: Path, run_dir: Path, *more: str) -> list[str]:
    return ["-m", "pretrain.train", "--config", str(config), f"run_dir={run_dir}", *SETTINGS, *more]


def pretrain(config: Path, name: str, num_ranks: int, from_checkpoint: Path | None = None) -> Path:
    run_dir = config.parent / name
    if from_checkpoint is not None:
        shutil.copytree(from_checkpoint, run_dir / "checkpoints" / from_checkpoint.name)
    run_ranks(num_ranks, words(config, run_dir), config.parent / f"{name}-logs")
    return run_dir


@pytest.fixture(scope="module")
def gone_back(config) -> Path:
    return pretrain(config, "gone-back", 2)


def steps(run_dir: Path, file: str = "metrics.jsonl") -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds", "save_wait_seconds")
    return {line["step"]: {k: v for k, v in line.items() if k not in clock} for line in lines if "loss" in line}


@pytest.mark.distributed
def test_run_goes_back_to_the_checkpoint_before_the_spike_and_never_sees_those_batches_again(config, gone_back):
    spike, rollback = read_incidents(gone_back)
    assert (spike["kind"], rollback["kind"]) == ("spike", "rollback") and 62 <= spike["step"] <= 68
    rows = rows_of_noise(config)
    assert rows & {sample for rank in spike["sample_ids"] for _, sample in rank}
    passed = spike["step"] - 50  # the checkpoint of step 60 is less than nine steps older than the spike
    assert (rollback["step"], rollback["first_batch"], rollback["num_batches"]) == (50, 50, passed)
    lines = steps(gone_back)
    assert list(lines) == list(range(1, 81)) and max(line["loss"] for line in lines.values()) == lines[1]["loss"]
    numbers = [line.get("batch", step - 1) for step, line in lines.items()]
    assert numbers == [*range(50), *range(50 + passed, 80 + passed)]
    assert [lines[step]["tokens"] for step in lines] == [8 * 32 * step for step in lines]
    assert steps(gone_back, "rolled_back.jsonl")[spike["step"]]["loss"] == spike["loss"] > 2 * lines[50]["loss"]


@pytest.mark.distributed
def test_run_resumed_right_after_it_went_back_sees_bitwise_the_same(config, gone_back):
    resumed = pretrain(config, "resumed", 2, gone_back / "checkpoints/step-00000050")
    assert steps(resumed) == {step: line for step, line in steps(gone_back).items() if step > 50}
    assert not read_incidents(resumed)
    states = [checkpoint.newest_valid(run).state for run in (resumed, gone_back)]
    assert states[0].passed_over == states[1].passed_over and states[0].recent_losses == states[1].recent_losses


@pytest.mark.distributed
def test_run_resumed_on_another_number_of_ranks_passes_over_the_same_batches(config, gone_back):
    alone = steps(pretrain(config, "alone", 1, gone_back / "checkpoints/step-00000070"))
    together = {step: line for step, line in steps(gone_back).items() if step > 70}
    assert [line["batch"] for line in alone.values()] == [line["batch"] for line in together.values()]
    np.testing.assert_allclose(*([line["loss"] for line in run.values()] for run in (alone, together)), rtol=2e-2)


@pytest.mark.distributed
def test_spike_beyond_the_limit_of_rollbacks_stops_the_run_with_70(config, gone_back):
    run_dir = config.parent / "limited"
    settings = "guard={spike_sigmas: 8, spike_rollback: true, spike_rollback_limit: 0}"
    (code,) = finish(start_ranks(1, words(config, run_dir, settings), config.parent / "limited-logs"))
    assert code == 70
    assert [incident["kind"] for incident in read_incidents(run_dir)] == ["spike", "guard_stopped"]
    assert "after going back 0 times" in (config.parent / "limited-logs/rank-0.log").read_text()
