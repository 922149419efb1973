"""Evaluation meanwhile, early end and best weights; a run that is stopped or killed goes on as if it had not been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.load import ConfigError, load_finetune
from configs.tuning import TuningConfig
from finetune.run_dir import result_of
from finetune.training import Run, check_metric, is_patience_over, judged
from pretrain.state import TrainState
from tests.finetune.test_classification import folder, records, settings  # noqa: F401 (a fixture)
from tests.ranks import run_ranks

TUNING = {
    "precision": "fp32",
    "dropout": 0.1,
    "num_epochs": 4,
    "micro_batch_size": 8,
    "eval_every": 5,
    "patience": 3,
    "save_every": 4,
    "optimizer": {"lr": 5e-3},
}


@pytest.fixture(scope="module")
def runs(folder) -> Path:  # noqa: F811
    (folder / "few.jsonl").write_text("".join((folder / "dev.jsonl").read_text().splitlines(keepends=True)[:48]))
    (folder / "training.yaml").write_text(json.dumps(settings(folder, tuning=TUNING, dev=str(folder / "few.jsonl"))))
    run_ranks(2, ["-m", "tests.finetune.training_on_ranks", str(folder)], folder / "training-logs")
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "examples_per_second"} for line in found]


def codes(folder: Path, name: str) -> list[Any]:  # noqa: F811
    return [json.loads(line) for line in (folder / f"{name}.codes").read_text().splitlines()]


@pytest.mark.distributed
def test_run_ends_early_and_reports_the_best_evaluation(runs):
    result = json.loads((runs / "undisturbed/seed-1/result.json").read_text())
    evaluated = {line["step"]: line for line in lines(runs / "undisturbed/seed-1/metrics.jsonl") if "loss" not in line}
    accuracies = [line["eval_accuracy"] for line in evaluated.values()]
    assert list(evaluated) == list(range(0, result["steps"] + 1, 5)) and result["steps"] < 76
    best = accuracies.index(max(accuracies[1:]), 1)  # the one of step 0 does not count
    assert result["best_step"] == 5 * best == result["steps"] - 5 * 3
    assert result["metrics"] == {
        name.removeprefix("eval_"): value for name, value in evaluated[5 * best].items() if name != "step"
    }


@pytest.mark.distributed
def test_stopped_and_killed_run_goes_on_bitwise_as_if_undisturbed(runs):
    first, second, *_ = codes(runs, "disturbed")
    assert first == 128 + 15 and second == "as if it were killed"
    file = "seed-1/metrics.jsonl"
    assert lines(runs / "disturbed" / file) == lines(runs / "undisturbed" / file)
    for file in ("predictions.jsonl", "results.json"):
        assert (runs / "disturbed" / file).read_bytes() == (runs / "undisturbed" / file).read_bytes()
    ours, theirs = (load_file(runs / name / "model/model.safetensors") for name in ("disturbed", "undisturbed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.distributed
def test_finished_run_is_not_made_again_and_needs_no_checkpoints(runs):
    assert codes(runs, "disturbed")[2:4] == [0, 0]
    assert not list((runs / "disturbed/checkpoints").iterdir())
    log = (runs / "training-logs/rank-0.log").read_text()
    assert log.count(f"going on from {runs}/disturbed/checkpoints") == 2


@pytest.mark.distributed
def test_run_directory_of_other_settings_is_refused(runs):
    assert "holds a run with tuning.optimizer.lr=0.005, now 0.001. Restore it to go on" in codes(runs, "disturbed")[4]


@pytest.mark.distributed
def test_every_example_is_held_out_once(runs):
    results = json.loads((runs / "folds/results.json").read_text())
    assert results["folds"] == 3 and len(results["accuracy"]["per_fold"]) == 3
    predicted = [line for fold in (1, 2, 3) for line in lines(runs / f"folds/fold-{fold}/predictions.jsonl")]
    assert sorted(line["text"] for line in predicted) == sorted(line["text"] for line in records(301, 301))
    assert not (runs / "folds/model").exists()


@pytest.mark.distributed
def test_run_without_updates_is_stopped(runs):
    (message,) = codes(runs, "hopeless")
    assert "seed-1 stopped at step 4: 3 steps in a row had a loss or gradient that is not finite" in message
    assert "guard_stopped" in (runs / "hopeless/incidents.jsonl").read_text()


def test_best_is_the_highest_or_the_lowest_by_the_metric_and_the_earlier_of_equals():
    for metric, values in (("pearson", [0.5, 0.7, 0.7, 0.6]), ("rmse", [0.5, 0.3, 0.3, 0.4])):
        state = TrainState()
        for number, value in enumerate(values, 1):
            state = judged(
                TuningConfig(metric=metric, eval_every=10),
                TrainState(**state.to_json() | {"step": number * 10}),
                {f"eval_{metric}": value},
            )
        assert (state.best_step, abs(state.best_loss or 0)) == (20, values[1])


def test_patience_counts_evaluations_since_the_best():
    tuning = TuningConfig(eval_every=10, patience=2)
    assert not is_patience_over(tuning, TrainState(step=39, best_step=20))
    assert is_patience_over(tuning, TrainState(step=40, best_step=20))
    assert not is_patience_over(TuningConfig(eval_every=10), TrainState(step=400, best_step=20))


def test_metric_that_the_task_has_not_is_named_at_the_start():
    with pytest.raises(ConfigError, match=r"tuning.metric=bleu: the task has no such metric; it has accuracy, f1"):
        check_metric(TuningConfig(metric="bleu", eval_every=1), {"step": 0, "eval_accuracy": 0.5, "eval_f1": 0.5})


def test_finished_run_of_other_files_is_refused(tmp_path):
    alone: Any = SimpleNamespace(is_first=True, gather=lambda value: [value])
    facts = {"run": "seed-1", "train": "a", "dev": "b", "model.weights": "c"}
    (tmp_path / "seed-1").mkdir()
    run = Run("seed-1", 1, [], np.zeros(0), None, [], 0, facts)
    assert result_of(tmp_path, run, alone) is None
    (tmp_path / "seed-1/result.json").write_text(json.dumps({"metrics": {"f1": 0.5}, "facts": facts}))
    assert result_of(tmp_path, run, alone) == {"f1": 0.5}
    for name, expected in (("train", "of another file train="), ("model.weights", "of other weights in model=")):
        other = replace(run, facts=facts | {name: "changed"})
        with pytest.raises(ConfigError, match=expected):
            result_of(tmp_path, other, alone)


@pytest.mark.parametrize("word", ["tuning.patience=3", "tuning.metric=f1"])
def test_patience_needs_evaluations(folder, word):  # noqa: F811
    (folder / "plain.yaml").write_text(json.dumps(settings(folder)))
    with pytest.raises(ConfigError, match=r"set tuning.eval_every too"):
        load_finetune(folder / "plain.yaml", [word])
