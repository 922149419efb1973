"""Rows of a dataset, each way to divide it, against the slow obvious way."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.pack import IGNORE_INDEX
from data_pipeline.packing import open_plan
from data_pipeline.rows import best_fit_rows, open_rows
from data_pipeline.shards import Dataset
from tests.data_pipeline.token_datasets import gpt_config, lengths, write_dataset

SHARDS = [lengths(1, 30), lengths(2, 7), lengths(3, 50)]
SEQ_LEN = 16


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return write_dataset(tmp_path / "data", SHARDS)


def documents() -> tuple[np.ndarray, np.ndarray]:
    """Of each token, its document and its place in it."""
    all_lengths = np.concatenate(SHARDS)
    document = np.repeat(np.arange(len(all_lengths)), all_lengths)
    return document, np.arange(len(document)) - (np.cumsum(all_lengths) - all_lengths)[document]


def expected(pieces: list[tuple[int, int]]) -> dict[str, list[int]]:
    """A row of pieces (start, length), by hand; they count documents and places in them anew."""
    document, _ = documents()
    row: dict[str, list[int]] = {name: [] for name in ("input_ids", "labels", "segment_ids", "position_ids")}
    segment, position = 0, 0
    for start, length in pieces:
        for token in range(start, start + length):
            if token == start or document[token] != document[token - 1]:
                segment, position = segment + 1, 0
            goes_on = token + 1 < len(document) and document[token + 1] == document[token]
            goes_on &= token + 1 < start + length or len(pieces) == 1
            row["input_ids"].append(token)
            row["labels"].append(token + 1 if goes_on else IGNORE_INDEX)
            row["segment_ids"].append(segment)
            row["position_ids"].append(position)
            position += 1
    padding = SEQ_LEN - len(row["labels"])
    row["labels"] += [IGNORE_INDEX] * padding
    return {name: values + [0] * (SEQ_LEN - len(values)) for name, values in row.items()}


def test_concatenated_rows_agree_with_the_slow_obvious_way(tmp_path, dataset):
    rows = open_rows(gpt_config(tmp_path), dataset, SEQ_LEN, None)
    assert rows.num_rows == (dataset.num_tokens - 1) // SEQ_LEN
    numbers = np.random.default_rng(0).permutation(rows.num_rows)
    made = rows.make(numbers, "train", numbers)
    for place, number in enumerate(numbers.tolist()):
        assert {name: made[name][place].tolist() for name in made} == expected([(number * SEQ_LEN, SEQ_LEN)])


def test_rows_within_shards_lose_less_than_a_row_of_each(tmp_path, dataset):
    rows = open_rows(gpt_config(tmp_path, {"shuffle_window_tokens": 1000}), dataset, SEQ_LEN, None)
    numbers = np.arange(rows.num_rows)
    starts = rows.first_tokens(numbers)
    shard = np.searchsorted(dataset.shard_starts, starts, side="right") - 1
    ends = np.array(dataset.shard_starts)[shard + 1]
    assert (starts + SEQ_LEN + 1 <= ends).all() and len(np.unique(starts)) == rows.num_rows
    for number, count in enumerate(np.diff(rows.block_starts).tolist()):
        assert (shard == number).sum() == count == (sum(SHARDS[number]) - 1) // SEQ_LEN
    made = rows.make(numbers, "train", numbers)
    for number, start in enumerate(starts.tolist()):
        assert {name: made[name][number].tolist() for name in made} == expected([(start, SEQ_LEN)])


def test_best_fit_rows_agree_with_the_slow_obvious_way(tmp_path, dataset):
    plan = open_plan(dataset, SEQ_LEN, tmp_path)
    numbers = np.random.default_rng(0).permutation(plan.num_rows)
    made = best_fit_rows(dataset, plan, numbers)
    seen = []
    for place, number in enumerate(numbers.tolist()):
        pieces = slice(int(plan.first_pieces[number]), int(plan.first_pieces[number + 1]))
        sizes = np.minimum(plan.lengths[pieces], SEQ_LEN).tolist()
        row = expected(list(zip(plan.starts[pieces].tolist(), sizes, strict=True)))
        assert {name: made[name][place].tolist() for name in made} == row
        seen += made["input_ids"][place][made["segment_ids"][place] > 0].tolist()
    assert sorted(seen) == list(range(dataset.num_tokens))


def test_best_fit_predicts_every_token_but_the_first_of_each_document(tmp_path, dataset):
    rows = open_rows(gpt_config(tmp_path, {"packing": "best_fit"}), dataset, SEQ_LEN, None)
    made = rows.make(np.arange(rows.num_rows), "train", np.arange(rows.num_rows))
    targets = np.sort(made["labels"][made["labels"] != IGNORE_INDEX])
    _, place = documents()
    # a long document's rest starts a row of its own context, but the token before it has it as its target
    assert np.array_equal(targets, np.flatnonzero(place > 0))


def test_rows_are_the_same_in_any_company(tmp_path, dataset):
    for packing in ("concatenate", "best_fit"):
        rows = open_rows(gpt_config(tmp_path, {"packing": packing}), dataset, SEQ_LEN, None)
        numbers = np.arange(rows.num_rows)
        together = rows.make(numbers, "train", numbers)
        for number in range(0, rows.num_rows, 7):
            alone = rows.make(numbers[number : number + 1], "train", numbers[number : number + 1])
            assert all(np.array_equal(alone[name][0], together[name][number]) for name in alone)
