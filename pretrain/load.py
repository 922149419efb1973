"""A checkpoint, or the weights of an imported model -> the model of a run: what may go on from it, and from where."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.load import ConfigError
from configs.model_sizes import BertShape, GPTShape, model_shape, style_name
from configs.schema import ModelConfig, PretrainConfig
from data_pipeline.stream import Stream
from data_pipeline.tokenizer import load_tokenizer
from pretrain import checkpoint, engine
from pretrain.checkpoint import Checkpoint
from pretrain.formats import hugging_face
from pretrain.formats.weights import model_section
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


def begin(config: PretrainConfig, model: Any, data: Stream, say: Callable[[str], None]) -> TrainState:
    """The state of a new run; with `model.init_from` its model gets the weights of that directory; every rank calls it.

    Rows of the embedding beyond the dataset's vocabulary are left out. Raises ConfigError where directory, model and
    dataset are not of the same shape or not of the same tokens.
    """
    if config.model.init_from is None:
        return TrainState()
    directory = Path(config.model.init_from)
    source = hugging_face.read(directory)
    check_shape(directory, model.module.shape, source.shape)
    check_tokens(directory, data)
    shapes = engine.shapes(model)

    @functools.lru_cache(maxsize=1)
    def whole(name: str) -> torch.Tensor:
        rows = shapes[name][0]
        return source.weight(name)[:rows].flatten()

    def read(name: str, key: str, start: int, length: int) -> torch.Tensor:
        return whole(name)[start : start + length] if key in ("master", "ema") else torch.zeros(length)

    engine.load_fragments(model, read, num_updates=0)
    for note in source.notes:
        say(f"{directory}: {note}")
    say(f"begins with the weights of {directory}")
    return TrainState()


def check_shape(directory: Path, ours: GPTShape | BertShape, theirs: GPTShape | BertShape) -> None:
    """Raises ConfigError unless the configuration's model is that of the directory, and has no more tokens."""
    wanted, found = model_section(theirs), model_section(ours)
    differing = [
        f"model.{key}={found.get(key)} (there: {value})" for key, value in wanted.items() if found.get(key) != value
    ]
    if differing:
        values = " ".join(f"model.{key}={value}" for key, value in wanted.items())
        raise ConfigError(f"model.init_from={directory}: another model than {', '.join(differing)}; set {values}")
    if ours.style != theirs.style:
        raise ConfigError(f"model.init_from={directory}: its blocks are {theirs.style}, here they are {ours.style}")
    if getattr(ours, "width_ratio", 1) != 1:
        raise ConfigError(f"model.init_from={directory}: its model was not made for model.mup; leave one of them out")
    if ours.vocab_size > theirs.vocab_size:
        raise ConfigError(
            f"model.init_from={directory}: has {theirs.vocab_size} tokens, the dataset {ours.vocab_size}; build the "
            f"dataset with data.build.tokenizer={{type: pretrained, path: {directory}}}"
        )


def check_tokens(directory: Path, data: Stream) -> None:
    """Raises ConfigError where an id of the dataset's tokenizer is another token in that of the directory, if any."""
    if not (directory / "tokenizer.json").is_file():
        return
    known, used = (load_tokenizer(Path(place)).get_vocab() for place in (directory, data.tokenizer_dir))
    if other := sorted((id_, token) for token, id_ in known.items() if used.get(token) != id_):
        id_, token = other[0]
        raise ConfigError(
            f"model.init_from={directory}: {len(other)} tokens are others in the dataset's tokenizer "
            f"({data.tokenizer_dir}), such as {id_}, {token!r}; build the dataset with "
            f"data.build.tokenizer={{type: pretrained, path: {directory}}}"
        )


def facts(config: PretrainConfig, data: Stream, batch: int) -> dict[str, Any]:
    """What may not change within a run that has seen the batches before `batch`; every checkpoint says what it was."""
    mup = {} if config.model.mup is None else {"model.mup": config.model.mup.model_dump(mode="json")}
    gelu = {} if config.model.gelu is None else {"model.gelu": config.model.gelu}
    return data.facts(batch) | optimizer_facts(config.train.optimizer) | mup | gelu | style_facts(config.model)


def style_facts(model: ModelConfig) -> dict[str, Any]:
    """What the shapes of the weights do not tell of a style; those of GPT-2 and BERT, which came first, say nothing."""
    shape = model_shape(model, None, 1)
    name, style = style_name(shape), shape.style
    if name in ("gpt2", "bert"):
        return {}
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.kv_heads}
    return {"model.style": {"name": name, **heads, "rope_theta": style.rope_theta, "local_window": style.local_window}}
