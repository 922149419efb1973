"""The directory of a trained model: Hugging Face's layout, and what it is for (saved_model.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from finetune.lora import merged
from finetune.saved_model import ABOUT, SavedModel
from pretrain import engine
from pretrain.runtime import Runtime


def save_model(
    model: Any,
    build: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    about: SavedModel,
    directory: Path,
    ranks: Runtime,
) -> None:
    """Write the trained model in Hugging Face layout, fp32, in place of what stood there; every rank calls it.

    After LoRA that is the merged one, and the adapter is written beside it; `build` makes a model of that kind.
    """
    weights = {name: weight.float() for name, weight in engine.gather_weights(model) if ranks.is_first}
    if ranks.is_first:
        module = model.module
        if about.config.tuning.lora is not None:
            module = merged(build(), weights, directory.with_name("adapter"))
            weights = {name: weight.detach().contiguous() for name, weight in module.named_parameters()}
        aside = directory.with_name(f".writing-{directory.name}")
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer.save_pretrained(aside)
        settings = module.config
        settings.architectures, settings.dtype = [type(module).__name__], "float32"
        settings.save_pretrained(aside)
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.save_pretrained(aside)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(about.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (aside / ABOUT).write_text(text, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    ranks.barrier()
