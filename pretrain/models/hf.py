"""Our parameter names <-> transformers', one parameter at a time, so that an export never holds a second model.

Where ours is one matrix (queries, keys and values; gate and up) theirs may be several. GPT-2 there keeps its matrices
transposed (Conv1D), and GPT-Neo does not divide its scores by sqrt(head_dim): an export's queries are divided instead.
hf_config.py has the config.json that belongs to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from configs.model_sizes import Shape


@dataclass(frozen=True)
class Naming:
    """Names of one kind of model of transformers; theirs for a module or parameter of ours."""

    block: str  # before the number of a block
    names: Mapping[str, str]  # those inside of a block without it
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a layer of ours theirs, in order of rows
    is_transposed: bool = False  # matrices of blocks
    head: str = "\0"  # what the names of those parameters begin with that an encoder alone does not need


_LLAMA_NAMES = {
    "word_embeddings.weight": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "word_output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
}
_GPT2_NAMES = {
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
_BERT_NAMES = {
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
_MODERNBERT_NAMES = {
    "word_embeddings.weight": "model.embeddings.tok_embeddings.weight",
    "embedding_norm": "model.embeddings.norm",
    "final_norm": "model.final_norm",
    "mlm_transform": "head.dense",
    "mlm_norm": "head.norm",
    "mlm_output.bias": "decoder.bias",
    "attention_norm": "attn_norm",
    "attention.qkv": "attn.Wqkv",
    "attention.output": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "mlp.gate_up": "mlp.Wi",
    "mlp.down": "mlp.Wo",
}
_LLAMA_PARTS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
_GPT_NEO_PARTS = {"attention.qkv": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")}
_BERT_PARTS = {"attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value")}

NAMINGS = {
    "gpt2": Naming("transformer.h.", _GPT2_NAMES, is_transposed=True),
    "gpt_neo": Naming("transformer.h.", _GPT2_NAMES | {"attention.output": "attn.attention.out_proj"}, _GPT_NEO_PARTS),
    "llama": Naming("model.layers.", _LLAMA_NAMES, _LLAMA_PARTS),
    "qwen3": Naming("model.layers.", _LLAMA_NAMES, _LLAMA_PARTS),
    "bert": Naming("bert.encoder.layer.", _BERT_NAMES, _BERT_PARTS, head="cls."),
    # ModernBERT's classifiers have the transform of the masked words' head too, and begin with what it has learnt.
    "modernbert": Naming("model.layers.", _MODERNBERT_NAMES, head="decoder."),
}


def hf_names(shape: Shape, name: str) -> list[str]:
    """transformers' names of what our parameter `name` is there: several where ours is fused."""
    naming = NAMINGS[shape.style.model_type]
    block, inner = _split_block(name)
    prefix = "" if block is None else f"{naming.block}{block}."
    module, _, leaf = inner.rpartition(".")
    if inner in naming.names:
        return [prefix + naming.names[inner]]
    return [f"{prefix}{part}.{leaf}" for part in naming.parts.get(module, (naming.names.get(module, module),))]


def to_hf(shape: Shape, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, tensor) for one of our parameters; three of them for a fused query, key and value."""
    names = hf_names(shape, name)
    pieces = tensor.split(_rows(shape, name)) if len(names) > 1 else [tensor]
    for place, (theirs, piece) in enumerate(zip(names, pieces, strict=True)):
        if _is_transposed(shape, name, piece):
            piece = piece.t()
        yield theirs, piece * shape.head_dim**-0.5 if _is_unscaled_query(shape, name, place) else piece


def from_hf(shape: Shape, names: list[str], theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict, for the parameter `names` of our model, out of one of transformers.

    Raises KeyError naming the tensor that `theirs` lacks.
    """
    ours = {}
    for name in names:
        wanted = hf_names(shape, name)
        if missing := [hf_name for hf_name in wanted if hf_name not in theirs]:
            raise KeyError(f"the model has no tensor {missing[0]}, from which `{name}` comes")
        pieces = [
            theirs[hf_name] * shape.head_dim**0.5 if _is_unscaled_query(shape, name, place) else theirs[hf_name]
            for place, hf_name in enumerate(wanted)
        ]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        ours[name] = tensor.t().contiguous() if _is_transposed(shape, name, tensor) else tensor
    return ours


def is_head(shape: Shape, hf_name: str) -> bool:
    """Whether a parameter of transformers' belongs to a pretraining head, which an encoder alone does not need."""
    return hf_name.startswith(NAMINGS[shape.style.model_type].head)


def _split_block(name: str) -> tuple[str | None, str]:
    """blocks.3.mlp.up.weight -> ("3", "mlp.up.weight")."""
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    return (block[1], block[2]) if block else (None, name)


def _rows(shape: Shape, name: str) -> list[int]:
    """Of each part of a fused layer."""
    if ".gate_up." in name:
        return [shape.mlp_size] * 2
    return [shape.hidden_size, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]


def _is_transposed(shape: Shape, name: str, tensor: torch.Tensor) -> bool:
    return NAMINGS[shape.style.model_type].is_transposed and name.startswith("blocks.") and tensor.dim() == 2


def _is_unscaled_query(shape: Shape, name: str, place: int) -> bool:
    return shape.style.model_type == "gpt_neo" and ".attention.qkv." in name and place == 0
