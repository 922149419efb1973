"""The optimizer, which parameters decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerConfig, ScheduleConfig
from pretrain.optimizers.average import keep_average
from pretrain.optimizers.lamb import Lamb
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.muon import Muon


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trained parameters of `model`; the engine puts fp32 pieces in their place."""
    groups = parameter_groups(model, config.weight_decay, apart=config.type == "muon")
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
    if config.ema_decay is not None:
        keep_average(optimizer, config.ema_decay)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float, apart: bool = False) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay; biases and normalisation weights do not (as GPT-2, GPT-3 and BERT do).

    Those that do not decay have `trust` False (see lamb.py). With `apart` the matrices inside `model.blocks` are a
    group of their own, with `orthogonalize` True (see muon.py). Decided by the name and the owning module, not by the
    number of axes: under ZeRO-3 a parameter is an empty vector. A tied parameter appears once.
    """
    inside = {id(parameter) for name, parameter in model.named_parameters() if apart and name.startswith("blocks.")}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "decayed": [], "kept": []}
    seen: set[int] = set()
    for module in model.modules():
        is_norm = isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            decays = not (is_norm or name == "bias")
            groups["kept" if not decays else "matrices" if id(parameter) in inside else "decayed"].append(parameter)
    made = [
        {"params": groups["matrices"], "weight_decay": weight_decay, "orthogonalize": True},
        {"params": groups["decayed"], "weight_decay": weight_decay},
        {"params": groups["kept"], "weight_decay": 0.0, "trust": False},
    ]
    return [group for group in made if group["params"]]


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of the update from `step` to `step + 1`, 0 <= step < num_steps.

    It rises linearly to the peak over warmup_steps, then follows the schedule from the peak to final_share of it, which
    the last step reaches: cosine (Loshchilov and Hutter 2017), linear, wsd (stable, then linear over the last
    decay_steps; Hu et al. 2024), constant.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.type == "wsd":
        start = max(start, num_steps - (schedule.decay_steps or max(1, num_steps // 10)))
    if schedule.type == "constant" or step < start:
        return peak
    progress = (step - start) / max(1, num_steps - 1 - start)
    remaining = 1 - progress if schedule.type != "cosine" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.final_share + (1 - schedule.final_share) * remaining)
