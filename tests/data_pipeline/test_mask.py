"""BERT's masking: shares, whole words, spans as in the paper, special tokens left alone, rows independent."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import MaskingConfig
from data_pipeline import chance
from data_pipeline.mask import IGNORE_INDEX, mask_rows, span_lengths

MASK_ID, VOCAB = 4, 1000
UNITS = ["token", "word", "span"]


def run(ids, maskable=None, continues=None, draws=None, **settings):
    """mask_rows of rows (n, seq), or one row (seq,), with the keys of `draws`."""
    ids = np.atleast_2d(ids)
    maskable = np.ones(ids.shape, bool) if maskable is None else np.broadcast_to(maskable, ids.shape)
    continues = np.zeros(ids.shape, bool) if continues is None else np.broadcast_to(continues, ids.shape)
    keys = chance.row_keys(11, np.arange(len(ids)) if draws is None else np.asarray(draws))
    return mask_rows(ids, maskable, continues, keys, MaskingConfig(**settings), MASK_ID, np.arange(5, VOCAB))


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, VOCAB, shape)


@pytest.mark.parametrize("unit", UNITS)
def test_shares_are_80_10_10_of_15_percent(unit):
    ids = random_ids(500, 400)
    masked, labels = run(ids, unit=unit)
    targets = labels != IGNORE_INDEX
    assert (targets.sum(1) == 60).all()
    assert np.array_equal(labels[targets], ids[targets])
    assert np.array_equal(masked[~targets], ids[~targets])
    is_mask, is_same = masked[targets] == MASK_ID, masked[targets] == ids[targets]
    deviation = 5 * np.sqrt((4.5 if unit == "span" else 1) / targets.sum())  # a span's tokens count as one draw
    assert is_mask.mean() == pytest.approx(0.8, abs=0.4 * deviation)
    assert is_same.mean() == pytest.approx(0.1, abs=0.3 * deviation)
    assert (~is_mask & ~is_same).mean() == pytest.approx(0.1, abs=0.3 * deviation)


def test_random_tokens_are_drawn_from_all_ordinary_ids_equally():
    masked, labels = run(np.full((1000, 400), 5), mask_share=0.0, random_share=1.0)
    counts = np.bincount(masked[labels != IGNORE_INDEX], minlength=VOCAB)
    assert (counts[:5] == 0).all()
    expected = counts.sum() / (VOCAB - 5)
    statistic = ((counts[5:] - expected) ** 2 / expected).sum()
    assert abs(statistic - (VOCAB - 6)) < 5 * np.sqrt(2 * (VOCAB - 6))


@pytest.mark.parametrize("unit", UNITS)
def test_special_tokens_are_never_targets(unit):
    maskable = np.arange(100) % 3 == 0
    _, labels = run(random_ids(20, 100), maskable, probability=0.9, unit=unit)
    assert ((labels != IGNORE_INDEX).sum(1) == round(0.9 * maskable.sum())).all()
    assert not (labels[:, ~maskable] != IGNORE_INDEX).any()


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_chosen_whole_and_their_number_is_exact(unit):
    begins = np.random.default_rng(1).random((200, 128)) < 0.7
    begins[:, 0] = True
    _, labels = run(random_ids(200, 128), continues=~begins, unit=unit)
    words = np.cumsum(begins, axis=1) - 1
    for row in range(len(begins)):
        is_target = labels[row] != IGNORE_INDEX
        chosen = set(words[row, is_target])
        assert np.array_equal(is_target, np.isin(words[row], list(chosen)))
        assert len(chosen) == round(0.15 * (words[row, -1] + 1))


@pytest.mark.parametrize("unit", ["token", "word"])
def test_every_place_is_equally_often_a_target(unit):
    _, labels = run(random_ids(20_000, 40), unit=unit)
    share = (labels != IGNORE_INDEX).mean(0)
    assert np.abs(share - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 20_000)


def test_words_do_not_reach_over_a_special_token():
    maskable, continues = np.array([True, False, True]), np.array([False, False, True])
    _, labels = run(np.tile(np.arange(5, 8), (40, 1)), maskable, continues, unit="word")
    assert set(map(tuple, labels != IGNORE_INDEX)) == {(True, False, False), (False, False, True)}


def test_span_lengths_have_the_papers_distribution_and_mean():
    lengths = span_lengths(chance.row_keys(3, np.arange(2000)), 100, 5.0, 10)
    exact = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    counts = np.bincount(lengths.ravel(), minlength=11)[1:]
    assert (((counts - 200_000 * exact) ** 2) / (200_000 * exact)).sum() < 9 + 5 * np.sqrt(18)
    assert lengths.mean() == pytest.approx(3.8, abs=0.03)  # Joshi et al. 2020, section 3.1


def test_spans_of_a_long_row_are_3_8_words_in_the_mean():
    _, labels = run(random_ids(20, 20_000), unit="span", probability=0.01)  # so rare that few of them touch
    is_target = np.pad(labels != IGNORE_INDEX, ((0, 0), (1, 1)))
    num_runs = (is_target[:, 1:] & ~is_target[:, :-1]).sum()
    assert is_target.sum() / num_runs == pytest.approx(3.8, abs=0.2)


def test_tokens_of_a_span_share_one_fate():
    ids = random_ids(20, 20_000)
    masked, labels = run(ids, unit="span", probability=0.01, mask_share=0.5, random_share=0.5)
    split = touching = 0
    for row in range(len(ids)):
        places = np.flatnonzero(labels[row] != IGNORE_INDEX)
        for span in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            fates = masked[row, span] == MASK_ID
            split += 0 < fates.sum() < len(span)
            touching += np.diff(fates.astype(int)).any()
    num_spans = 20 * 200 / 3.8
    assert split == touching < 0.02 * num_spans  # two spans that touch, with unequal fates


def test_every_way_to_lay_spans_into_a_row_is_equally_likely():
    """All of them, for 3 of 6 words in spans of 1 or 2, against 60,000 rows."""
    short, long = 2 / 3, 1 / 3  # p = 1/2, given at most 2
    drawn = {(1, 1, 1): short**2, (1, 2): short * long, (2, 1): long}  # the last span is cut to what is left
    expected: Counter[tuple[int, ...]] = Counter()
    for lengths, probability in drawn.items():
        layouts = list(combinations(range(3 + len(lengths)), len(lengths)))
        for things in layouts:
            words: list[int] = []
            for number, (thing, length) in enumerate(zip(things, lengths, strict=True)):
                start = thing - number + sum(lengths[:number])
                words += range(start, start + length)
            expected[tuple(words)] += probability / len(layouts)
    assert sum(expected.values()) == pytest.approx(1)
    count = 60_000
    _, labels = run(np.full((count, 6), 9), unit="span", probability=0.5, span_mean=2.0, span_max=2)
    found = Counter(tuple(np.flatnonzero(row)) for row in labels != IGNORE_INDEX)
    assert set(found) == set(expected)
    statistic = sum((found[w] - count * p) ** 2 / (count * p) for w, p in expected.items())
    assert statistic < len(expected) + 5 * np.sqrt(2 * len(expected))


@pytest.mark.parametrize("unit", UNITS)
def test_at_least_one_target_in_a_short_row_and_none_at_probability_zero(unit):
    assert (run(np.array([9, 10]), unit=unit)[1] != IGNORE_INDEX).sum() == 1
    masked, labels = run(np.array([9, 10]), probability=0.0, unit=unit)
    assert np.array_equal(masked, [[9, 10]]) and (labels == IGNORE_INDEX).all()


@pytest.mark.parametrize("unit", UNITS)
def test_row_without_words_is_left_as_it_is_beside_one_with_words(unit):
    ids = np.array([[9, 10], [9, 10]])
    masked, labels = run(ids, np.array([[False, False], [True, True]]), unit=unit)
    assert np.array_equal(masked[0], ids[0]) and (labels[0] == IGNORE_INDEX).all()
    assert (labels[1] != IGNORE_INDEX).sum() == 1
    masked, labels = run(ids, np.zeros((2, 2), bool), unit=unit)
    assert np.array_equal(masked, ids) and (labels == IGNORE_INDEX).all()


@given(
    st.sampled_from(UNITS), st.floats(0.01, 0.99), st.integers(1, 40), st.integers(0, 2**32), st.integers(1, 12),
    st.floats(1.0, 8.0),
)  # fmt: skip
def test_a_row_is_the_same_in_any_batch(unit, probability, seq, seed, longest, mean):
    rng = np.random.default_rng(seed)
    ids, maskable, continues = rng.integers(5, VOCAB, (5, seq)), rng.random((5, seq)) < 0.8, rng.random((5, seq)) < 0.3
    settings = {"unit": unit, "probability": probability, "span_max": longest, "span_mean": mean}
    draws = rng.integers(0, 2**40, 5)
    together = run(ids, maskable, continues, draws, **settings)
    some = rng.permutation(5)[:3]
    apart = run(ids[some], maskable[some], continues[some], draws[some], **settings)
    padded = run(*(np.pad(a, ((0, 0), (0, 7))) for a in (ids, maskable, continues)), draws, **settings)
    for both, few, wide in zip(together, apart, padded, strict=True):
        assert np.array_equal(both[some], few)
        assert np.array_equal(both, wide[:, :seq])


@pytest.mark.parametrize("unit", UNITS)
def test_same_draw_gives_the_same_row_and_another_gives_another(unit):
    ids = np.tile(np.arange(5, 205), (3, 1))
    masked, labels = run(ids, draws=[3, 3, 4], unit=unit)
    assert np.array_equal(masked[0], masked[1]) and np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])
