"""Regression, and what texts share over all tasks: tables without column names, windows of long texts."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from configs.load import ConfigError, load_finetune
from configs.schema import TokenizerConfig
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune.tasks import classification, regression
from finetune.texts import encode_texts, mean_of_windows, read_rows
from tests.ranks import run_ranks

WORDS = "sun moon river stone bird king queen hill sea".split()  # noqa: SIM905


def rows(num: int, seed: int) -> list[dict]:
    """Texts of 4 to 12 words; the value is how many of them are `good`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        words = list(rng.choice(WORDS, rng.integers(4, 9))) + ["good"] * int(rng.integers(0, 5))
        rng.shuffle(words)
        found.append({"text": " ".join(map(str, words)), "score": float(words.count("good"))})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression")
    model = folder / "bert"
    model.mkdir()
    tokenizer = make_tokenizer(
        TokenizerConfig(type="wordpiece", vocab_size=120), [" ".join([*WORDS, "good"])] * 5, model
    )
    save_tokenizer(tokenizer, model, 64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, initializer_range=0.1, **sizes
    )
    BertModel(config).save_pretrained(model)
    for name, num in (("train", 401), ("dev", 103)):
        lines = [json.dumps(row) for row in rows(num, num)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder, **more) -> FinetuneConfig:
    tuning = {"num_epochs": 6, "batch_size": 16, "micro_batch_size": 8, "dropout": 0.0, "optimizer": {"lr": 3e-3}}
    values = {"task": "regression", "model": str(folder / "bert"), "run_dir": str(folder / "run"), "label_key": "score"}
    values |= {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl"), "log": {"tensorboard": False}}
    return FinetuneConfig.model_validate(values | {"tuning": tuning | more.pop("tuning", {})} | more)


@pytest.mark.distributed
def test_it_learns_a_number_and_transformers_loads_the_model(folder):
    (folder / "run.yaml").write_text(settings(folder).model_dump_json())
    run_ranks(2, ["-m", "finetune.run", "--config", str(folder / "run.yaml")], folder / "logs")
    results = json.loads((folder / "run/results.json").read_text())
    assert results["pearson"]["mean"] > 0.9 and results["spearman"]["mean"] > 0.9 and results["rmse"]["mean"] < 0.7
    lines = [json.loads(line) for line in (folder / "run/predictions.jsonl").open()]
    assert [line["label"] for line in lines] == [row["score"] for row in rows(103, 103)]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/model")
    with torch.no_grad():
        theirs = [model(**tokenizer(line["text"], return_tensors="pt")).logits.item() for line in lines[:20]]
    np.testing.assert_allclose(theirs, [line["prediction"] for line in lines[:20]], atol=0.1)  # bf16


def test_row_that_fills_a_batch_up_has_no_error_and_no_gradient():
    values = torch.tensor([1.0, 5.0], requires_grad=True)

    def model(**_):
        return type("Out", (), {"logits": values.unsqueeze(-1)})

    loss = regression.loss(model, {"labels": torch.tensor([3.0, float("nan")])})
    loss.backward()
    assert loss.item() == 4.0 and values.grad.tolist() == [-4.0, 0.0]


def test_label_that_is_no_number_is_named(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": 1}\n{"text": "x", "score": "high"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: label 'high' is no number.*task=classification"):
        regression.load(settings(folder, train=str(tmp_path / "a.jsonl")))


def test_published_stsb_files_load(shared_data):
    config = load_finetune("configs/finetune/stsb.yaml", [f"train={shared_data}/tasks/stsb/train.csv"])
    found = read_rows(shared_data / "tasks/stsb/dev.csv", config.text_keys, config.label_key, config.columns)
    assert len(found) == 1500 and all(len(texts) == 2 for texts, _, _ in found)
    assert {0.0, 5.0} <= {float(label) for _, label, _ in found} and max(float(label) for _, label, _ in found) == 5.0


def test_long_text_becomes_windows_that_overlap(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    long, short = " ".join(WORDS * 2), "sun moon"
    found = encode_texts(tokenizer, [(long,), (short,)], max_seq_len=10, overlap=3)
    windows = [row["input_ids"] for row in found if row["example"] == 0]
    whole = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert all(len(ids) <= 10 for ids in windows) and len(windows) > 1
    joined = windows[0][1:-1]
    for before, after in pairwise(windows):
        assert before[-4:-1] == after[1:4]
        joined += after[4:-1]
    assert joined == whole
    assert [row["example"] for row in found].count(1) == 1
    assert len(encode_texts(tokenizer, [(long,), (short,)], max_seq_len=10, overlap=None)) == 2


def test_prediction_of_a_text_is_the_mean_over_its_windows(folder):
    found = [{"example": 0}, {"example": 1}, {"example": 1}]
    outputs = [np.array([0.9, 0.1]), np.array([0.8, 0.2]), np.array([0.1, 0.9])]
    np.testing.assert_allclose(mean_of_windows(found, outputs), [[0.9, 0.1], [0.45, 0.55]])
    split = classification.Split([("a",), ("b",)], np.array([0, 1]), np.ones(2))
    assert classification.evaluate(settings(folder), split, found, outputs)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tuning.window_overlap=20", "text_keys=[a, b]"], "window_overlap is for single texts"),
        (["tuning.window_overlap=130"], "window_overlap=130 is more than half of tuning.max_seq_len=256"),
    ],
)
def test_windows_that_cannot_be_are_refused(words, expected):
    with pytest.raises(ConfigError, match=expected):
        load_finetune("configs/finetune/classification.yaml", words)
