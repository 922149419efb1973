"""The runs of `millstream prove loss` on one number of ranks: `python -m pretrain.prove JOBS.json`.

Starting a process takes seconds, a few steps of a small model take less than one; so all runs on N ranks share N
processes, and each has a model, an engine and a stream of its own. Every run starts from the same weights, drawn on the
CPU from train.seed. What the steps of a run are is not written here: it is the loop's own `train_step`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from configs.deepspeed_json import deepspeed_json
from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.shards import DataError
from data_pipeline.stream import open_stream
from pretrain import engine, runtime
from pretrain.models import build_model
from pretrain.reference import train_plainly
from pretrain.runtime import Runtime
from pretrain.step import train_step

Curve = list[dict[str, float]]  # of each step "loss", the mean over the targets, and "grad_norm", before clipping


def main() -> int:
    """Make the runs of {"config": FILE, "folder": FOLDER, "runs": [...]} and write FOLDER/curves-N.jsonl.

    A run is {"name", "words"}, which go over the configuration, and for the reference {"plain"}: the arguments
    `precision`, `layout` and `kernels` of `train_plainly`. A line of the result is {"name", "curve"}.
    """
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        ranks = runtime.start(jobs["folder"])
        with Path(jobs["folder"], f"curves-{ranks.world_size}.jsonl").open("a", encoding="utf-8") as file:
            for run in jobs["runs"]:
                curve = make_run(jobs["config"], run, ranks)
                if ranks.is_first:
                    file.write(json.dumps({"name": run["name"], "curve": curve}) + "\n")
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"{error}\nprove loss needs the whole model in float32 in one process: prove a smaller one, for example "
              f"with model.num_layers=2, or fewer tokens with train.micro_batch_size=1", file=sys.stderr)  # fmt: skip
        return 2
    return 0


def make_run(file: str, run: dict[str, Any], ranks: Runtime) -> Curve:
    config = load_pretrain(file, run["words"])
    initial = initial_weights(config)
    if "plain" in run:
        return train_plainly(config, initial, ranks.device, **run["plain"])
    return train_in_loop(config, initial, ranks)


def initial_weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """Whole weights, fp32, on the CPU: the same at every stage and on any device, whose generators differ."""
    data = open_stream(config, "train")
    data.close()
    runtime.seed_all(config.train.seed)
    return build_model(config.model, data.vocab_size, config.train.longest_seq_len).state_dict()


def train_in_loop(config: PretrainConfig, initial: Mapping[str, torch.Tensor], ranks: Runtime) -> Curve:
    """The first `train.num_steps` steps of the training loop; nothing is evaluated and nothing saved."""
    data = open_stream(config, "train")
    model = engine.initialize(
        lambda: build_model(config.model, data.vocab_size, config.train.longest_seq_len),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )

    def read(name: str, key: str, start: int, length: int) -> torch.Tensor:
        return initial[name].flatten()[start : start + length] if key == "master" else torch.zeros(length)

    engine.load_fragments(model, read, num_updates=0)
    lines = [train_step(config, model, data, step, ranks) for step in range(config.train.num_steps)]
    data.close()
    engine.close(model)
    return [{"loss": line["loss"], "grad_norm": line["grad_norm"]} for line in lines]


if __name__ == "__main__":
    runtime.run(main)
