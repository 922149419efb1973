"""Workers do every task once; an error, a killed worker or Ctrl-C ends all of them at once, with a word to the user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import ConfigError
from configs.schema import BuildConfig
from data_pipeline.engines import open_engine
from data_pipeline.shards import DataError
from tests.conftest import ROOT

LONG_SECONDS = 60  # much more than a test may take: whoever waits for such a task fails


def square(number: int) -> int:
    return number * number


def leave_mark(folder: Path, number: int) -> None:
    (folder / str(number)).write_text(str(os.getpid()))
    time.sleep(LONG_SECONDS)


def fail_after_mark(folder: Path, error: Exception | None, number: int) -> None:
    if number:
        leave_mark(folder, number)
    while not (folder / "1").exists():
        time.sleep(0.01)
    if error is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise error


def kill_the_last_worker(folder: Path, number: int) -> None:
    """Of two workers, the one that was started last is killed while the other one still has much to do."""
    (folder / f"{number}.pid").write_text(str(os.getpid()))
    (folder / f"{number}.pid").rename(folder / str(number))
    while not (folder / str(1 - number)).exists():
        time.sleep(0.01)
    if os.getpid() > int((folder / str(1 - number)).read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG_SECONDS)


def pid_in(folder: Path) -> int:
    deadline = time.monotonic() + 30
    while not ((folder / "1").exists() and (folder / "1").read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return int((folder / "1").read_text())


def is_running(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_task_is_done_once(tmp_path, num_workers):
    with open_engine(BuildConfig(), tmp_path, num_workers) as (run, found):
        assert found == num_workers
        assert sorted(run(square, [(number,) for number in range(20)])) == [number**2 for number in range(20)]
        assert list(run(square, [])) == []


@pytest.mark.parametrize(
    "error", [DataError("a.jsonl:3: is broken"), ConfigError("no such language"), OSError(28, "No space")]
)
def test_error_of_a_task_is_raised_as_it_is_and_ends_the_other_workers(tmp_path, error):
    started = time.monotonic()
    with pytest.raises(type(error)) as caught, open_engine(BuildConfig(), tmp_path, 2) as (run, _):
        list(run(fail_after_mark, [(tmp_path, error, number) for number in range(2)]))
    assert str(caught.value) == str(error)
    assert time.monotonic() - started < LONG_SECONDS / 2
    assert not is_running(pid_in(tmp_path))


def test_killed_worker_is_an_error_that_says_what_is_kept_and_ends_the_others(tmp_path):
    with pytest.raises(DataError) as caught, open_engine(BuildConfig(), tmp_path, 2) as (run, _):
        list(run(fail_after_mark, [(tmp_path, None, number) for number in range(2)]))
    assert "it was killed" in str(caught.value) and "Finished parts are kept" in str(caught.value)
    assert not is_running(pid_in(tmp_path))


def test_kill_of_the_worker_that_was_started_last_is_noticed_at_once(tmp_path):
    started = time.monotonic()
    with pytest.raises(DataError, match="it was killed"), open_engine(BuildConfig(), tmp_path, 2) as (run, _):
        list(run(kill_the_last_worker, [(tmp_path, number) for number in range(2)]))
    assert time.monotonic() - started < LONG_SECONDS / 2


@pytest.mark.slow
def test_killed_worker_of_datatrove_is_not_waited_for(tmp_path):
    pytest.importorskip("datatrove")
    engine = BuildConfig(engine="datatrove")
    with pytest.raises(DataError, match="it was killed"), open_engine(engine, tmp_path, 2) as (run, _):
        list(run(fail_after_mark, [(tmp_path, None, number) for number in range(2)]))
    assert not is_running(pid_in(tmp_path))


def test_ctrl_c_while_the_server_of_the_workers_imports_shows_no_traceback_of_it():
    code = (
        "import time; from data_pipeline.engines import start_server; start_server(); print(flush=True); time.sleep(60)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, process_group=0, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "\n"
    time.sleep(0.05)  # Python has started by then, and imports
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=LONG_SECONDS / 2)
    assert errors.count("Traceback") == 1  # this program's own


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them_however_it_ends(tmp_path, end):
    program = (
        "import sys; from pathlib import Path; from configs.schema import BuildConfig\n"
        "from data_pipeline.engines import open_engine; from tests.data_pipeline.test_engines import leave_mark\n"
        "with open_engine(BuildConfig(), Path(), 2) as (run, _):\n"
        "    list(run(leave_mark, [(Path(sys.argv[1]), number) for number in range(2)]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, process_group=0, text=True
    )
    worker = pid_in(tmp_path)
    # Ctrl-C goes to all processes of a terminal, the other signals to one
    (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
    _, errors = process.communicate(timeout=LONG_SECONDS / 2)
    assert not is_running(worker)
    assert errors.count("Traceback") == (end == signal.SIGINT)  # this program's own, none of a worker
