"""The plan against a real run: the memory that a process has had, and a probe from end to end."""

from __future__ import annotations

import pytest

from benchmarks.plan import Case, train, write_config
from configs.errors import ConfigError
from configs.hardware import GPUS, NETWORKS
from configs.load import load_pretrain
from launcher import plan_measure
from launcher.plan import make_plan
from launcher.plan_command import plan
from launcher.plan_job import make_cluster, make_job

MODEL = {"preset": "gpt2", "num_layers": 5, "hidden_size": 256, "num_heads": 4, "max_seq_len": 128}
CASE = Case("test", 1, 2, 6000, MODEL, 128, 16)


@pytest.mark.slow
def test_planned_memory_of_one_rank_is_within_15_percent_of_what_the_run_has_resident(tmp_path):
    config = write_config(CASE, tmp_path)
    job = make_job(load_pretrain(config), CASE.vocab_size, 1)
    planned = make_plan(job, make_cluster(1, 1, GPUS["cpu"], NETWORKS["eth-10"]), saves_before_end=False)
    peak, steps = train(config, tmp_path / "run", 1, on_cpu=True)
    assert len(steps) > 2
    assert planned.memory.total == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_probe_without_a_dataset_measures_on_random_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_measure, "SECONDS", 0.2)
    config = write_config(CASE, tmp_path)
    words = [f"data.dir={tmp_path / 'nothing'}", "data.build.tokenizer.vocab_size=6000", "model.num_layers=2"]
    assert plan([str(config), "--gpu", "cpu", "--probe", *words]) == 0
    shown = capsys.readouterr().out
    assert "probed" in shown and "as the probe has measured it" in shown


@pytest.mark.slow
def test_probe_of_a_failing_run_says_so(tmp_path, capfd):
    config = write_config(CASE, tmp_path)
    with pytest.raises(ConfigError, match="the short run has failed with exit code 2"):
        words = ["model.architecture=bert", "model.preset=nano", f"data.dir={tmp_path / 'nothing'}"]
        plan([str(config), "--gpu", "cpu", "--probe", *words])
    assert "no dataset; BERT's masking needs its tokenizer" in capfd.readouterr().err
