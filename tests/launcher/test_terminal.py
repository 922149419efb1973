"""The terminal view of `millstream watch`, in a real terminal (tmux)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from configs.incidents import append_incident
from launcher.terminal import sparkline
from tests.conftest import ROOT
from tests.launcher.run_directories import make_ring, make_run, step_line


def test_sparkline_has_the_shape_of_the_curve():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 10) == "▁▁" and len(sparkline(list(range(1000)), 60)) <= 60


@pytest.fixture
def terminal(tmp_path) -> Iterator[list[str]]:
    """A tmux server of this test's own; yields the command that speaks to it."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux (Debian package: tmux)")
    tmux = ["env", "-u", "COLUMNS", "-u", "LINES", "tmux", "-f", "/dev/null", "-S", str(tmp_path / "tmux.socket")]
    yield tmux
    subprocess.run([*tmux, "kill-server"], capture_output=True)


def screen(tmux: list[str]) -> str:
    return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True).stdout


def wait_for(tmux: list[str], text: str) -> str:
    deadline = time.monotonic() + 20
    while text not in (shown := screen(tmux)):
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)
    return shown


def test_terminal_shows_the_run_keeps_up_and_leaves_with_ctrl_c(tmp_path, terminal):
    run_dir = make_run(tmp_path / "mine")
    now = time.time()
    for rank, phase in enumerate(("backward", "reduce")):
        make_ring(run_dir, rank, 2, [(now - 1, 40, phase)])
    append_incident(run_dir, "spike", "loss 6.1 [bold]at step 7", step=7)
    watch = f"cd {ROOT} && {sys.executable} -m launcher.cli watch {run_dir} --terminal"
    # in the middle of a shell: what it leaves behind is seen
    subprocess.run(
        [
            *terminal,
            "new-session",
            "-d",
            "-x",
            "100",
            "-y",
            "30",
            f"sh -c 'trap : INT; {watch}; echo left with $?; sleep 60'",
        ],
        check=True,
    )
    shown = wait_for(terminal, "step 40 of 100, about 12 s left, checkpoint 40")
    assert "─ mine ─" in shown and "running" in shown
    assert "rank 0  backward  step 41" in shown and "rank 1  reduce    step 41" in shown
    assert "spike: loss 6.1 [bold]at step 7" in shown  # text is text
    assert any("loss" in line and "█" in line and "▁" in line for line in shown.splitlines())
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(41)) + "\n")
    wait_for(terminal, "step 41 of 100")
    subprocess.run([*terminal, "send-keys", "C-c"], check=True)
    shown = wait_for(terminal, "left with 0")
    assert "mine" not in shown  # the screen is as it was before


def test_narrow_terminal_and_several_runs_fit(tmp_path, terminal):
    runs = [make_run(tmp_path / name, steps=100) for name in ("first", "second")]
    command = f"cd {ROOT} && {sys.executable} -m launcher.cli watch {' '.join(map(str, runs))} --terminal"
    subprocess.run([*terminal, "new-session", "-d", "-x", "48", "-y", "40", command], check=True)
    shown = wait_for(terminal, "─ second ─")
    assert shown.count("finished") == 2 and all(len(line) <= 48 for line in shown.splitlines())
