"""Muon (Jordan et al. 2024): momentum made orthogonal. AdamW for all that is not a matrix inside a block.

    m <- beta m + (1 - beta) g         u = beta m + (1 - beta) g, Nesterov's look ahead
    O = orthogonalize(u), all of whose singular values are near 1
    w <- w - lr (0.2 sqrt(max(rows, columns)) O + weight_decay w)

The factor is Moonshot's (Liu et al. 2025, Muon is Scalable for LLM Training): it gives the update the root mean square
of AdamW's, so that matrices and the rest share one learning rate and one decay, those found for AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from pretrain.optimizers.slices import Layout, Slice, on_whole_parameters, unsplit

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, as steep at zero as converging allows (Jordan et al.)
ITERATIONS = 5

State = dict[str, torch.Tensor]


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonalize` True are matrices; the others are AdamW's. `layouts` as for Lamb."""

    def __init__(
        self,
        groups: Any,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        self.layouts: dict[torch.Tensor, Layout] = {}
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"orthogonalize": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                if group["orthogonalize"]:
                    layout = self.layouts.get(flat) or unsplit(flat)
                    muon(flat.view(-1), flat.grad.view(-1), self.state[flat], group, layout)
                else:
                    adam(flat, flat.grad, self.state[flat], group)


def muon(weights: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any], layout: Layout) -> None:
    """One update of the flat `weights`, (elements,) fp32, and of state["momentum"], in place."""
    if not state:
        state |= {"step": weights.new_zeros(()), "momentum": torch.zeros_like(weights)}
    state["step"] += 1  # not in the formula; the moving average of the weights counts with it
    momentum, beta = state["momentum"].view(-1), group["momentum"]
    momentum.lerp_(grad, 1 - beta)
    update = grad.lerp(momentum, beta)
    on_whole_parameters(update, layout, direction)
    weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def direction(matrix: torch.Tensor, part: Slice) -> torch.Tensor:
    """`matrix` (rows, columns) orthogonalized and scaled; a fused one as the two or three that it is."""
    columns = matrix.shape[1]
    blocks: Sequence[torch.Tensor] = [matrix]
    if part.name.endswith("qkv.weight"):  # queries are as wide as the model, keys and values share the rest
        kv_rows = (len(matrix) - columns) // 2
        blocks = matrix.split([columns, kv_rows, kv_rows])
    elif part.name.endswith("gate_up.weight"):
        blocks = matrix.chunk(2)
    return torch.cat([orthogonalize(block) * (0.2 * math.sqrt(max(block.shape))) for block in blocks])


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """U S V^T -> about U V^T, by five Newton-Schulz iterations; singular values end between 0.7 and 1.2.

    On a GPU in bf16, which the iteration bears (Jordan et al.); on a CPU in fp32, where bf16 gains nothing.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrix.dtype)


def adam(weights: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """The very update of torch.optim.AdamW(fused=True), in place."""
    if not state:
        state |= {"step": weights.new_zeros(())}
        state |= {name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq")}
    adamw(
        [weights], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True, amsgrad=False,
        beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip
