"""`millstream submit slurm` on a real SLURM of two nodes: signals, requeues, a lost node, time limits, scancel.

All tests share the cluster and one undisturbed run. A job whose time limit is a minute runs beside them all the while.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from configs.incidents import read_incidents
from configs.launches import read_launch
from launcher.restarts import newest_checkpoint
from tests.cluster.slurm import slurm_cluster
from tests.conftest import ROOT
from tests.launcher.small_run import has_reached, losses, pid_of, wait_until
from tests.pretrain.test_objective import metrics, small_run, write_random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CLUSTER = """
cpus_per_rank: 1
save_seconds: 30
env: {DS_ACCELERATOR: cpu, OMP_NUM_THREADS: "1"}
"""
SECRET = "never-written-anywhere"
STEPS = ("train.num_steps=40", "checkpoint.every_steps=10")


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]

    def submit(self, run: str, *words: str) -> str:
        """Submit with a umask of 027; returns the job's number."""
        done = self.millstream(run, *words)
        assert done.returncode == 0, done.stderr
        found = re.match(r"submitted job (\d+): ", done.stdout)
        assert found, done.stdout
        return found[1]

    def millstream(self, run: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["submit", "slurm", str(self.folder / "config.yaml"), "--cluster", str(self.folder / "cluster.yaml")]
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *command, f"run_dir={self.folder / run}", *words],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, umask=0o027, timeout=30,
        )  # fmt: skip

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def fields(self, job: str) -> dict[str, str]:
        """What SLURM knows of the job: JobState, ExitCode, Restarts, NodeList, ..."""
        shown = self.ask("scontrol", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_end(self, job: str, seconds: float = 90) -> dict[str, str]:
        """Until the job is out of the queue; its fields then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.fields(job)["JobState"] in ended, None, seconds)
        return self.fields(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("submit")
    write_random_tokens(folder / "data")
    small_run(folder, {"dir": str(folder / "data")}, {"precision": "fp32"}, {"stage": 3})
    (folder / "cluster.yaml").write_text(CLUSTER)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with slurm_cluster(folder / "slurm") as environment:
        slurm = {"SLURM_CONF": environment["SLURM_CONF"], "PYTHONPATH": str(ROOT), "UPLOAD_TOKEN": SECRET}
        yield Cluster(folder, inherited | slurm)


@pytest.fixture(scope="module", autouse=True)
def limited_job(cluster) -> str:
    """A run without an end in jobs of a minute each, on what the others leave of a core of the first node."""
    aside = ["cluster.time=1", "cluster.options=[--nodelist=n1]", "cluster.setup=['renice -n 19 $$ > /dev/null']"]
    return cluster.submit("limited", "train.num_steps=1000000", "eval.every_steps=1000000", *aside)


@pytest.fixture(scope="module")
def undisturbed(cluster) -> Path:
    """The directory of a run on two nodes, one rank each, which nothing has happened to."""
    is_there = f'cluster.setup=["[ ${{#UPLOAD_TOKEN}} = {len(SECRET)} ] || exit 3"]'
    job = cluster.submit("undisturbed", "--nodes", "2", *STEPS, is_there)
    ended = cluster.wait_for_end(job)
    run_dir = cluster.folder / "undisturbed"
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), (run_dir / f"logs/slurm-{job}.log").read_text()
    launch = read_launch(run_dir)
    assert launch and (launch.kind, launch.job, launch.num_ranks) == ("slurm", job, 2)
    assert launch.command[:3] == ["millstream", "submit", "slurm"]
    return run_dir


def test_submitted_run_trains_on_both_nodes_with_the_users_umask_and_no_secret_on_the_disk(undisturbed):
    assert len(losses(undisturbed)) == 40 and read_incidents(undisturbed) == []
    assert len(list(undisturbed.glob("checkpoints/step-00000040/rank-*.safetensors"))) == 2
    assert (undisturbed / "logs/rank-0.log").read_text().startswith("step ")
    files = [undisturbed, *undisturbed.rglob("*")]
    assert {path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o027} == set()
    assert [path for path in files if path.is_file() and SECRET in path.read_text(errors="replace")] == []


def test_signal_in_the_middle_saves_requeues_and_the_loss_is_bitwise_that_of_the_undisturbed_run(cluster, undisturbed):
    run_dir = cluster.folder / "signalled"
    job = cluster.submit("signalled", "--nodes", "2", *STEPS)
    wait_until(has_reached(run_dir, 12), None)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    (incident,) = read_incidents(run_dir)
    assert (incident["kind"], incident["code"], incident["num_ranks"]) == ("requeue", 138, 2)
    assert 12 <= incident["step"] < 40
    steps = [line for line in metrics(run_dir) if "loss" in line]
    assert steps == [line for line in metrics(undisturbed) if "loss" in line]
    assert metrics(run_dir)[-1] == metrics(undisturbed)[-1]  # the evaluation


def test_unknown_partition_is_refused_with_sbatchs_own_words(cluster):
    refused = cluster.millstream("refused", "cluster.partition=gup")
    assert refused.returncode == 2 and "invalid partition specified: gup" in refused.stderr
    assert read_launch(cluster.folder / "refused") is None


def test_mistake_of_the_user_ends_the_job_and_is_not_queued_again(cluster):
    job = cluster.submit("mistake", "--nodes", "2", *STEPS, f"data.dir={cluster.folder}/nowhere")
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    output = (cluster.folder / f"mistake/logs/slurm-{job}.log").read_text()
    assert "nowhere" in output and "something to mend" in output
    assert read_incidents(cluster.folder / "mistake") == []


def test_killed_rank_is_named_and_the_run_is_given_up_after_so_many_failures_without_progress(cluster):
    run_dir = cluster.folder / "killed"
    job = cluster.submit("killed", "--nodes", "2", "train.num_steps=100000", "cluster.requeues=0")
    wait_until(has_reached(run_dir, 3, rank=1), None)
    os.kill(pid_of(run_dir, 1), signal.SIGKILL)
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "0")
    incidents = [(incident["kind"], incident["rank"]) for incident in read_incidents(run_dir)]
    assert incidents == [("rank_failed", 1), ("given_up", None)]


RANK_OF_ITS_OWN = """
import os, pathlib, signal, sys, time
run_dir = pathlib.Path(sys.argv[2]).parents[1]
if (run_dir / "saved").exists():
    sys.exit(0)
def save(number, frame):
    (run_dir / "saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGUSR1, save)
(run_dir / ("ready-" + os.environ["SLURM_PROCID"])).touch()
time.sleep(60)
"""


def test_where_no_job_is_requeued_the_next_one_is_submitted_and_launch_json_names_it(cluster):
    run_dir = cluster.folder / "chained"
    (cluster.folder / "own").mkdir()
    (cluster.folder / "own/rank_of_its_own.py").write_text(RANK_OF_ITS_OWN)
    own = f"cluster.setup=[module=rank_of_its_own, 'export PYTHONPATH={cluster.folder}/own']"
    job = cluster.submit("chained", "--nodes", "2", own, "cluster.options=[--no-requeue]")
    wait_until(lambda: len(list(run_dir.glob("ready-*"))) == 2, None)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    cluster.wait_for_end(job)
    launch = read_launch(run_dir)
    assert launch and launch.job is not None and int(launch.job) > int(job) and launch.num_ranks == 2
    assert cluster.wait_for_end(launch.job)["JobState"] == "COMPLETED"
    assert [incident["kind"] for incident in read_incidents(run_dir)] == ["requeue"]


def test_stop_saves_after_the_step_and_ends_the_job_for_good(cluster):
    run_dir = cluster.folder / "stopped"
    job = cluster.submit("stopped", "--nodes", "2", "train.num_steps=1000000", "checkpoint.every_steps=1000000")
    wait_until(has_reached(run_dir, 12), None)
    stop = [sys.executable, "-m", "launcher.cli", "stop", str(run_dir)]
    done = subprocess.run(stop, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = newest_checkpoint(run_dir)
    assert f"asked job {job} to finish its step, save and end" in done.stdout and f"{saved:,}" in done.stdout
    ended = cluster.wait_for_end(job, seconds=20)
    assert saved == len(losses(run_dir)) >= 12 and ended["Restarts"] == "0" and read_incidents(run_dir) == []
    assert not json.loads((run_dir / "slurm/state.json").read_text())["is_queued"]


def test_run_goes_on_on_the_node_that_is_left(cluster, undisturbed):
    run_dir = cluster.folder / "lost"
    job = cluster.submit("lost", "--nodes", "1-2", *STEPS)
    wait_until(has_reached(run_dir, 15), None)
    kill_second_node(cluster, pid_of(run_dir, 1))
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "1", "n1")
    lost, requeued = read_incidents(run_dir)
    assert (lost["kind"], lost["node"], requeued["kind"], requeued["num_ranks"]) == ("node_lost", "n2", "requeued", 1)
    assert requeued["step"] == 10  # at most one checkpoint's interval was lost
    assert [line["step"] for line in metrics(run_dir) if "loss" in line] == list(range(1, 41))
    np.testing.assert_allclose(losses(run_dir), losses(undisturbed), rtol=1e-4)
    launch = read_launch(run_dir)
    assert launch and launch.num_ranks == 1


def is_early(job: dict[str, str]) -> bool:
    return job["JobState"] == "PENDING" or job["RunTime"] < "00:00:15"


def kill_second_node(cluster: Cluster, rank: int) -> None:
    """SIGKILL for all of it: slurmd, the daemon of the step, and the rank."""
    file = cluster.folder / "slurm/slurmd.n2.pid"
    step = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (int(file.read_text()), step, rank):
        os.kill(pid, signal.SIGKILL)
    file.unlink()


def test_time_limit_and_preemption_are_survived_and_scancel_saves_and_ends_the_run_for_good(cluster, limited_job):
    run_dir = cluster.folder / "limited"
    wait_until(lambda: read_incidents(run_dir), None)
    limit = read_incidents(run_dir)[0]
    assert (limit["kind"], limit["code"]) == ("requeue", 138) and "was asked to save" in limit["text"]
    # early in its minute: after half of it it has been asked to save, and goes back into the queue whatever its limit
    wait_until(lambda: is_early(cluster.fields(limited_job)), None, seconds=90)
    cluster.ask("scontrol", "update", f"JobId={limited_job}", "TimeLimit=60")
    reached = read_incidents(run_dir)[-1]["step"] + 5
    wait_until(lambda: cluster.fields(limited_job)["JobState"] == "RUNNING" and has_reached(run_dir, reached)(), None)
    again = cluster.millstream("limited")
    assert again.returncode == 2 and f"its job {limited_job} is running" in again.stderr
    before = len(read_incidents(run_dir))
    cluster.ask("sbatch", "--partition=urgent", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: len(read_incidents(run_dir)) > before, None)
    preempted = read_incidents(run_dir)[-1]
    assert (preempted["kind"], preempted["step"]) == ("requeued", newest_checkpoint(run_dir))
    assert preempted["step"] >= reached  # it was saved
    wait_until(has_reached(run_dir, preempted["step"] + 5), None)
    cluster.ask("scancel", limited_job)
    ended = cluster.wait_for_end(limited_job, seconds=20)
    assert ended["JobState"] == "CANCELLED" and int(ended["Restarts"]) >= 2
    steps = [line["step"] for line in metrics(run_dir) if "loss" in line]
    assert newest_checkpoint(run_dir) == steps[-1] > preempted["step"]
    assert steps == list(range(1, steps[-1] + 1))
    assert not json.loads((run_dir / "slurm/state.json").read_text())["is_queued"]
