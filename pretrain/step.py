"""One training step. Read `train_step` first: it is all that happens between two optimizer updates.

Everything is a function of the step number: samples (data_pipeline/samples.py), learning rate, dropout seed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.schema import PretrainConfig, TrainConfig
from data_pipeline.samples import tokens_before
from data_pipeline.stream import Batch, Stream
from pretrain import engine, guard, runtime
from pretrain.objective import count_targets, global_mean, mean_losses
from pretrain.optim import learning_rate
from pretrain.runtime import Runtime
from pretrain.state import batch_number
from pretrain.trace import write_trace
from pretrain.verify import Verification, check_norm, is_due


def train_step(
    config: PretrainConfig,
    model: Any,
    data: Stream,
    step: int,
    ranks: Runtime,
    time_share: float = 0.0,
    passed_over: Sequence[tuple[int, int]] = (),
) -> dict[str, float]:
    """One optimizer step, from `step` to `step + 1`; returns its line for metrics.jsonl.

    time_share: of the schedule, by a wall-clock budget; see budget.py.
    passed_over: batches that the run does not see, see `TrainState`; the line then has the number of its `batch`.

    A loss or gradient that is not finite leaves the model as it was; the line then has `skipped`.
    """
    started = time.perf_counter()
    runtime.seed_all(config.train.seed, step, ranks.rank)  # dropout
    number = batch_number(step, passed_over)
    if config.log.trace:
        sample_ids = data.samples.sample_ids(number, ranks.rank, ranks.world_size)
        write_trace(Path(config.run_dir), ranks.rank, step + 1, sample_ids)
    train = config.train
    lr = learning_rate(step, train.num_steps, train.optimizer.lr, train.schedule, time_share)
    engine.set_lr(model, lr)
    model.train()

    ranks.mark("data", step)
    made = data.micro_batches(number, ranks.rank, ranks.world_size)
    batches = [data.expand(runtime.to_device(batch, ranks.device)) for batch in made]
    losses = add_up_gradient(config, model, batches, step, ranks)
    ranks.mark("step", step)
    is_updated = engine.update(model, is_wanted=guard.are_finite(losses))  # clips; refuses what is not finite

    if is_due(config.guard, step):
        check_norm(engine.grad_norm(model), config, step, ranks)

    seconds = time.perf_counter() - started
    before, after = tokens_seen(config.train, number, passed_over), tokens_seen(config.train, number + 1, passed_over)
    return {
        "step": step + 1,
        **losses,
        "lr": lr,
        "grad_norm": engine.grad_norm(model),
        "tokens": after,
        "tokens_per_second": (after - before) / seconds,
        "step_seconds": seconds,
        **({"time_share": time_share} if train.budget is not None else {}),
        **({"batch": number} if passed_over else {}),
        **({} if is_updated else {"skipped": 1}),
    }


def add_up_gradient(
    config: PretrainConfig, model: Any, batches: Sequence[Batch], step: int, ranks: Runtime
) -> dict[str, float]:
    """Forward and backward of this rank's micro batches, up to the update; returns the mean losses over all ranks."""
    engine.set_accumulation(model, len(batches))
    ranks.mark("reduce", step)
    counts = sum_over_ranks(count_targets(batches), ranks)
    check = Verification(config, model, batches, counts, step, ranks) if is_due(config.guard, step) else None
    totals: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        if number:
            model.step()  # between two micro batches it only counts
        ranks.mark("forward", step)
        sums = model(**batch, label_smoothing=config.train.label_smoothing, z_loss=config.train.z_loss)
        ranks.mark("backward", step)
        engine.backward(model, global_mean(sums, counts))
        totals = {name: totals.get(name, 0.0) + loss.detach() for name, loss in sums.items()}
    ranks.mark("reduce", step)
    losses = mean_losses(sum_over_ranks(totals, ranks), counts)
    if check is not None:
        check.compare(totals, losses)
    return losses


def tokens_seen(train: TrainConfig, number: int, passed_over: Sequence[tuple[int, int]]) -> int:
    """Tokens of the batches before `number`, without those passed over, all of which lie before it."""
    passed = (tokens_before(train, first + count) - tokens_before(train, first) for first, count in passed_over)
    return tokens_before(train, number) - sum(passed)


def sum_over_ranks(values: dict[str, Any], ranks: Runtime) -> dict[str, float]:
    """Sum each entry over all ranks, in fp64."""
    totals = ranks.sum(torch.tensor([float(value) for value in values.values()], dtype=torch.float64))
    return dict(zip(values, totals.tolist(), strict=True))
