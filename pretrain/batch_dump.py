"""A step's batch on disk, to be run again elsewhere: tensors, and JSON that says what they are. No pickle.

FOLDER/batch/ has `batch.json` and one `rank-00000.safetensors` a rank, with the tensors `0/tokens`, `1/tokens`, ... of
its micro batches as the data pipeline made them; `config.yaml` lies beside it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from configs.load import ConfigError, dump
from configs.schema import PretrainConfig
from data_pipeline.stream import Batch, Stream
from pretrain.runtime import Runtime
from pretrain.state import TrainState

NAME = "batch"


def write(folder: Path, config: PretrainConfig, state: TrainState, data: Stream, ranks: Runtime) -> None:
    """Write the micro batches of all ranks for the step after `state`; every rank calls it.

    An earlier dump in `folder` is replaced.
    """
    place = folder / NAME
    if ranks.is_first:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    ranks.barrier()
    ranks.mark("save", state.step)
    made = enumerate(data.micro_batches(state.batch, ranks.rank, ranks.world_size))
    tensors = {f"{number}/{name}": tensor.clone() for number, batch in made for name, tensor in batch.items()}
    save_file(tensors, place / _file_name(ranks.rank))
    about = {
        "step": state.step,  # the batch is that of the step from this one to the next
        "batch": state.batch,  # its number in the order of samples
        "world_size": ranks.world_size,
        "sample_ids": samples_of_ranks(data, state.batch, ranks.world_size),
        "facts": data.facts(state.batch + 1),
    }
    if ranks.is_first:
        (place / "batch.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    ranks.barrier()


def samples_of_ranks(data: Stream, batch: int, world_size: int) -> list[list[list[int]]]:
    """For each rank the [source, sample] of each of its samples of the global batch of this number, in order."""
    return [data.samples.sample_ids(batch, rank, world_size) for rank in range(world_size)]


def read_about(folder: Path) -> dict[str, Any] | None:
    """What `batch.json` says; None where no batch was dumped."""
    path = folder / NAME / "batch.json"
    about: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return about


def read(folder: Path, rank: int) -> list[Batch]:
    """The micro batches of `rank`, in order. Raises ConfigError if they are not there."""
    path = folder / NAME / _file_name(rank)
    if not path.exists():
        raise ConfigError(f"{path}: is missing; the batch was dumped by fewer ranks")
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        number, _, own_name = name.partition("/")
        batches.setdefault(int(number), {})[own_name] = tensor
    return [batches[number] for number in sorted(batches)]


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
