"""`millstream prove kills`: one real proof, and each difference that it has to find."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import ConfigError, load_pretrain
from configs.phases import open_ring, ring_path
from launcher import prove_kills
from launcher.kills import Life
from launcher.prove_kills import Differs, Kill, Plan, oldest_allowed
from tests.conftest import ROOT
from tests.launcher.small_run import make_config

NANO = ROOT / "configs/gpt/nano.yaml"


def test_numbers_of_the_command_are_taken_and_the_rest_left():
    numbers, others = prove_kills.take_numbers(["kills=3", "train.seed=7", "seed=9"])
    assert numbers == {"kills": 3, "steps": 40, "seed": 9} and others == ["train.seed=7"]


@pytest.mark.parametrize("word", ["kills=0", "steps=7", "seed=-1", "kills=many"])
def test_numbers_that_make_no_proof_are_refused(word):
    with pytest.raises(ConfigError, match=f"{word}: expected a number, at least"):
        prove_kills.take_numbers([word])


def test_runs_are_as_short_as_asked_and_nothing_of_them_leaves_the_machine():
    overrides = ["checkpoint.upload=s3://bucket/run", "train.schedule.warmup_steps=900", "train.num_steps=1000"]
    overrides.append("train.budget=1h")
    config = load_pretrain(NANO, [*overrides, *prove_kills.own_words(str(NANO), overrides, 40)])
    assert (config.train.num_steps, config.train.schedule.warmup_steps, config.checkpoint.every_steps) == (40, 40, 5)
    assert config.checkpoint.upload is None and config.train.budget is None
    words = prove_kills.own_words(str(NANO), ["checkpoint.every_steps=20"], 40)
    assert "checkpoint.every_steps=20" in words
    with pytest.raises(ConfigError, match=r"checkpoint.every_steps=41: expected at most steps=40"):
        prove_kills.own_words(str(NANO), ["checkpoint.every_steps=41"], 40)


@pytest.mark.parametrize("background", [True, False])
def test_oldest_allowed_checkpoint_is_that_of_a_run_on_the_slowest_disk(background):
    """A run that saves every 5 steps: in the background, on a disk so slow that each save waits for the one before."""
    safe, writing = 0, None
    for reached in range(1, 40):
        assert oldest_allowed(reached, 5, background) == safe
        if reached % 5 == 0 and background:
            safe, writing = writing or 0, reached
        elif reached % 5 == 0:
            safe = reached


def write_lines(run_dir: Path, lines: list[dict]) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


LINES = [{"step": step, "loss": 5.0 / step, "step_seconds": 0.1 * step} for step in (1, 2, 3)]


def test_lines_may_end_early_but_not_differ_in_any_bit_or_field(tmp_path):
    expected = prove_kills.comparable(write_lines(tmp_path / "a", LINES))
    assert expected[0] == {"step": 1, "loss": 5.0}
    prove_kills.check_lines(expected[:2], expected)
    last_bit = {"step": 2, "loss": 2.5000000000000004}
    with pytest.raises(Differs, match=r"line 2 \(step 2\), loss: 2.5 undisturbed, 2.5000000000000004 after kills"):
        prove_kills.check_lines([expected[0], last_bit], expected)
    with pytest.raises(Differs, match=r"line 1 \(step 1\), lr: null undisturbed, 1 after"):
        prove_kills.check_lines([expected[0] | {"lr": 1}], expected)
    with pytest.raises(Differs, match=r"line 2 \(step 2\), step: 2 undisturbed, 3 after"):
        prove_kills.check_lines([expected[0], expected[2]], expected)
    with pytest.raises(Differs, match="has 4 lines, the undisturbed run's 3"):
        prove_kills.check_lines([*expected, expected[2]], expected)


def test_not_a_number_is_equal_to_itself():
    nan = [{"step": 1, "loss": float("nan")}]
    prove_kills.check_lines(nan, nan)


def test_start_from_another_checkpoint_than_the_newest_is_found():
    prove_kills.check_start(Life(first_step=10), 10)
    prove_kills.check_start(Life(first_step=None), 10)
    with pytest.raises(Differs, match="went on from step 5, the newest checkpoint was of step 10"):
        prove_kills.check_start(Life(first_step=5), 10)


def test_checkpoint_that_is_too_old_is_found(tmp_path):
    config = load_pretrain(NANO, ["checkpoint.every_steps=1"])
    write_lines(tmp_path, LINES)
    prove_kills.check_age(tmp_path, 1, config)
    with pytest.raises(Differs, match="3 steps were finished, the newest checkpoint is of step 0 instead of 1"):
        prove_kills.check_age(tmp_path, 0, config)


def write_end(run_dir: Path, weights: bytes = b"weights", seconds: float = 1.0, step: int = 3) -> Path:
    folder = write_lines(run_dir, LINES) / "checkpoints/step-00000003"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(weights)
    state = {"step": step, "seconds": seconds}
    (folder / "manifest.json").write_text(json.dumps({"state": state, "checksum": str(seconds)}))
    return run_dir


def test_end_has_to_be_the_same_but_for_the_clock(tmp_path):
    undisturbed = write_end(tmp_path / "undisturbed")
    prove_kills.check_end(write_end(tmp_path / "same", seconds=2.0), undisturbed, 3)
    with pytest.raises(Differs, match=r"rank-00000.safetensors of the final checkpoint is not that"):
        prove_kills.check_end(write_end(tmp_path / "weights", b"weightz"), undisturbed, 3)
    with pytest.raises(Differs, match=r"manifest.json of the final checkpoint is not that"):
        prove_kills.check_end(write_end(tmp_path / "state", step=4), undisturbed, 3)
    fewer = write_end(tmp_path / "fewer")
    (fewer / "checkpoints/step-00000003/rank-00000.safetensors").unlink()
    with pytest.raises(Differs, match="the final checkpoint has the files"):
        prove_kills.check_end(fewer, undisturbed, 3)
    short = write_lines(write_end(tmp_path / "short"), LINES[:2])
    with pytest.raises(Differs, match="has 2 lines at the end, the undisturbed run's 3"):
        prove_kills.check_end(short, undisturbed, 3)


def test_kill_before_the_first_step_of_a_start_loses_nothing_more(tmp_path):
    write_lines(tmp_path, LINES)
    (tmp_path / "checkpoints/.writing-step-00000002").mkdir(parents=True)
    (tmp_path / "ranks").mkdir()
    open_ring(ring_path(tmp_path, 1), 1, 2)
    plan = Plan(load_pretrain(NANO), [], 2, tmp_path)
    at_start = prove_kills.describe(plan, tmp_path, Life(killed=(0,)), 1)
    assert (at_start.phase, at_start.lost, at_start.is_unfinished, at_start.seconds) == ("import", 0, False, None)
    assert str(at_start) == "rank 0 killed before the first mark: steps lost 0, checkpoint 1"
    later = prove_kills.describe(plan, tmp_path, Life((1,), first_step=1, seconds_to_first_step=6.0), 1)
    assert (later.phase, later.lost, later.is_unfinished, later.seconds) == ("start", 2, True, 6.0)


def test_summary_counts_kills_by_phase():
    kill = Kill((0, 1), True, "save", 5, 3, 0, True, 6.0)
    at_start = Kill((0,), False, "import", 0, 0, 5, False, None)
    words = [line.split() for line in prove_kills.summary([kill, kill, at_start], load_pretrain(NANO)).splitlines()]
    assert ["save", "2", "2", "2"] in words and ["import", "1", "0", "0"] in words
    assert ["together", "3", "2", "2"] in words
    assert ["seconds", "to", "go", "on", "median", "6.0,", "largest", "6.0"] in words


@pytest.mark.slow
@pytest.mark.distributed
def test_kills_are_survived_and_the_run_dir_not_touched(tmp_path):
    config = make_config(tmp_path)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ["prove", "kills", str(config), "--ranks", "2", "kills=3", "steps=8", f"run_dir={tmp_path}/runs/mine"]
    command = [sys.executable, "-m", "launcher.cli", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "   3  " in done.stdout and "is at its end: metrics and final checkpoint are equal" in done.stdout
    assert "final checkpoint: equal, bit for bit" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
    shutil.rmtree(tmp_path / "data")
    broken = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert broken.returncode == 2 and "the undisturbed run ended with exit code 2" in broken.stderr, broken.stderr
    assert str(tmp_path / "data") in broken.stdout
