"""Where the first number that is not finite comes from: hooks on every module, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.checkpoint import Fragment


@dataclass(frozen=True)
class NotFinite:
    """A module's output, or the gradient of its output, that is not finite."""

    module: str  # its name in the model
    type: str
    count: int  # elements that are not finite
    size: int  # elements in all
    was_given_finite: bool  # its inputs and parameters; of a gradient always true, for it is the first


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, NotFinite]]:
    """While it is open, note the first output ("forward") and the first gradient of an output ("backward").

    A module's hook runs when it has ended, so of modules inside of each other the innermost is first.
    """
    seen: dict[str, NotFinite] = {}

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if "forward" not in seen and (count := not_finite(tensor)):
                given = [*tensors_in(inputs), *module.parameters(recurse=False)]
                was_finite = not any(not_finite(other) for other in given)
                seen["forward"] = NotFinite(name, type(module).__name__, count, tensor.numel(), was_finite)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: look_back(name, module, gradient))

    def look_back(name: str, module: nn.Module, gradient: torch.Tensor) -> None:
        if "backward" not in seen and (count := not_finite(gradient)):
            seen["backward"] = NotFinite(name, type(module).__name__, count, gradient.numel(), True)

    def hook(name: str) -> Any:
        return lambda module, inputs, output: look(name, module, inputs, output)

    handles = [part.register_forward_hook(hook(name or "the model")) for name, part in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def not_finite(tensor: torch.Tensor) -> int:
    """How many elements are NaN or infinite; 0 of integers."""
    return int((~tensor.detach().isfinite()).sum()) if tensor.is_floating_point() else 0


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def count_not_finite(fragments: Iterable[Fragment]) -> dict[str, int]:
    """Parameter, and where it is the optimizer's state also its key -> elements that are not finite, where any are."""
    counts = {}
    for piece in fragments:
        for key, tensor in piece.tensors.items():
            if count := not_finite(tensor):
                counts[piece.name if key == "master" else f"{piece.name} ({key})"] = count
    return counts
