"""Runs that fail are started again, at the size that is left, and give up when they make no progress."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from configs.incidents import read_incidents
from configs.launches import read_launch
from configs.load import load_pretrain
from launcher.local import Outcome
from launcher.restarts import (
    Attempt,
    after,
    may_start_again,
    newest_checkpoint,
    size_that_fits,
    slot_names,
    slots_used,
)
from tests.conftest import ROOT
from tests.launcher.small_run import has_reached, losses, make_config, pid_of, start, wait_until

NANO = load_pretrain(ROOT / "configs/gpt/nano.yaml", ["train.global_batch_size=24", "train.micro_batch_size=2"])
FAILED = Outcome("failed", 137, rank=1, step=40)


def test_failures_count_until_a_checkpoint_is_beyond_the_step_that_was_reached():
    first = after(Attempt(4, None), FAILED, checkpoint=30, config=NANO, devices=[])
    assert (first.failures, first.step, first.num_ranks) == (1, 40, 4)
    without = after(first, replace(FAILED, rank=0, step=35), checkpoint=40, config=NANO, devices=[])
    assert (without.failures, without.step) == (2, 40)
    at_the_start = after(first, replace(FAILED, rank=0, step=0), checkpoint=30, config=NANO, devices=[])
    assert (at_the_start.failures, at_the_start.step) == (2, 40)
    beyond = after(without, replace(FAILED, step=60), checkpoint=41, config=NANO, devices=[])
    assert (beyond.failures, beyond.step) == (1, 60)


def test_same_rank_again_without_progress_makes_the_run_smaller():
    first = after(Attempt(4, None), FAILED, checkpoint=30, config=NANO, devices=[])
    assert after(first, replace(FAILED, rank=2), checkpoint=30, config=NANO, devices=[]).num_ranks == 4
    assert after(first, FAILED, checkpoint=41, config=NANO, devices=[]).num_ranks == 4
    assert after(first, FAILED, checkpoint=30, config=NANO, devices=[]).num_ranks == 3
    nobody = replace(FAILED, rank=None)
    assert after(after(Attempt(4, None), nobody, 30, NANO, []), nobody, 30, NANO, []).num_ranks == 4


def test_the_device_of_the_rank_that_failed_again_is_left_out():
    devices = ["0", "1", "2", "3"]
    first = after(Attempt(4, None), FAILED, checkpoint=30, config=NANO, devices=devices)
    assert (first.num_ranks, first.devices) == (4, None)
    second = after(first, FAILED, checkpoint=30, config=NANO, devices=devices)
    assert (second.num_ranks, second.devices) == (3, ("0", "2", "3"))


def test_fewer_visible_devices_make_the_run_smaller():
    first = after(Attempt(4, None), FAILED, checkpoint=30, config=NANO, devices=["0", "2"])
    assert (first.num_ranks, first.devices) == (2, None)


def test_ranks_fill_the_hosts_in_the_order_of_the_hostfile():
    hosts = {"b": 2, "a": 4}
    assert slots_used(Attempt(6, None), hosts) == hosts
    assert slots_used(Attempt(3, None), hosts) == {"b": 2, "a": 1}
    assert slot_names(hosts, ["a", "b"])[:3] == ["b:0", "b:1", "a:0"]


def test_host_that_does_not_answer_any_more_is_left_out():
    hosts = {"h1": 2, "h2": 2}
    left = slot_names(hosts, ["h2"])
    following = after(Attempt(4, None), Outcome("failed", 129, rank=1, step=9), 5, NANO, left)
    assert slots_used(replace(following, devices=tuple(left)), hosts) == {"h2": 2}


def test_size_is_the_largest_that_divides_the_batch():
    assert [size_that_fits(NANO, largest) for largest in (1, 2, 3, 5, 8, 11, 12, 100)] == [1, 2, 3, 4, 6, 6, 12, 12]


@pytest.mark.parametrize(
    ("kind", "code", "again"),
    [
        ("failed", 1, True), ("failed", 137, True), ("stalled", 124, True), ("failed", 134, True),
        ("finished", 0, False), ("stopped", 143, False), ("failed", 2, False), ("failed", 70, False),
    ],
)  # fmt: skip
def test_only_failures_and_stalls_are_started_again(kind, code, again):
    assert may_start_again(Outcome(kind, code)) is again


def test_only_finished_checkpoints_count(tmp_path):
    assert newest_checkpoint(tmp_path) == 0
    for name in ("step-00000020", "step-00000030", ".writing-step-00000040"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000020/manifest.json").touch()
    (tmp_path / "checkpoints/.writing-step-00000040/manifest.json").touch()
    assert newest_checkpoint(tmp_path) == 20


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_config(tmp_path_factory.mktemp("restarts"))


SHORT = ("train.num_steps=60", "checkpoint.every_steps=20", "launch.backoff_seconds=0.2")


def send_at(process: subprocess.Popen[str], run_dir: Path, rank: int, step: int, number: int) -> int:
    """Send the signal to a rank once it is in that step; returns the process id."""
    wait_until(has_reached(run_dir, step, rank), process)
    pid = pid_of(run_dir, rank)
    os.kill(pid, number)
    return pid


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=180)
    return process.returncode, error


def after_the_restart(process: subprocess.Popen[str], run_dir: Path, rank: int, earlier: int) -> None:
    wait_until(lambda: has_reached(run_dir, 0, rank)() and pid_of(run_dir, rank) != earlier, process)


@pytest.mark.distributed
def test_killed_rank_is_started_again_and_the_loss_is_bitwise_the_same(config, tmp_path):
    assert wait_for_end(start(config, tmp_path / "whole", *SHORT))[0] == 0
    run_dir = tmp_path / "killed"
    process = start(config, run_dir, *SHORT, "launch.restarts=1")
    send_at(process, run_dir, 1, 25, signal.SIGKILL)
    code, error = wait_for_end(process)
    assert code == 0, error
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert "rank 1 failed first, killed by SIGKILL" in error
    assert "restart 1 of 1 in 0.2 s, on 2 ranks, from step 20" in error
    incidents = read_incidents(run_dir)
    assert [incident["kind"] for incident in incidents] == ["rank_failed", "restart"]
    assert [(i["num_ranks"], i["code"], i["rank"]) for i in incidents] == [(2, 137, 1)] * 2
    assert incidents[0]["step"] >= 25 and incidents[1]["step"] == 20


@pytest.mark.distributed
def test_rank_that_is_killed_again_and_again_costs_the_run_a_rank(config, tmp_path):
    process = start(config, tmp_path, *SHORT, "launch.restarts=2", "checkpoint.every_steps=1000")
    first = send_at(process, tmp_path, 1, 5, signal.SIGKILL)
    after_the_restart(process, tmp_path, 1, first)
    send_at(process, tmp_path, 1, 5, signal.SIGKILL)
    code, error = wait_for_end(process)
    assert code == 0, error
    assert "restart 2 of 2 in 0.4 s, on 1 ranks instead of 2, from step 0" in error
    assert newest_checkpoint(tmp_path) == 60
    assert read_incidents(tmp_path)[-1]["num_ranks"] == 1
    launch = read_launch(tmp_path)
    assert launch and (launch.kind, launch.pid, launch.num_ranks) == ("local", process.pid, 1)


@pytest.mark.distributed
def test_restarts_that_are_used_up_leave_the_failures_code_and_message(config, tmp_path):
    process = start(config, tmp_path, *SHORT, "launch.restarts=1", "checkpoint.every_steps=1000")
    first = send_at(process, tmp_path, 1, 5, signal.SIGKILL)
    after_the_restart(process, tmp_path, 1, first)
    send_at(process, tmp_path, 0, 5, signal.SIGABRT)
    code, error = wait_for_end(process)
    assert code == 128 + signal.SIGABRT, error
    assert "rank 0 failed first, killed by SIGABRT" in error
    assert "given up after 2 failures without progress; launch.restarts=1" in error


@pytest.mark.distributed
def test_run_that_stood_still_is_started_again(config, tmp_path):
    process = start(config, tmp_path, *SHORT, "launch.restarts=1", "launch.stall_seconds=20")
    send_at(process, tmp_path, 0, 25, signal.SIGSTOP)
    code, error = wait_for_end(process)
    assert code == 0, error
    assert [incident["kind"] for incident in read_incidents(tmp_path)] == ["stall", "restart"]
    assert newest_checkpoint(tmp_path) == 60


@pytest.mark.distributed
def test_signal_while_waiting_for_a_restart_ends_at_once(config, tmp_path):
    process = start(config, tmp_path, *SHORT, "launch.restarts=1", "launch.backoff_seconds=600")
    send_at(process, tmp_path, 1, 5, signal.SIGKILL)
    wait_until(lambda: any(i["kind"] == "restart" for i in read_incidents(tmp_path)), process)
    threading.Timer(0.5, process.terminate).start()
    assert process.wait(10) == 128 + signal.SIGTERM
    process.communicate()


@pytest.mark.distributed
def test_run_that_was_asked_to_stop_is_not_started_again(config, tmp_path):
    process = start(config, tmp_path, *SHORT, "train.num_steps=100000", "launch.restarts=3")
    send_at(process, tmp_path, 1, 5, signal.SIGTERM)
    code, error = wait_for_end(process)
    assert code == 128 + signal.SIGTERM, error
    assert read_incidents(tmp_path) == [] and newest_checkpoint(tmp_path) > 5
