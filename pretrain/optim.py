"""The optimizer, which parameters decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from configs.load import ConfigError
from configs.schema import OptimizerConfig, ScheduleConfig
from pretrain.optimizers.average import keep_average
from pretrain.optimizers.lamb import Lamb
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.slices import unsplit


def make_optimizer(model: nn.Module, config: OptimizerConfig, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trained parameters of `model`; the engine puts fp32 pieces in their place.

    Raises ConfigError where muon or a layer_decay below 1 finds no layers in the model.
    """
    width_ratio = getattr(getattr(model, "shape", None), "width_ratio", 1.0)  # of our GPT alone
    groups = parameter_groups(model, config.weight_decay, config.type == "muon", layer_decay, width_ratio)
    optimizer: torch.optim.Optimizer
    match config.type:
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        case "lion":
            optimizer = Lion(groups, config.lr, config.betas)
        case "lamb":
            optimizer = Lamb(groups, config.lr, config.betas, config.eps)
        case "muon":
            optimizer = Muon(groups, config.lr, config.momentum, config.betas, config.eps)
            # By name it knows fused matrices; what ZeRO puts in the parameters' place gets its layout from the engine.
            optimizer.layouts = {whole: unsplit(whole, name) for name, whole in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    if config.ema_decay is not None:
        keep_average(optimizer, config.ema_decay)
    return optimizer


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    apart: bool = False,
    layer_decay: float = 1.0,
    width_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay; biases and normalisation weights do not (as GPT-2, GPT-3 and BERT do).

    Those that do not decay have `trust` False (see lamb.py). With `apart` the matrices inside the model's layers are
    groups of their own, with `orthogonalize` True (see muon.py). With a `layer_decay` below 1 each distance from the
    head is too, with `lr_scale` layer_decay^distance, which the engine multiplies every rate by. A `width_ratio` other
    than 1 is muP's (Yang et al. 2022, Table 8): matrices inside the layers learn slower by it, and decay stronger, so
    that rate x decay stays. Decided by the name and the owning module, not by the number of axes: under ZeRO-3 a
    parameter is an empty vector. A tied parameter appears once, under its first name.
    """
    distances = distances_from_head(model) if layer_decay < 1 else {}
    inside = f"{longest_module_list(model)[0]}." if apart or width_ratio != 1 else None
    groups: dict[tuple[int, str], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        is_norm = isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            kind = "kept" if is_norm or name.endswith("bias") else "decayed"
            if kind == "decayed" and inside and name.startswith(inside) and not isinstance(module, nn.Embedding):
                kind = "matrices"
            groups.setdefault((distances.get(name, 0), kind), []).append(parameter)
    settings: dict[str, dict[str, Any]] = {
        "matrices": {"weight_decay": weight_decay * width_ratio} | ({"orthogonalize": True} if apart else {}),
        "decayed": {"weight_decay": weight_decay},
        "kept": {"weight_decay": 0.0, "trust": False},
    }
    return [
        {
            "params": groups[distance, kind],
            "lr_scale": layer_decay**distance / (width_ratio if kind == "matrices" else 1.0),
            **more,
        }
        for distance in sorted({distance for distance, _ in groups})
        for kind, more in settings.items()
        if (distance, kind) in groups
    ]


def distances_from_head(model: nn.Module) -> dict[str, int]:
    """How far below the head each parameter lies: the head 0, the top layer 1, the embeddings one below all layers.

    As BEiT counts (Bao et al. 2022, after ELECTRA, Clark et al. 2020). Layers are the numbered entries of the model's
    longest module list, embeddings what is called so or is an nn.Embedding, and everything else is of the head:
    poolers, a last normalisation, the new classifier.
    """
    prefix, layers = longest_module_list(model)
    distances = {}
    for owner, module in model.named_modules():
        for name, _ in module.named_parameters(owner, recurse=False):
            if name.startswith(f"{prefix}."):
                distances[name] = len(layers) - int(name.removeprefix(f"{prefix}.").partition(".")[0])
            else:
                is_embedding = isinstance(module, nn.Embedding) or "embed" in name
                distances[name] = len(layers) + 1 if is_embedding else 0
    return distances


def longest_module_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and value of the module list with the most parameters: a transformer's layers. Raises ConfigError."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__}: has no list of layers (torch.nn.ModuleList), which optimizer.type=muon and "
            f"tuning.layer_decay need; choose adamw and a layer_decay of 1"
        )
    return max(lists, key=lambda item: sum(1 for _ in item[1].parameters()))


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleConfig, time_share: float = 0.0) -> float:
    """The rate of the update from `step` to `step + 1`, 0 <= step < num_steps.

    It rises linearly to the peak over warmup_steps, then follows the schedule from the peak to final_share of it, which
    the last step reaches: cosine (Loshchilov and Hutter 2017), linear, wsd (stable, then linear over the last
    decay_steps; Hu et al. 2024), constant. inverse_sqrt is peak x sqrt(warmup_steps / (step + 1)) (Vaswani et al. 2017,
    section 5.3), at least final_share of the peak; with decay_steps it too falls to that over the last of them, the
    linear factor of Zhai et al. 2022. What falls to the end does so by the steps or by `time_share`, the share of a
    wall-clock budget that is spent, whichever is further; warmup and inverse_sqrt always count steps.
    """
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    rising = peak * (step + 1) / warmup if step < warmup else peak
    stable, start = 1.0, warmup
    if schedule.type == "wsd":
        start = max(start, num_steps - (decay or max(1, num_steps // 10)))
    elif schedule.type == "inverse_sqrt":
        stable = max(schedule.final_share, math.sqrt(warmup / max(warmup, step + 1)))
        start = max(start, num_steps - decay) if decay else num_steps
    position = max(step, time_share * (num_steps - 1))
    if schedule.type == "constant" or position < start:
        return min(rising, peak * stable)
    progress = (position - start) / max(1, num_steps - 1 - start)
    remaining = 1 - progress if schedule.type != "cosine" else (1 + math.cos(math.pi * progress)) / 2
    return min(rising, peak * (schedule.final_share + (stable - schedule.final_share) * remaining))
