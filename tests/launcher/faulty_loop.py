"""`pretrain.prove` with a fault planted in it, named by FAULT: `millstream prove loss` must find and name it."""

from __future__ import annotations

import os
from typing import Any

from pretrain import prove, runtime, step
from pretrain.models import gpt
from pretrain.objective import count_targets, global_mean


def average_over_micro_batches() -> None:
    """The oldest mistake of gradient accumulation: each micro batch's mean, divided by the number of micro batches."""
    waiting: list[dict[str, Any]] = []

    def count(batches: list[dict[str, Any]]) -> dict[str, int]:
        waiting[:] = batches
        return count_targets(batches)

    def mean(sums: dict[str, Any], counts: dict[str, float]) -> Any:
        own = count_targets([waiting.pop(0)])
        return global_mean(sums, {name: number * num_parts for name, number in own.items()})

    def add_up(config: Any, model: Any, batches: list[Any], *more: Any) -> dict[str, float]:
        nonlocal num_parts
        num_parts = len(batches)
        return right(config, model, batches, *more)

    num_parts, right = 1, step.add_up_gradient
    step.count_targets, step.global_mean, step.add_up_gradient = count, mean, add_up


def let_documents_see_each_other() -> None:
    gpt.attention_mask = lambda segment_ids, causal: None


if __name__ == "__main__":
    {"average": average_over_micro_batches, "leak": let_documents_see_each_other}[os.environ["FAULT"]]()
    runtime.run(prove.main)
