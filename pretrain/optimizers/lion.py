"""Lion (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms): the sign of an interpolated momentum.

    c = beta1 m + (1 - beta1) g         w <- w - lr (sign(c) + weight_decay w)         m <- beta2 m + (1 - beta2) g

One state tensor instead of AdamW's two. Every element moves by lr, so lr is 3 to 10 times smaller than AdamW's and the
decay as much larger (section 5 of the paper).
"""

from __future__ import annotations

from typing import Any

import torch

State = dict[str, torch.Tensor]


class Lion(torch.optim.Optimizer):
    """Groups need nothing but parameters; a group's lr, betas and weight_decay overrule the ones given here."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    lion(flat, flat.grad, self.state[flat], group)


def lion(weights: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """One update of `weights` and of state["momentum"], in place; all of one shape, fp32."""
    if not state:
        state |= {"step": weights.new_zeros(()), "momentum": torch.zeros_like(weights)}
    state["step"] += 1  # not in the formula; the moving average of the weights counts with it
    momentum, (beta1, beta2) = state["momentum"], group["betas"]
    direction = momentum.lerp(grad, 1 - beta1).sign_()
    weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
    momentum.lerp_(grad, 1 - beta2)
