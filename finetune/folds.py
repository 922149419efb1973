"""Cross-validation: the examples of the training file dealt into folds, each held out once. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from configs.load import ConfigError
from data_pipeline import order
from finetune.tasks import Row

Key = tuple[int, Hashable]  # of an example: its stratum, and what it shares with those that may not be parted from it


def assign_folds(keys: Sequence[Key], num_folds: int, seed: int) -> np.ndarray:
    """The fold of each example, (examples,) int64 from 0: every stratum is spread evenly, in an order of the seed's.

    Examples of equal keys are in one fold. Raises ConfigError where there are fewer keys than folds.
    """
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < num_folds:
        raise ConfigError(f"folds={num_folds}: the training file has only {len(distinct)} examples that can be parted")
    mixed = order.permute(np.arange(len(distinct)), len(distinct), order.key(seed, "folds")).tolist()
    by_stratum = sorted(mixed, key=lambda number: distinct[number][0])
    fold = {distinct[number]: place % num_folds for place, number in enumerate(by_stratum)}
    return np.array([fold[key] for key in keys])


def rows_of(rows: list[Row], examples: np.ndarray) -> list[Row]:
    """The rows of these examples, (examples,) ints, numbered anew in that order."""
    new = {int(example): number for number, example in enumerate(examples)}
    return [row | {"example": new[row["example"]]} for row in rows if row["example"] in new]
