"""Steps whose loss or gradient is not finite: they have no update, and a run that meets nothing else is stopped.

A step is refused before its update, by numbers that are sums over all ranks (the losses, the gradient's norm), so every
rank decides alike and nothing more has to be exchanged. Weights, optimizer state and average stay bitwise as they were;
the step itself counts, its line in metrics.jsonl has NaN or Infinity as it was and `skipped`, and the next one goes on
with the next batch. After `guard.non_finite_limit` of them in a row the run is stopped: it is not the data then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.incidents import append_incident
from configs.schema import CheckpointConfig, PretrainConfig
from data_pipeline.stream import Stream
from pretrain import batch_dump, engine
from pretrain.load import facts
from pretrain.runtime import Runtime
from pretrain.saver import open_saver
from pretrain.state import TrainState

EXIT_CODE = 70  # not started again, see launcher/restarts.py
FOLDER = "stopped"  # in the run directory: what replays the step at which a run was stopped


class GuardStop(RuntimeError):
    """The run must not go on; raised on every rank at the same step. The message says why and what to do."""


def are_finite(losses: Mapping[str, float]) -> bool:
    return all(math.isfinite(loss) for loss in losses.values())


def after_step(state: TrainState, line: Mapping[str, Any]) -> TrainState:
    """The state after the step of this line of metrics.jsonl; `updates` counts only steps that had one."""
    was_skipped = "skipped" in line
    return replace(
        state,
        step=state.step + 1,
        updates=state.updates + (not was_skipped),
        skipped_in_a_row=state.skipped_in_a_row + 1 if was_skipped else 0,
    )


def note_skipped(run_dir: Path, line: Mapping[str, Any], state: TrainState, data: Stream, ranks: Runtime) -> None:
    """Append the incident of a skipped step, with the samples of every rank; `state` is that after it."""
    if not ranks.is_first:
        return
    what = "loss" if not math.isfinite(line["loss"]) or math.isfinite(line["grad_norm"]) else "gradient"
    text = (
        f"step {line['step']}: the {what} is not finite (loss {line['loss']:g}, gradient norm {line['grad_norm']:g}); "
        f"no update, {state.skipped_in_a_row} in a row, {state.skipped} in all"
    )
    append_incident(
        run_dir,
        "non_finite",
        text,
        step=line["step"],
        loss=line["loss"],
        grad_norm=line["grad_norm"],
        in_a_row=state.skipped_in_a_row,
        sample_ids=batch_dump.samples_of_ranks(data, state.batch - 1, ranks.world_size),
    )


def stop_if_hopeless(
    config: PretrainConfig, state: TrainState, model: Any, data: Stream, run_dir: Path, ranks: Runtime
) -> None:
    """Raise GuardStop after non_finite_limit skipped steps in a row, with all that replays the last one on disk.

    Every rank calls it, after each step that was skipped; `state` is that after it.
    """
    if state.skipped_in_a_row < config.guard.non_finite_limit:
        return
    folder = run_dir / FOLDER
    # The weights are those before the step.
    before = replace(state, step=state.step - 1, skipped_in_a_row=state.skipped_in_a_row - 1)
    batch_dump.write(folder, config, before, data, ranks)
    with open_saver(folder, CheckpointConfig(keep_last=1, background=False), ranks) as saver:
        saver.save(before, engine.fragments(model), facts(config, data, before.batch))
    text = (
        f"stopped at step {state.step}: {state.skipped_in_a_row} steps in a row had a loss or gradient that is not "
        f"finite. The last batch and the weights are in {folder}: `millstream replay {run_dir} {state.step}` shows "
        f"where the first such number comes from. The same command would go on from the newest checkpoint and come "
        f"here again: lower train.optimizer.lr, try train.precision=fp32, or remove the newest checkpoints to go "
        f"further back"
    )
    if ranks.is_first:
        append_incident(run_dir, "guard_stopped", text, step=state.step, in_a_row=state.skipped_in_a_row)
    ranks.barrier()  # the first rank to leave ends the others
    raise GuardStop(text)
