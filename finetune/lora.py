"""Low-rank adaptation (Hu et al. 2022) by peft: W x becomes W x + (alpha / rank) B A x; only A and B are trained.

B begins as zero, so training begins at the model as it was. What the model's directory did not have (a new head, a new
pooler) is trained whole. The result is saved twice: as peft's adapter, and merged into the weights, as a model like any
other. The engine, the checkpoints and ZeRO see nothing of it but parameters that are not trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from configs.load import ConfigError
from configs.tuning import LoraConfig


def add_lora(model: Any, settings: LoraConfig, new: Iterable[str]) -> torch.nn.Module:
    """peft's model around a transformers model; `new` are names of parameters that were drawn just now.

    The caller seeds torch. Raises ConfigError without peft, or where the model has no such modules.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"tuning.lora needs peft ({error}); pip install 'millstream[lora]'") from None
    every = settings.targets == ["all-linear"]
    wanted = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if every else settings.targets or None,
        modules_to_save=whole_modules(model, new),
    )
    try:
        return peft.get_peft_model(model, wanted)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(
            f"tuning.lora.targets={settings.targets}: {error}. The model's linear modules are called {', '.join(names)}"
        ) from None


def whole_modules(model: Any, new: Iterable[str]) -> list[str]:
    """Names of the modules that are trained whole: the head, if it is not the output embedding, and new ones. Pure."""
    output = model.get_output_embeddings()
    heads = {
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and module is not output and next(module.parameters(), None) is not None
    }
    inside = {name.rpartition(".")[0] for name in new if name.partition(".")[0] not in heads}
    return sorted(heads | inside)


def merged(model: Any, weights: dict[str, torch.Tensor], adapter: Path) -> Any:
    """The transformers model that `weights`, of the trained model that `model` is like, come to; writes the adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.save_pretrained(adapter)
    return model.merge_and_unload()
