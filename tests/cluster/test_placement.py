"""Ranks that srun and mpirun have started find each other without a launcher of torch's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from pretrain.placement import first_host
from tests.cluster.slurm import slurm_cluster
from tests.conftest import ROOT
from tests.pretrain.test_objective import metrics, small_run, write_random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

RANK = """
import json, os, torch
from pretrain import runtime
ranks = runtime.start()
total = int(ranks.sum(torch.tensor(10 ** ranks.rank)))
print(json.dumps([ranks.rank, ranks.world_size, ranks.local_rank, int(os.environ["LOCAL_WORLD_SIZE"]), total]))
runtime.end()
"""
COMMAND = [sys.executable, "-c", RANK]
OWN = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run(command: list[str], environment: dict[str, str]) -> list[list[int]]:
    """Run it; returns what the ranks have printed, in their order."""
    done = subprocess.run(command, env=environment | OWN, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_tasks_of_srun_on_two_nodes_are_ranks_that_train_and_a_batch_script_is_alone(tmp_path):
    with slurm_cluster(tmp_path / "slurm") as environment:
        found = run(["srun", "--nodes=2", "--ntasks=3", "--distribution=block", *COMMAND], environment)
        assert found == [[0, 3, 0, 2, 111], [1, 3, 1, 2, 111], [2, 3, 0, 1, 111]]

        write_random_tokens(tmp_path / "data")
        config = small_run(tmp_path, {"dir": str(tmp_path / "data")}, {}, {})
        run_dir = tmp_path / "run"
        command = [sys.executable, "-m", "launcher.cli", "pretrain", str(config), f"run_dir={run_dir}"]
        run(["srun", "--nodes=2", "--ntasks=2", *command], environment)
        assert [line["step"] for line in metrics(run_dir) if "loss" in line] == [1, 2, 3, 4, 5, 6]
        files = sorted(path.name for path in (run_dir / "checkpoints/step-00000006").iterdir())
        assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]

        script, output = tmp_path / "job.sh", tmp_path / "job.txt"
        script.write_text(f"#!/bin/bash\nexec {sys.executable} {tmp_path / 'rank.py'}\n")
        (tmp_path / "rank.py").write_text(RANK)
        command = ["sbatch", "--wait", "--nodes=2", "--ntasks=2", f"--output={output}", str(script)]
        assert run(command, environment) == []
        assert json.loads(output.read_text()) == [0, 1, 0, 1, 1]

        for nodes in ("n[1-2]", "gpu[007-012,020],cpu1", "rack[1-2]node[04-05]", "a-[3,5]", "b,n[12]"):
            listed = subprocess.run(["scontrol", "show", "hostnames", nodes], env=environment, capture_output=True)
            assert listed.stdout.decode().split()[0] == first_host(nodes)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun (Debian's openmpi-bin)")
def test_processes_of_mpirun_are_ranks():
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    found = run(["mpirun", *as_root, "--oversubscribe", "-n", "2", *COMMAND], dict(os.environ))
    assert found == [[0, 2, 0, 2, 11], [1, 2, 1, 2, 11]]
