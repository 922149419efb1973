"""Runs on two hosts: real sshd, ssh, pdsh and mpirun between network namespaces. Each ends as on one machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.incidents import read_incidents
from tests.cluster.namespaces import Hosts, command_line, network_hosts
from tests.conftest import ROOT
from tests.launcher.small_run import has_reached, losses, make_config, wait_until
from tests.pretrain.test_objective import metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SECRET = "not-for-other-eyes"
RUN = ["train.num_steps=40", "checkpoint.every_steps=10", "log.every_steps=40"]
OWN = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Cluster:
    hosts: Hosts
    folder: Path
    config: Path

    def start(self, run_dir: Path, *words: str, before: tuple[str, ...] = (), **more: str) -> subprocess.Popen[str]:
        """`BEFORE millstream pretrain CONFIG WORDS`, given on h1."""
        own = [sys.executable, "-m", "launcher.cli", "pretrain", str(self.config), f"run_dir={run_dir}", *RUN, *words]
        environment = {"MILLSTREAM_SSH_ARGS": self.hosts.ssh_arguments, "GLOO_SOCKET_IFNAME": "e0"} | more
        return subprocess.Popen(
            self.hosts.inside("h1", [*before, *own]), cwd=ROOT, env=os.environ | OWN | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def hostfile(self, *lines: str) -> list[str]:
        path = self.folder / "hostfile"
        path.write_text("# two hosts\n" + "".join(f"{line}\n" for line in lines or ("h1 slots=1", "h2 slots=1")))
        return ["--hosts", str(path)]


def finish(process: subprocess.Popen[str], code: int, seconds: float = 60) -> str:
    """Wait for it; returns what it wrote to stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, out[-2000:] + err[-4000:]
    return err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    with network_hosts(folder / "network") as hosts:
        yield Cluster(hosts, folder, make_config(folder))


@pytest.fixture(scope="module")
def on_one_machine(cluster) -> list[dict]:
    """The metrics of the same run by two ranks of one machine."""
    finish(cluster.start(cluster.folder / "alone", "--ranks", "2", GLOO_SOCKET_IFNAME="lo"), 0)
    assert len(losses(cluster.folder / "alone")) == 40
    return metrics(cluster.folder / "alone")


def secrets_on_command_lines(hosts: Hosts, process: subprocess.Popen[str]) -> list[str]:
    """Look at all processes of both hosts until the run has ended."""
    found = []
    while process.poll() is None:
        lines = [command_line(pid) for name in hosts.addresses for pid in hosts.pids(name)]
        found += [line for line in lines if SECRET in line]
        time.sleep(0.3)
    return found


def files_with_secret(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.skipif(not shutil.which("pdsh"), reason="no pdsh (Debian's package)")
def test_pdsh_run_with_a_host_cut_off_stands_still_ends_and_goes_on_as_if_nothing_had_been(cluster, on_one_machine):
    run_dir = cluster.folder / "pdsh"
    words = [*cluster.hostfile(), "--launcher", "pdsh", "launch.stall_seconds=4"]
    process = cluster.start(run_dir, *words, MLFLOW_TRACKING_TOKEN=SECRET)
    wait_until(has_reached(run_dir, 15), process)
    began = time.monotonic()
    cluster.hosts.cut_off("h2")
    try:
        out, err = process.communicate(timeout=80)
        assert process.returncode == 124 and time.monotonic() - began < 45, out[-2000:] + err[-2000:]
        # whichever rank reports: what the one on the lost host prints arrives nowhere
        assert "stall" in [incident["kind"] for incident in read_incidents(run_dir)] and SECRET not in out + err
        assert cluster.hosts.running("h1", "pretrain.train") == cluster.hosts.running("h2", "pretrain.train") == []
    finally:
        cluster.hosts.connect_again("h2")
    process = cluster.start(run_dir, *words[:-1], MLFLOW_TRACKING_TOKEN=SECRET)
    assert secrets_on_command_lines(cluster.hosts, process) == []
    finish(process, 0)
    assert metrics(run_dir) == on_one_machine
    assert "eval loss" in (run_dir / "logs/rank-0.log").read_text()


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun (Debian's openmpi-bin)")
def test_ranks_of_mpirun_on_two_hosts_find_the_first_one_by_mpi(cluster, on_one_machine):
    agent = ["--mca", "plm_rsh_agent", f"ssh {cluster.hosts.ssh_arguments}"]
    passed = [word for name in [*OWN, "GLOO_SOCKET_IFNAME"] for word in ("-x", name)]
    before = ("mpirun", "--allow-run-as-root", *agent, "--host", "h1:1,h2:1", *passed)
    finish(cluster.start(cluster.folder / "mpi", before=before), 0)
    assert metrics(cluster.folder / "mpi") == on_one_machine


def test_hosts_that_do_not_answer_or_are_not_known_are_named_before_any_rank_starts(cluster):
    nobody = f"{cluster.hosts.addresses['h1'].rpartition('.')[0]}.254"  # this machine itself, where no sshd listens
    err = finish(cluster.start(cluster.folder / "none", *cluster.hostfile("h1 slots=1", f"{nobody} slots=1")), 2)
    assert f"host {nobody}: ssh ended with exit code 255" in err and "host h1" not in err
    unknown = f"{cluster.hosts.ssh_arguments} -o UserKnownHostsFile=/dev/null"
    err = finish(cluster.start(cluster.folder / "none", *cluster.hostfile(), MILLSTREAM_SSH_ARGS=unknown), 2)
    assert "Host key verification failed" in err and "host h2: ssh ended" in err
    assert not (cluster.folder / "none/ranks/rank-00000.phases").exists()


def test_host_that_is_cut_off_ends_the_run_which_goes_on_later_as_if_nothing_had_been(cluster, on_one_machine):
    run_dir = cluster.folder / "cut"
    words = [*cluster.hostfile(), "launch.silence_seconds=4"]
    process = cluster.start(run_dir, *words)
    wait_until(has_reached(run_dir, 15), process)
    began = time.monotonic()
    cluster.hosts.cut_off("h2")
    try:
        err = finish(process, 128 + signal.SIGHUP)
        assert time.monotonic() - began < 20
        assert "rank 1 failed first, its host h2 is gone: nothing was heard of it for 4 s" in err
        assert [(i["kind"], i["rank"]) for i in read_incidents(run_dir)] == [("rank_failed", 1)]
        assert cluster.hosts.running("h1", "pretrain.train") == []
        left = cluster.hosts.running("h2", "pretrain.train")
    finally:
        cluster.hosts.connect_again("h2")
    finish(cluster.start(run_dir, *words[:-1]), 0)
    assert metrics(run_dir) == on_one_machine
    assert (run_dir / "logs/rank-0.log").stat().st_size and (run_dir / "logs/rank-1.log").exists()
    wait_until(lambda: not set(left) & set(cluster.hosts.pids("h2")), None, seconds=30)  # it has noticed by itself


def test_killed_rank_and_killed_connection_start_the_run_again_and_no_secret_is_shown(cluster, on_one_machine):
    run_dir, variables = cluster.folder / "killed", cluster.folder / "variables"
    variables.write_text(f"MY_API_TOKEN={SECRET}\n")  # asked for: it goes along, over the connection
    words = [*cluster.hostfile(), "launch.restarts=2", "launch.backoff_seconds=0.1"]
    process = cluster.start(run_dir, *words, DS_ENV_FILE=str(variables), HF_TOKEN=SECRET)
    wait_until(has_reached(run_dir, 15, rank=1), process)
    (rank,) = cluster.hosts.running("h2", "pretrain.train")
    environment = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
    assert f"MY_API_TOKEN={SECRET}".encode() in environment
    assert not [variable for variable in environment if variable.startswith(b"HF_TOKEN")]
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: len(read_incidents(run_dir)) == 2 and has_reached(run_dir, 25, rank=1)(), process)
    for session in cluster.hosts.running("h2", "sshd: root"):
        os.kill(session, signal.SIGKILL)
    assert secrets_on_command_lines(cluster.hosts, process) == []
    err = finish(process, 0)
    assert "rank 1 failed first, killed by SIGKILL" in err
    assert "rank 1 failed first, its host h2 is gone: its ssh connection has ended" in err
    # What the second one left of the ranks may have stopped and saved: an evaluation that the other run does not have.
    assert losses(run_dir) == [line["loss"] for line in on_one_machine if "loss" in line]
    assert metrics(run_dir)[-1] == on_one_machine[-1]
    assert files_with_secret(run_dir) == [] and cluster.hosts.running("h2", "launcher/host.py") == []


def test_rank_that_hangs_on_another_host_is_named_and_nothing_is_left(cluster):
    run_dir = cluster.folder / "hanging"
    process = cluster.start(run_dir, *cluster.hostfile(), "launch.stall_seconds=10")
    wait_until(has_reached(run_dir, 15, rank=1), process)
    (rank,) = cluster.hosts.running("h2", "pretrain.train")
    os.kill(rank, signal.SIGSTOP)
    began = time.monotonic()
    err = finish(process, 124, seconds=80)
    assert time.monotonic() - began < 60
    assert "rank 1 is behind" in err and re.search(r"^  1 +h2 .*<- behind$", err, re.MULTILINE), err
    (incident,) = read_incidents(run_dir)
    assert (incident["kind"], incident["rank"]) == ("stall", 1)
    assert cluster.hosts.running("h1", "pretrain.train") == cluster.hosts.running("h2", "pretrain.train") == []


def test_disk_that_is_full_at_a_checkpoint_ends_the_run_which_goes_on_when_there_is_room(cluster, on_one_machine):
    first = cluster.folder / "alone/checkpoints/step-00000020"
    num_bytes = sum(path.stat().st_size for path in first.iterdir())
    run_dir = cluster.folder / "full"
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes * 8 // 5}", "tmpfs", str(folder)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        err = finish(cluster.start(run_dir, "--ranks", "2", GLOO_SOCKET_IFNAME="lo"), 2)
        assert "No space left on device" in err and "Traceback" not in err
        assert [path.name for path in folder.glob("step-*/manifest.json")] == ["manifest.json"]
        subprocess.run(["mount", "-o", f"remount,size={num_bytes * 8}", str(folder)], check=True)
        finish(cluster.start(run_dir, "--ranks", "2", GLOO_SOCKET_IFNAME="lo"), 0)
        assert metrics(run_dir) == on_one_machine
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
