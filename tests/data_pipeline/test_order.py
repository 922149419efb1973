"""The keyed permutation: a bijection, well mixed, the same wherever it is asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import permute, sample_ids


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_hits_every_index_once(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4097])
def test_each_epoch_visits_every_sample_once_in_an_order_of_its_own(size):
    epochs = [sample_ids(7, "data", epoch * size, size, size) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 3:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@given(first=st.integers(0, 5000), count=st.integers(1, 300))
def test_any_piece_of_the_order_is_the_same_as_within_the_whole(first, count):
    whole = sample_ids(1, "data", 0, 5300, 1001)
    assert np.array_equal(sample_ids(1, "data", first, count, 1001), whole[first : first + count])


def test_order_depends_on_seed_and_dataset():
    orders = [sample_ids(seed, data, 0, 100, 100).tolist() for seed, data in [(1, "a"), (2, "a"), (1, "b")]]
    assert len({tuple(o) for o in orders}) == 3


def test_seek_to_a_far_step_needs_no_memory():
    far = sample_ids(1, "data", 10**15, 4, 10**12)
    assert far.min() >= 0 and far.max() < 10**12


def test_positions_are_uniform_and_neighbours_uncorrelated():
    size, keys = 1000, range(200)
    permutations = np.stack([permute(np.arange(size), size, key) for key in keys])
    # where index 0 goes, over the keys: chi-square over 10 equal bins, 9 degrees of freedom, p = 0.001 at 27.9
    counts = np.histogram(permutations[:, 0], bins=10, range=(0, size))[0]
    assert ((counts - 20) ** 2 / 20).sum() < 27.9
    # correlation of neighbours: standard error 1 / sqrt(1000) each, so 1 / sqrt(200,000) over all keys
    correlations = [np.corrcoef(p[:-1], p[1:])[0, 1] for p in permutations]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(size * len(keys))
