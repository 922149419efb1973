"""Plain modules: `gpt.py` and `bert.py`, made of `layers.py`; `hf.py` knows transformers' parameter names."""

from __future__ import annotations

from dataclasses import replace

from configs.load import ConfigError
from configs.schema import ModelConfig
from pretrain.models import bert, gpt


def build_model(config: ModelConfig, vocab_size: int, seq_len: int) -> gpt.GPT | bert.Bert:
    """The model of `config`: a row of its architecture's size table with the given values put over it.

    Raises ConfigError for an unknown preset, a width that the heads do not divide, or a seq_len beyond the positions.
    """
    names = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_seq_len")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    options = (config.dropout, config.attention_dropout, config.activation_checkpointing)
    try:
        if config.architecture == "gpt":
            gpt_shape = replace(gpt.SIZES[config.preset], vocab_size=vocab_size, **given)
            _check(gpt_shape, config, seq_len)
            return gpt.GPT(gpt_shape, *options)
        bert_shape = replace(bert.SIZES[config.preset], vocab_size=vocab_size, **given)
        _check(bert_shape, config, seq_len)
        return bert.Bert(bert_shape, *options)
    except KeyError:
        valid = gpt.SIZES if config.architecture == "gpt" else bert.SIZES
        raise ConfigError(
            f"model.preset={config.preset}: architecture {config.architecture} has {', '.join(valid)}"
        ) from None


def _check(shape: gpt.GPTShape | bert.BertShape, config: ModelConfig, seq_len: int) -> None:
    if shape.hidden_size % shape.num_heads:
        raise ConfigError(
            f"model.hidden_size={shape.hidden_size} is not a multiple of model.num_heads={shape.num_heads}"
        )
    if seq_len > shape.max_seq_len:
        raise ConfigError(
            f"train.seq_len={seq_len}, but model preset {config.preset} has {shape.max_seq_len} positions; "
            f"lower train.seq_len or set model.max_seq_len={seq_len}"
        )
