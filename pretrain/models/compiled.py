"""torch.compile of a model's blocks: the operators between the matrix products become one pass over memory each.

A block at a time, because all blocks share one graph (a model of 48 layers compiles as fast as one of 2), and because
under ZeRO-3 the weights of a block are gathered before it and let go after it: the engine does that around the whole
block, outside of what is compiled, where otherwise each layer has its own gather.

Only training is compiled, and each shape by itself (`dynamic=False`). Evaluations and single samples have shapes of
their own, and what a step computes must not depend on what the process saw before: a resumed run would be another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs.compiler import what_compile_lacks
from configs.load import ConfigError

# Graphs of one block: a mask or none, and a sequence length a phase. Beyond, torch would go on uncompiled.
MOST_GRAPHS = 64


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile the forward pass, and with it the backward pass, of each block at its first training step.

    A compiled block has `is_compiled`: hooks on modules inside of it are not called. Raises ConfigError where torch
    would find no compiler.
    """
    if lacking := what_compile_lacks():
        raise ConfigError(f"model.compile=true: torch.compile needs {lacking}; or set model.compile=false")
    for block in blocks:
        _compile(block)


def use_uncompiled(model: nn.Module) -> None:
    """Let compiled blocks run as they are written from now on, with their modules' hooks."""
    for module in model.modules():
        if getattr(module, "is_compiled", False):
            del module.forward, module.is_compiled


def _compile(block: nn.Module) -> None:
    plain = block.forward

    @functools.cache  # at the first step: within deepspeed's zero.Init, which builds the model, dynamo cannot be loaded
    def compiled() -> Callable[..., torch.Tensor]:
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
        return torch.compile(plain, fullgraph=True, dynamic=False)

    def forward(*inputs: Any) -> torch.Tensor:
        return compiled()(*inputs) if block.training and torch.is_grad_enabled() else plain(*inputs)

    block.forward = forward
    block.is_compiled = True  # type: ignore[assignment]
