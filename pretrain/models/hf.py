"""Our parameter names <-> transformers', one parameter at a time, so that an export never holds a second model.

GPT-2 in transformers keeps its matrices transposed (Conv1D) and both models there name things otherwise; BERT there has
separate query, key and value where ours is one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from configs.model_sizes import BertShape, GPTShape
from pretrain.models.bert import NORM_EPS, PADDING_ID

GPT_NAMES = {
    "word_embeddings.weight": "transformer.wte.weight",
    "position_embeddings.weight": "transformer.wpe.weight",
    "final_norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
BERT_NAMES = {
    "word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "token_type_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "mlm_transform": "cls.predictions.transform.dense",
    "mlm_norm": "cls.predictions.transform.LayerNorm",
    "mlm_output.bias": "cls.predictions.bias",
    "nsp_output": "cls.seq_relationship",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
QKV = ("query", "key", "value")


def to_hf(architecture: str, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, tensor) for one of our parameters; three of them for BERT's fused query, key and value."""
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    inner = block[2] if block else name
    if architecture == "gpt":
        prefix = f"transformer.h.{block[1]}." if block else ""
        is_matrix = block and tensor.dim() == 2
        yield prefix + _rename(inner, GPT_NAMES), tensor.t() if is_matrix else tensor
        return
    prefix = f"bert.encoder.layer.{block[1]}." if block else ""
    if inner.startswith("attention.qkv."):
        for part, piece in zip(QKV, tensor.chunk(3), strict=True):
            yield f"{prefix}attention.self.{part}.{inner.rpartition('.')[2]}", piece
    else:
        yield prefix + _rename(inner, BERT_NAMES), tensor


def from_hf(architecture: str, names: list[str], theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict, for the parameter `names` of our model, out of one of transformers.

    Raises KeyError naming the tensor that `theirs` lacks.
    """
    ours = {}
    for name in names:
        probe = torch.empty(3, 1) if name.endswith("weight") else torch.empty(3)
        wanted = [hf_name for hf_name, _ in to_hf(architecture, name, probe)]
        if missing := [hf_name for hf_name in wanted if hf_name not in theirs]:
            raise KeyError(f"the model has no tensor {missing[0]}, from which `{name}` comes")
        tensor = torch.cat([theirs[hf_name] for hf_name in wanted])
        transposed = architecture == "gpt" and name.startswith("blocks.") and tensor.dim() == 2
        ours[name] = tensor.t().contiguous() if transposed else tensor
    return ours


def hf_config(shape: GPTShape | BertShape, end_of_text: int | None) -> dict[str, Any]:
    """The content of config.json; `end_of_text` is the id of the token that ends a document, which GPT needs."""
    if isinstance(shape, GPTShape):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": shape.vocab_size,
            "n_positions": shape.max_seq_len,
            "n_embd": shape.hidden_size,
            "n_layer": shape.num_layers,
            "n_head": shape.num_heads,
            "n_inner": shape.intermediate_size,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "tie_word_embeddings": True,
        }
    return {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.intermediate_size or 4 * shape.hidden_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": shape.init_std,
        "type_vocab_size": 2,
        "layer_norm_eps": NORM_EPS,
        "pad_token_id": PADDING_ID,
        "tie_word_embeddings": True,
    }


def shape_from_hf(config: Mapping[str, Any]) -> GPTShape | BertShape:
    """The shape of the model that a config.json of type gpt2 or bert describes. Raises ValueError for other types."""
    if config["model_type"] == "gpt2":
        return GPTShape(
            config["n_layer"], config["n_embd"], config["n_head"], config["n_positions"], config["vocab_size"],
            config.get("n_inner"),
        )  # fmt: skip
    if config["model_type"] == "bert":
        return BertShape(
            config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"],
            config["max_position_embeddings"], config["vocab_size"], config["intermediate_size"],
            config.get("initializer_range", 0.02),
        )  # fmt: skip
    raise ValueError(f"model_type {config['model_type']!r}: expected gpt2 or bert")


def _rename(name: str, table: Mapping[str, str]) -> str:
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}"
