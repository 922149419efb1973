"""The optimizer, which parameters decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerConfig, ScheduleConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of `model`; the engine then puts its flat fp32 pieces in their place."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay; biases and normalisation weights do not (as GPT-2, GPT-3 and BERT do).

    Decided by the name and the owning module, not by the number of axes: under ZeRO-3 a parameter is an empty vector.
    A tied parameter appears once.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        is_norm = isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            (kept if is_norm or name == "bias" else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
