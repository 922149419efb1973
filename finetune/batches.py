"""Rows to batches: which rows a run trains on, in which order, on which rank. Pure but for the tensors made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data_pipeline import order
from finetune.tasks import IGNORE_INDEX, ON_HOST, Row
from pretrain.runtime import Runtime

BUCKET_BATCHES = 16  # rows are sorted by length within this many batches: less padding, still well mixed


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
