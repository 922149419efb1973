"""Classification end to end on real ranks: files in, metrics, predictions and a model that a pipeline loads out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from configs.load import ConfigError
from configs.schema import TokenizerConfig
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune.models import check_directory
from finetune.tasks import IGNORE_INDEX, classification
from finetune.texts import read_rows
from tests.ranks import finish, run_ranks, start_ranks

WORDS = "sun moon river stone bird king queen hill sea good nice fine bad sad poor".split()  # noqa: SIM905
GOOD, BAD = {"good", "nice", "fine"}, {"bad", "sad", "poor"}


def records(num: int, seed: int) -> list[dict[str, str]]:
    """Texts with one good or one bad word in them, labelled by it."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        label = rng.choice(["praise", "blame"])
        words = [*rng.choice(WORDS[:9], rng.integers(3, 9)), rng.choice(sorted(GOOD if label == "praise" else BAD))]
        rng.shuffle(words)
        found.append({"text": " ".join(words), "second": str(rng.choice(WORDS)), "label": str(label)})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT and a tiny GPT-2 in Hugging Face layout, and the examples in every format."""
    folder = tmp_path_factory.mktemp("classification")
    texts = [" ".join(WORDS)] * 5
    for kind, tokenizer_type in (("bert", "wordpiece"), ("gpt2", "byte_bpe")):
        directory = folder / kind
        directory.mkdir()
        tokenizer: Tokenizer = make_tokenizer(TokenizerConfig(type=tokenizer_type, vocab_size=400), texts, directory)
        save_tokenizer(tokenizer, directory, 64)
        torch.manual_seed(0)
        size = tokenizer.get_vocab_size()
        if kind == "bert":
            config = BertConfig(
                vocab_size=size,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.1,
                hidden_dropout_prob=0.0,
            )
            BertModel(config).save_pretrained(directory)
        else:
            config = GPT2Config(
                vocab_size=size,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=2,
                initializer_range=0.1,
                bos_token_id=0,
                eos_token_id=0,
            )
            GPT2LMHeadModel(config).save_pretrained(directory)
    for name, num in (("train", 301), ("dev", 103)):  # neither divides into batches
        rows = records(num, num)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
            with (folder / f"{name}{suffix}").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["text", "second", "label"], delimiter=delimiter)
                writer.writeheader()
                writer.writerows(rows)
    return folder


def settings(folder: Path, model: str = "bert", **more) -> dict:
    tuning = {"num_epochs": 4, "batch_size": 16, "micro_batch_size": 4, "optimizer": {"lr": 3e-3}, "seeds": [1]}
    tuning |= more.pop("tuning", {})
    return {
        "task": "classification",
        "model": str(folder / model),
        "train": str(folder / "train.jsonl"),
        "dev": str(folder / "dev.jsonl"),
        "run_dir": str(folder / "run"),
        "log": {"tensorboard": False},
        "tuning": tuning,
        **more,
    }


def run(folder: Path, name: str, num_ranks: int, **more) -> Path:
    config = settings(folder, run_dir=str(folder / name), **more)
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    run_ranks(num_ranks, ["-m", "finetune.run", "--config", str(folder / f"{name}.yaml")], folder / f"{name}-logs")
    return folder / name


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_it_learns_and_transformers_pipeline_repeats_its_predictions(folder, model):
    run_dir = run(folder, f"learns-{model}", 2, model=model, tuning={"seeds": [1, 2], "num_epochs": 8, "dropout": 0.0})
    results = json.loads((run_dir / "results.json").read_text())
    assert results["seeds"] == [1, 2] and len(results["accuracy"]["per_seed"]) == 2
    assert results["accuracy"]["mean"] > 0.95
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").open()]
    assert [line["text"] for line in lines] == [record["text"] for record in records(103, 103)]
    right = np.mean([line["label"] == line["prediction"] for line in lines])
    assert right == pytest.approx(results["accuracy"]["per_seed"][0])
    answers = pipeline("text-classification", str(run_dir / "model"))([line["text"] for line in lines])
    assert [answer["label"] for answer in answers] == [line["prediction"] for line in lines]
    np.testing.assert_allclose(
        [a["score"] for a in answers], [line["probability"] for line in lines], atol=0.05
    )  # bf16
    _, info = AutoModelForSequenceClassification.from_pretrained(run_dir / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.distributed
def test_steps_that_are_not_finite_have_no_update_and_say_so(folder):
    tuning = {
        "precision": "fp32",
        "num_epochs": 0.2,
        "dropout": 0.0,
        "optimizer": {"lr": 1e30},  # the first update ends it
        "non_finite_limit": 4,
    }
    run_dir = run(folder, "not-finite", 2, tuning=tuning)
    first, *others = [json.loads(line) for line in (run_dir / "seed-1/metrics.jsonl").read_text().splitlines()]
    assert "skipped" not in first and np.isfinite(first["loss"])
    assert len(others) == 3 and all(line["skipped"] == 1 and not np.isfinite(line["loss"]) for line in others)
    printed = (folder / "not-finite-logs/rank-0.log").read_text()
    assert "NOT FINITE" in printed and "seed-1: 3 of 4 steps had no update" in printed
    weights = load_file(run_dir / "model/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values()), "an update was made of numbers that are none"


@pytest.mark.distributed
def test_ranks_micro_batches_and_formats_do_not_change_the_result(folder):
    exact = {"precision": "fp32", "dropout": 0.0, "num_epochs": 1}
    alone = run(folder, "alone", 1, tuning={**exact, "micro_batch_size": 16})
    shared = run(folder, "shared", 2, tuning=exact, train=str(folder / "train.csv"), dev=str(folder / "dev.tsv"))
    curves = [[json.loads(x)["loss"] for x in (r / "seed-1/metrics.jsonl").open()] for r in (alone, shared)]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    predictions = [[json.loads(x) for x in (r / "predictions.jsonl").open()] for r in (alone, shared)]
    assert [p["prediction"] for p in predictions[0]] == [p["prediction"] for p in predictions[1]]


@pytest.mark.distributed
def test_layer_decay_slows_each_layer_by_its_distance_from_the_head(folder):
    tuning = {"layer_decay": 0.5, "num_epochs": 1, "warmup_share": 0, "precision": "fp32"}
    tuning["optimizer"] = {"lr": 1e-2, "weight_decay": 0}
    run_dir = run(folder, "layer-decay", 2, tuning=tuning, max_train_examples=16)  # one step
    before, after = load_file(folder / "bert/model.safetensors"), load_file(run_dir / "model/model.safetensors")
    moved = {name: (after[f"bert.{name}"] - weight).abs().max().item() for name, weight in before.items()}
    layer = "encoder.layer.{}.output.dense.weight"  # Adam's first step moves an element by the rate
    assert moved["pooler.dense.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved[layer.format(1)] == pytest.approx(1e-2 * 0.5, rel=1e-3)
    assert moved[layer.format(0)] == pytest.approx(1e-2 * 0.5**2, rel=1e-3)
    assert moved["embeddings.word_embeddings.weight"] == pytest.approx(1e-2 * 0.5**3, rel=1e-3)


@pytest.mark.distributed
@pytest.mark.slow
def test_zero_stage_does_not_change_the_result(folder):
    exact = {"precision": "fp32", "dropout": 0.0, "num_epochs": 1}
    runs = [run(folder, f"stage-{stage}", 2, tuning=exact, zero={"stage": stage}) for stage in (3, 0, 2)]
    curves = [[json.loads(x)["loss"] for x in (r / "seed-1/metrics.jsonl").open()] for r in runs]
    weights = [load_file(r / "model/model.safetensors") for r in runs]
    for curve, weight in zip(curves[1:], weights[1:], strict=True):
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)
        assert weight.keys() == weights[0].keys()
        assert all(torch.allclose(weight[name], weights[0][name], atol=1e-3) for name in weight)


@pytest.mark.distributed
def test_pairs_are_encoded_as_pairs_and_a_scratch_model_differs(folder):
    run_dir = run(folder, "pairs", 1, text_keys=["text", "second"], from_scratch=True, tuning={"num_epochs": 0.2})
    line = json.loads((run_dir / "predictions.jsonl").open().readline())
    assert line["text"] == [records(103, 103)[0]["text"], records(103, 103)[0]["second"]]
    trained, start = (
        AutoModelForSequenceClassification.from_pretrained(d) for d in (run_dir / "model", folder / "bert")
    )
    theirs, ours = (m.bert.embeddings.word_embeddings.weight for m in (start, trained))
    assert (theirs - ours).abs().max() > 0.1


@pytest.mark.distributed
def test_mistake_ends_every_rank_with_its_message_and_keeps_earlier_results(folder):
    run_dir = run(folder, "kept", 1, tuning={"num_epochs": 0.2})
    before = (run_dir / "results.json").read_text()
    config = settings(folder, run_dir=str(run_dir), train=str(folder / "nothing.jsonl"))
    (folder / "wrong.yaml").write_text(json.dumps(config))
    codes = finish(start_ranks(2, ["-m", "finetune.run", "--config", str(folder / "wrong.yaml")], folder / "wrong"))
    assert codes == [2, 2]
    log = (folder / "wrong/rank-0.log").read_text()
    assert f"{folder}/nothing.jsonl: no such file" in log and "Traceback" not in log
    assert (run_dir / "results.json").read_text() == before


def test_encoding_is_the_tokenizers_with_its_pair_types(folder):
    config = FinetuneConfig.model_validate(settings(folder, text_keys=["text", "second"]))
    tokenizer, examples = AutoTokenizer.from_pretrained(folder / "bert"), classification.load(config)
    assert examples.label_names == ["blame", "praise"]
    row, texts = classification.encode(config, tokenizer, examples.dev)[0], examples.dev.texts[0]
    assert row["input_ids"] == tokenizer(*texts)["input_ids"]
    assert 1 in row["token_type_ids"]
    assert row["labels"] == examples.label_names.index(records(103, 103)[0]["label"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{broken\n', "a.jsonl:2: is not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n', "a.jsonl:1: has no `label` (found: text); set text_keys and label_key"),
        ("a.jsonl", "5\n", "a.jsonl:1: is a int, expected an object"),
        ("a.jsonl", "", "a.jsonl: holds no examples"),
        ("a.jsonl", '{"text": "x", "label": 1}\n', "all examples have the label '1'"),
        ("a.csv", "text,kind\nx,1\n", "a.csv:2: has no `label` (found: text, kind)"),
        ("a.tsv", "text\tlabel\nx\n", "a.tsv:2: has no `label`"),
        ("a.doc", "text", "a.doc: unknown kind of file; known: .jsonl"),
        ("a.jsonl", b'{"text": "\xff", "label": 1}\n', "a.jsonl: is not UTF-8"),
    ],
)
def test_broken_file_of_examples_is_named(folder, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    config = FinetuneConfig.model_validate(settings(folder, train=str(tmp_path / name)))
    with pytest.raises(DataError) as caught:
        classification.load(config)
    assert expected in str(caught.value)


def test_class_weights_are_in_the_loss_alone(folder):
    def examples(weights) -> classification.Examples:
        return classification.load(FinetuneConfig.model_validate(settings(folder, tuning={"class_weights": weights})))

    labels = examples(None).train.labels
    balanced = examples("balanced").train.weights
    np.testing.assert_allclose(balanced * np.bincount(labels), len(labels) / 2)
    assert examples({"praise": 3}).dev.weights.tolist() == [1, 3]
    with pytest.raises(ConfigError, match=r"class_weights: there is no label 'good'; labels are blame, praise"):
        examples({"good": 2})

    logits = torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0]])
    batch = {"labels": torch.tensor([1, 0, IGNORE_INDEX]), "weight": torch.tensor([3.0, 1.0, 3.0])}
    found = classification.loss(lambda: type("Out", (), {"logits": logits}), batch)
    log = logits.log_softmax(-1)
    assert found.item() == pytest.approx(-3 * log[0, 1].item() - log[1, 0].item())


def test_class_weights_are_of_classification(folder):
    with pytest.raises(ValueError, match=r"class_weights is for task=classification, found task=regression"):
        FinetuneConfig.model_validate(settings(folder, task="regression", tuning={"class_weights": "balanced"}))


def test_label_that_only_the_held_out_file_has_is_named(folder, tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"text": "x", "label": "other"}\n')
    config = FinetuneConfig.model_validate(settings(folder, dev=str(tmp_path / "dev.jsonl")))
    with pytest.raises(DataError, match=r"dev.jsonl:1: label 'other' does not occur in .*train.jsonl"):
        classification.load(config)


def test_quotation_marks_of_a_tsv_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"quoted\t1\nplain\t0\n')
    rows = read_rows(tmp_path / "a.tsv", ["text"], "label")
    assert [texts for texts, _, _ in rows] == [('"quoted',), ("plain",)]


def test_directory_that_is_no_model_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="no such directory; give a Hugging Face directory"):
        check_directory(str(tmp_path / "nothing"))
    for place in ("run/export", "tuned/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match=rf"has no config.json.*did you mean .*{place}"):
            check_directory(str((tmp_path / place).parent))
    (tmp_path / "run/export/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"Pickles .* can run code"):
        check_directory(str(tmp_path / "run/export"))


def test_published_sst2_and_rte_files_load(shared_data):
    sst2 = read_rows(shared_data / "tasks/sst2/dev.tsv", ["sentence"], "label")
    assert len(sst2) == 872 and {label for _, label, _ in sst2} == {"0", "1"}
    rte = read_rows(shared_data / "tasks/rte/train.tsv", ["sentence1", "sentence2"], "label")
    assert len(rte) == 2490 and all(len(texts) == 2 for texts, _, _ in rte)
