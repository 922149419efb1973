"""Sizes of the models: the published tables, and the shape that a configuration asks for. Numbers only, no torch.

The models (`pretrain/models/`) are built from these shapes and `millstream plan` computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.errors import ConfigError
from configs.schema import ModelConfig


@dataclass(frozen=True)
class GPTShape:
    num_layers: int
    hidden_size: int
    num_heads: int
    max_seq_len: int
    vocab_size: int = 50_257
    intermediate_size: int | None = None  # None: 4 x hidden_size
    # muP (Yang et al. 2022, Table 8): this width and head_dim over those of the base model; 1 is the usual GPT
    width_ratio: float = 1.0
    head_dim_ratio: float = 1.0


@dataclass(frozen=True)
class BertShape:
    num_layers: int
    hidden_size: int
    num_heads: int
    max_seq_len: int
    vocab_size: int = 30_522
    intermediate_size: int | None = None  # None: 4 x hidden_size
    init_std: float = 0.02  # of all weights (Devlin et al. 2019's code)


# GPT-2: table 2 of Radford et al. 2019 (parameters counted with the tied embedding once). GPT-3: table 2.1 of Brown et
# al. 2020; where its head count times head size is not the width, the head count that divides the width is used.
GPT_SIZES = {
    "nano": GPTShape(4, 128, 2, 256),
    "gpt2": GPTShape(12, 768, 12, 1024),
    "gpt2-medium": GPTShape(24, 1024, 16, 1024),
    "gpt2-large": GPTShape(36, 1280, 20, 1024),
    "gpt2-xl": GPTShape(48, 1600, 25, 1024),
    "gpt3-125m": GPTShape(12, 768, 12, 2048),
    "gpt3-350m": GPTShape(24, 1024, 16, 2048),
    "gpt3-760m": GPTShape(24, 1536, 16, 2048),
    "gpt3-1.3b": GPTShape(24, 2048, 16, 2048),
    "gpt3-2.7b": GPTShape(32, 2560, 32, 2048),
    "gpt3-6.7b": GPTShape(32, 4096, 32, 2048),
    "gpt3-13b": GPTShape(40, 5120, 40, 2048),
    "gpt3-175b": GPTShape(96, 12288, 96, 2048),
}

# Devlin et al. 2019, section 3; nano is ours, for CPUs. With weights of 0.02 the outputs of a matrix of its width start
# out 2.4 times smaller than in base, and the loss stays longer on its first plateau; 0.05 = 0.02 x sqrt(768 / 128).
BERT_SIZES = {
    "nano": BertShape(4, 128, 2, 512, init_std=0.05),
    "base": BertShape(12, 768, 12, 512),
    "large": BertShape(24, 1024, 16, 512),
}


def model_shape(config: ModelConfig, vocab_size: int | None, seq_len: int) -> GPTShape | BertShape:
    """The shape of `config`: a row of its architecture's size table with the given values put over it.

    vocab_size: of the dataset; None: that of the published models. Raises ConfigError for an unknown preset, a width
    that the heads do not divide, or a seq_len beyond the positions.
    """
    sizes: dict[str, GPTShape] | dict[str, BertShape] = GPT_SIZES if config.architecture == "gpt" else BERT_SIZES
    if config.preset not in sizes:
        raise ConfigError(f"model.preset={config.preset}: architecture {config.architecture} has {', '.join(sizes)}")
    names = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_seq_len")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if vocab_size is not None:
        given["vocab_size"] = vocab_size
    shape = replace(sizes[config.preset], **given)
    if shape.hidden_size % shape.num_heads:
        raise ConfigError(
            f"model.hidden_size={shape.hidden_size} is not a multiple of model.num_heads={shape.num_heads}"
        )
    if seq_len > shape.max_seq_len:
        raise ConfigError(
            f"train.seq_len={seq_len}, but model preset {config.preset} has {shape.max_seq_len} positions; "
            f"lower train.seq_len or set model.max_seq_len={seq_len}"
        )
    if config.mup is None or isinstance(shape, BertShape):
        return shape
    head_dim = shape.hidden_size / shape.num_heads
    width_ratio = shape.hidden_size / config.mup.base_hidden_size
    return replace(shape, width_ratio=width_ratio, head_dim_ratio=head_dim / (config.mup.base_head_dim or head_dim))
