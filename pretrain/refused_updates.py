"""Updates that DeepSpeed is not to make: of a gradient that is not finite, or that the loop does not want.

Each of DeepSpeed's optimizers decides in its own way, and at stage 0 not at all, whether it applies a gradient.
Here each of them learns to ask `engine.is_update_wanted` too, and leaves the gradient's norm in `engine.measured_norm`,
as it was: DeepSpeed would say "infinite", whatever it was. `engine.update` is what the rest of the program sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def refuse_when_not_finite(engine: Any, largest_norm: float) -> None:
    """Make a new DeepSpeed engine discard what is not finite or not wanted, at its ZeRO stage; all ranks decide alike.

    largest_norm: above which the gradient is clipped; 0 turns that off.
    """
    engine.is_update_wanted, engine.measured_norm = True, None
    if engine.zero_optimization_stage() == 0:
        _step_when_finite_at_stage_0(engine, largest_norm)
    else:
        _refuse_at_stages_1_to_3(engine)


def _step_when_finite_at_stage_0(engine: Any, largest: float) -> None:
    """At stage 0 DeepSpeed applies any gradient, and clips it but forgets its norm; so all of it is done here.

    `largest` is the norm above which the gradient is clipped; 0 turns that off.
    """
    engine.clip_fp32_gradients = lambda: None
    optimizer, step = engine.optimizer, engine.optimizer.step

    def step_when_finite(*arguments: Any) -> None:
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, largest or float("inf"))
        optimizer._global_grad_norm = engine.measured_norm = norm
        optimizer.overflow = not (engine.is_update_wanted and bool(norm.isfinite()))  # what DeepSpeed asks for
        if not optimizer.overflow:
            step(*arguments)

    optimizer.step = step_when_finite


def _refuse_at_stages_1_to_3(engine: Any) -> None:
    """At stages 1 to 3 DeepSpeed discards a step whose norm is below 0 or not finite; here it learns of our reasons.

    All ranks have the same norm, so all decide alike. Of a refused step `engine.measured_norm` is what it was.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        measure_groups = optimizer._get_norm_groups

        def norms_or_refusal() -> list[torch.Tensor]:
            norms = measure_groups()
            engine.measured_norm = _whole_norm(engine, norms)
            return norms if engine.is_update_wanted else [torch.full_like(norms[0], -1.0)]

        optimizer._get_norm_groups = norms_or_refusal
    elif hasattr(optimizer, "scaled_global_norm"):
        measure = optimizer.scaled_global_norm

        def norm_or_refusal() -> torch.Tensor:
            norm: torch.Tensor = measure()
            engine.measured_norm = _whole_norm(engine, [norm])
            return norm if engine.is_update_wanted else torch.full_like(norm, -1.0)

        optimizer.scaled_global_norm = norm_or_refusal
        optimizer.check_grad_overflow = True  # or with bf16 the norm would not be judged
        optimizer.check_overflow = lambda **arguments: None  # the norm says it: no search through the gradients before
    else:
        _refuse_at_stage_1_with_bf16(engine)


def _refuse_at_stage_1_with_bf16(engine: Any) -> None:
    """There DeepSpeed has another optimizer, whose ranks have the whole gradient and measure it each for itself."""
    optimizer = engine.optimizer
    collect, clear = optimizer.get_grads_for_norm, optimizer.clear_hp_grads

    def gradients_or_refusal(for_clipping: bool = False) -> Any:
        if engine.is_update_wanted or for_clipping:
            return collect(for_clipping)
        return [torch.full((1,), float("inf"), device=engine.device)], {}

    def measure_and_clear() -> None:
        if optimizer.overflow and engine.measured_norm is None:
            norms = [gradient.norm() for group in optimizer.fp32_groups_gradients for gradient in group]
            engine.measured_norm = torch.linalg.vector_norm(torch.stack(norms))
        clear()

    optimizer.get_grads_for_norm, optimizer.clear_hp_grads = gradients_or_refusal, measure_and_clear


def _whole_norm(engine: Any, norms: list[torch.Tensor]) -> torch.Tensor:
    """The norm out of those of the groups; where one is not finite, for which they have -1, NaN or infinity."""
    stacked = torch.stack(norms).float()
    if bool(((stacked >= 0) & stacked.isfinite()).all()):
        return torch.linalg.vector_norm(stacked)
    gradients = [g for group in engine.optimizer.averaged_gradients.values() for g in group or [] if g is not None]
    has_nan = torch.tensor(int(any(bool(gradient.isnan().any()) for gradient in gradients)), device=engine.device)
    torch.distributed.all_reduce(has_nan, torch.distributed.ReduceOp.MAX)
    return torch.tensor(float("nan") if has_nan else float("inf"))
