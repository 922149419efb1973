"""LAMB (You et al. 2020, Large Batch Optimization for Deep Learning, algorithm 2): Adam with a rate per parameter.

    r = m^ / (sqrt(v^) + eps), the bias-corrected Adam direction         u = r + weight_decay w
    w <- w - lr (|w| / |u|) u         norms over the whole parameter; a norm of 0 makes the ratio 1

The ratio is not clipped, as in the authors' code. Groups with `trust` False (biases and normalisation weights, which
are not decayed either) take the plain Adam step, as there too.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrain.optimizers.slices import Layout, sum_per_parameter, unsplit

State = dict[str, torch.Tensor]


class Lamb(torch.optim.Optimizer):
    """`layouts` says which parameters a flat tensor consists of; a tensor that is not in it is one whole parameter."""

    def __init__(
        self, groups: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        self.layouts: dict[torch.Tensor, Layout] = {}
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    layout = self.layouts.get(flat) or unsplit(flat)
                    lamb(flat.view(-1), flat.grad.view(-1), self.state[flat], group, layout)


def lamb(weights: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any], layout: Layout) -> None:
    """One update of the flat `weights`, (elements,) fp32, and of the moments in `state`, in place."""
    update = adam_direction(grad, state, group["betas"], group["eps"])
    update.add_(weights, alpha=group["weight_decay"])
    if group["trust"]:
        for view, ratio in zip(layout.views(update), trust_ratios(weights, update, layout), strict=True):
            view.mul_(ratio)
    weights.sub_(update, alpha=group["lr"])


def trust_ratios(weights: torch.Tensor, update: torch.Tensor, layout: Layout) -> torch.Tensor:
    """|w| / |u| of every parameter, (parameters,) fp32; 1 where either norm is 0."""
    squares = [torch.stack(torch._foreach_norm(layout.views(flat))).square() for flat in (weights, update)]
    of_weights, of_update = sum_per_parameter(squares, layout).sqrt()
    return torch.where((of_weights > 0) & (of_update > 0), of_weights / of_update, 1.0)


def adam_direction(grad: torch.Tensor, state: State, betas: tuple[float, float], eps: float) -> torch.Tensor:
    """m^ / (sqrt(v^) + eps) after folding `grad` into the moments of `state`; a new tensor (Kingma and Ba 2015)."""
    if not state:
        moments = {name: torch.zeros_like(grad) for name in ("exp_avg", "exp_avg_sq")}
        state |= {"step": grad.new_zeros(()), **moments}
    state["step"] += 1
    beta1, beta2 = betas
    mean, square, step = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), float(state["step"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    deviation = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    return mean.div(deviation).div_(1 - beta1**step)
