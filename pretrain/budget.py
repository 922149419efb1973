"""A run's wall-clock budget, `train.budget`: the learning rate falls with the time, and the run ends on time.

As Izsak et al. 2021 ("How to train BERT with an academic budget") train: where the schedule is is the share of the time
that is spent, not of the steps, so the rate is at its floor when the time is over, on whatever machine. Time is that of
the whole run, over all resumes, with evaluations and saves. It is rank 0's; the others get it with the flags that are
summed after every step. All that is decided by it follows from `TrainState`, so every rank decides alike, and a resumed
run goes on with the rate that it had. metrics.jsonl has the `time_share` of every step, so a replay has the rate too.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from configs.schema import PretrainConfig
from pretrain.state import TrainState

NEWEST_STEPS = 20  # the longest of these is what the next one may take


class Clock:
    """Measures, on rank 0, what a `TrainState` says of the time; `read` it after every step."""

    def __init__(self, began: float, spent: float, foreseen_end: float) -> None:
        """`began`: time.monotonic() when this start of the run did; `spent`: seconds of the run before that."""
        self._zero = began - spent
        self._last_read = time.monotonic()
        self._steps: deque[float] = deque(maxlen=NEWEST_STEPS)
        self._pause, self._foreseen_end = 0.0, foreseen_end

    def read(self, step_seconds: float, write_seconds: float) -> list[float]:
        """`seconds`, `step_seconds` and `end_seconds` of the state after a step of so many seconds.

        What passed between two steps was an evaluation, a save or both; `write_seconds` is what the longest write of a
        checkpoint took while the run went on.
        """
        now = time.monotonic()
        self._pause = max(self._pause, now - self._last_read - step_seconds)
        self._last_read = now
        self._steps.append(step_seconds)
        self._foreseen_end = max(self._foreseen_end, self._pause + write_seconds)
        return [now - self._zero, max(self._steps), self._foreseen_end]


def start_clock(config: PretrainConfig, began: float, state: TrainState) -> Clock:
    """The clock of a run that goes on from `state`, in a process that began at `began` (time.monotonic())."""
    return Clock(began, next_step_begins(config, state), state.end_seconds)


def at(config: PretrainConfig, state: TrainState, times: list[float], share: float) -> TrainState:
    """The state after a step with this `time_share`, by rank 0's clock; without a budget only `seconds` depends on one.

    times: of `Clock.read`.
    """
    seconds, step_seconds, end_seconds = times
    if config.train.budget is None:
        return replace(state, seconds=seconds)
    return replace(state, seconds=seconds, step_seconds=step_seconds, end_seconds=end_seconds, time_share=share)


def is_finished(config: PretrainConfig, state: TrainState) -> bool:
    """Whether there is no further step: all are made, or the newest was the last one that ends in time.

    Where a step or a pause was so long that no other one ends in time, though the rate is not at its floor yet, there
    is one more, at the floor.
    """
    if state.step >= config.train.num_steps or config.train.budget is None:
        return state.step >= config.train.num_steps
    return state.time_share >= 1 and not ends_in_time(config, state)


def time_share(config: PretrainConfig, state: TrainState) -> float:
    """How far the schedule is by the time, for the step after `state`: in [0, 1], 0 without a budget.

    It is 1 in the last step, as the share of the steps is: where, as far as foreseen, no other one ends in time.
    """
    budget = config.train.budget_seconds
    if budget is None:
        return 0.0
    after = replace(state, step=state.step + 1, seconds=next_step_begins(config, state) + state.step_seconds)
    if not ends_in_time(config, after):
        return 1.0
    return min(1.0, state.seconds / (budget - state.end_seconds))


def ends_in_time(config: PretrainConfig, state: TrainState) -> bool:
    """Whether the step after `state` ends within the budget, as far as foreseen, with what follows the last step."""
    budget = config.train.budget_seconds
    return budget is None or next_step_begins(config, state) + state.step_seconds + state.end_seconds <= budget


def next_step_begins(config: PretrainConfig, state: TrainState) -> float:
    """Seconds of the run when the next step begins; an evaluation or a save may be due before it."""
    is_paused = state.step > 0 and (
        state.step % config.eval.every_steps == 0 or state.step % config.checkpoint.every_steps == 0
    )
    return state.seconds + (state.end_seconds if is_paused else 0.0)
