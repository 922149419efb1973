"""The keyed permutation: a bijection, as well mixed as numpy's, the same wherever it is asked, found at once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import key, nearby_ids, permute, sample_ids


def ours(size: int, number: int) -> np.ndarray:
    return permute(np.arange(size), size, key("test", number))


def numpys(size: int, number: int) -> np.ndarray:
    return np.random.default_rng(number).permutation(size)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_hits_every_index_once(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 999_983, 2**20 + 1, 3_000_000])
def test_permutation_hits_every_index_of_large_sizes_once(size):
    assert np.array_equal(np.bincount(permute(np.arange(size), size, 9), minlength=size), np.ones(size))


@given(shape=st.sampled_from([(), (3,), (2, 3), (0,)]), size=st.integers(1, 2**61))
def test_any_shape_and_size_stays_in_range(shape, size):
    found = permute(np.full(shape, size - 1), size, 1)
    assert found.shape == shape and found.dtype == np.int64 and ((found >= 0) & (found < size)).all()


def endless(seed: int, first: int, count: int, size: int, window: int | None) -> np.ndarray:
    """The order over everything, or with a window and blocks of 300 samples (the last is shorter)."""
    if window is None:
        return sample_ids(seed, "data", first, count, size)
    return nearby_ids(seed, "data", first, count, np.append(np.arange(0, size, 300), size), window)


@pytest.mark.parametrize("window", [None, 500, 10_000])
@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4097])
def test_each_epoch_visits_every_sample_once_in_an_order_of_its_own(size, window):
    epochs = [endless(7, epoch * size, size, size, window) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 3:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@cache
def whole_order(window: int | None) -> np.ndarray:
    return endless(1, 0, 5300, 1001, window)


@given(first=st.integers(0, 5000), count=st.integers(0, 300), window=st.sampled_from([None, 200, 5000]))
def test_any_piece_of_the_order_is_the_same_as_within_the_whole(first, count, window):
    whole = whole_order(window)
    assert np.array_equal(endless(1, first, count, 1001, window), whole[first : first + count])


def test_order_depends_on_seed_and_dataset():
    orders = [sample_ids(seed, data, 0, 100, 100).tolist() for seed, data in [(1, "a"), (2, "a"), (1, "b")]]
    assert len({tuple(o) for o in orders}) == 3


def test_positions_beyond_int32_are_distinct_and_in_range():
    far = sample_ids(1, "data", 10**15, 1000, 10**12)
    assert far.min() >= 0 and far.max() < 10**12 and len(np.unique(far)) == 1000


def test_seek_to_the_end_of_an_epoch_of_ten_billion_samples_takes_less_than_a_millisecond():
    shards = np.linspace(0, 10**10, 1001).astype(np.int64)
    for seek in (
        lambda epoch: sample_ids(1, "data", (epoch + 1) * 10**10 - 64, 64, 10**10),
        lambda epoch: nearby_ids(1, "data", (epoch + 1) * 10**10 - 64, 64, shards, 10**8),
    ):
        seconds = []
        for epoch in range(7):
            began = time.perf_counter()
            seek(epoch)
            seconds.append(time.perf_counter() - began)
        assert sorted(seconds)[3] < 1e-3  # the median: the machine has other work too


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_few_items_is_equally_likely(size):
    draws, kinds = 3000, math.factorial(size)
    rows = np.stack([ours(size, number) for number in range(draws)])
    counts = np.bincount(rows @ size ** np.arange(size), minlength=1)
    expected = draws / kinds
    assert (counts > 0).sum() == kinds
    freedom = kinds - 1
    chi_square = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_places_of_every_item_are_uniform():
    size, draws = 60, 2000
    rows = np.stack([ours(size, number) for number in range(draws)])
    counts = np.stack([np.bincount(rows[:, item], minlength=size) for item in range(size)])
    freedom = (size - 1) ** 2
    chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def statistics(make: Callable[[int, int], np.ndarray], size: int, draws: int) -> dict[str, float]:
    """Signs of structure, each as a distance from its value for a random permutation in standard errors."""
    rows = np.stack([make(size, number) for number in range(draws)])
    places = np.arange(size)
    centred = (rows - rows.mean()) / rows.std()
    pairs = {f"serial correlation, lag {lag}": (centred[:, :-lag], centred[:, lag:]) for lag in (1, 2, 32, size // 2)}
    pairs["correlation between epochs"] = (centred[:-1], centred[1:])
    pairs["correlation with the place"] = (
        centred,
        np.broadcast_to((places - places.mean()) / places.std(), rows.shape),
    )
    found = {name: float((a * b).sum() / math.sqrt(a.size)) for name, (a, b) in pairs.items()}
    displacement = np.abs(rows - places).mean() / size
    found["displacement"] = (displacement - 1 / 3) / (0.2108 / math.sqrt(size * draws))  # sd: Diaconis & Graham 1977
    # Poisson(1) each: neighbours that stay neighbours, items that stay where they are
    counts = {
        "steps of one": (np.diff(rows, axis=1) == 1).sum(),
        "steps of minus one": (np.diff(rows, axis=1) == -1).sum(),
        "fixed points": (rows == places).sum(),
    }
    found |= {name: float((count - draws) / math.sqrt(draws)) for name, count in counts.items()}
    # the same two samples side by side in two epochs: either order, so Poisson(2)
    beside = [neighbours(a) & neighbours(b) for a, b in itertools.pairwise(rows)]
    found["same neighbours in two epochs"] = (sum(map(len, beside)) - 2 * (draws - 1)) / math.sqrt(2 * (draws - 1))
    return found


def neighbours(row: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(np.minimum(row[:-1], row[1:]).tolist(), np.maximum(row[:-1], row[1:]).tolist(), strict=True))


@pytest.mark.parametrize("make", [ours, numpys])
@pytest.mark.parametrize("size", [1000, 4096, 10_007])
def test_no_structure_shows_that_numpys_permutation_does_not_show(make, size):
    found = statistics(make, size, 80)
    # ten figures of standard deviation 1; the tiny biases of finite sizes are far below one
    assert max(map(abs, found.values())) < 4, found
    assert math.sqrt(np.mean(np.square(list(found.values())))) < 2, found


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any),
    window=st.integers(20, 900),
    seed=st.integers(0, 100),
)
def test_blocks_of_any_lengths_give_every_sample_once(lengths, window, seed):
    starts = np.cumsum([0, *lengths])
    ids = nearby_ids(seed, "data", 0, int(starts[-1]), starts, window)
    assert np.array_equal(np.sort(ids), np.arange(starts[-1]))


def test_each_shard_is_touched_in_one_stretch_of_windows():
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(rng.integers(900, 1100, 50))])
    window, size = 4000, int(starts[-1])
    shards = np.searchsorted(starts, nearby_ids(1, "data", 0, size, starts, window), side="right") - 1
    windows = np.arange(size) // window
    for shard in range(50):
        used = np.unique(windows[shards == shard])
        assert len(used) <= 2 and used[-1] - used[0] <= 1
    assert max(len(np.unique(shards[windows == number])) for number in np.unique(windows)) <= window // 900 + 2


def test_samples_within_a_window_are_well_mixed():
    starts = np.arange(0, 64_001, 1000)
    ids = nearby_ids(1, "data", 0, 6400, starts, 6400)
    ranks = np.argsort(np.argsort(ids))
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 4 / math.sqrt(6400)
    assert abs(np.corrcoef(ranks, np.arange(6400))[0, 1]) < 4 / math.sqrt(6400)
