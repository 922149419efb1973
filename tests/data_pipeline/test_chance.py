"""Random numbers by place: splitmix64's, uniform, and without a trace of which row or place they are for."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline import chance

ROWS, PLACES = 4000, 500
WORD = (1 << 64) - 1


def numbers(first_draw: int = 0) -> np.ndarray:
    """(ROWS, PLACES) uint64 of rows that follow each other."""
    return chance.bits(chance.row_keys(7, first_draw + np.arange(ROWS))[:, None], np.arange(PLACES))


def chi_square(counts: np.ndarray) -> float:
    """(statistic - degrees of freedom) / standard deviation, against equal chances."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def splitmix64(seed: int, count: int) -> list[int]:
    """Steele, Lea and Flood 2014, as published."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & WORD
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        found.append(z ^ (z >> 31))
    return found


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5, WORD])
def test_numbers_of_a_key_are_splitmix64s(key):
    assert chance.bits(np.uint64(key), np.arange(20)).tolist() == splitmix64(key, 20)


def test_first_number_of_seed_0_is_the_published_one():
    assert chance.bits(np.uint64(0), np.array([0])).tolist() == [0xE220A8397B1DCDAF]


def test_every_bit_is_set_half_of_the_time():
    drawn = numbers().ravel()
    shares = np.array([((drawn >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / np.sqrt(drawn.size)


@pytest.mark.parametrize("first_draw", [0, 10**10])
def test_numbers_are_uniform_over_all_over_each_row_and_over_each_place(first_draw):
    drawn = chance.uniform(chance.row_keys(7, first_draw + np.arange(ROWS))[:, None], np.arange(PLACES))
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(chi_square(np.bincount((drawn.ravel() * 1000).astype(int), minlength=1000))) < 5
    for means, size in ((drawn.mean(1), PLACES), (drawn.mean(0), ROWS)):
        z = (means - 0.5) * np.sqrt(12 * size)
        assert z.std() == pytest.approx(1, abs=0.1) and np.abs(z).max() < 5


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 64), (256, 0)])
def test_neighbouring_rows_and_places_are_independent(shift):
    """Pairs of 5 leading bits, at places that far apart, fall into all 1,024 cells equally often."""
    leading = (numbers() >> np.uint64(59)).astype(int)
    down, right = shift
    pairs = leading * 32 + np.roll(leading, (down, right), axis=(0, 1))
    counts = np.bincount(pairs[down:].ravel(), minlength=1024)
    assert abs(chi_square(counts)) < 5


def test_a_flipped_bit_of_the_draw_flips_half_of_all_bits():
    draws = np.arange(1000)
    before = chance.bits(chance.row_keys(7, draws)[:, None], np.arange(8))
    for bit in (0, 1, 20, 40):
        changed = before ^ chance.bits(chance.row_keys(7, draws ^ (1 << bit))[:, None], np.arange(8))
        assert np.bitwise_count(changed).mean() == pytest.approx(32, abs=5 * 4 / np.sqrt(8000))


def test_keys_of_a_billion_samples_apart_and_of_two_seeds_do_not_meet():
    draws = np.concatenate([np.arange(100_000), 10**9 + np.arange(100_000)])
    keys = np.concatenate([chance.row_keys(seed, draws) for seed in (1, 2)])
    assert len(np.unique(keys)) == len(keys)
