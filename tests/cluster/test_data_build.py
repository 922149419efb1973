"""A build whose workers are tasks of a real SLURM cluster, through datatrove."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from tests.cluster.slurm import slurm_cluster
from tests.conftest import ROOT
from tests.data_pipeline.test_build import SMALL_PARTS, content

pytest.importorskip("datatrove", reason="no datatrove (pip install 'millstream[datatrove]')")


@pytest.mark.slow
def test_dataset_built_by_slurm_array_jobs_is_byte_identical(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["sun", "moon", "river", "stone", "bird", "king", "runs", "sings", "slowly", "."])
    lines = [json.dumps({"text": " ".join(rng.choice(words, rng.integers(5, 60)))}) for _ in range(300)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    build = {
        "sources": [str(tmp_path / "corpus.jsonl")],
        "validation_fraction": 0.1,
        "tokenizer": {"vocab_size": 300},
        "deduplicate": {"exact": True},
        "num_workers": 2,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"run_dir": "unused", "data": {"dir": str(tmp_path / "here"), "build": build}}))
    command = [sys.executable, "-c", SMALL_PARTS, str(config)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)

    slurm = {
        "partition": "main",
        "time": "00:05:00",
        "mem_per_cpu_gb": 1,
        "qos": "",
        "mail_type": "NONE",
        "env_command": f"export PATH={sys.prefix}/bin:$PATH PYTHONPATH={ROOT}",
    }
    words = [f"data.dir={tmp_path}/cluster", "data.build.engine=datatrove", f"data.build.slurm={json.dumps(slurm)}"]
    with slurm_cluster(tmp_path / "slurm") as environment:
        ran = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        log = (tmp_path / "slurm" / "log" / "ctld.log").read_text()
    assert content(tmp_path / "cluster") == content(tmp_path / "here")
    assert "sched: Allocate" in log or "_job_complete" in log
