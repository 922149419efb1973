"""LoRA by peft, under ZeRO on two ranks: what is trained, what stays, what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from configs.load import ConfigError, load_finetune
from configs.tuning import LoraConfig
from finetune.lora import add_lora, whole_modules
from tests.finetune.test_classification import folder, settings  # noqa: F401 (a fixture)
from tests.ranks import run_ranks

peft = pytest.importorskip("peft", reason="needs peft: pip install 'millstream[lora]'")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def runs(folder) -> Path:  # noqa: F811
    tuning = {
        "precision": "fp32",
        "num_epochs": 2,
        "micro_batch_size": 8,
        "save_every": 10,
        "optimizer": {"lr": 2e-2},
        "lora": {"rank": 4, "dropout": 0.1, "targets": ["query", "value"]},
    }
    (folder / "lora.yaml").write_text(json.dumps(settings(folder, tuning=tuning)))
    run_ranks(2, ["-m", "tests.finetune.lora_on_ranks", str(folder)], folder / "lora-logs")
    return folder


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "seed-1/metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_it_learns_alike_at_both_zero_stages_and_after_a_kill(runs):
    results = json.loads((runs / "lora-3/results.json").read_text())
    assert results["accuracy"]["mean"] > 0.9
    np.testing.assert_allclose(losses(runs / "lora-2"), losses(runs / "lora-3"), rtol=1e-3, atol=1e-4)
    assert losses(runs / "lora-killed") == losses(runs / "lora-3")
    ours, theirs = (load_file(runs / name / "model/model.safetensors") for name in ("lora-killed", "lora-3"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.distributed
def test_merged_weights_differ_from_the_start_by_thin_products_alone(runs):
    before, after = load_file(runs / "bert/model.safetensors"), load_file(runs / "lora-3/model/model.safetensors")
    for name, weight in before.items():
        change = after[f"bert.{name}"] - weight
        if name.endswith(("query.weight", "value.weight")):
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 4, name
        else:
            assert change.abs().max() == 0, name


@pytest.mark.distributed
def test_adapter_on_the_start_model_is_the_merged_model(runs):
    merged = BertForSequenceClassification.from_pretrained(runs / "lora-3/model").eval()
    start = BertForSequenceClassification.from_pretrained(runs / "bert", num_labels=2)
    adapted = peft.PeftModel.from_pretrained(start, runs / "lora-3/adapter").eval()
    lines = [json.loads(line) for line in (runs / "lora-3/predictions.jsonl").open()]
    texts = AutoTokenizer.from_pretrained(runs / "bert")([line["text"] for line in lines], padding=True)
    batch = {name: torch.tensor(values) for name, values in texts.items()}
    with torch.no_grad():
        ours, theirs = (model(**batch).logits.softmax(-1) for model in (merged, adapted))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.max(-1).values, [line["probability"] for line in lines], atol=1e-4)


def test_head_and_what_is_new_are_trained_whole_but_not_output_embeddings():
    new = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"]
    bert = BertForSequenceClassification(BertConfig(**SIZES))
    assert whole_modules(bert, new) == ["bert.pooler.dense", "classifier"]
    assert whole_modules(GPT2ForSequenceClassification(GPT2Config(**GPT2)), []) == ["score"]
    assert whole_modules(GPT2LMHeadModel(GPT2Config(**GPT2)), []) == []


def test_unknown_target_is_named_with_those_there_are():
    with pytest.raises(
        ConfigError, match=r"tuning.lora.targets=\['q_proj'\].*are called classifier, dense, key, query"
    ):
        add_lora(BertForSequenceClassification(BertConfig(**SIZES)), LoraConfig(targets=["q_proj"]), [])


def test_scratch_model_has_nothing_to_adapt(folder):  # noqa: F811
    (folder / "scratch.yaml").write_text(json.dumps(settings(folder, from_scratch=True, tuning={"lora": {}})))
    with pytest.raises(ConfigError, match=r"from_scratch=true with tuning.lora"):
        load_finetune(folder / "scratch.yaml")
