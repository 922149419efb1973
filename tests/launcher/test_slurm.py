"""The sbatch script, what is found before it is submitted, and what becomes of a job that has ended. Without SLURM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.clusters import FOLDER, load_cluster
from configs.errors import ConfigError
from configs.incidents import read_incidents
from configs.launches import read_launch
from launcher import slurm_job
from launcher.slurm import BY_HAND, DASHES, file_system, node_range, submit
from launcher.slurm_job import AGAIN, GIVEN_UP, State, count, ended_ranks, first_failure, verdict
from tests.conftest import ROOT

NANO = str(ROOT / "configs/gpt/nano.yaml")
SAYS_1 = "srun: error: n1: task 0: Exited with exit code 1\n"


def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert submit(["slurm", NANO, f"run_dir={tmp_path}/run", "--dry-run", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [None, *sorted(path.stem for path in FOLDER.glob("*.yaml"))])
def test_script_of_every_shipped_cluster_is_clean_shell_and_nothing_is_written(tmp_path, capsys, name):
    text = dry_run(tmp_path, capsys, "--nodes", "1-2", "train.global_batch_size=64", "train.micro_batch_size=1",
                   *(["--cluster", name] if name else []))  # fmt: skip
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    options = re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE)
    assert {"--nodes=1-2", "--requeue", "--export=ALL"} <= set(options)
    assert f"--signal=B:USR1@{load_cluster(name).save_seconds}" in options
    assert text.index("#SBATCH") < text.index("run_dir=") < text.index("srun --nodes")
    assert list(tmp_path.iterdir()) == []


def test_what_the_cluster_wants_stands_in_the_script(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "account: a1\npartition: p1\nqos: q1\ngres: gpu:h100:4\nconstraint: a&b\ntime: 2-12\nmem: 10G\n"
        "exclusive: true\ncpus_per_rank: 6\noptions: [--mail-type=END]\n"
        "modules: [cuda/12.8, nccl]\nenv: {NAME: it's}\nsetup: [ulimit -l 5]\n"
        "export: [HOME, HF_TOKEN]\nsrun_options: [--mpi=none]\n"
        "container: {type: apptainer, image: /i.sif, mounts: [/data]}\n"
    )
    text = dry_run(tmp_path, capsys, "--cluster", str(tmp_path / "mine.yaml"), "--nodes=2", "train.micro_batch_size=1")
    for option in ("account=a1", "partition=p1", "qos=q1", "gres=gpu:h100:4", "constraint=a&b", "time=2-12", "mem=10G",
                   "exclusive", "cpus-per-task=6", "mail-type=END", "ntasks-per-node=4", "nodes=2",
                   "export=HOME,HF_TOKEN"):  # fmt: skip
        assert f"\n#SBATCH --{option}\n" in text
    assert "module purge\nmodule load cuda/12.8 nccl || exit\n" in text
    assert """export NAME='it'"'"'s'\nulimit -l 5\n""" in text
    assert "srun_options=(--cpus-per-task=6 --cpu-bind=cores --mpi=none)" in text
    assert re.search(
        r"^container=\(apptainer exec --nv --bind \S+ .*--bind /data:/data .*/i\.sif\)$", text, re.MULTILINE
    )


def test_script_for_use_by_hand_is_clean_shell_and_its_lower_part_is_that_of_every_script(tmp_path, capsys):
    for path in BY_HAND.parent.glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
    part = DASHES.split(BY_HAND.read_text())[1]
    assert dry_run(tmp_path, capsys).endswith(part)


def test_only_sizes_over_which_the_batch_divides_are_used(tmp_path, capsys):
    batch = ("train.global_batch_size=12", "train.micro_batch_size=1")
    assert "\nnode_counts=(6 4 3)" in dry_run(tmp_path, capsys, "--nodes", "3-8", *batch)
    with pytest.raises(ConfigError, match=r"--nodes 7-11 with 1 ranks a node: .* does not divide"):
        dry_run(tmp_path, capsys, "--nodes", "7-11", *batch)
    with pytest.raises(ConfigError, match="--nodes 2 with 8 ranks a node"):
        dry_run(tmp_path, capsys, "--nodes", "2", "cluster.gres=gpu:8", *batch)


@pytest.mark.parametrize("text", ["0", "-1", "4-2", "many", "2,4", "1-", "0-3", "", "2.5"])
def test_numbers_of_nodes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="expected a number of nodes"):
        node_range(text)
    assert (node_range("8"), node_range("4-8")) == ((8, 8), (4, 8))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pbs", NANO], "only slurm"),
        (["slurm"], "a configuration file is missing"),
        (["slurm", "a=b"], "a configuration file is missing"),
        (["slurm", NANO, "--nodes"], "--nodes: its value is missing"),
        (["slurm", NANO, "--partition", "x"], "unknown flag --partition"),
        (["slurm", NANO, "--cluster", "nowhere.yaml"], "no such file"),
        (["slurm", NANO, "run_dir=a b"], "means something to sbatch"),
        (["slurm", NANO, "checkpoint.upload=https://me:pw@host/x"], "checkpoint.upload holds a password"),
        (["slurm", NANO, "cluster.nodez=3"], "unknown key `nodez`"),
    ],
)
def test_mistakes_are_named_before_anything_is_submitted(words, said):
    with pytest.raises(ConfigError) as error:
        submit(words)
    assert said in str(error.value) and "pw" not in str(error.value)


def test_without_sbatch_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no program sbatch on this machine"):
        submit(["slurm", NANO, f"run_dir={tmp_path}/run"])
    assert list(tmp_path.iterdir()) == []


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def test_what_sbatch_says_is_shown_and_a_job_that_it_takes_is_written_down(tmp_path, monkeypatch, capsys):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    program(programs, "sbatch", "echo 'sbatch: error: invalid partition specified: gup' >&2; exit 1")
    words = ["slurm", NANO, f"run_dir={tmp_path}/run", "--nodes", "2", "cluster.partition=gup"]
    with pytest.raises(ConfigError, match=r"(?s)invalid partition specified: gup.*nothing was submitted"):
        submit(words)
    assert read_launch(tmp_path / "run") is None
    program(programs, "sbatch", "echo '12;main'")
    assert submit(words) == 0
    launch = read_launch(tmp_path / "run")
    assert launch and (launch.kind, launch.job, launch.num_ranks) == ("slurm", "12", 2)
    assert launch.command == ["millstream", "submit", *words]
    assert "submitted job 12" in capsys.readouterr().out
    program(programs, "squeue", "echo PENDING")
    with pytest.raises(ConfigError, match="its job 12 is pending"):
        submit(words)


def test_type_of_a_file_system_is_that_of_the_longest_mount():
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/nowhere/at/all")) == file_system(Path("/"))


@pytest.mark.parametrize(
    ("code", "asked", "again"),
    [
        (0, "none", False), (2, "none", False), (70, "none", False), (1, "none", True), (137, "none", True),
        (124, "none", True), (138, "USR1", True), (143, "USR1", True), (138, "none", True), (143, "none", False),
        (130, "none", False), (143, "TERM", False), (137, "TERM", False), (0, "USR1", False), (2, "USR1", False),
    ],
)  # fmt: skip
def test_which_ends_are_queued_again(code, asked, again):
    assert (verdict(code, asked) is None) is again


def test_failures_count_until_a_checkpoint_is_beyond_the_step_that_was_reached():
    first = count(State(), checkpoint=30, step=40)
    assert (first.failures, first.step) == (1, 40)
    assert count(first, checkpoint=40, step=45) == State(failures=2, step=45)
    assert count(first, checkpoint=41, step=45).failures == 1


def test_end_that_was_asked_for_is_a_failure_only_without_progress():
    assert count(State(failures=2, step=40), checkpoint=41, step=41, was_asked=True).failures == 0
    assert count(State(failures=2, step=40), checkpoint=40, step=41, was_asked=True).failures == 3


def test_ranks_that_failed_are_read_from_srun_in_the_order_of_time():
    messages = (
        "srun: error: n2: tasks 4-5,7: Exited with exit code 1\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=1.0\n"
        "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-25T14:43:43 ***\nsrun: error: n1: task 0: Killed\n"
        "srun: error: n1: task 1: Segmentation fault (core dumped)\nsrun: error: n1: task 0: Exited with exit code 9\n"
    )
    assert ended_ranks(messages) == {4: 1, 5: 1, 7: 1, 0: 137, 1: 139}
    assert first_failure(ended_ranks(messages)) == (4, 1)
    assert first_failure({1: 1, 0: 70}) == (0, 70)
    assert first_failure({}) == (None, 0)


def job(tmp_path: Path, *words: str, srun: str | None = None) -> int:
    (tmp_path / "slurm").mkdir(exist_ok=True)
    (tmp_path / "logs").mkdir(exist_ok=True)
    if srun is not None:
        (tmp_path / "slurm/srun.txt").write_text(srun)
    return slurm_job.main([words[0], str(tmp_path), *words[1:]])


def test_jobs_that_fail_without_progress_are_given_up_with_the_traceback_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for ends in (AGAIN, 1):
        assert job(tmp_path, "before", "2", "1") == 0
        (tmp_path / "logs/rank-0.log").write_text("RuntimeError: the culprit\n")
        assert job(tmp_path, "after", "2", "1", "1", "none", srun=SAYS_1) == ends
        assert "rank 0 failed first, with exit code 1" in (error := capsys.readouterr().err) and "the culprit" in error
    kinds = [incident["kind"] for incident in read_incidents(tmp_path)]
    assert kinds == ["rank_failed", "requeue", "rank_failed", "given_up"]
    assert getattr(read_launch(tmp_path), "job", None) == "7"


def test_job_that_was_lost_with_its_first_node_counts_as_a_failure(tmp_path, monkeypatch):
    for restarts in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert job(tmp_path, "before", "2", "1") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert job(tmp_path, "before", "2", "1") == GIVEN_UP
    assert [incident["kind"] for incident in read_incidents(tmp_path)] == ["requeued", "requeued", "given_up"]


def test_chained_job_is_the_one_that_launch_json_names(tmp_path):
    assert job(tmp_path, "before", "2", "1") == 0
    assert job(tmp_path, "chained", "31;cluster") == 0
    launch = read_launch(tmp_path)
    assert launch and (launch.job, launch.num_ranks) == ("31", 2)


def test_submitting_imports_no_torch():
    code = "import sys, launcher.slurm, launcher.slurm_job; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
