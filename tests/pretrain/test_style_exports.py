"""Exports of every style: parity with what was trained, no weight missing or unknown, and fine-tuning goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.schema import CheckpointConfig, PretrainConfig, TokenizerConfig
from configs.tuning import FinetuneConfig
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune.models import load_model
from pretrain import checkpoint
from pretrain.checkpoint import Fragment
from pretrain.export import export, generate
from pretrain.formats.weights import FormatError
from pretrain.models import build_model
from pretrain.models.hf_config import hf_config
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_saver import Alone
from tests.pretrain.test_styles import STYLES, with_noise

SEQ_LEN = 24
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt-neo": "GPTNeoForCausalLM",
    "modernbert": "ModernBertForMaskedLM",
}


def exported(name: str, folder: Path) -> tuple[Path, torch.nn.Module]:
    """The export of a model of that style with random weights, and the model."""
    is_gpt = STYLES[name].architecture == "gpt"
    texts = ["the sun and the moon"] * 5
    kind = "byte_bpe" if is_gpt else "wordpiece"
    tokenizer = make_tokenizer(TokenizerConfig(type=kind, vocab_size=300), texts, folder)
    (folder / "tokenizer").mkdir()
    save_tokenizer(tokenizer, folder / "tokenizer", SEQ_LEN)
    config = PretrainConfig(run_dir=str(folder), model=STYLES[name], train={"seq_len": SEQ_LEN})
    model = with_noise(build_model(config.model, tokenizer.get_vocab_size(), SEQ_LEN))
    named = list(model.named_parameters())
    fragments = [Fragment(n, tuple(p.shape), 0, {"master": p.detach().flatten()}) for n, p in named]
    with open_saver(folder, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragments, {"dataset": "none"})
    (folder / "metrics.jsonl").write_text("")
    export(config, checkpoint.newest_valid(folder), folder, folder / "export")
    return folder / "export", model


@pytest.mark.parametrize("name", STYLES)
def test_export_is_transformers_model_of_the_style_and_can_be_tuned(name, tmp_path):
    directory, model = exported(name, tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    assert settings["architectures"] == [CLASSES[name]]
    is_gpt = model.architecture == "gpt"
    auto = AutoModelForCausalLM if is_gpt else AutoModelForMaskedLM
    theirs, info = auto.from_pretrained(directory, output_loading_info=True)
    assert type(theirs).__name__ == CLASSES[name]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer("the sun and the moon " * 5, return_tensors="pt", truncation=True)
    assert encoded.keys() == {"input_ids", "attention_mask"}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**encoded).logits, model(encoded["input_ids"]), atol=1e-4, rtol=1e-4)
    if is_gpt:
        assert len(generate(directory)) == 3
    source = str(directory if is_gpt else directory / "encoder")
    given = {"task": "classification", "run_dir": "r", "train": "t.jsonl", "dev": "d.jsonl", "model": source}
    tuned = FinetuneConfig.model_validate(given)
    if is_gpt:
        tokenizer.pad_token = tokenizer.eos_token
    classifier = load_model(AutoModelForSequenceClassification, tuned, tokenizer, num_labels=2)
    loss = classifier(**encoded, labels=torch.tensor([1])).loss
    loss.backward()
    body = dict(theirs.base_model.named_parameters())
    for key, parameter in classifier.base_model.named_parameters():
        assert torch.equal(parameter, body[key]) and parameter.grad is not None, key
    if not is_gpt:  # its head begins with what the masked words' head has learnt
        assert torch.equal(classifier.head.dense.weight, theirs.head.dense.weight)


def test_export_that_differs_from_what_was_trained_is_refused(tmp_path, monkeypatch):
    wrong = {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    monkeypatch.setattr("pretrain.formats.hugging_face.hf_config", lambda shape, ids: hf_config(shape, ids) | wrong)
    with pytest.raises(FormatError, match="logits differ"):
        exported("llama", tmp_path)
    assert not (tmp_path / "export").exists()
