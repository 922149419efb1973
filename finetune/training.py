"""One fine-tuning run: steps, evaluations, checkpoints, an early end. Read `train` first.

Rows, learning rate and dropout are functions of the step, as in pretraining, and what an early end depends on is in the
checkpoints' `TrainState`; so a run that is killed and goes on makes, bit for bit, the numbers it would have made.
transformers' Trainer saves iterators and generators of random numbers instead, for one number of ranks.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xxhash

from configs.incidents import append_incident
from configs.load import ConfigError
from configs.schema import CheckpointConfig, ScheduleConfig
from configs.tuning import LOWER_IS_BETTER, FinetuneConfig, TuningConfig
from data_pipeline.shards import DataError
from finetune.batches import collate, count_targets, part_of_rank, shuffled_batches, subset
from finetune.inference import predict
from finetune.tasks import Row
from pretrain import checkpoint, engine, runtime
from pretrain.guard import GuardStop, after_step
from pretrain.metrics import open_metrics
from pretrain.optim import learning_rate
from pretrain.runtime import Runtime, StopRequest
from pretrain.saver import open_saver
from pretrain.state import TrainState


@dataclass(frozen=True)
class Run:
    """One training from the start weights, with what it learns from and is measured on."""

    name: str  # of its folder in run_dir
    seed: int
    train_rows: list[Row]
    chosen: np.ndarray  # numbers of the rows it trains on, int64, ordered by the seed
    dev: Any  # the task's split
    dev_rows: list[Row]
    padding_id: int
    facts: dict[str, str]  # what a run that goes on must have as it was: its name, hashes of weights and rows


def make_run(
    config: FinetuneConfig,
    name: str,
    seed: int,
    train_rows: list[Row],
    dev: Any,
    dev_rows: list[Row],
    padding_id: int,
    facts: dict[str, str],
) -> Run:
    chosen = subset(train_rows, config.max_train_examples, seed)
    chosen = chosen[[count_targets(train_rows[row]) > 0 for row in chosen]]
    if not len(chosen):
        raise DataError(f"{config.train}: no target fits into tuning.max_seq_len={config.tuning.max_seq_len}; raise it")
    facts = facts | {"run": name, "train": fingerprint(train_rows), "dev": fingerprint(dev_rows)}
    return Run(name, seed, train_rows, chosen, dev, dev_rows, padding_id, facts)


def fingerprint(rows: list[Row]) -> str:
    """A hash of ids and labels."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return digest.hexdigest()


def train(
    config: FinetuneConfig, model: Any, task: ModuleType, run: Run, stop: StopRequest, ranks: Runtime
) -> TrainState | None:
    """Train from the newest checkpoint of this run, if there is one, to the end; None if it was stopped before.

    With `eval_every` the model then has the weights of the best evaluation. Writes RUN/NAME/metrics.jsonl. Raises
    GuardStop after non_finite_limit steps in a row without an update.
    """
    tuning, run_dir = config.tuning, Path(config.run_dir)
    num_steps = max(1, round(tuning.num_epochs * math.ceil(len(run.chosen) / tuning.batch_size)))
    schedule = ScheduleConfig(type="linear", warmup_steps=round(tuning.warmup_share * num_steps), final_share=0.0)
    state = resume(model, run_dir, run.facts, ranks)
    batches = shuffled_batches(run.train_rows, run.chosen, tuning.batch_size, run.seed)  # they never end
    is_stopped = False
    if ranks.is_first:
        (run_dir / run.name).mkdir(exist_ok=True)
    kept = CheckpointConfig(keep_last=1, keep_best=1)
    with (
        open_metrics(run_dir / run.name, state.step, num_steps, config.log, ranks.is_first) as metrics,
        open_saver(run_dir, kept, ranks) as saver,
    ):
        if tuning.eval_every and state.step == 0:
            metrics.log(line := evaluate(config, model, task, run, 0, ranks))
            check_metric(tuning, line)
        for batch in islice(batches, state.step, None):
            if is_stopped or state.step >= num_steps or is_patience_over(tuning, state):
                break
            started = time.perf_counter()
            ranks.mark("forward", state.step)  # and all that belongs to the step
            runtime.seed_all(run.seed, state.step, ranks.rank)  # dropout
            lr = learning_rate(state.step, num_steps, tuning.optimizer.lr, schedule)
            engine.set_lr(model, lr)
            model.train()
            line = train_step(config, model, task, [run.train_rows[i] for i in batch], run.padding_id, ranks)
            line |= {"examples_per_second": len(batch) / (time.perf_counter() - started)}
            metrics.log({"step": state.step + 1, "lr": lr, **line})
            state = replace(after_step(state, line), eval_loss=None)
            stop_if_hopeless(tuning, state, run, run_dir, ranks)
            _, (is_stopped, *flags) = ranks.agree([], stop.is_asked, *saver.flags)
            saver.hear(*flags)
            if tuning.eval_every and (state.step == num_steps or state.step % tuning.eval_every == 0):
                metrics.log(line := evaluate(config, model, task, run, state.step, ranks))
                state = judged(tuning, state, line)
            if is_stopped or state.eval_loss is not None or state.step % tuning.save_every == 0:
                saver.save(state, engine.fragments(model), run.facts)
    if state.step < num_steps and not is_patience_over(tuning, state):
        return None
    if state.best_step not in (0, state.step):
        load_best(model, run_dir, state, ranks)
    return state


def train_step(
    config: FinetuneConfig, model: Any, task: ModuleType, batch: list[Row], padding_id: int, ranks: Runtime
) -> dict[str, float]:
    """One optimizer step on `batch`, of which each rank takes its part; returns its line for metrics.jsonl.

    The loss is the mean over the batch's targets. A loss or gradient that is not finite leaves the model as it was; the
    line then has `skipped`.
    """
    num_targets = sum(count_targets(row) for row in batch)
    mine = part_of_rank(batch, config.tuning.batch_size, ranks)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(mine), config.tuning.micro_batch_size):
        tensors = collate(mine[start : start + config.tuning.micro_batch_size], padding_id)
        loss = task.loss(model, runtime.to_device(tensors, ranks.device)) / num_targets
        if start:
            model.step()  # between two micro batches it only counts
        engine.backward(model, loss)
        total += loss.detach().double().cpu()
    mean = ranks.sum(total).item()
    is_updated = engine.update(model, is_wanted=math.isfinite(mean))  # clips; refuses what is not finite
    return {"loss": mean, "grad_norm": engine.grad_norm(model), **({} if is_updated else {"skipped": 1})}


def evaluate(
    config: FinetuneConfig, model: Any, task: ModuleType, run: Run, step: int, ranks: Runtime
) -> dict[str, float]:
    """The task's metrics on the held-out examples, as a line for metrics.jsonl."""
    outputs = predict(model, task, run.dev_rows, run.padding_id, config.tuning.micro_batch_size, ranks)
    metrics = task.evaluate(config, run.dev, run.dev_rows, outputs)
    return {"step": step, **{f"eval_{name}": value for name, value in metrics.items()}}


def metric_of(tuning: TuningConfig, line: dict[str, float]) -> str:
    """The name of the metric that decides: `tuning.metric`, or the task's first one."""
    return tuning.metric or next(name.removeprefix("eval_") for name in line if name.startswith("eval_"))


def check_metric(tuning: TuningConfig, line: dict[str, float]) -> None:
    """Raises ConfigError unless an evaluation's line has the metric that decides."""
    if f"eval_{metric_of(tuning, line)}" not in line:
        found = ", ".join(name.removeprefix("eval_") for name in line if name.startswith("eval_"))
        raise ConfigError(f"tuning.metric={tuning.metric}: the task has no such metric; it has {found}")


def judged(tuning: TuningConfig, state: TrainState, line: dict[str, float]) -> TrainState:
    """The state after an evaluation with this line. Pure.

    `eval_loss`, by which checkpoints are kept, is the metric, or minus it where more is better. Of equals the earlier
    is the best.
    """
    name = metric_of(tuning, line)
    loss = line[f"eval_{name}"] * (1 if name in LOWER_IS_BETTER else -1)
    state = replace(state, eval_loss=loss)
    if not math.isnan(loss) and (state.best_loss is None or loss < state.best_loss):
        state = replace(state, best_loss=loss, best_step=state.step)
    return state


def is_patience_over(tuning: TuningConfig, state: TrainState) -> bool:
    """Whether the last `patience` evaluations were no better than one before. Pure."""
    if tuning.patience is None or tuning.eval_every is None:
        return False
    return state.step // tuning.eval_every - state.best_step // tuning.eval_every >= tuning.patience


def stop_if_hopeless(tuning: TuningConfig, state: TrainState, run: Run, run_dir: Path, ranks: Runtime) -> None:
    """Raise GuardStop on every rank after non_finite_limit steps in a row without an update."""
    if state.skipped_in_a_row < tuning.non_finite_limit:
        return
    text = (
        f"{run.name} stopped at step {state.step}: {state.skipped_in_a_row} steps in a row had a loss or gradient that "
        f"is not finite, see {run_dir / run.name}/metrics.jsonl. In another run_dir, lower tuning.optimizer.lr, raise "
        f"tuning.warmup_share or try tuning.precision=fp32; if it happens at step 1, weights in model= are not finite"
    )
    if ranks.is_first:
        append_incident(run_dir, "guard_stopped", text, step=state.step, in_a_row=state.skipped_in_a_row)
    ranks.barrier()  # the first rank to leave ends the others
    raise GuardStop(text)


def resume(model: Any, run_dir: Path, facts: dict[str, str], ranks: Runtime) -> TrainState:
    """Fill the model from the newest valid checkpoint of this run and return its state; a new one without any.

    Checkpoints of another run are removed: that one is finished, or is not asked for any more.
    """
    say = print if ranks.is_first else lambda text: None
    found = checkpoint.newest_valid(run_dir, say, ranks)
    if found is None:
        return TrainState()
    if found.facts.get("run") != facts["run"]:
        say(f"the checkpoints of {found.facts.get('run')} are removed")
        remove_checkpoints(run_dir, ranks)
        return TrainState()
    checkpoint.check_facts(found, facts)
    checkpoint.check_parameters(found, engine.shapes(model))
    engine.load_fragments(model, checkpoint.reader(found), found.state.updates)
    say(f"going on from {found.path}")
    return found.state


def load_best(model: Any, run_dir: Path, state: TrainState, ranks: Runtime) -> None:
    """Fill the model with the weights of the best evaluation. Raises CheckpointError if they are damaged."""
    path = run_dir / f"checkpoints/step-{state.best_step:08d}"
    found = checkpoint.open_checkpoint(path, ranks)
    engine.load_fragments(model, checkpoint.reader(found), found.state.updates)


def remove_checkpoints(run_dir: Path, ranks: Runtime) -> None:
    """Every rank calls it, while none saves."""
    ranks.barrier()
    if ranks.is_first:
        checkpoint.remove_all_but(run_dir, set())
    ranks.barrier()
