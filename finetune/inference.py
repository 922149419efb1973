"""Rows to a task's outputs, on any number of ranks: for evaluations, and for new inputs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from finetune.batches import collate, part_of_rank
from finetune.tasks import Row
from pretrain import runtime
from pretrain.runtime import Runtime


@torch.no_grad()
def predict(
    model: Any, task: ModuleType, rows: list[Row], padding_id: int, micro_batch_size: int, ranks: Runtime
) -> list[np.ndarray]:
    """The task's output for every row, in the order of `rows`, on every rank."""
    model.eval()
    size = micro_batch_size * ranks.world_size
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    mine: list[np.ndarray] = []
    for start in range(0, len(rows), size):
        ranks.mark("evaluate", start // size)
        part = part_of_rank([rows[i] for i in by_length[start : start + size]], size, ranks)
        mine += task.predict(model, runtime.to_device(collate(part, padding_id), ranks.device))
    of_all_ranks: list[Any] = ranks.gather(mine)
    outputs: list[np.ndarray] = [np.empty(0)] * len(rows)
    for place, row in enumerate(by_length):
        rank, its_place = place % ranks.world_size, place // ranks.world_size
        outputs[row] = of_all_ranks[rank][its_place]
    return outputs
