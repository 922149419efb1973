"""From a window of tokens to a sample: boundaries, labels."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.pack import IGNORE_INDEX, pack_gpt


def test_gpt_row_restarts_positions_and_never_predicts_across_documents():
    row = pack_gpt(np.array([5, 6, 7, 8, 9, 10], np.uint16), np.array([2, 4]))
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert row["labels"].tolist() == [6, IGNORE_INDEX, 8, IGNORE_INDEX, 10]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 3]
    assert row["position_ids"].tolist() == [0, 1, 0, 1, 0]


def test_document_that_starts_right_after_the_row_takes_the_last_label():
    row = pack_gpt(np.array([5, 6, 7]), np.array([0, 2]))
    assert row["labels"].tolist() == [6, IGNORE_INDEX]
    assert row["segment_ids"].tolist() == [1, 1]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_gpt_rows_agree_with_the_slow_obvious_way(lengths):
    tokens = np.arange(sum(lengths) + 1)
    starts = np.cumsum([0, *lengths])
    row = pack_gpt(tokens, starts[starts < len(tokens)])
    document = np.repeat(np.arange(len(lengths) + 1), [*lengths, 1])
    for place in range(len(tokens) - 1):
        same = document[place] == document[place + 1]
        assert row["labels"][place] == (tokens[place + 1] if same else IGNORE_INDEX)
        assert row["position_ids"][place] == place - starts[document[place]]
        assert row["segment_ids"][place] == document[place] + 1
