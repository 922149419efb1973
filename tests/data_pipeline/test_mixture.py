"""Mixtures: exact proportions in every stretch, each source in its own order without gaps, the same wherever asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import counts, make_mixture, places, stages_of_schedule

MOST = 1.68  # samples; see the module's docstring
weights = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12)
schedules = st.integers(1, 5).flatmap(
    lambda num: st.lists(
        st.tuples(
            st.integers(1, 400),
            st.lists(st.floats(0.0, 1.0), min_size=num, max_size=num).filter(lambda given: sum(given) > 0.1),
        ),
        min_size=1,
        max_size=6,
    )
)


def from_lengths(schedule: list[tuple[int, list[float]]]) -> list[tuple[int, list[float]]]:
    """Stages (length, weights) as (first place, weights)."""
    starts = np.cumsum([0, *[length for length, _ in schedule]])
    return [(int(start), stage) for start, (_, stage) in zip(starts[:-1], schedule, strict=True)]


def prefix_counts(sources: np.ndarray, num_sources: int) -> np.ndarray:
    """How often each source came before each place and at the end; (places + 1, sources)."""
    hits = sources[:, None] == np.arange(num_sources)
    return np.vstack([np.zeros(num_sources, int), np.cumsum(hits, axis=0)])


@settings(deadline=None)
@given(weights)
def test_every_source_has_its_share_of_every_stretch(given_weights):
    share = np.array(given_weights) / sum(given_weights)
    before = prefix_counts(places(make_mixture([(0, given_weights)]), 0, 3000)[0], len(share))
    off = before - np.arange(3001)[:, None] * share
    most = 0.5 if len(share) <= 2 else MOST
    assert np.abs(off).max() <= most + 1e-5
    # a stretch's count is off by the difference of two prefixes: the largest over all stretches
    assert (off.max(axis=0) - off.min(axis=0)).max() <= 2 * most + 1e-5


@settings(deadline=None)
@given(schedules)
def test_each_source_goes_through_its_own_order_without_gaps_also_where_weights_change(schedule):
    mixture = make_mixture(from_lengths(schedule))
    sources, within = places(mixture, 0, 2000)
    for source in range(mixture.num_sources):
        own = within[sources == source]
        assert np.array_equal(own, np.arange(len(own)))


@settings(deadline=None)
@given(schedules, st.integers(0, 2500), st.integers(0, 300))
def test_any_piece_is_the_same_as_within_the_whole(schedule, first, count):
    mixture = make_mixture(from_lengths(schedule))
    whole = places(mixture, 0, 2800)
    piece = places(mixture, first, count)
    assert all(np.array_equal(a, b[first : first + count]) for a, b in zip(piece, whole, strict=True))


@settings(deadline=None)
@given(schedules, st.integers(0, 2500))
def test_counts_are_those_of_the_places_before(schedule, place):
    mixture = make_mixture(from_lengths(schedule))
    sources, _ = places(mixture, 0, place)
    assert np.array_equal(counts(mixture, place), np.bincount(sources, minlength=mixture.num_sources))


@settings(deadline=None)
@given(
    st.integers(2, 4).flatmap(lambda num: st.tuples(*[st.lists(st.floats(0.01, 1), min_size=num, max_size=num)] * 2))
)
def test_proportions_hold_all_along_a_ramp(ends):
    start, end = ends
    stages = stages_of_schedule(start, [(10, 200, end)], lambda step: 8 * step)
    num = len(start)
    places_of_stages = np.searchsorted([first for first, _ in stages], np.arange(2000), side="right") - 1
    share = np.array([stage for _, stage in stages])[places_of_stages]
    expected = np.vstack([np.zeros(num), np.cumsum(share, axis=0)])
    before = prefix_counts(places(make_mixture(stages), 0, 2000)[0], num)
    # each level rounds by 1/2; an error from above counts at most twice, as shares below move monotonically from
    # one value to another (summation by parts): 1/2, 3/2, 7/2. Rounded stage by stage it would grow with 200 stages.
    assert np.abs(before - expected).max() <= (2 ** (num - 1) - 1) / 2 + 1e-4


def test_small_weight_gets_its_samples_though_each_stage_is_shorter_than_one_of_them():
    # 1,000 stages of 8 samples with weights around 1 %: rounded stage by stage, the source would never be seen
    stages = [(8 * number, [0.99 - number * 1e-6, 0.01 + number * 1e-6]) for number in range(1000)]
    sources, _ = places(make_mixture(stages), 0, 8000)
    expected = 8 * sum(stage[1][1] for stage in stages)
    assert abs((sources == 1).sum() - expected) <= 1


def test_source_without_weight_is_not_seen_until_it_has_some():
    sources, _ = places(make_mixture([(0, [1, 0, 2]), (300, [1, 1, 0])]), 0, 600)
    assert set(sources[:300]) == {0, 2}
    assert (sources[300:] == 2).sum() <= 1  # what it was owed by rounding
    assert (sources[300:] == 1).sum() == 150


def test_far_places_are_exact_and_cost_no_more():
    mixture = make_mixture([(0, [0.7, 0.2, 0.1]), (10**12, [0.1, 0.2, 0.7])])
    for far in (10**12 - 5, 10**12, 3 * 10**15):
        before, after = counts(mixture, far), counts(mixture, far + 1000)
        sources, within = places(mixture, far, 1000)
        assert np.array_equal(after - before, np.bincount(sources, minlength=3)) and before.sum() == far
        for source in range(3):
            own = within[sources == source]
            assert np.array_equal(own, before[source] + np.arange(len(own)))
    share = counts(mixture, 10**12) / 10**12
    np.testing.assert_allclose(share, [0.7, 0.2, 0.1], rtol=0, atol=2**-30)


def test_tiny_share_is_exact_too():
    mixture = make_mixture([(0, [12_345_678.0, 1000.0 * 4])])  # one source of 1,000 samples for four epochs
    assert abs(counts(mixture, 12_345_678 + 4000)[1] - 4000) <= 1


def test_schedule_ramps_linearly_and_begins_its_stages_with_steps():
    stages = stages_of_schedule([3, 1], [(10, 4, [1, 3]), (20, 0, [0, 1])], lambda step: 8 * step)
    expected = [(0, 0.75), (80, 0.6875), (88, 0.5625), (96, 0.4375), (104, 0.3125), (112, 0.25), (160, 0.0)]
    assert [(start, stage[0]) for start, stage in stages] == expected
    assert all(math.isclose(sum(stage), 1) for _, stage in stages)


def test_long_ramp_is_made_of_few_stages_and_has_the_same_mean():
    stages = stages_of_schedule([1, 0], [(1, 100_000, [0, 1])], lambda step: step)
    assert len(stages) <= 260
    assert counts(make_mixture(stages), 100_001)[1] == pytest.approx(50_000, abs=2)
