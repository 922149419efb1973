"""Signals to a run of two ranks, at every stage of its life: finish the step and save, or end at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from configs.phases import read_rings
from launcher.restarts import newest_checkpoint
from tests.launcher.small_run import has_reached, make_config, pid_of, start, wait_until

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_config(tmp_path_factory.mktemp("signals"))


def phases(run_dir: Path) -> list[str]:
    return [ring.phase if ring else "" for ring in read_rings(run_dir, 2)]


def no_rank_is_left(run_dir: Path) -> bool:
    return not any(Path(f"/proc/{ring.pid}").exists() for ring in read_rings(run_dir, 2) if ring)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_run_saves_its_step_and_says_how_to_go_on(config, tmp_path, number):
    process = start(config, tmp_path)
    wait_until(has_reached(tmp_path, 3), process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    step = newest_checkpoint(tmp_path)
    assert step >= 3 and f"stopped at step {step}, which is saved; the same command goes on from it" in out
    assert "Traceback" not in out + error


def test_signal_to_one_rank_only_stops_and_saves_all_with_its_code(config, tmp_path):
    process = start(config, tmp_path)
    wait_until(has_reached(tmp_path, 3), process)
    os.kill(pid_of(tmp_path, 1), signal.SIGUSR1)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, error
    assert "which is saved" in out and newest_checkpoint(tmp_path) >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["imports", "start"])
def test_signal_before_the_first_step_ends_at_once(config, tmp_path, number, stage):
    process = start(config, tmp_path)
    if stage == "imports":
        wait_until(lambda: (tmp_path / "logs/rank-1.log").exists(), process)
        time.sleep(0.5)
    else:
        wait_until(lambda: phases(tmp_path) == ["start", "start"], process)
    process.send_signal(number)
    began = time.monotonic()
    out, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number, error
    assert time.monotonic() - began < 2
    assert "Traceback" not in out + error and "failed" not in error
    assert no_rank_is_left(tmp_path) and newest_checkpoint(tmp_path) == 0


def test_signal_during_the_first_step_saves_it(config, tmp_path):
    process = start(config, tmp_path)
    wait_until(lambda: "forward" in phases(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert newest_checkpoint(tmp_path) >= 1


@pytest.mark.parametrize("phase", ["backward", "save"])
def test_second_signal_ends_at_once_while_a_rank_waits_for_another(config, tmp_path, phase):
    """Rank 0's main thread is inside of a collective with a stopped rank: no handler of Python's could run there."""
    process = start(config, tmp_path, "checkpoint.every_steps=1", "train.global_batch_size=16")
    wait_until(has_reached(tmp_path, 3), process)
    hold(process, tmp_path, 1, phase)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    os.kill(pid_of(tmp_path, 0), signal.SIGTERM)  # to the rank alone: the launcher would kill it
    began = time.monotonic()
    wait_until(lambda: not Path(f"/proc/{pid_of(tmp_path, 0)}").exists() or is_dead(pid_of(tmp_path, 0)), None, 5)
    assert time.monotonic() - began < 2
    os.kill(pid_of(tmp_path, 1), signal.SIGCONT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, error


def hold(process: subprocess.Popen[str], run_dir: Path, rank: int, phase: str) -> None:
    """Stop the rank at a moment at which the other one is, and stays, in this phase."""
    victim = pid_of(run_dir, rank)
    for _ in range(1000):
        wait_until(lambda: phases(run_dir)[1 - rank] == phase, process)
        os.kill(victim, signal.SIGSTOP)
        time.sleep(0.1)
        before = phases(run_dir)
        time.sleep(0.2)
        if before[1 - rank] == phase == phases(run_dir)[1 - rank]:
            return
        os.kill(victim, signal.SIGCONT)
    raise AssertionError(f"rank {1 - rank} was never held in phase {phase}")


def is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_second_signal_to_the_command_ends_everything_at_once(config, tmp_path):
    process = start(config, tmp_path)
    wait_until(has_reached(tmp_path, 3), process)
    os.kill(pid_of(tmp_path, 1), signal.SIGSTOP)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, error
    assert time.monotonic() - began < 2
    assert no_rank_is_left(tmp_path)
