"""A checkpoint -> the model of a run: what may go on from it, and from where the data goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.model_sizes import model_shape, style_name
from configs.schema import ModelConfig, PretrainConfig
from data_pipeline.stream import Stream
from pretrain import checkpoint, engine
from pretrain.checkpoint import Checkpoint
from pretrain.optimizer_changes import optimizer_facts, state_reader
from pretrain.state import TrainState


def load(found: Checkpoint, config: PretrainConfig, model: Any, data: Stream, say: Callable[[str], None]) -> TrainState:
    """Fill the model with weights and optimizer state and return the run's state; every rank calls it.

    Raises CheckpointError where the checkpoint is not one of this configuration.
    """
    checkpoint.check_facts(found, facts(config, data, found.state.batch))
    checkpoint.check_parameters(found, engine.shapes(model))
    engine.load_fragments(model, state_reader(found, config.train.optimizer, say), found.state.updates)
    return found.state


def facts(config: PretrainConfig, data: Stream, batch: int) -> dict[str, Any]:
    """What may not change within a run that has seen the batches before `batch`; every checkpoint says what it was."""
    mup = {} if config.model.mup is None else {"model.mup": config.model.mup.model_dump(mode="json")}
    return data.facts(batch) | optimizer_facts(config.train.optimizer) | mup | style_facts(config.model)


def style_facts(model: ModelConfig) -> dict[str, Any]:
    """What the shapes of the weights do not tell of a style; those of GPT-2 and BERT, which came first, say nothing."""
    shape = model_shape(model, None, 1)
    name, style = style_name(shape), shape.style
    if name in ("gpt2", "bert"):
        return {}
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.kv_heads}
    return {"model.style": {"name": name, **heads, "rope_theta": style.rope_theta, "local_window": style.local_window}}
