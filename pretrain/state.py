"""What a run carries from step to step besides weights and optimizer state: one small value, kept in every checkpoint.

Nothing else about a run has a memory. Samples, learning rate and dropout are functions of the step, so a run that is
filled from a checkpoint and from its `TrainState` goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Checkpoints from before have no such values.
ADDED_LATER = frozenset(
    {
        "recent_losses",
        "passed_over",
        "skipped_in_a_row",
        "step_seconds",
        "end_seconds",
        "time_share",
        "best_step",
        "best_loss",
    }
)


@dataclass(frozen=True)
class TrainState:
    step: int = 0  # steps made: the number of the next one
    updates: int = 0  # steps whose update was applied; the optimizer's bias correction counts these
    seconds: float = 0.0  # of the run's wall-clock time, over all resumes, by rank 0's clock
    step_seconds: float = 0.0  # what the longest of the newest steps took; budget.py goes by it
    end_seconds: float = 0.0  # what an evaluation and a save take at most, as far as known
    time_share: float = 0.0  # of the schedule in the newest step, by a wall-clock budget; see budget.py
    eval_loss: float | None = None  # of the newest evaluation; checkpoint.keep_best goes by it
    best_step: int = 0  # fine-tuning: of the best evaluation so far, and its eval_loss; see finetune/training.py
    best_loss: float | None = None
    skipped_in_a_row: int = 0  # the newest steps, if they had no update; guard.non_finite_limit goes by it
    recent_losses: tuple[float, ...] = ()  # of the newest steps, while guard.spike_sigmas looks for spikes
    passed_over: tuple[tuple[int, int], ...] = ()  # batches that no step sees: number of the first, how many; in order

    @property
    def skipped(self) -> int:
        """Steps that had no update, in all."""
        return self.step - self.updates

    @property
    def batch(self) -> int:
        """The number of the next step's global batch in the order of samples: that of the step, without rollbacks."""
        return batch_number(self.step, self.passed_over)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The state that `to_json` gave. Raises ValueError for values that are missing or not known.

        What was added later may be missing: it is then what it was before the run had it, the default.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not names - ADDED_LATER <= values.keys() <= names:
            raise ValueError(f"state has {sorted(values)}, expected {sorted(names)}")
        losses, passed_over = values.get("recent_losses", ()), values.get("passed_over", ())
        return cls(**values | {"recent_losses": tuple(losses), "passed_over": tuple(map(tuple, passed_over))})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def batch_number(step: int, passed_over: Sequence[tuple[int, int]]) -> int:
    """The number of the global batch that the step from `step` to `step + 1` sees, of a run that passed over batches.

    What was passed over lies before: a run that goes back forgets the steps after it.
    """
    return step + sum(number for _, number in passed_over)
