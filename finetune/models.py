"""Models from Hugging Face directories, ours and others': what every task needs to load one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from configs.load import ConfigError
from configs.tuning import FinetuneConfig
from finetune.lora import add_lora
from pretrain.checkpoint import file_hash

DROPOUTS = (  # of BERT, GPT-2, GPT-Neo and ModernBERT
    "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout",
    "embed_dropout", "attention_dropout", "embedding_dropout", "mlp_dropout",
)  # fmt: skip


def check_directory(model: str) -> None:
    """Raise ConfigError unless `model` is a directory with config.json, weights and a tokenizer."""
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(
            f"model={model}: no such directory; give a Hugging Face directory, for example RUN_DIR/export"
        )
    if not (directory / "config.json").is_file():
        inside = sorted(directory.glob("*/config.json"))  # export/ of a pretraining run, model/ of fine-tuning
        cure = f"; did you mean {inside[0].parent}?" if inside else ""
        raise ConfigError(f"model={model}: has no config.json, so it is not a Hugging Face directory{cure}")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"model={model}: has no .safetensors file. Pickles (pytorch_model.bin) can run code when loaded and "
            f"are not read; convert them with transformers' save_pretrained"
        )


def weights_hash(model: str) -> str:
    """A hash of the directory's weights, so that a run does not go on from others of the same name."""
    return "-".join(file_hash(path)[:16] for path in sorted(Path(model).glob("*.safetensors")))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The directory's tokenizer, with a padding token: where it has none, its end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model={model}: its tokenizer cannot be loaded ({error})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(auto: Any, config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, **head: Any) -> torch.nn.Module:
    """The model of an AutoModelFor... class in fp32, with a new head made from `head`.

    With `tuning.lora` it is peft's model around that one, whose body stays as it is but for what is added to it.
    With `from_scratch` all of its weights are new. The caller seeds torch. Raises ConfigError if the directory lacks
    weights of the model's body: only the head may be new.
    """
    settings = AutoConfig.from_pretrained(config.model, **head)
    for name in DROPOUTS:
        if config.tuning.dropout is not None and hasattr(settings, name):
            setattr(settings, name, config.tuning.dropout)
    settings.pad_token_id = tokenizer.pad_token_id
    how = {"dtype": torch.float32, "attn_implementation": attention(config)}
    if config.from_scratch:
        return auto.from_config(settings, **how)
    model, info = auto.from_pretrained(
        config.model, config=settings, output_loading_info=True, use_safetensors=True, **how
    )
    body = f"{model.base_model_prefix}."
    if lost := sorted(name for name in info["missing_keys"] if name.startswith(body) and ".pooler." not in name):
        raise ConfigError(f"model={config.model}: lacks {len(lost)} weights of the model's body, such as {lost[0]}")
    if config.tuning.lora is not None:
        return add_lora(model, config.tuning.lora, info["missing_keys"])
    return model


def attention(config: FinetuneConfig) -> str | None:
    """Which of transformers' kinds of attention; None: the model's default, which is torch's fused one.

    In bf16 on a CPU forward and backward of that one take 1.1 to 3.7 times as long as plain products of matrices
    (`python -m benchmarks.attention_cpu`). These keep the scores of all pairs of tokens, hence not for long rows.
    """
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"  # runtime.start sees to it
    return "eager" if on_cpu and config.tuning.precision == "bf16" and config.tuning.max_seq_len <= 512 else None


def check_causal(model: str) -> int | None:
    """The model's number of positions, if it says so. Raises ConfigError unless it predicts the next token."""
    settings = AutoConfig.from_pretrained(model)
    names = settings.architectures or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise ConfigError(f"model={model}: is {', '.join(names) or 'nameless'}; expected a causal model, such as a GPT")
    return getattr(settings, "max_position_embeddings", None)


def load_labeller(
    auto: Any, config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> torch.nn.Module:
    """As `load_model`, with a head whose outputs have these names."""
    ids = {name: number for number, name in enumerate(names)}
    return load_model(auto, config, tokenizer, num_labels=len(names), id2label=dict(enumerate(names)), label2id=ids)
