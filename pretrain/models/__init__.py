"""Plain modules: `gpt.py` and `bert.py`, made of `layers.py`; `hf.py` knows transformers' parameter names."""

from __future__ import annotations

from configs.model_sizes import GPTShape, model_shape
from configs.schema import ModelConfig
from pretrain.models import bert, gpt
from pretrain.models.compiled import compile_blocks


def build_model(config: ModelConfig, vocab_size: int, seq_len: int) -> gpt.GPT | bert.Bert:
    """The model of `config`, in the shape that `model_shape` gives it, whose ConfigErrors it raises."""
    shape = model_shape(config, vocab_size, seq_len)
    options = (config.dropout, config.attention_dropout, config.activation_checkpointing)
    model = gpt.GPT(shape, *options) if isinstance(shape, GPTShape) else bert.Bert(shape, *options)
    if config.compile:
        compile_blocks(model.blocks)
    return model
