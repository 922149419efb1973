"""What a trained model's directory says of its task: millstream.json, for `millstream predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from configs.load import ConfigError, load_as
from configs.schema import Section
from configs.tuning import FinetuneConfig

ABOUT = "millstream.json"


class SavedModel(Section):
    """What a model's directory says of its task, for predictions."""

    format: Literal[1] = 1
    config: FinetuneConfig
    about: dict[str, Any]  # of the examples, by the task: names of labels


def load_about(directory: Path, overrides: list[str]) -> SavedModel:
    """What `save_model` wrote, with other settings of the configuration. Raises ConfigError."""
    path = directory / ABOUT
    if not path.is_file():
        cure = f"; did you mean {directory / 'model'}?" if (directory / "model" / ABOUT).is_file() else ""
        raise ConfigError(f"{directory}: has no {ABOUT}, which `millstream finetune` writes into RUN_DIR/model{cure}")
    own = [f"config.model={json.dumps(str(directory), ensure_ascii=False)}", "config.from_scratch=false"]
    own += ["config.tuning.lora=null"]  # it is merged
    return load_as(SavedModel, path, [*(f"config.{word}" for word in overrides), *own])
