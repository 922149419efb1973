"""Fine-tuning: `millstream finetune CONFIG [key=value ...]`, on any number of ranks, through the same ZeRO-3 engine.

One run per seed, from the same encoded rows. The loss of a step is the mean over the batch's targets, whatever the
ranks and micro batches; the order of the rows is a function of (seed, epoch).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from configs.deepspeed_json import deepspeed_json
from configs.load import ConfigError, dump, load_finetune
from configs.schema import ScheduleConfig
from configs.tuning import FinetuneConfig
from data_pipeline import order
from data_pipeline.shards import DataError
from finetune.models import check_directory, load_tokenizer
from finetune.tasks import IGNORE_INDEX, ON_HOST, Row, classification, qa, regression, tagging
from pretrain import engine, runtime
from pretrain.metrics import open_metrics
from pretrain.optim import learning_rate
from pretrain.runtime import Runtime

TASKS = {"classification": classification, "regression": regression, "qa": qa, "tagging": tagging}
BUCKET_BATCHES = 16  # rows are sorted by length within this many batches: less padding, still well mixed


def main() -> int:
    file, overrides = runtime.launch_arguments(__doc__.splitlines()[0])
    try:
        config = load_finetune(file, overrides)
        finetune(config, runtime.start(config.run_dir, config.launch.stall_seconds))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def finetune(config: FinetuneConfig, ranks: Runtime) -> None:
    """Train and evaluate once per seed; write results.json and, of the first seed, predictions.jsonl and model/."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_directory(config.model)
    task, tokenizer = TASKS[config.task], load_tokenizer(config.model)
    examples = task.load(config)
    train_rows = task.encode(config, tokenizer, examples.train)
    dev_rows = task.encode(config, tokenizer, examples.dev)
    run_dir = Path(config.run_dir)
    prepare_run_dir(config, ranks)
    results = []
    for seed in config.tuning.seeds:
        runtime.seed_all(seed)
        model = engine.initialize(
            lambda: task.build_model(config, examples, tokenizer),
            config.tuning.optimizer,
            deepspeed_json(config, ranks.world_size),
            in_pieces=False,
            layer_decay=config.tuning.layer_decay,
        )
        train(config, model, task, train_rows, tokenizer.pad_token_id, seed, ranks)
        outputs = predict(config, model, task, dev_rows, tokenizer.pad_token_id, ranks)
        results.append(task.evaluate(config, examples.dev, dev_rows, outputs))
        if ranks.is_first:
            print(f"seed {seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in results[-1].items()))
        if seed == config.tuning.seeds[0]:
            save_model(model, tokenizer, run_dir / "model", ranks)
            if ranks.is_first:
                records = task.records(config, examples, examples.dev, dev_rows, outputs)
                write_lines(run_dir / "predictions.jsonl", records)
        engine.close(model)
    if ranks.is_first:
        summary = {"seeds": config.tuning.seeds, **summarise(results)}
        (run_dir / "results.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    ranks.barrier()


def train(
    config: FinetuneConfig, model: Any, task: ModuleType, rows: list[Row], padding_id: int, seed: int, ranks: Runtime
) -> None:
    """All epochs of one seed; writes RUN/seed-N/metrics.jsonl."""
    tuning = config.tuning
    chosen = subset(rows, config.max_train_examples, seed)
    num_steps = max(1, round(tuning.num_epochs * math.ceil(len(chosen) / tuning.batch_size)))
    schedule = ScheduleConfig(type="linear", warmup_steps=round(tuning.warmup_share * num_steps), final_share=0.0)
    batches = shuffled_batches(rows, chosen, tuning.batch_size, seed)
    seed_dir = Path(config.run_dir) / f"seed-{seed}"
    num_skipped = 0
    with open_metrics(seed_dir, 0, num_steps, config.log, ranks.is_first) as metrics:
        for step, batch in zip(range(num_steps), batches, strict=False):  # the batches never end
            started = time.perf_counter()
            ranks.mark("forward", step)  # and all that belongs to the step
            runtime.seed_all(seed, step, ranks.rank)  # dropout
            lr = learning_rate(step, num_steps, tuning.optimizer.lr, schedule)
            engine.set_lr(model, lr)
            model.train()
            line = train_step(config, model, task, [rows[i] for i in batch], padding_id, ranks)
            speed = len(batch) / (time.perf_counter() - started)
            metrics.log({"step": step + 1, "lr": lr, **line, "examples_per_second": speed})
            num_skipped += "skipped" in line
    if num_skipped and ranks.is_first:
        print(f"seed {seed}: {num_skipped} of {num_steps} steps had no update, see {seed_dir}/metrics.jsonl")


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


@torch.no_grad()
def predict(
    config: FinetuneConfig, model: Any, task: ModuleType, rows: list[Row], padding_id: int, ranks: Runtime
) -> list[np.ndarray]:
    """The task's output for every row, in the order of `rows`, on every rank."""
    model.eval()
    size = config.tuning.micro_batch_size * ranks.world_size
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


def subset(rows: list[Row], largest: int | None, seed: int) -> np.ndarray:
    """The row numbers to train on, int64: all rows of at most `largest` examples, chosen and ordered by the seed."""
    example = np.array([row["example"] for row in rows])
    num = int(example.max()) + 1
    place = np.empty(num, np.int64)  # of each example in an order of the seed's
    place[order.permute(np.arange(num), num, order.key(seed, "subset"))] = np.arange(num)
    by_place = np.argsort(place[example], kind="stable")
    return by_place[: np.count_nonzero(place[example] < (largest or num))]


def shuffled_batches(rows: list[Row], chosen: np.ndarray, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers; every epoch has each of the `chosen` once, in an order of its own.

    A stretch of BUCKET_BATCHES batches is sorted by length before it is cut, and its batches are shuffled again.
    """
    num, stretch = len(chosen), BUCKET_BATCHES * batch_size
    epoch = 0
    while True:
        mixed = chosen[order.permute(np.arange(num), num, order.key(seed, epoch))].tolist()
        for start in range(0, num, stretch):
            by_length = sorted(mixed[start : start + stretch], key=lambda i: len(rows[i]["input_ids"]))
            cut = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            for i in order.permute(np.arange(len(cut)), len(cut), order.key(seed, epoch, start)):
                yield cut[i]
        epoch += 1


def part_of_rank(batch: list[Row], size: int, ranks: Runtime) -> list[Row]:
    """This rank's rows of a batch of up to `size`; short batches are filled, so that all ranks have equally many."""
    filler = batch[0] | {"labels": ignored(batch[0]["labels"])}
    return (batch + [filler] * (size - len(batch)))[ranks.rank :: ranks.world_size]


def collate(rows: list[Row], padding_id: int) -> dict[str, torch.Tensor]:
    """A batch: fields of tokens (rows, longest row), int64, each with its own padding; other labels as they are."""
    padding = {"input_ids": padding_id, "labels": IGNORE_INDEX}
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0].keys() - ON_HOST:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            values = [value + [padding.get(name, 0)] * (longest - len(value)) for value in values]
        batch[name] = torch.tensor(values)
    return batch


def count_targets(row: Row) -> int:
    labels = row["labels"]
    several = labels if isinstance(labels, list | tuple) else [labels]
    return sum(label != IGNORE_INDEX and not math.isnan(label) for label in several)


def ignored(labels: Any) -> Any:
    """`labels` of a row that has no targets."""
    if isinstance(labels, list | tuple):
        return type(labels)(ignored(label) for label in labels)
    return math.nan if isinstance(labels, float) else IGNORE_INDEX


def prepare_run_dir(config: FinetuneConfig, ranks: Runtime) -> None:
    """Make the run directory with the resolved configuration. Raises ConfigError on every rank if it cannot be."""
    problem = None
    if ranks.is_first:
        try:
            for seed in config.tuning.seeds:
                (Path(config.run_dir) / f"seed-{seed}").mkdir(parents=True, exist_ok=True)
            (Path(config.run_dir) / "config.yaml").write_text(dump(config), encoding="utf-8")
        except OSError as error:
            problem = f"run_dir={config.run_dir}: cannot be written ({error}); choose a directory you can write to"
    if reasons := [reason for reason in ranks.gather(problem) if reason]:
        raise ConfigError(str(reasons[0]))


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, ranks: Runtime) -> None:
    """Write the trained model in Hugging Face layout, fp32, in place of what stood there; every rank calls it."""
    weights = {name: weight.float() for name, weight in engine.gather_weights(model) if ranks.is_first}
    if ranks.is_first:
        aside = directory.with_name(f".writing-{directory.name}")
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer.save_pretrained(aside)
        settings = model.module.config
        settings.architectures, settings.dtype = [type(model.module).__name__], "float32"
        settings.save_pretrained(aside)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    ranks.barrier()


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def summarise(results: list[dict[str, float]]) -> dict[str, Any]:
    """Of each metric over the seeds: the mean, the spread (largest minus smallest) and the single values."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary[name] = {
            "mean": sum(values) / len(values),
            "spread": max(values) - min(values),
            "per_seed": values,
        }
    return summary


if __name__ == "__main__":
    runtime.run(main)
