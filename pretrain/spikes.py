"""Spikes of the loss: when a loss is one, and going back to before it without the batches that led there.

A loss is a spike when it lies more than `guard.spike_sigmas` standard deviations above those of the steps before. Their
level is the median of the last WINDOW ones, their deviation comes from the differences d of successive ones, in which
the fall of the loss hardly shows: 1.4826 x median |d| / sqrt 2, the standard deviation of normally distributed numbers.
Single spikes move neither. The window is in `TrainState`, so a resumed run judges as the undisturbed one.

Going back is the recipe of PaLM (Chowdhery et al. 2022, section 5.1): to a checkpoint from about 100 steps before
(`guard.spike_margin_steps`), because a newer one may be of weights that are on their way to the spike; and the next
`guard.spike_skip_batches` batches are passed over. Later checkpoints are removed, or a resume would go on from them.
They saw that a spike does not come back then, though the same batches do no harm from other weights: it takes both, a
state of the weights and certain batches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.incidents import append_incident
from configs.schema import PretrainConfig
from data_pipeline.stream import Stream
from pretrain import batch_dump, checkpoint, engine, guard
from pretrain.load import facts, load
from pretrain.metrics import Metrics, Silent
from pretrain.runtime import Runtime
from pretrain.saver import Saver
from pretrain.state import TrainState

WINDOW = 50  # losses of the steps before, which a loss is compared with
LEAST = 20  # with fewer, at the start of a run, there is no spike
TO_SIGMA = 1.4826  # 1 / the 75 % quantile of the normal distribution


def largest_usual(recent: Sequence[float], sigmas: float) -> float:
    """The loss above which the next one is a spike; infinity as long as too few are known."""
    if len(recent) < LEAST:
        return math.inf
    difference = statistics.median(abs(after - before) for before, after in pairwise(recent))
    return statistics.median(recent) + sigmas * TO_SIGMA * difference / math.sqrt(2)


def remember(recent: Sequence[float], loss: float) -> tuple[float, ...]:
    """The window after a step. A spike is in it too: losses that stay there are the usual ones in the end."""
    return (*recent, loss)[-WINDOW:] if math.isfinite(loss) else tuple(recent)


def watch(
    config: PretrainConfig,
    model: Any,
    data: Stream,
    state: TrainState,
    loss: float,
    saver: Saver,
    metrics: Metrics | Silent,
    ranks: Runtime,
) -> tuple[TrainState, bool]:
    """The state after a step that had this loss, and whether it is one from before, to which the run went back.

    `state` is that after the step. Every rank calls it with the same values.
    """
    usual = largest_usual(state.recent_losses, config.guard.spike_sigmas or math.inf)
    after = replace(state, recent_losses=remember(state.recent_losses, loss))
    if not usual < loss < math.inf:  # what is not finite is the guard's
        return after, False
    run_dir = Path(config.run_dir)
    text = f"step {state.step}: a spike, the loss is {loss:.4f}, after losses that call for at most {usual:.4f}"
    if ranks.is_first:
        print(text, flush=True)
        ids = batch_dump.samples_of_ranks(data, state.batch - 1, ranks.world_size)
        append_incident(run_dir, "spike", text, step=state.step, loss=loss, usual=usual, sample_ids=ids)
    if not config.guard.spike_rollback:
        return after, False
    saver.finish()
    say: Callable[[str], None] = print if ranks.is_first else lambda text: None
    found = checkpoint.newest_valid(run_dir, say, ranks, last=state.step - config.guard.spike_margin_steps)
    if (
        found is None or found.state.passed_over != state.passed_over
    ):  # not behind an earlier rollback: it would not count
        found = checkpoint.newest_valid(run_dir, say, ranks, last=state.step - 1)
    if found is None:
        say("there is no checkpoint from before it: the run goes on")
        return after, False
    return go_back(found, config, model, data, state, saver, metrics, ranks), True


def go_back(
    found: checkpoint.Checkpoint,
    config: PretrainConfig,
    model: Any,
    data: Stream,
    state: TrainState,
    saver: Saver,
    metrics: Metrics | Silent,
    ranks: Runtime,
) -> TrainState:
    """Fill the model from `found` and return its state, with the batches up to that of `state` and more passed over.

    The checkpoint is saved again with the new state, so whatever happens next, nothing sees those batches. Raises
    GuardStop where the run went back `spike_rollback_limit` times already.
    """
    say: Callable[[str], None] = print if ranks.is_first else lambda text: None
    num_times, limit = len(found.state.passed_over) + 1, config.guard.spike_rollback_limit
    if num_times > limit:
        text = (
            f"stopped at step {state.step}: another spike of the loss, after going back {limit} times "
            f"(guard.spike_rollback_limit). See incidents.jsonl; lower train.optimizer.lr, or go on from an earlier "
            f"checkpoint by removing the newest ones"
        )
        if ranks.is_first:
            append_incident(config.run_dir, "guard_stopped", text, step=state.step)
        ranks.barrier()  # the first rank to leave ends the others
        raise guard.GuardStop(text)
    before = load(found, config, model, data, say)
    num_batches = max(config.guard.spike_skip_batches, state.step - before.step)
    after = replace(before, passed_over=(*before.passed_over, (before.batch, num_batches)))
    # Time does not go back.
    after = replace(after, seconds=state.seconds, step_seconds=state.step_seconds, end_seconds=state.end_seconds)
    text = (
        f"went back from step {state.step} to {before.step}, passing over {num_batches} batches from number "
        f"{before.batch} on; {num_times} of guard.spike_rollback_limit={limit}"
    )
    say(text)
    if ranks.is_first:
        numbers = {"from_step": state.step, "first_batch": before.batch, "num_batches": num_batches}
        append_incident(config.run_dir, "rollback", text, step=before.step, **numbers)
    metrics.go_back(before.step)
    saver.forget_after(before.step)
    saver.save(after, engine.fragments(model), facts(config, data, after.batch))
    return after
