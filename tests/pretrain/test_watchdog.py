"""The watch that a rank keeps over itself, where no launcher of ours does."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

WAITING = """
import sys, time
from pathlib import Path
from configs.phases import byte_counter, open_ring, ring_path
from pretrain.watchdog import watch
run_dir, seconds = Path(sys.argv[1]), float(sys.argv[2])
watch(str(run_dir), 0, 2, 2)
open_ring(ring_path(run_dir, 1), 1, 2)
wrote = byte_counter(ring_path(run_dir, 1))
end = time.monotonic() + seconds
while time.monotonic() < end:  # the other rank, whose disk is slow
    wrote(1000)
    time.sleep(0.1)
print("written", flush=True)
time.sleep(60)
"""


def seconds_until_it_ends(run_dir, writes_for: float) -> float:
    """From the last byte on."""
    command = [sys.executable, "-c", WAITING, str(run_dir), str(writes_for)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        began = time.monotonic()
        assert process.wait(50) == 124
        return time.monotonic() - began


@pytest.mark.slow
def test_rank_that_stands_still_ends_the_run(tmp_path):
    assert seconds_until_it_ends(tmp_path, writes_for=0) < 20


@pytest.mark.slow
def test_rank_that_waits_for_anothers_slow_disk_ends_the_run_only_once_no_bytes_move(tmp_path):
    assert seconds_until_it_ends(tmp_path, writes_for=6) < 20  # three times the limit
