"""From windows of tokens to a micro batch: boundaries, labels, positions, padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.pack import IGNORE_INDEX, cu_seqlens, gpt_rows, pad_rows


def one_row(tokens: list[int], starts: list[int]) -> dict[str, list[int]]:
    batch = gpt_rows(np.array([tokens], np.uint16), np.zeros(len(starts), int), np.array(starts, int))
    return {name: array[0].tolist() for name, array in batch.items()}


def test_row_restarts_positions_and_never_predicts_across_documents():
    row = one_row([5, 6, 7, 8, 9, 10], [2, 4])
    assert row["input_ids"] == [5, 6, 7, 8, 9]
    assert row["labels"] == [6, IGNORE_INDEX, 8, IGNORE_INDEX, 10]
    assert row["segment_ids"] == [1, 1, 2, 2, 3]
    assert row["position_ids"] == [0, 1, 0, 1, 0]


def test_document_that_starts_right_after_the_row_takes_the_last_label():
    row = one_row([5, 6, 7], [0, 2])
    assert row["labels"] == [6, IGNORE_INDEX]
    assert row["segment_ids"] == [1, 1] and row["position_ids"] == [0, 1]


def test_row_within_one_document_has_a_label_everywhere():
    row = one_row([5, 6, 7, 8], [])
    assert row == {"input_ids": [5, 6, 7], "labels": [6, 7, 8], "segment_ids": [1, 1, 1], "position_ids": [0, 1, 2]}


@given(
    st.integers(1, 9).flatmap(
        lambda num: st.lists(st.lists(st.booleans(), min_size=num + 1, max_size=num + 1), min_size=1, max_size=6)
    )
)
def test_rows_agree_with_the_slow_obvious_way(starts):
    is_start = np.array(starts)
    tokens = np.arange(is_start.size, dtype=np.uint16).reshape(is_start.shape)
    batch = gpt_rows(tokens, *np.nonzero(is_start))
    assert {name: array.dtype for name, array in batch.items()} == {
        "input_ids": np.int64,
        "labels": np.int64,
        "segment_ids": np.int32,
        "position_ids": np.int64,
    }
    for row in range(len(tokens)):
        segment, position = 1, 0
        for column in range(tokens.shape[1] - 1):
            if is_start[row, column] and column:
                segment, position = segment + 1, 0
            label = IGNORE_INDEX if is_start[row, column + 1] else tokens[row, column + 1]
            found = {name: int(array[row, column]) for name, array in batch.items()}
            assert found == {
                "input_ids": tokens[row, column],
                "labels": label,
                "segment_ids": segment,
                "position_ids": position,
            }
            position += 1


def test_padding_has_no_targets_and_segment_zero():
    batch = gpt_rows(np.array([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]]), np.array([0, 0]), np.array([1, 3]))
    pad_rows(batch, np.array([3, 4]))
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX], [2, 3, 4, 5]]
    assert batch["segment_ids"].tolist() == [[1, 2, 2, 0], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 0], [0, 1, 2, 3]]


def test_boundaries_for_varlen_kernels_are_those_of_the_documents():
    boundaries = cu_seqlens(np.array([[1, 1, 2, 3], [1, 1, 1, 1], [1, 2, 0, 0]], np.int32))
    assert boundaries.tolist() == [0, 2, 3, 4, 8, 9, 10, 12] and boundaries.dtype == np.int32
