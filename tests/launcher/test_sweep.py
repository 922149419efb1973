"""`millstream sweep`: which trials are made, what a sweep that was stopped goes on with, what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from configs.load import ConfigError, load_finetune
from configs.tuning import FinetuneConfig
from launcher import restarts
from launcher.sweep import sweep

pytest.importorskip("optuna", reason="needs optuna: pip install 'millstream[sweep]'")

CONFIG = """
task: classification
model: {folder}/model
train: {folder}/train.jsonl
dev: {folder}/dev.jsonl
run_dir: {folder}/sweep
sweep:
  metric: accuracy
  num_trials: 12
  ranges:
    tuning.optimizer.lr: {{low: 1.0e-5, high: 1.0e-3, log: true}}
    tuning.batch_size: [32, 64]
    tuning.max_seq_len: {{low: 64, high: 256, step: 64}}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


class Runs:
    """In place of fine-tunings: what was asked for, and results that are best at a rate of 1e-4."""

    def __init__(self, codes: dict[int, int] | None = None) -> None:
        self.configs: list[FinetuneConfig] = []
        self.codes = codes or {}  # of the n-th run, if it does not end well

    def __call__(self, module: str, words: list[str], config: FinetuneConfig, num_ranks: int | None) -> int:
        assert module == "finetune.run" and load_finetune(words[1]) == config and num_ranks == 2
        self.configs.append(config)
        if code := self.codes.get(len(self.configs)):
            return code
        value = 1 - abs(math.log10(config.tuning.optimizer.lr) + 4) / 4
        (Path(config.run_dir) / "model").mkdir(parents=True)
        results = {"seeds": [1], "accuracy": {"mean": value, "spread": 0.0, "per_seed": [value]}}
        (Path(config.run_dir) / "results.json").write_text(json.dumps(results))
        return 0


def make(monkeypatch, file: Path, codes: dict[int, int] | None = None) -> tuple[int, list[FinetuneConfig]]:
    runs = Runs(codes)
    monkeypatch.setattr(restarts, "run", runs)
    return sweep(str(file), [], 2), runs.configs


def chosen(config: FinetuneConfig) -> tuple[float, int, int]:
    return config.tuning.optimizer.lr, config.tuning.batch_size, config.tuning.max_seq_len


def test_trials_lie_in_their_ranges_and_the_best_is_written_out(monkeypatch, file, capsys):
    code, configs = make(monkeypatch, file)
    assert code == 0 and len(configs) == 12 and len({chosen(config) for config in configs}) == 12
    assert all(
        1e-5 <= lr <= 1e-3 and batch in (32, 64) and seq in (64, 128, 192, 256)
        for lr, batch, seq in map(chosen, configs)
    )
    best = max(configs, key=lambda config: -abs(math.log10(config.tuning.optimizer.lr) + 4))
    written = load_finetune(file.parent / "sweep/best.yaml")
    assert chosen(written) == chosen(best) and written.sweep is None and written.run_dir.endswith("sweep/best")
    table = (file.parent / "sweep/sweep.md").read_text().splitlines()
    assert (
        len(table) == 14
        and table[2].startswith(f"| {Path(best.run_dir).name} | ")
        and table[2] in capsys.readouterr().out
    )
    assert [path.parent.name for path in (file.parent / "sweep").glob("*/model")] == [Path(best.run_dir).name]


def test_sweep_that_was_stopped_goes_on_with_its_trial_and_makes_the_same_choices(monkeypatch, file, tmp_path):
    _, expected = make(monkeypatch, file)
    again = tmp_path / "again.yaml"
    again.write_text(file.read_text().replace(f"{tmp_path}/sweep", f"{tmp_path}/again"))
    code, first = make(monkeypatch, again, {5: 143})
    assert code == 143 and len(first) == 5
    code, second = make(monkeypatch, again)
    assert code == 0 and len(second) == 8 and second[0].run_dir == first[4].run_dir
    assert [chosen(config) for config in [*first[:4], *second]] == [chosen(config) for config in expected]
    code, third = make(monkeypatch, again)
    assert code == 0 and not third


def test_trial_whose_steps_are_not_finite_is_a_result_and_the_last_of_the_table(monkeypatch, file):
    code, configs = make(monkeypatch, file, {2: 70})
    assert code == 0 and len(configs) == 12
    assert (file.parent / "sweep/sweep.md").read_text().splitlines()[-1].startswith("| trial-0001 | not finite |")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tuning.batch_size", "tuning.batchsize", r"sweep.ranges: tuning.batchsize=32 is not valid.*did you mean"),
        ("[32, 64]", "[32, 33]", r"tuning.batch_size=33 is not valid.*not a multiple of tuning.micro_batch_size=32"),
        ("[32, 64]", "[]", r"ranges: tuning.batch_size has no values"),
        ("low: 64", "low: 640", r"low=640 is not below high=256"),
        ("low: 1.0e-5", "low: 0.0", r"log=true with low=0.0"),
        ("metric: accuracy", "metric: bleu", r"sweep.metric=bleu: there is no such metric.*it has accuracy"),
    ],
)
def test_mistake_in_the_section_is_named(monkeypatch, file, old, new, expected):
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        make(monkeypatch, file)


def test_sweep_of_another_configuration_is_refused(monkeypatch, file):
    make(monkeypatch, file)
    file.write_text(file.read_text().replace("num_trials: 12", "num_trials: 13"))
    assert len(make(monkeypatch, file)[1]) == 1
    file.write_text(file.read_text() + "tuning: {num_epochs: 9}\n")
    with pytest.raises(ConfigError, match=r"holds a sweep with tuning.num_epochs=3.0, now 9.0"):
        make(monkeypatch, file)


def test_file_without_the_section_is_named(file):
    file.write_text(file.read_text().partition("sweep:")[0])
    with pytest.raises(ConfigError, match=r"has no section `sweep`"):
        sweep(str(file), [], None)
