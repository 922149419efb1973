"""`millstream lm-eval MODEL --tasks NAMES [options]`: EleutherAI's lm-evaluation-harness on an exported directory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from configs.errors import ConfigError


def harness_words(model: str, options: list[str]) -> list[str]:
    """The words behind `python -m lm_eval`; `options` go to it as they are, more model_args joined to ours.

    Raises ConfigError for what is no Hugging Face directory, and where the harness is not installed.
    """
    if not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{model}: has no config.json; give a Hugging Face directory, for example RUN_DIR/export")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("the package lm_eval is not installed; pip install 'millstream[harness]'")
    arguments, options = f"pretrained={model}", list(options)
    if "--model_args" in options:
        place = options.index("--model_args")
        arguments = ",".join([arguments, *options[place + 1 : place + 2]])
        del options[place : place + 2]
    return ["run", "--model", "hf", "--model_args", arguments, *options]
