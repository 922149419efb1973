"""Rows made of tokens alone against `pack.gpt_rows`, which is told where documents start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.expand import expand_tokens
from data_pipeline.pack import gpt_rows

END = 7


def assert_same(tokens: np.ndarray) -> None:
    """`expand_tokens` makes of the tokens what `gpt_rows` makes of them and the places behind each end."""
    rows, columns = np.nonzero(tokens[:, :-1] == END)
    expected = gpt_rows(tokens, rows, columns + 1)
    made = expand_tokens(torch.from_numpy(tokens), END)
    assert list(made) == list(expected)
    for name, array in expected.items():
        assert torch.equal(made[name], torch.from_numpy(array)), name
        assert made[name].dtype == torch.from_numpy(array).dtype and made[name].is_contiguous(), name


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(
    "row",
    [
        [1, 2, 3, 4, 5],  # no end
        [1, 2, 3, END, 5],  # a document starts right behind the row: no label there
        [1, 2, 3, 4, END],  # the end is a label
        [END, 2, 3, 4, 5],  # a rest of one token
        [1, END, END, 4, 5],  # a document of one token
        [END, END, END, END, END],
    ],
)
def test_document_borders_anywhere_in_a_row(row, dtype):
    assert_same(np.array([row], dtype))


@given(
    st.integers(1, 9).flatmap(
        lambda num: st.lists(
            st.lists(st.sampled_from([END, 0, 1, 60_000]), min_size=num + 1, max_size=num + 1), min_size=1, max_size=6
        )
    )
)
def test_rows_are_those_that_are_made_from_the_document_starts(rows):
    assert_same(np.array(rows, np.uint16))


def test_ids_above_the_largest_signed_ones_stay():
    assert_same(np.array([[65_535, END, 40_000, 32_768]], np.uint16))
    assert_same(np.array([[2**32 - 1, END, 2**31, 70_000]], np.uint32))


def test_nothing_waits_for_the_device():
    # tensors on "meta" have no values: whatever has to look at one fails there
    made = expand_tokens(torch.empty((8, 17), dtype=torch.uint16, device="meta"), END)
    assert {tuple(tensor.shape) for tensor in made.values()} == {(8, 16)}
