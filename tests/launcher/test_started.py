"""Who has started the command, by the variables that real launchers set."""

from __future__ import annotations

import subprocess
import sys

import pytest

from configs.errors import ConfigError
from configs.launches import read_launch
from launcher.local import free_port
from launcher.started import Node, Rank, started_as_rank, started_on_nodes
from tests.conftest import ROOT
from tests.launcher.small_run import losses, make_config

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5"}
# What Kubeflow's training operator sets in the second pod of a PyTorchJob of two pods with two processes each.
POD = {
    "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "1", "PET_NODE_RANK": "1",
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2",
}  # fmt: skip
# The same by an operator from before there were PET_ variables: WORLD_SIZE counts the pods.
OLD_POD = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        (TORCHRUN, Rank("torchrun", 3, 4)),
        (POD | TORCHRUN, Rank("torchrun", 3, 4)),  # torchrun inside of a pod
        (OPEN_MPI, Rank("mpi", 1, 2)),
        (MPICH, Rank("mpi", 1, 2)),
        (SRUN, Rank("slurm", 5, 6)),
        (SRUN | OPEN_MPI, Rank("mpi", 1, 2)),  # mpirun has started its daemons by srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # one task that starts the ranks of its node
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # a batch script
        (POD, None),
        ({"HOME": "/root"}, None),
    ],
)
def test_who_has_started_this_process_as_a_rank(environment, rank):
    assert started_as_rank(environment) == rank


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        (POD, Node(1, 2, 2, "job-master-0", "23456")),
        (POD | {"PET_NPROC_PER_NODE": "auto"}, Node(1, 2, None, "job-master-0", "23456")),
        (OLD_POD, Node(1, 2, None, "job-master-0", "23456")),
        (
            {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29400"},
            Node(3, 4, None, "first", "29400"),
        ),  # version 2 of the operator sets nothing else
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"HOME": "/root"}, None),
    ],
)
def test_which_of_several_machines_this_is(environment, node):
    assert started_on_nodes(environment) == node


@pytest.mark.parametrize(
    ("environment", "fault"),
    [
        (POD | {"PET_NNODES": "1:4"}, "PET_NNODES=1:4: the number of machines is not fixed"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a"}, r"WORLD_SIZE=2, .*RANK\)=2, MASTER_ADDR=a: expected"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR=not set: expected"),
        ({"PET_NNODES": "2", "MASTER_ADDR": "a"}, r"PET_NNODES=2, .*=not set"),
    ],
)
def test_variables_that_do_not_agree_are_named(environment, fault):
    with pytest.raises(ConfigError, match=fault):
        started_on_nodes(environment)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_and_two_pods_train_as_two_ranks_of_one_machine(tmp_path, monkeypatch):
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    config, launcher = make_config(tmp_path), ["-m", "launcher.cli", "pretrain"]

    def words(name: str) -> list[str]:
        return [*launcher, str(config), f"run_dir={tmp_path / name}", "train.num_steps=4"]

    subprocess.run(
        [sys.executable, *words("alone"), "--ranks", "2"], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*torchrun, *words("torchrun")], cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "alone")
    assert read_launch(tmp_path / "torchrun").kind == "torchrun"
    assert "eval loss" in (tmp_path / "torchrun/logs/rank-0.log").read_text()

    with monkeypatch.context() as patch:
        for name, value in (POD | {"MASTER_ADDR": "127.0.0.1", "PET_NPROC_PER_NODE": "1"}).items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", free_port())
        second = subprocess.Popen([sys.executable, *words("pods")], cwd=ROOT)
        patch.setenv("PET_NODE_RANK", "0")
        first = subprocess.Popen([sys.executable, *words("pods")], cwd=ROOT)
        assert [first.wait(60), second.wait(60)] == [0, 0]
    assert losses(tmp_path / "pods") == losses(tmp_path / "alone")
    assert (tmp_path / "pods/logs/rank-1.log").exists()
