"""What a run carries from step to step besides weights and optimizer state: one small value, kept in every checkpoint.

Nothing else about a run has a memory. Samples, learning rate and dropout are functions of the step, so a run that is
filled from a checkpoint and from its `TrainState` goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    step: int = 0  # steps made: the number of the next one
    updates: int = 0  # steps whose update was applied; the optimizer's bias correction counts these
    seconds: float = 0.0  # spent in training, over all resumes
    eval_loss: float | None = None  # of the newest evaluation; checkpoint.keep_best goes by it

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The state that `to_json` gave. Raises ValueError for values that are missing or not known."""
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(f"state has {sorted(values)}, expected {sorted(names)}")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
