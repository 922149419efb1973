"""The training loop. `millstream pretrain CONFIG`, or `deepspeed pretrain/train.py --config CONFIG [key=value ...]`.

What happens in a step is `step.train_step`. Everything is a function of the step number: the samples
(data_pipeline/order.py), the learning rate, the dropout seed. So a run that is interrupted and resumed writes, bit for
bit, the numbers it would have written anyway.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from configs.deepspeed_json import deepspeed_json
from configs.load import ConfigError, dump, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.shards import DataError
from data_pipeline.stream import Stream, open_stream
from data_pipeline.tokenizer import copy_tokenizer
from pretrain import budget, checkpoint, engine, guard, local_copies, runtime, sanity, spikes, upload
from pretrain.checkpoint import CheckpointError
from pretrain.load import begin, facts, load
from pretrain.metrics import open_metrics
from pretrain.models import build_model
from pretrain.objective import count_targets, mean_losses
from pretrain.report import write_report
from pretrain.runtime import Runtime, StopRequest
from pretrain.saver import open_saver
from pretrain.state import TrainState
from pretrain.step import sum_over_ranks, train_step


def main() -> int:
    file, overrides = runtime.launch_arguments(__doc__.splitlines()[0])
    try:
        config = load_pretrain(file, overrides)
        return train(config, runtime.start(config.run_dir, config.launch.stall_seconds))
    except (ConfigError, DataError, CheckpointError) as error:  # what a user can mend needs no traceback
        print(error, file=sys.stderr)
        return 2
    except guard.GuardStop as stop:
        print(stop, file=sys.stderr)
        return guard.EXIT_CODE


def train(config: PretrainConfig, ranks: Runtime) -> int:
    """Train to the last step or a stop request, from the newest checkpoint if there is one; returns the exit code."""
    began = time.monotonic()
    data, validation = open_stream(config, "train"), open_stream(config, "validation")
    run_dir = prepare_run_dir(config, data, ranks)
    runtime.seed_all(config.train.seed)
    model = engine.initialize(
        lambda: build_model(config.model, data.vocab_size, config.train.longest_seq_len),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )
    ranks.mark("start", 0)  # the model is there; what follows may take as long again
    state = resume(config, model, data, run_dir, ranks)
    sanity.check_start(config, model, data, validation, state.step, ranks)
    stop = StopRequest()
    with (
        open_metrics(run_dir, state.step, config.train.num_steps, config.log, ranks.is_first) as metrics,
        open_saver(run_dir, config.checkpoint, ranks) as saver,
    ):
        clock = budget.start_clock(config, began, state)
        if state.step == 0:
            metrics.log(evaluated := evaluate(config, model, validation, state.step, ranks))
            if config.model.init_from is None:
                sanity.check_first_loss(model, evaluated)
            state = replace(state, eval_loss=evaluated["eval_loss"])
        while not budget.is_finished(config, state):
            share = budget.time_share(config, state)
            line = train_step(config, model, data, state.step, ranks, share, state.passed_over)
            metrics.log(line | saver.waits())
            state = guard.after_step(state, line)
            if "skipped" in line:
                guard.note_skipped(run_dir, line, state, data, ranks)
                guard.stop_if_hopeless(config, state, model, data, run_dir, ranks)
            if config.guard.spike_sigmas is not None:
                state, went_back = spikes.watch(config, model, data, state, line["loss"], saver, metrics, ranks)
                if went_back:
                    continue
            times = clock.read(line["step_seconds"], saver.write_seconds)
            times, (is_stopped, *flags) = ranks.agree(times, stop.is_asked, *saver.flags)
            state = budget.at(config, state, times, share)
            saver.hear(*flags)
            last = budget.is_finished(config, state) or is_stopped
            if last or state.step % config.eval.every_steps == 0:
                metrics.log(evaluated := evaluate(config, model, validation, state.step, ranks))
                state = replace(state, eval_loss=evaluated["eval_loss"])
            if last or state.step % config.checkpoint.every_steps == 0:
                saver.save(state, engine.fragments(model), facts(config, data, state.batch))
            if last:
                break
    ranks.mark("end", state.step)
    if ranks.is_first:
        write_report(run_dir)
        if not budget.is_finished(config, state):
            print(f"stopped at step {state.step}, which is saved; the same command goes on from it")
    exit_code = 0 if budget.is_finished(config, state) else stop.exit_code(ranks)
    ranks.barrier()  # a rank that leaves while another still works takes the connection with it
    data.close()
    engine.close(model)
    return exit_code


@torch.no_grad()
def evaluate(config: PretrainConfig, model: Any, validation: Stream, step: int, ranks: Runtime) -> dict[str, float]:
    """Mean losses over the same held-out samples each time, as long as seq_len stays.

    The perplexity is of the token loss, without NSP. `eval_ema_loss` is the loss of the average of the weights.
    """
    losses = held_out_losses(config, model, validation, step, ranks)
    token_loss = losses.get("loss_clm", losses.get("loss_mlm", losses["loss"]))
    line = {"eval_perplexity": math.exp(min(token_loss, 700.0))}  # exp overflows beyond
    if step > 0 and config.train.optimizer.ema_decay is not None:
        with engine.averaged_weights(model):
            line["eval_ema_loss"] = held_out_losses(config, model, validation, step, ranks)["loss"]
    return {"step": step, **{f"eval_{name}": loss for name, loss in losses.items()}, **line}


def held_out_losses(
    config: PretrainConfig, model: Any, validation: Stream, step: int, ranks: Runtime
) -> dict[str, float]:
    """Mean losses of the weights as they are; names as those of a training step."""
    model.eval()
    totals: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    ranks.mark("evaluate", step)
    for made in validation.eval_batches(step, config.eval.num_samples, ranks.rank, ranks.world_size):
        batch = validation.expand(runtime.to_device(made, ranks.device))
        for name, loss in model(**batch).items():
            totals[name] = totals.get(name, 0.0) + loss
        for name, count in count_targets([batch]).items():
            counts[name] = counts.get(name, 0) + count
        ranks.mark("evaluate", step)  # for every batch: a long evaluation is no stall
    return mean_losses(sum_over_ranks(totals, ranks), sum_over_ranks(counts, ranks))


def prepare_run_dir(config: PretrainConfig, data: Stream, ranks: Runtime) -> Path:
    """Make the run directory with the resolved configuration and the tokenizer: it needs nothing from outside."""
    run_dir = Path(config.run_dir)
    problem = None
    if ranks.is_first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
            copy_tokenizer(data.tokenizer_dir, run_dir / "tokenizer")
        except OSError as error:
            problem = f"run_dir={config.run_dir}: cannot be written ({error}); choose a directory you can write to"
    if reasons := [reason for reason in ranks.gather(problem) if reason]:
        raise ConfigError(str(reasons[0]))
    return run_dir


def resume(config: PretrainConfig, model: Any, data: Stream, run_dir: Path, ranks: Runtime) -> TrainState:
    """Fill the model from the newest valid checkpoint and return its state; where there is none, begin."""
    say = print if ranks.is_first else lambda text: None
    address = config.checkpoint.upload
    found = checkpoint.newest_valid(run_dir, say, ranks)
    if config.train.resume == "never":
        if found:
            raise ConfigError(f"train.resume=never, but {found.path} exists; choose another run_dir or resume=auto")
        if address and (names := upload.list_steps(address, ranks)):
            raise ConfigError(f"train.resume=never, but {address} has {names[-1]}; choose another one or resume=auto")
        return begin(config, model, data, say)
    if config.checkpoint.local_dir:
        found = local_copies.bring_newer(config.checkpoint.local_dir, run_dir, found, say, ranks)
    if found is None and address:
        found = upload.fetch_newest(address, run_dir, say, ranks)
    if found is None:
        return begin(config, model, data, say)
    state = load(found, config, model, data, say)
    say(f"going on from {found.path}")
    return state


if __name__ == "__main__":
    runtime.run(main)
