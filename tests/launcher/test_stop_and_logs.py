"""`millstream logs` and `millstream stop`: on directories as runs leave them, and once on a real run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.incidents import append_incident
from configs.launches import Launch, write_launch
from launcher.cli import main
from launcher.restarts import newest_checkpoint
from launcher.stop import stop_run
from tests.conftest import ROOT
from tests.launcher.run_directories import dead_pid, make_ring, make_run
from tests.launcher.small_run import has_reached, make_config, start, wait_until


def log(run_dir: Path, rank: int, text: str) -> Path:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    path = run_dir / f"logs/rank-{rank}.log"
    path.write_text(text)
    return path


def failure(what: str) -> str:
    return f"before\nTraceback (most recent call last):\n  File x\nRuntimeError: {what}\n"


def test_traceback_of_the_rank_that_failed_first_comes_first(tmp_path, capsys):
    make_run(tmp_path)
    log(tmp_path, 0, failure("connection reset by peer"))
    log(tmp_path, 1, failure("the culprit"))
    append_incident(tmp_path, "rank_failed", "rank 1 failed first, with exit code 1", rank=1, code=1)
    assert main(["logs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("rank 1 failed first, with exit code 1\nTraceback")
    assert said.index("the culprit") < said.index("connection reset") < said.rindex("the culprit")


def test_without_a_launchers_word_the_earliest_traceback_is_that_of_the_first(tmp_path, capsys):
    make_run(tmp_path)
    for rank, seconds in ((0, 1000), (1, 990)):
        path = log(tmp_path, rank, failure(f"of rank {rank}"))
        os.utime(path, (seconds, seconds))
    main(["logs", str(tmp_path)])
    assert capsys.readouterr().out.startswith("rank 1 has the earliest traceback\nTraceback")


def test_traceback_of_an_earlier_start_is_not_shown(tmp_path, capsys):
    make_run(tmp_path)
    log(tmp_path, 0, failure("old") + "--- started again at 2026-11-25T12:00:00+00:00\nall is well\n")
    main(["logs", str(tmp_path)])
    assert capsys.readouterr().out == f"==> {tmp_path}/logs/rank-0.log <==\nall is well\n\n"


def test_one_rank_is_shown_whole_and_cannot_steer_the_terminal(tmp_path, capsys):
    make_run(tmp_path)
    log(tmp_path, 1, "\x1b[31mred\x1b[0m\x07\n" + "line\n" * 100)
    main(["logs", str(tmp_path), "--rank", "1"])
    assert capsys.readouterr().out == "red\n" + "line\n" * 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "7"], "no log of rank 7; there are those of ranks 0"),
        (["--rank"], "expected the number of a rank"),
        (["--all"], "expected RUN_DIR"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, capsys, words, message):
    make_run(tmp_path)
    log(tmp_path, 0, "here\n")
    assert main(["logs", str(tmp_path), *words]) == 2 and message in capsys.readouterr().err


def test_following_shows_what_is_added_behind_its_rank_and_ends_with_the_run(tmp_path):
    make_run(tmp_path)
    log(tmp_path, 0, "")
    run = subprocess.Popen(["sleep", "60"])
    make_ring(tmp_path, 0, 1, [(time.time(), 3, "forward")], pid=run.pid)
    command = [sys.executable, "-u", "-m", "launcher.cli", "logs", str(tmp_path), "--follow"]
    follower = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(0.7)
        log(tmp_path, 0, "first\n")
        log(tmp_path, 3, "other\nhalf")
        assert sorted(follower.stdout.readline() for _ in range(2)) == ["rank-0 | first\n", "rank-3 | other\n"]
    finally:
        run.kill()
        run.wait()
    assert follower.wait(timeout=20) == 0


def test_stopping_a_run_that_does_not_run_sends_nothing_and_says_how_it_ended(tmp_path, capsys):
    make_run(tmp_path, steps=100)
    make_ring(tmp_path, 0, 1, [(time.time(), 100, "end")], pid=dead_pid())
    assert stop_run(tmp_path, now=False) == 0
    assert "is not running, nothing was sent; finished" in capsys.readouterr().out


def test_process_that_got_the_runs_number_is_left_alone(tmp_path, capsys):
    make_run(tmp_path)
    other = subprocess.Popen(["sleep", "60"])
    try:
        write_launch(tmp_path, Launch("local", [], pid=other.pid, started="2026-01-01T00:00:00+00:00"))
        assert stop_run(tmp_path, now=True) == 0
        assert other.poll() is None and "nothing was sent" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()


def test_run_of_another_machine_is_not_stopped_from_here(tmp_path):
    make_run(tmp_path)
    make_ring(tmp_path, 0, 1, [(time.time(), 3, "forward")], host="node7")
    with pytest.raises(ConfigError, match="runs on node7, not on this machine; nothing was sent"):
        stop_run(tmp_path, now=False)


def test_rank_is_asked_where_the_launcher_is_gone(tmp_path, capsys):
    make_run(tmp_path)
    rank = subprocess.Popen(["sleep", "60"])
    threading.Thread(target=rank.wait, daemon=True).start()  # as its launcher would: no dead process stays
    make_ring(tmp_path, 0, 1, [(time.time(), 3, "forward")], pid=rank.pid)
    write_launch(tmp_path, Launch("local", [], pid=dead_pid()))
    assert stop_run(tmp_path, now=False) == 0
    assert f"asked a rank (pid {rank.pid})" in capsys.readouterr().out
    assert rank.wait() == -signal.SIGTERM


def test_other_programs_launchers_are_not_asked_because_they_give_no_time_to_save(tmp_path, capsys):
    make_run(tmp_path)
    launcher, rank = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    for process in (launcher, rank):
        threading.Thread(target=process.wait, daemon=True).start()
    try:
        write_launch(tmp_path, Launch("hosts", ["millstream", "pretrain", "x", "--launcher", "pdsh"], pid=launcher.pid))
        make_ring(tmp_path, 0, 1, [(time.time(), 3, "forward")], host="node7")
        with pytest.raises(ConfigError, match="its ranks run on node7, and their launcher here would end them without"):
            stop_run(tmp_path, now=False)
        make_ring(tmp_path, 0, 1, [(time.time(), 3, "forward")], pid=rank.pid)
        monitor = threading.Thread(target=lambda: (rank.wait(), launcher.kill()))
        monitor.start()
        assert stop_run(tmp_path, now=False) == 0
        assert f"asked a rank (pid {rank.pid})" in capsys.readouterr().out
        monitor.join(10)
        assert rank.wait() == -signal.SIGTERM and launcher.wait() == -signal.SIGKILL
    finally:
        launcher.kill()
        rank.kill()


def test_job_gets_the_signal_through_scancel(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    write_launch(tmp_path / "run", Launch("slurm", [], job="17"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (
        ("squeue", f"test -e {tmp_path}/cancelled || echo 'RUNNING|None'"),
        ("scancel", f'echo "$@" > {tmp_path}/cancelled'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert stop_run(tmp_path / "run", now=False) == 0
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 17\n"
    assert "asked job 17 to finish its step" in capsys.readouterr().out


@pytest.fixture
def runs() -> Iterator[list[subprocess.Popen[str]]]:
    """Runs that a test starts: ended with it, whatever happens."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.terminate()
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_real_run_is_seen_running_stopped_and_logged_and_is_ended_at_once(tmp_path, capfd, runs):
    config, run_dir = make_config(tmp_path), tmp_path / "run"
    runs.append(start(config, run_dir, num_ranks=1))
    wait_until(lambda: (run_dir / "launch.json").exists(), runs[0])
    assert main(["status", str(run_dir)]) == 0 and "starting" in capfd.readouterr().out
    wait_until(has_reached(run_dir, 3), runs[0])
    assert main(["status", str(run_dir)]) == 0
    said = capfd.readouterr().out
    assert "state       running" in said and f"pid {runs[0].pid}" in said and "1 rank: 1 in" in said
    threading.Thread(target=runs[0].wait, daemon=True).start()  # as a shell would: no dead process stays
    assert stop_run(run_dir, now=False) == 0
    step = newest_checkpoint(run_dir)
    said = capfd.readouterr().out
    assert runs[0].wait(10) == 143 and step >= 3
    assert f"stopped: as asked; the same command goes on from there; the newest checkpoint is of step {step}" in said
    assert main(["logs", str(run_dir), "--rank", "0"]) == 0
    assert f"stopped at step {step}, which is saved" in capfd.readouterr().out

    runs.append(start(config, run_dir, num_ranks=1))
    wait_until(has_reached(run_dir, step + 2), runs[1])
    threading.Thread(target=runs[1].wait, daemon=True).start()
    began = time.monotonic()
    assert stop_run(run_dir, now=True) == 0
    assert time.monotonic() - began < 10 and runs[1].wait(10) == 143
