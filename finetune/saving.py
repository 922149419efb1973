"""The directory of a trained model: Hugging Face's layout, and what it is for (saved_model.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from finetune.saved_model import ABOUT, SavedModel
from pretrain import engine
from pretrain.runtime import Runtime


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, about: SavedModel, directory: Path, ranks: Runtime
) -> None:
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
        text = json.dumps(about.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (aside / ABOUT).write_text(text, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    ranks.barrier()
