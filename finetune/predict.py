"""Predictions for a new file: `millstream predict MODEL INPUT [--output FILE] [key=value ...]`.

MODEL is what a fine-tuning left in RUN_DIR/model; its millstream.json says which task it is and how texts are encoded.
INPUT is a file as those that it was trained on, without the labels; if they are there, they are not looked at. One
line of JSON for each example goes to FILE, or to the terminal. key=value changes a setting of the model's
configuration, such as text_keys or tuning.micro_batch_size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from configs.load import ConfigError
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.inference import predict
from finetune.models import check_directory, load_tokenizer
from finetune.saved_model import load_about
from finetune.tasks.by_name import TASKS
from pretrain import runtime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="millstream predict")
    parser.add_argument("model", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    try:
        lines = predictions(given.model, given.input, given.overrides)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if given.output is None:
            sys.stdout.write(text)
        else:
            write(given.output, text)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def predictions(directory: Path, file: Path, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """What `task.records` says of each example, without labels. Raises ConfigError and DataError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    saved = load_about(directory, overrides)
    check_directory(str(directory))
    config, task, tokenizer = saved.config, TASKS[saved.config.task], load_tokenizer(str(directory))
    examples = task.read_input(config, saved.about, file)
    rows = task.encode(config, tokenizer, examples.dev)
    alone = runtime.start()
    model = load_trained(config, task, examples, tokenizer, directory).to(alone.device)
    size = config.tuning.micro_batch_size
    outputs = predict(model, task, rows, tokenizer.pad_token_id, size, alone)
    for record in task.records(config, examples, examples.dev, rows, outputs):
        yield {name: value for name, value in record.items() if name != task.LABEL}


def load_trained(
    config: FinetuneConfig, task: ModuleType, examples: Any, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> torch.nn.Module:
    """The model with its head, in the precision it was trained in. Raises ConfigError where weights are missing."""
    model: torch.nn.Module = task.build_model(config, examples, tokenizer)
    there: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            there.update(weights.keys())
    if missing := [name for name, _ in model.named_parameters() if name not in there]:
        raise ConfigError(f"{directory}: lacks {len(missing)} of the model's weights, such as {missing[0]}")
    return model.to(torch.bfloat16) if config.tuning.precision == "bf16" else model


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--output {path}: cannot be written ({error}); give a file in a folder that exists"
        ) from None


if __name__ == "__main__":
    runtime.run(main)
