"""Layer-wise decay of the learning rate finds head, layers and embeddings of every kind of model and head."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from configs.tuning import LoraConfig
from finetune.lora import add_lora
from pretrain.optim import distances_from_head

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SHORT: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = [
    BertConfig(**SIZES),
    RobertaConfig(**SIZES),
    ElectraConfig(**SIZES, embedding_size=16),
    DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p"]),
    ModernBertConfig(**SIZES, cls_token_id=0, sep_token_id=0),
    DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=99),
    GPT2Config(n_embd=32, n_layer=3, n_head=2, **SHORT),
    LlamaConfig(**SIZES, num_key_value_heads=2),
]
HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("auto", HEADS, ids=["classifier", "tagger", "qa"])
def test_head_is_next_to_the_loss_and_embeddings_are_below_all_layers(config, auto):
    model = auto.from_config(config)
    distances = distances_from_head(model)
    assert distances.keys() == dict(model.named_parameters()).keys()
    body = f"{model.base_model_prefix}."
    heads = {name for name in distances if not name.startswith(body)}
    assert heads and all(distances[name] == 0 for name in heads)
    assert sorted(set(distances.values())) == [0, 1, 2, 3, 4]
    embeddings = [name for name, distance in distances.items() if distance == 4]
    assert any("tok" in name or "word" in name or "wte" in name for name in embeddings)
    assert not any(".layer" in name or ".h." in name for name in (*embeddings, *heads))


def test_what_lora_adds_is_as_far_from_the_head_as_its_layer():
    pytest.importorskip("peft", reason="needs peft: pip install 'millstream[lora]'")
    model = add_lora(AutoModelForSequenceClassification.from_config(CONFIGS[0]), LoraConfig(), [])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    distances = {name: distance for name, distance in distances_from_head(model).items() if name in trained}
    assert {distance for name, distance in distances.items() if "layer.0" in name} == {3}
    assert {distance for name, distance in distances.items() if "classifier" in name} == {0}
