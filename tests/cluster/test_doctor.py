"""`millstream doctor` on several hosts: real SLURM, real sshd, real faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cluster.slurm import slurm_cluster
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
OWN = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
DOCTOR = [sys.executable, "-m", "launcher.cli", "doctor"]


def run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(command, env=environment | OWN, cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def line(shown: str, check: str) -> str:
    """The table's line of a check with the lines of its cure."""
    lines = shown.splitlines()
    (start,) = [number for number, text in enumerate(lines) if text[8:].startswith(check + "  ")]
    more = [text for text in lines[start + 1 : start + 4] if text.startswith(" " * 9)]
    return " ".join(" ".join([lines[start], *more]).split())


def test_two_nodes_of_slurm_are_compared_and_leave_nothing_in_the_folder(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    with slurm_cluster(tmp_path / "slurm") as environment:
        code, shown = run([*DOCTOR, "--slurm", "--nodes=2", str(runs)], environment)
    assert code == 0, shown
    assert "2 hosts in" in shown and " 0 failed" in shown
    assert "seen by all, renames" in line(shown, "shared folder")  # the table may break the line behind it
    assert "n1:" in line(shown, "rendezvous port")
    assert "of n1" in line(shown, "clocks")
    assert "GB/s" in line(shown, "links between hosts")
    assert list(runs.iterdir()) == []
