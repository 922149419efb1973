"""What rank 0 prints is on the terminal, as it is, and in its log file, as whole lines."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

from launcher.tee import Lines
from tests.conftest import ROOT

START = (
    "import sys; from pathlib import Path; from launcher.local import Signals, run_local\n"
    "sys.exit(run_local('job', ['word'], 1, Path({run_dir!r}), Signals()).code)"
)
PROGRESS = (
    "import sys, time\n"
    "from rich.progress import Progress\n"
    "print('on a terminal:', sys.stdout.isatty(), sys.stderr.isatty())\n"
    "with Progress() as progress:\n"
    "    task = progress.add_task('step', total=40)\n"
    "    for number in range(40):\n"
    "        progress.update(task, completed=number + 1, refresh=True)\n"
    "        if number == 20: progress.console.print('a line between')\n"
)


def launch(tmp_path: Path, script: str, **streams: object) -> subprocess.Popen[bytes]:
    (tmp_path / "job.py").write_text(script)
    command = [sys.executable, "-c", START.format(run_dir=str(tmp_path))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "60", "TERM": "xterm"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)  # type: ignore[call-overload]


def log(tmp_path: Path) -> str:
    return (tmp_path / "logs/rank-0.log").read_text()


def test_stdout_and_stderr_stay_apart_and_are_both_in_the_log(tmp_path):
    script = "import sys; print('to out'); print('to err', file=sys.stderr)"
    out, error = launch(tmp_path, script, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=60)
    assert (out, error) == (b"to out\n", b"to err\n")
    assert sorted(log(tmp_path).splitlines()) == ["to err", "to out"]


def test_rank_0_sees_a_terminal_where_there_is_one_and_its_log_has_the_lines_without_the_redrawing(tmp_path):
    master, slave = pty.openpty()
    process = launch(tmp_path, PROGRESS, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:
            break
    assert process.wait(timeout=60) == 0
    assert b"on a terminal: True True" in shown and shown.count(b"\r") > 40 and b"\x1b[" in shown
    lines = log(tmp_path).splitlines()
    assert lines[:2] == ["on a terminal: True True", "a line between"]
    assert len(lines) == 3 and "100%" in lines[2] and "\x1b" not in log(tmp_path)


def test_last_words_of_a_rank_that_crashes_are_in_its_log_and_come_before_the_launchers(tmp_path):
    script = "import os; print('last words'); os.write(2, b'no line end'); os.abort()"
    process = launch(tmp_path, script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 134
    assert out.index(b"last words") < out.index(b"rank 0 failed first, killed by SIGABRT")
    assert b"no line end" in out and sorted(log(tmp_path).splitlines()) == ["last words", "no line end"]


def test_rank_0_goes_on_printing_when_its_launcher_was_killed(tmp_path):
    script = "import time; print('before'); time.sleep(2); print('after')"
    process = launch(tmp_path, script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while b"before" not in os.read(process.stdout.fileno(), 100):
        pass
    process.kill()
    process.communicate(timeout=60)  # ends when nobody holds the other ends any more
    assert log(tmp_path).splitlines() == ["before", "after"]


def test_log_goes_on_when_nobody_reads_the_terminal(tmp_path):
    script = "import time; print('first'); time.sleep(0.5); print('second'); time.sleep(0.2); print('third')"
    process = launch(tmp_path, script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert log(tmp_path).splitlines() == ["first", "second", "third"]


def test_second_start_writes_behind_the_first(tmp_path):
    for _ in range(2):
        launch(tmp_path, "print('here')", stdout=subprocess.DEVNULL).wait(timeout=60)
        time.sleep(0.1)
    first, between, second = log(tmp_path).splitlines()
    assert (first, second) == ("here", "here") and between.startswith("--- started again at 20")


def test_line_is_what_stood_there_when_it_ended():
    lines = Lines()
    assert lines.take(b"one\ntw") == b"one\n"
    assert lines.take(b"o\r\x1b[2Kthree \x1b[31mred\x1b[0m") == b""
    assert lines.take(b"!\r\nlast") == b"three red!\n"
    assert lines.end() == b"last\n" and Lines().end() == b""
