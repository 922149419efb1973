"""Runs of two ranks that really stand still: the right one is named with its phase, and all ends with 124, in time."""

from __future__ import annotations

import functools
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.incidents import read_incidents
from configs.phases import read_rings
from tests.conftest import ROOT
from tests.launcher.small_run import has_reached, make_config, pid_of, start, wait_until
from tests.ranks import finish, start_ranks

pytestmark = pytest.mark.distributed

STALL = 20  # seconds: more than a start may take without a mark while the machine has other work
BOUND = STALL + 20  # seconds: two for the look, three for the stacks, ten for those that do not end when asked to


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_config(tmp_path_factory.mktemp("stalls"))


def ended(process: subprocess.Popen[str], run_dir: Path, rank: int | None, phase: str) -> str:
    """Wait for the end and check what every stall has in common; returns what was printed."""
    began = time.monotonic()
    _, error = process.communicate(timeout=BOUND + 20)
    assert process.returncode == 124, error
    assert time.monotonic() - began < BOUND
    incident = [incident for incident in read_incidents(run_dir) if incident["kind"] == "stall"][-1]
    assert (incident["rank"], incident["phase"], incident["code"], incident["num_ranks"]) == (rank, phase, 124, 2)
    assert incident["text"] in error and (run_dir / "ranks/stall.txt").read_text().strip() in error
    assert not any(Path(f"/proc/{ring.pid}").exists() for ring in read_rings(run_dir, 2) if ring)
    return error


def test_stopped_rank_is_named(config, tmp_path):
    process = start(config, tmp_path, f"launch.stall_seconds={STALL}")
    wait_until(has_reached(tmp_path, 5), process)
    victim = pid_of(tmp_path, 1)
    os.kill(victim, signal.SIGSTOP)
    time.sleep(0.5)
    phase = read_rings(tmp_path, 2)[1].phase
    error = ended(process, tmp_path, 1, phase)
    assert "rank 1 is behind" in error and "the process is stopped (by SIGSTOP" in error
    assert "waits in a collective" in next(line for line in error.splitlines() if line.startswith("  0 "))


def test_rank_whose_worker_gives_no_data_is_named_with_its_stack(config, tmp_path):
    process = start(config, tmp_path, f"launch.stall_seconds={STALL}", "data.num_workers=1")
    wait_until(lambda: workers_of(tmp_path, 1), process)
    wait_until(has_reached(tmp_path, 20), process)
    worker = workers_of(tmp_path, 1)[0]
    os.kill(worker, signal.SIGSTOP)
    error = ended(process, tmp_path, 1, "data")
    assert "rank 1 is behind, in phase data" in error and "look at data.dir" in error
    assert "stack of rank 1, innermost call first" in error and "in micro_batches" in error
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), None, 5)


def workers_of(run_dir: Path, rank: int) -> list[int]:
    pid = pid_of(run_dir, rank) if has_reached(run_dir, 0, rank)() else None
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "data_pipeline.workers"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


class StopsAnswering(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; once `silent` is set, requests for shards of training data are never answered."""

    silent = threading.Event()

    def do_GET(self) -> None:
        if self.silent.is_set() and "/train/" in self.path and self.path.endswith(".tokens"):
            time.sleep(600)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


def test_server_that_stops_answering_is_a_stall_in_data(config, tmp_path):
    handler = functools.partial(StopsAnswering, directory=config.parent / "data")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    StopsAnswering.silent.set()
    url = f"http://127.0.0.1:{server.server_port}"
    process = start(
        config, tmp_path / "run", f"launch.stall_seconds={STALL}", f"data.dir={url}",
        f"data.cache.dir={tmp_path}/cache",
    )  # fmt: skip
    try:
        wait_until(lambda: has_phase(tmp_path / "run", "data"), process)
        _, error = process.communicate(timeout=BOUND + 30)
    finally:
        server.shutdown()
    assert process.returncode == 124, error
    assert "behind, in phase data of step 0" in error or "all ranks are in phase data of step 0" in error
    assert "look at data.dir, its file system or server" in error and "data_pipeline/store.py" in error


def has_phase(run_dir: Path, phase: str) -> bool:
    return any(ring is not None and ring.phase == phase for ring in read_rings(run_dir, 2))


@pytest.mark.skipif(os.geteuid() != 0, reason="freezing a file system needs root")
def test_save_that_is_blocked_for_all_ranks_is_named(config, tmp_path):
    disk, image, run_dir = tmp_path / "disk", tmp_path / "image", tmp_path / "run"
    disk.mkdir()
    run_dir.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(disk)], capture_output=True)
    if made.returncode or mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    (run_dir / "checkpoints").symlink_to(disk)
    try:
        process = start(config, run_dir, f"launch.stall_seconds={STALL}", "checkpoint.every_steps=50")
        wait_until(has_reached(run_dir, 5), process)
        subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
        threading.Timer(BOUND - 5, thaw, [disk]).start()  # a process that waits for a frozen disk cannot be killed
        error = ended(process, run_dir, None, "save")
        assert "all ranks are in phase save of step" in error and "look at the file system of run_dir" in error
    finally:
        thaw(disk)
        subprocess.run(["umount", str(disk)], check=True)


def thaw(disk: Path) -> None:
    subprocess.run(["fsfreeze", "-u", str(disk)], capture_output=True)


def test_rank_that_never_came_is_named(config, tmp_path):
    """Rank 1's process is there, but does not come as far as its first mark: it is stopped while it imports."""
    process = start(config, tmp_path, f"launch.stall_seconds={STALL}")
    wait_until(lambda: rank_process(process.pid, 1), process)
    os.kill(rank_process(process.pid, 1) or 0, signal.SIGSTOP)
    _, error = process.communicate(timeout=BOUND + 30)
    assert process.returncode == 124, error
    assert "rank 1 is behind and made no mark at all" in error
    assert "it was not started, or still imports" in error


def rank_process(launcher: int, rank: int) -> int | None:
    """The process of this rank, once the launcher has started it."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    return None


def test_under_another_launcher_a_rank_names_the_one_behind_and_ends_the_job(config, tmp_path):
    """The ranks are started as SLURM or torchrun would: nothing of ours watches them from outside."""
    run_dir = tmp_path / "run"
    words = ["-m", "pretrain.train", "--config", str(config), f"run_dir={run_dir}", f"launch.stall_seconds={STALL}"]
    processes = start_ranks(2, words, tmp_path / "logs")
    wait_until(has_reached(run_dir, 5), None)
    os.kill(processes[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    while processes[1].poll() is None and time.monotonic() - began < BOUND:
        time.sleep(0.1)
    processes[0].kill()
    assert finish(processes) == [-signal.SIGKILL, 124]
    error = (tmp_path / "logs/rank-1.log").read_text()
    assert "rank 0 is behind" in error and "the process is stopped" in error
    assert read_incidents(run_dir)[-1]["rank"] == 0


def test_deepspeeds_launcher_ends_with_124(config, tmp_path):
    words = ["pretrain/train.py", "--config", str(config), f"run_dir={tmp_path}", f"launch.stall_seconds={STALL}"]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    process = subprocess.Popen(
        [launcher, "--num_accelerators", "2", *words, "data.num_workers=1"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(has_reached(tmp_path, 20), process)
    wait_until(lambda: workers_of(tmp_path, 1), process)
    worker = workers_of(tmp_path, 1)[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        assert process.wait(BOUND + 30) == 124
    finally:
        os.kill(worker, signal.SIGKILL)  # it holds the pipe
    out, _ = process.communicate(timeout=10)
    assert "rank 1 is behind, in phase data" in out
