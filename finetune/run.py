"""Fine-tuning: `millstream finetune CONFIG [key=value ...]`, on any number of ranks, through the same ZeRO-3 engine.

One run per seed, or per fold, from the same encoded rows. The loss of a step is the mean over the batch's targets,
whatever the ranks and micro batches; the order of the rows is a function of (seed, epoch). What happens in a run is in
training.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from configs.deepspeed_json import deepspeed_json
from configs.load import ConfigError, load_finetune
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.folds import assign_folds, rows_of
from finetune.inference import predict
from finetune.models import check_directory, load_tokenizer, weights_hash
from finetune.run_dir import finish_run, prepare_run_dir, result_of, say_cuts, summarise, write_json, write_lines
from finetune.saved_model import SavedModel
from finetune.saving import save_model
from finetune.tasks.by_name import TASKS
from finetune.training import Run, make_run, train
from pretrain import engine, guard, runtime
from pretrain.checkpoint import CheckpointError
from pretrain.runtime import Runtime, StopRequest


def main() -> int:
    file, overrides = runtime.launch_arguments(__doc__.splitlines()[0])
    try:
        config = load_finetune(file, overrides)
        return finetune(config, runtime.start(config.run_dir, config.launch.stall_seconds))
    except (ConfigError, DataError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    except guard.GuardStop as stop:
        print(stop, file=sys.stderr)
        return guard.EXIT_CODE


def finetune(config: FinetuneConfig, ranks: Runtime) -> int:
    """Train and evaluate once per seed or fold; returns the exit code.

    Writes results.json, and predictions.jsonl and model/ of the first seed; of each fold FOLD/predictions.jsonl
    alone. A run that is finished is not made again.
    """
    if config.sweep is not None:
        raise ConfigError("the configuration has a section `sweep`: use millstream sweep, or sweep=null for one run")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_directory(config.model)
    task, tokenizer = TASKS[config.task], load_tokenizer(config.model)
    examples = task.load(config if config.folds is None else config.model_copy(update={"dev": config.train}))
    weights: Any = ranks.gather(weights_hash(config.model) if ranks.is_first else None)[0]
    facts = {"model.weights": weights}
    runs = list((runs_of_seeds if config.folds is None else runs_of_folds)(config, task, tokenizer, examples, facts))
    run_dir = prepare_run_dir(config, ranks)
    if ranks.is_first:
        say_cuts(runs[0])
    results, stop = [], None

    def build() -> torch.nn.Module:
        model: torch.nn.Module = task.build_model(config, examples, tokenizer)
        return model

    for run in runs:
        metrics = result_of(run_dir, run, ranks)
        if metrics is None:
            runtime.seed_all(run.seed)
            model = engine.initialize(
                build,
                config.tuning.optimizer,
                deepspeed_json(config, ranks.world_size),
                in_pieces=False,
                layer_decay=config.tuning.layer_decay,
            )
            stop = stop or StopRequest()  # before, there is nothing to save
            state = train(config, model, task, run, stop, ranks)
            if state is None:
                return say_stopped(run, stop, ranks)
            if state.skipped and ranks.is_first:
                print(f"{run.name}: {state.skipped} of {state.step} steps had no update, see its metrics.jsonl")
            outputs = predict(model, task, run.dev_rows, run.padding_id, config.tuning.micro_batch_size, ranks)
            metrics = task.evaluate(config, run.dev, run.dev_rows, outputs)
            if ranks.is_first and (config.folds or run is runs[0]):
                folder = run_dir / run.name if config.folds else run_dir
                records = task.records(config, examples, run.dev, run.dev_rows, outputs)
                write_lines(folder / "predictions.jsonl", records)
            if run is runs[0] and config.folds is None:
                about = SavedModel(config=config, about=task.about(examples))
                save_model(model, build, tokenizer, about, run_dir / "model", ranks)
            finish_run(run_dir, run, metrics, {"steps": state.step, "best_step": state.best_step or state.step}, ranks)
            engine.close(model)
        results.append(metrics)
        if ranks.is_first:
            print(f"{run.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if ranks.is_first:
        about_runs = {"seeds": config.tuning.seeds} | ({"folds": config.folds} if config.folds else {})
        write_json(run_dir / "results.json", about_runs | summarise(results, "fold" if config.folds else "seed"))
    ranks.barrier()
    return 0


def runs_of_seeds(
    config: FinetuneConfig, task: ModuleType, tokenizer: PreTrainedTokenizerBase, examples: Any, facts: dict[str, str]
) -> Iterator[Run]:
    train_rows = task.encode(config, tokenizer, examples.train)
    dev_rows = task.encode(config, tokenizer, examples.dev)
    for seed in config.tuning.seeds:
        yield make_run(config, f"seed-{seed}", seed, train_rows, examples.dev, dev_rows, tokenizer.pad_token_id, facts)


def runs_of_folds(
    config: FinetuneConfig, task: ModuleType, tokenizer: PreTrainedTokenizerBase, examples: Any, facts: dict[str, str]
) -> Iterator[Run]:
    """One run for each fold of the training file, which is held out."""
    rows, seed, num_folds = task.encode(config, tokenizer, examples.train), config.tuning.seeds[0], config.folds or 0
    fold = assign_folds(task.fold_keys(examples.train), num_folds, seed)
    for number in range(num_folds):
        others, held_out = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        dev = task.select(examples.train, held_out)
        train_rows, dev_rows = rows_of(rows, others), rows_of(rows, held_out)
        yield make_run(config, f"fold-{number + 1}", seed, train_rows, dev, dev_rows, tokenizer.pad_token_id, facts)


def say_stopped(run: Run, stop: StopRequest, ranks: Runtime) -> int:
    """Returns the exit code of a run that was asked to stop."""
    if ranks.is_first:
        print(f"{run.name} stopped and is saved; the same command goes on from it")
    exit_code = stop.exit_code(ranks)
    ranks.barrier()  # a rank that leaves while another still works takes the connection with it
    return exit_code


if __name__ == "__main__":
    runtime.run(main)
