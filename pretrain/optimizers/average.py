"""An exponential moving average of the weights (Polyak and Juditsky 1992), in fp32, in the optimizer's own pieces.

    average <- d average + (1 - d) weights after every applied update,   d = min(decay, (1 + n) / (10 + n))

n is the number of updates before, and d is 0 for the first: the average begins as the weights after it. The ramp, that
of TensorFlow and timm, keeps it from remembering the random start: after n updates its memory is about n / 10 of them,
until the decay takes over. It lies in the optimizer's state, so it is split over the ranks and is in every checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

KEY = "ema"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """From now on every `optimizer.step()` also updates state[parameter]["ema"], shaped as the parameter."""

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    average(weights, optimizer.state[weights], decay)

    optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def average(weights: torch.Tensor, state: dict[str, torch.Tensor], decay: float) -> None:
    """Fold `weights` into state["ema"]; state["step"] counts the updates, the last one included."""
    if KEY not in state:
        state[KEY] = weights.detach().clone()
    state[KEY].lerp_(weights, 1 - ramped(decay, int(state["step"]) - 1))


def ramped(decay: float, num_updates: int) -> float:
    """The decay after `num_updates` earlier updates."""
    return min(decay, (1 + num_updates) / (10 + num_updates)) if num_updates else 0.0
