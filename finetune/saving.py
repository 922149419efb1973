"""The directory of a trained model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from pretrain import engine
from pretrain.runtime import Runtime


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, ranks: Runtime) -> None:
    """Write the trained model in Hugging Face layout, fp32, in place of what stood there; every rank calls it."""
    weights = {name: weight.float() for name, weight in engine.gather_weights(model) if ranks.is_first}
    if ranks.is_first:
        aside = directory.with_name(f".writing-{directory.name}")
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer.save_pretrained(aside)
        settings = model.module.config
        settings.architectures, settings.dtype = [type(model.module).__name__], "float32"
        settings.save_pretrained(aside)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    ranks.barrier()
