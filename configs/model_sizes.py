"""Sizes of the models: the published tables, and the shape that a configuration asks for. Numbers only, no torch.

The models (`pretrain/models/`) are built from these shapes and `millstream plan` computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.errors import ConfigError
from configs.model_styles import BERT_STYLES, GPT_STYLES, Style
from configs.schema import ModelConfig, PretrainConfig

LLAMA, GPT_NEO, MODERNBERT = GPT_STYLES["llama"], GPT_STYLES["gpt-neo"], BERT_STYLES["modernbert"]
TIED_LLAMA = replace(LLAMA, has_tied_output=True)


@dataclass(frozen=True)
class Shape:
    """What GPT and BERT have in common: sizes, and the style of their blocks."""

    num_layers: int
    hidden_size: int
    num_heads: int
    max_seq_len: int
    vocab_size: int
    intermediate_size: int | None = None  # None: 4 x hidden_size, gated 8/3 of it; see `mlp_size`
    num_kv_heads: int | None = None  # of keys and values, each for num_heads / num_kv_heads queries; None: num_heads
    style: Style = GPT_STYLES["gpt2"]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width inside of the MLP. A gated one has three matrices: at 8/3, rounded up to 64s, as large as two at 4."""
        gated = -(-8 * self.hidden_size // (3 * 64)) * 64
        return self.intermediate_size or (gated if self.style.is_gated else 4 * self.hidden_size)


@dataclass(frozen=True)
class GPTShape(Shape):
    vocab_size: int = 50_257
    # muP (Yang et al. 2022, Table 8): this width and head_dim over those of the base model; 1 is the usual GPT
    width_ratio: float = 1.0
    head_dim_ratio: float = 1.0


@dataclass(frozen=True)
class BertShape(Shape):
    vocab_size: int = 30_522
    style: Style = BERT_STYLES["bert"]
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
    # GPT-Neo (Black et al. 2021): GPT-3's sizes with its alternating local attention; 2.7b has 20 heads
    "gpt-neo-nano": GPTShape(4, 128, 2, 256, style=replace(GPT_NEO, local_window=64)),
    "gpt-neo-125m": GPTShape(12, 768, 12, 2048, style=GPT_NEO),
    "gpt-neo-1.3b": GPTShape(24, 2048, 16, 2048, style=GPT_NEO),
    "gpt-neo-2.7b": GPTShape(32, 2560, 20, 2048, style=GPT_NEO),
    # SmolLM (Allal et al. 2024), TinyLlama (Zhang et al. 2024), Llama 2 (Touvron et al. 2023), Llama 3 (Grattafiori et
    # al. 2024), as published: their vocabularies are those of their tokenizers
    "llama-nano": GPTShape(4, 128, 4, 256, num_kv_heads=2, style=LLAMA),
    "smollm-135m": GPTShape(30, 576, 9, 2048, 49_152, 1536, 3, TIED_LLAMA),
    "smollm-360m": GPTShape(32, 960, 15, 2048, 49_152, 2560, 5, TIED_LLAMA),
    "tinyllama-1.1b": GPTShape(22, 2048, 32, 2048, 32_000, 5632, 4, LLAMA),
    "llama2-7b": GPTShape(32, 4096, 32, 4096, 32_000, 11_008, style=LLAMA),
    "llama3-8b": GPTShape(32, 4096, 32, 8192, 128_256, 14_336, 8, replace(LLAMA, rope_theta=500_000.0)),
    "qwen3-nano": GPTShape(4, 128, 4, 256, num_kv_heads=2, style=GPT_STYLES["qwen3"]),
}

# Devlin et al. 2019, section 3; nano is ours, for CPUs. With weights of 0.02 the outputs of a matrix of its width start
# out 2.4 times smaller than in base, and the loss stays longer on its first plateau; 0.05 = 0.02 x sqrt(768 / 128).
BERT_SIZES = {
    "nano": BertShape(4, 128, 2, 512, init_std=0.05),
    "base": BertShape(12, 768, 12, 512),
    "large": BertShape(24, 1024, 16, 512),
    # ModernBERT (Warner et al. 2024): 1,024 positions in its main phase, 8,192 after the extension
    "modernbert-nano": BertShape(4, 128, 2, 512, style=replace(MODERNBERT, local_window=64), init_std=0.05),
    "modernbert-base": BertShape(22, 768, 12, 8192, 50_368, 1152, style=MODERNBERT),
    "modernbert-large": BertShape(28, 1024, 16, 8192, 50_368, 2624, style=MODERNBERT),
}


def model_shape(config: ModelConfig, vocab_size: int | None, seq_len: int) -> GPTShape | BertShape:
    """The shape of `config`: a row of its architecture's size table with the given values put over it.

    vocab_size: of the dataset; None: that of the published models. Raises ConfigError for an unknown preset or style, a
    width that the heads do not divide, a setting that the style does not have, or a seq_len beyond the positions.
    """
    sizes: dict[str, GPTShape] | dict[str, BertShape] = GPT_SIZES if config.architecture == "gpt" else BERT_SIZES
    if config.preset not in sizes:
        raise ConfigError(f"model.preset={config.preset}: architecture {config.architecture} has {', '.join(sizes)}")
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "max_seq_len")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if vocab_size is not None:
        given["vocab_size"] = vocab_size
    row = sizes[config.preset]
    style = _style(config, row.style)
    if style.model_type != row.style.model_type:  # what the row has beyond depth, width and heads suits its own style
        row = replace(row, num_kv_heads=None, intermediate_size=None)
    shape = replace(row, style=style, **given)
    _check_heads(shape)
    if seq_len > shape.max_seq_len:
        raise ConfigError(
            f"train.seq_len={seq_len}, but model preset {config.preset} has {shape.max_seq_len} positions; "
            f"lower train.seq_len or set model.max_seq_len={seq_len}"
        )
    if config.mup is None or isinstance(shape, BertShape):
        return shape
    if shape.style.model_type != "gpt2":
        raise ConfigError(f"model.mup is defined for model.style=gpt2, found {style_name(shape)}; leave model.mup out")
    head_dim = shape.hidden_size / shape.num_heads
    width_ratio = shape.hidden_size / config.mup.base_hidden_size
    return replace(shape, width_ratio=width_ratio, head_dim_ratio=head_dim / (config.mup.base_head_dim or head_dim))


def _style(config: ModelConfig, of_preset: Style) -> Style:
    """The preset's style or `model.style`, with what is given for it."""
    styles = GPT_STYLES if config.architecture == "gpt" else BERT_STYLES
    if config.style is not None and config.style not in styles:
        raise ConfigError(f"model.style={config.style}: architecture {config.architecture} has {', '.join(styles)}")
    style = of_preset
    if config.style is not None and styles[config.style].model_type != of_preset.model_type:
        style = styles[config.style]
    name = style.model_type.replace("_", "-")
    if config.rope_theta is not None and style.rope_theta is None:
        raise ConfigError(f"model.rope_theta: style {name} has learned positions; leave it out")
    if config.local_window is not None and style.local_window is None:
        other = "gpt-neo" if config.architecture == "gpt" else "modernbert"
        raise ConfigError(
            f"model.local_window={config.local_window}: style {name} has no local blocks; model.style={other} has"
        )
    if config.tied_output is not None and not (style.is_causal and style.rope_theta is not None):
        raise ConfigError(f"model.tied_output: the output layer of style {name} is always the embedding; leave it out")
    if config.gelu is not None and style.model_type not in ("gpt2", "bert"):
        raise ConfigError(f"model.gelu={config.gelu}: is for styles gpt2 and bert, found {name}; leave it out")
    if config.gelu is not None:
        style = replace(style, activation="gelu_tanh" if config.gelu == "tanh" else "gelu")
    names = {"rope_theta": "rope_theta", "local_window": "local_window", "tied_output": "has_tied_output"}
    given = {ours: getattr(config, name) for name, ours in names.items() if getattr(config, name) is not None}
    return replace(style, **given)


def _check_heads(shape: Shape) -> None:
    if shape.hidden_size % shape.num_heads:
        raise ConfigError(
            f"model.hidden_size={shape.hidden_size} is not a multiple of model.num_heads={shape.num_heads}"
        )
    if shape.style.rope_theta is not None and shape.head_dim % 2:
        raise ConfigError(
            f"model.hidden_size={shape.hidden_size} / model.num_heads={shape.num_heads} = {shape.head_dim} is odd; "
            f"rotary positions rotate pairs"
        )
    if shape.kv_heads == shape.num_heads:
        return
    if shape.style.rope_theta is None or not shape.style.is_causal:
        raise ConfigError(
            f"model.num_kv_heads={shape.num_kv_heads}: style {style_name(shape)} has as many heads of keys as of "
            f"queries; leave it out, or set model.style=llama"
        )
    if shape.num_heads % shape.kv_heads:
        raise ConfigError(f"model.num_heads={shape.num_heads} is not a multiple of model.num_kv_heads={shape.kv_heads}")


def style_name(shape: Shape) -> str:
    """The name of the shape's style in the tables of `model_styles.py`."""
    return shape.style.model_type.replace("_", "-")


def check_objective(config: PretrainConfig) -> None:
    """Raise ConfigError where data.masking.pairs asks for a head that the model's style does not have."""
    if config.model.architecture != "bert" or config.data.masking.pairs == "none":
        return
    row = BERT_SIZES.get(config.model.preset)
    if row is not None and not _style(config.model, row.style).has_pairs:
        raise ConfigError(
            f"data.masking.pairs={config.data.masking.pairs}: style modernbert has no head for pairs of "
            f"sentences; set data.masking.pairs=none"
        )
