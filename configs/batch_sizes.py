"""The global batch size of each step, and how many samples come before it. Pure.

With `train.batch_ramp` it grows linearly with the samples seen, in equal increments (Brown et al. 2020, appendix B:
from a small batch to the full one over the first 4 to 12 billion tokens). Megatron-LM's `--rampup-batch-size START
INCREMENT SAMPLES` is the same: a step that begins when c samples have been seen has

    min(global_batch_size, start_size + increment x floor(c x K / num_samples))

samples, where K is the number of increments from start_size to global_batch_size. The ramp says only where the endless
order of samples is cut into steps, not what is in it.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

from configs.schema import BatchRampConfig, TrainConfig


def batch_size(train: TrainConfig, step: int) -> int:
    """Samples of the step from `step` to `step + 1`, over all ranks and micro batches."""
    if train.batch_ramp is None:
        return train.global_batch_size
    return _stage_at(train.batch_ramp, train.global_batch_size, step)[2]


def samples_before(train: TrainConfig, step: int) -> int:
    """Samples of all steps before `step`: the first place of its batch in the order of samples."""
    if train.batch_ramp is None:
        return step * train.global_batch_size
    first_step, samples, size = _stage_at(train.batch_ramp, train.global_batch_size, step)
    return samples + (step - first_step) * size


def all_sizes(train: TrainConfig) -> list[int]:
    """Every size that a step can have, ascending."""
    if train.batch_ramp is None:
        return [train.global_batch_size]
    return list(range(train.batch_ramp.start_size, train.global_batch_size + 1, train.batch_ramp.increment))


def _stage_at(ramp: BatchRampConfig, full_size: int, step: int) -> tuple[int, int, int]:
    stages = _stages(ramp, full_size)
    return stages[bisect_right(stages, step, key=lambda stage: stage[0]) - 1]


@lru_cache(maxsize=8)
def _stages(ramp: BatchRampConfig, full_size: int) -> list[tuple[int, int, int]]:
    """Stretches of steps with one size, in order: first step, samples before it, size."""
    num_increments = (full_size - ramp.start_size) // ramp.increment
    stages = []
    step, samples = 0, 0
    for increment in range(num_increments):
        size = ramp.start_size + increment * ramp.increment
        # The first step at which the formula gives more begins at samples x K >= (increment + 1) x num_samples.
        end = -(-(increment + 1) * ramp.num_samples // num_increments)
        num_steps = max(0, -(-(end - samples) // size))
        if num_steps:
            stages.append((step, samples, size))
            step, samples = step + num_steps, samples + num_steps * size
    return [*stages, (step, samples, full_size)]
