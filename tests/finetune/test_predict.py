"""`millstream predict`: a model's directory says all that predictions need, and they are those of its own run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from configs.load import ConfigError
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.conll import read_words
from finetune.predict import predictions
from finetune.saved_model import load_about
from finetune.squad import read_squad
from finetune.tasks.by_name import TASKS
from finetune.texts import read_rows
from tests.conftest import ROOT
from tests.finetune import test_classification, test_generation, test_qa, test_regression, test_tagging
from tests.ranks import run_ranks

MODULES: dict[str, ModuleType] = {
    "classification": test_classification,
    "regression": test_regression,
    "qa": test_qa,
    "tagging": test_tagging,
    "generation": test_generation,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run directory of each task, with again.jsonl: what `predict` says to the dev file."""
    runs = tmp_path_factory.mktemp("predict")
    for task, module in MODULES.items():
        folder = module.folder.__wrapped__(tmp_path_factory)  # the files of that task's own tests
        settings = getattr(module, "settings", None) or module.config
        values = FinetuneConfig.model_validate(settings(folder)).model_dump(mode="json")
        values["run_dir"] = str(runs / task)
        (runs / f"predict-{task}.yaml").write_text(json.dumps(values))
    run_ranks(1, ["-m", "tests.finetune.predict_on_rank", str(runs)], runs / "logs")
    return runs


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize("task", MODULES)
def test_predictions_of_the_dev_file_are_those_of_the_run(runs, task):
    label = TASKS[task].LABEL
    expected = lines(runs / task / "predictions.jsonl")
    assert all(label in line for line in expected)
    found = lines(runs / task / "again.jsonl")
    assert found == [{name: value for name, value in line.items() if name != label} for line in expected]


@pytest.mark.distributed
def test_command_predicts_a_file_without_labels_with_other_settings(runs, tmp_path):
    (tmp_path / "new.tsv").write_text("sentence\tid\nthe good sun\t1\nthe sad moon\t2\n")
    words = ["predict", str(runs / "classification/model"), str(tmp_path / "new.tsv"), "text_keys=[sentence]"]
    output = tmp_path / "out.jsonl"
    subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words, "--output", str(output)],
        cwd=ROOT, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = lines(output)
    assert [line["text"] for line in found] == ["the good sun", "the sad moon"]
    assert all(line.keys() == {"text", "prediction", "probability"} for line in found)


@pytest.mark.distributed
def test_mistake_is_named(runs, tmp_path):
    for model, words, expected in (
        (runs / "qa", [], rf"has no millstream.json.*did you mean {runs}/qa/model\?"),
        (runs / "qa/model", [], r"x.json: no such file"),
        (runs / "qa/model", ["text_key=[a]"], r"did you mean `config.text_keys`\?"),
    ):
        with pytest.raises((ConfigError, DataError), match=expected):
            list(predictions(model, tmp_path / "x.json", words))


def test_directory_that_is_not_ours_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no millstream.json, which `millstream finetune` writes"):
        load_about(tmp_path, [])


def test_labels_of_an_input_need_not_be_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert read_rows(tmp_path / "a.jsonl", ["text"], None) == [(("x",), "", f"{tmp_path}/a.jsonl:1")]
    with pytest.raises(DataError, match=r"a.jsonl:1: has no `words` \(found: text\); set text_keys$"):
        read_rows(tmp_path / "a.jsonl", ["words"], None)
    question = {"id": 1, "question": "?", "answers": [{"text": "not there", "answer_start": 0}]}
    paragraph = {"context": "x", "qas": [question, {"id": 2, "question": "!"}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    assert [q.answers for q in read_squad(tmp_path / "a.json", is_answered=False).questions] == [(), ()]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "anna sees rome\n\nbert goes\n"), ("a.conll", "anna O\nsees\nrome\n\nbert\ngoes\tX\tY\n")],
)
def test_words_are_read_with_or_without_tags(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [one.words for one in read_words(tmp_path / name)] == [["anna", "sees", "rome"], ["bert", "goes"]]
