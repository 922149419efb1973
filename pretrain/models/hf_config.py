"""The config.json of an export, for each style, and back: the shape that such a file describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from configs.model_sizes import BertShape, GPTShape, Shape
from configs.model_styles import BERT_STYLES, GPT_STYLES, Style
from pretrain.models.bert import PADDING_ID

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bert": "BertForPreTraining",
    "modernbert": "ModernBertForMaskedLM",
}

HF_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
# theirs -> ours
ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu"]] = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
    "gelu_python": "gelu",
}  # fmt: skip
# Settings with which the same weights compute something else than here; where they are not written, they are like this
FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    },
    "gpt_neo": {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None},
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_scaling": None},
    "bert": {
        "layer_norm_eps": 1e-12, "type_vocab_size": 2, "position_embedding_type": "absolute", "is_decoder": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    },
    "modernbert": {
        "hidden_activation": "gelu", "norm_eps": 1e-5, "norm_bias": False, "attention_bias": False, "mlp_bias": False,
        "decoder_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip


def hf_config(shape: GPTShape | BertShape, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of config.json; ids: of the special tokens "eos" (GPT), "cls" and "sep" (ModernBERT)."""
    style = shape.style
    start: dict[str, Any] = {"architectures": [CLASSES[style.model_type]], "model_type": style.model_type}
    start |= {"vocab_size": shape.vocab_size, "tie_word_embeddings": style.has_tied_output}
    match style.model_type:
        case "gpt2":
            return start | _gpt2(shape, ids.get("eos"))
        case "gpt_neo":
            return start | _gpt_neo(shape, ids.get("eos"))
        case "llama" | "qwen3":
            return start | _llama(shape, ids.get("eos"))
        case "bert":
            assert isinstance(shape, BertShape)
            return start | _bert(shape)
    assert isinstance(shape, BertShape)
    return start | _modernbert(shape, ids)


def _gpt2(shape: Shape, eos: int | None) -> dict[str, Any]:
    return {
        "n_positions": shape.max_seq_len,
        "n_embd": shape.hidden_size,
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "n_inner": shape.intermediate_size,
        "activation_function": HF_ACTIVATIONS[shape.style.activation],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": shape.style.norm_eps,
        "bos_token_id": eos,
        "eos_token_id": eos,
    }


def _gpt_neo(shape: Shape, eos: int | None) -> dict[str, Any]:
    kinds = ["global" if shape.style.window(layer) is None else "local" for layer in range(shape.num_layers)]
    return {
        "max_position_embeddings": shape.max_seq_len,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "intermediate_size": shape.mlp_size,
        "attention_types": [[kinds, 1]],
        "window_size": shape.style.local_window,
        "activation_function": "gelu_new",
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_epsilon": shape.style.norm_eps,
        "bos_token_id": eos,
        "eos_token_id": eos,
    }


def _llama(shape: Shape, eos: int | None) -> dict[str, Any]:
    theta = shape.style.rope_theta
    return {
        "max_position_embeddings": shape.max_seq_len,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp_size,
        "hidden_act": "silu",
        "rms_norm_eps": shape.style.norm_eps,
        "rope_theta": theta,  # of transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": None,
    }


def _bert(shape: BertShape) -> dict[str, Any]:
    return {
        "max_position_embeddings": shape.max_seq_len,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.mlp_size,
        "hidden_act": HF_ACTIVATIONS[shape.style.activation],
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": shape.init_std,
        "type_vocab_size": 2,
        "layer_norm_eps": shape.style.norm_eps,
        "pad_token_id": PADDING_ID,
    }


def _modernbert(shape: BertShape, ids: Mapping[str, int | None]) -> dict[str, Any]:
    style = shape.style
    kinds = [
        "full_attention" if style.window(layer) is None else "sliding_attention" for layer in range(shape.num_layers)
    ]
    return {
        "max_position_embeddings": shape.max_seq_len,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.mlp_size,
        "hidden_activation": "gelu",
        "initializer_range": shape.init_std,
        "norm_eps": style.norm_eps,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "local_attention": style.local_window,
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": style.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": style.local_rope_theta},
        },
        # of transformers before 5
        "global_attn_every_n_layers": style.global_every,
        "global_rope_theta": style.rope_theta,
        "local_rope_theta": style.local_rope_theta,
        "pad_token_id": PADDING_ID,
        "bos_token_id": ids.get("cls"),
        "cls_token_id": ids.get("cls"),
        "eos_token_id": ids.get("sep"),
        "sep_token_id": ids.get("sep"),
    }


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of a config.json with which its weights compute something else than ours."""
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"model_type {kind!r}: expected one of {', '.join(CLASSES)}")
    problems = [
        f"{key}={config[key]}: expected {expected}"
        for key, expected in FIXED[kind].items()
        if config.get(key, expected) != expected
    ]
    activation = {"gpt2": "activation_function", "bert": "hidden_act"}.get(kind)
    if activation is not None and config.get(activation, "gelu") not in ACTIVATIONS:
        problems.append(f"{activation}={config[activation]}: expected {' or '.join(ACTIVATIONS)}")
    rope = config.get("rope_parameters") or {}
    kinds = {part.get("rope_type", "default") for part in [rope, *rope.values()] if isinstance(part, dict)}
    if kinds - {"default"}:
        problems.append(f"rope_parameters: rope_type={', '.join(sorted(kinds - {'default'}))}: expected default")
    if kind in ("llama", "qwen3") and config.get("head_dim"):
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        if config["head_dim"] != head_dim:
            problems.append(f"head_dim={config['head_dim']}: expected hidden_size / num_attention_heads = {head_dim}")
    if problems:
        raise ValueError("; ".join(problems))


def shape_from_hf(config: Mapping[str, Any]) -> GPTShape | BertShape:
    """The shape of the model that a config.json of one of CLASSES' types describes.

    Raises ValueError for other types and for settings that ours does not have, KeyError for missing sizes.
    """
    check_settings(config)
    kind = config["model_type"]
    if kind == "gpt2":
        return GPTShape(
            config["n_layer"], config["n_embd"], config["n_head"], config["n_positions"], config["vocab_size"],
            config.get("n_inner"), style=_with_activation(GPT_STYLES["gpt2"], config.get("activation_function")),
        )  # fmt: skip
    if kind == "gpt_neo":
        return GPTShape(
            config["num_layers"], config["hidden_size"], config["num_heads"], config["max_position_embeddings"],
            config["vocab_size"], config.get("intermediate_size"),
            style=replace(GPT_STYLES["gpt-neo"], local_window=config["window_size"]),
        )  # fmt: skip
    theirs = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    ours = ("num_layers", "hidden_size", "num_heads", "max_seq_len")
    sizes: dict[str, Any] = {our: config[name] for our, name in zip(ours, theirs, strict=True)}
    sizes |= {name: config[name] for name in ("vocab_size", "intermediate_size")}
    std = config.get("initializer_range", 0.02)
    rope = config.get("rope_parameters") or {}
    if kind == "bert":
        return BertShape(**sizes, init_std=std, style=_with_activation(BERT_STYLES["bert"], config.get("hidden_act")))
    if kind == "modernbert":
        full, local = (rope[name]["rope_theta"] for name in ("full_attention", "sliding_attention"))
        style = BERT_STYLES["modernbert"]
        style = replace(style, local_window=config["local_attention"], rope_theta=full, local_rope_theta=local)
        return BertShape(**sizes, init_std=std, style=style)
    style = replace(
        GPT_STYLES[kind], norm_eps=config["rms_norm_eps"], rope_theta=rope["rope_theta"],
        has_tied_output=config["tie_word_embeddings"],
    )  # fmt: skip
    return GPTShape(**sizes, num_kv_heads=config["num_key_value_heads"], style=style)


def _with_activation(style: Style, activation: str | None) -> Style:
    return style if activation is None else replace(style, activation=ACTIVATIONS[activation])
