"""Ranks on this machine: their environment, signals, and whose failure is shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.incidents import read_incidents
from launcher.local import LocalRank, cores_of_rank, first_failure, rank_environment, stopped_code
from tests.conftest import ROOT

START = (
    "import sys; from pathlib import Path; from launcher.local import Signals, run_local\n"
    "sys.exit(run_local('job', ['word'], {num_ranks}, Path({run_dir!r}), Signals()).code)"
)


def launch(tmp_path: Path, script: str, num_ranks: int, before: str = "") -> subprocess.Popen[str]:
    """Start `script` as a module on `num_ranks` ranks, through run_local."""
    (tmp_path / "job.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "-c", before + "\n" + START.format(num_ranks=num_ranks, run_dir=str(tmp_path))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_get_what_the_deepspeed_launcher_and_torchrun_give(tmp_path):
    script = "import os, sys; print(*[os.environ[n] for n in 'RANK LOCAL_RANK WORLD_SIZE'.split()], sys.argv[1])"
    out, _ = launch(tmp_path, script, 3).communicate(timeout=60)
    assert out.strip() == "0 0 3 word"
    assert [(tmp_path / f"logs/rank-{r}.log").read_text().strip() for r in (1, 2)] == ["1 1 3 word", "2 2 3 word"]


def test_cores_are_shared_among_the_ranks_and_a_set_value_stays(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("launcher.local.count_gpus", lambda: 0)
    assert int(rank_environment(2)["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(2)["OMP_NUM_THREADS"] == "7"


def test_cpu_rank_with_as_many_threads_as_its_share_of_the_cores_stays_on_them():
    def bound(rank: int, num_ranks: int, cores: list[int], **environment: str) -> list[int]:
        own = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks), "DS_ACCELERATOR": "cpu"} | environment
        return cores_of_rank(own, cores)

    assert [bound(rank, 2, [0, 1], OMP_NUM_THREADS="1") for rank in (0, 1)] == [[0], [1]]
    assert [bound(rank, 3, list(range(4, 11)), OMP_NUM_THREADS="2") for rank in (0, 1, 2)] == [[4, 5], [6, 7], [8, 9]]
    assert bound(0, 2, [0, 1, 2, 3], OMP_NUM_THREADS="4") == []  # the user's number: they share all cores
    assert bound(0, 4, [0, 1], OMP_NUM_THREADS="1") == []  # fewer cores than ranks
    assert bound(0, 1, [0, 1], OMP_NUM_THREADS="2") == []
    assert bound(0, 2, [0, 1]) == [] and bound(0, 2, [0, 1], OMP_NUM_THREADS="1", DS_ACCELERATOR="cuda") == []


def test_rank_is_bound_before_it_starts_a_thread(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    own = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(len(cores) // 2)}
    program = "import time, os; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)))"
    rank = LocalRank([sys.executable, "-c", program], os.environ | own, stdout=subprocess.PIPE)
    shown, _ = rank.communicate()
    assert shown.decode().strip() == str(cores[len(cores) // 2 : len(cores) // 2 * 2])


def test_first_failing_ranks_output_is_shown_and_the_others_are_ended(tmp_path):
    script = (
        "import os, time\n"
        "if os.environ['RANK'] == '1': time.sleep(0.5); raise RuntimeError('the culprit')\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    process = launch(tmp_path, script, 3)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 failed first, with exit code 1" in error and "RuntimeError: the culprit" in error
    assert time.monotonic() - began < 30
    incident = read_incidents(tmp_path)[-1]
    assert (incident["kind"], incident["rank"], incident["code"]) == ("rank_failed", 1, 1)


def test_killed_rank_is_the_first_failure_not_the_one_that_failed_because_of_it():
    assert first_failure([1, None, -9]) == 2
    assert first_failure([None, 1, 1]) == 1
    assert first_failure([-6, 2, 1]) == 1
    assert first_failure([0, 143, None, 130]) is None


def test_rank_whose_host_is_gone_goes_before_those_that_died_of_it():
    assert first_failure([-signal.SIGABRT, 1, -signal.SIGHUP]) == 2


def test_rank_that_died_of_a_signal_was_stopped_only_if_the_command_was_asked():
    assert stopped_code([None, -15], asked=None) is None
    assert stopped_code([None, -15], asked=signal.SIGINT) == 130
    assert stopped_code([None, 138], asked=None) == 138
    assert stopped_code([0, 1, None], asked=signal.SIGTERM) is None


def test_killed_rank_is_named_with_its_signal_and_what_it_started_is_ended_too(tmp_path):
    script = (
        "import os, subprocess, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "time.sleep(600)\n"
    )
    process = launch(tmp_path, script, 2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "rank 1 failed first, killed by SIGKILL" in error and "for want of memory" in error
    child = int((tmp_path / "logs/rank-1.log").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_reaches_every_rank_and_its_exit_code_comes_back(tmp_path, number):
    script = (
        "import os, pathlib, signal, sys, time\n"
        "def stop(number, frame): print('stopped', flush=True); sys.exit(128 + number)\n"
        "[signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready-' + os.environ['RANK']).touch()\n"
        "time.sleep(600)\n"
    )
    process = launch(tmp_path, script, 2)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out.strip() == "stopped" and (tmp_path / "logs/rank-1.log").read_text().strip() == "stopped"


def test_second_signal_ends_at_once_even_ranks_that_do_not_listen(tmp_path):
    script = (
        "import os, pathlib, signal, time\n"
        "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready-' + os.environ['RANK']).touch()\n"
        "time.sleep(600)\n"
    )
    process = launch(tmp_path, script, 2)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None  # the ranks may finish what they do
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 2


def test_run_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    start = START.format(num_ranks=1, run_dir=str(tmp_path / "file/below"))
    done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be written" in done.stderr and "choose a directory you can write to" in done.stderr


def test_rank_that_stays_when_the_others_have_stopped_is_ended(tmp_path):
    script = "import os, sys, time\nif os.environ['RANK'] == '0': sys.exit(143)\ntime.sleep(600)\n"
    process = launch(tmp_path, script, 2, "from launcher import local; local.GRACE_SECONDS = 1")
    process.communicate(timeout=60)
    assert process.returncode == 143
