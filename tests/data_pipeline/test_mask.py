"""BERT's masking: shares, whole words, special tokens left alone, reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.mask import IGNORE_INDEX, mask_tokens

MASK_ID, VOCAB = 4, 1000


def run(ids, maskable=None, continues=None, seed=0, **settings):
    settings = {"probability": 0.15, "mask_share": 0.8, "random_share": 0.1} | settings
    maskable = np.ones(len(ids), bool) if maskable is None else maskable
    rng = np.random.Generator(np.random.Philox(seed))
    random_ids = np.arange(5, VOCAB)
    return mask_tokens(ids, maskable, continues, mask_id=MASK_ID, random_ids=random_ids, rng=rng, **settings)


def test_shares_are_80_10_10_of_15_percent():
    ids = np.random.default_rng(0).integers(5, VOCAB, 100_000)
    masked, labels = run(ids)
    targets = labels != IGNORE_INDEX
    assert targets.sum() == 15_000
    assert np.array_equal(labels[targets], ids[targets])
    assert np.array_equal(masked[~targets], ids[~targets])
    is_mask, is_same = masked[targets] == MASK_ID, masked[targets] == ids[targets]
    assert is_mask.mean() == pytest.approx(0.8, abs=0.01)
    assert is_same.mean() == pytest.approx(0.1, abs=0.01)
    assert (~is_mask & ~is_same).mean() == pytest.approx(0.1, abs=0.01)


def test_special_tokens_are_never_targets():
    ids = np.arange(5, 105)
    maskable = np.arange(100) % 3 == 0
    _, labels = run(ids, maskable, probability=0.9)
    assert (labels != IGNORE_INDEX).sum() == round(0.9 * maskable.sum())
    assert not (labels[~maskable] != IGNORE_INDEX).any()


def test_pieces_of_a_word_share_one_fate_as_targets():
    continues = np.array([False, True, True, False, False, True] * 50)
    words = np.cumsum(~continues) - 1
    _, labels = run(np.arange(5, 305), continues=continues)
    for word in range(words.max() + 1):
        assert len(set((labels != IGNORE_INDEX)[words == word])) == 1


def test_words_do_not_reach_over_a_special_token():
    ids, maskable = np.arange(5, 8), np.array([True, False, True])
    continues = np.array([False, False, True])
    chosen = [tuple(run(ids, maskable, continues, seed)[1] != IGNORE_INDEX) for seed in range(20)]
    assert {(True, False, False), (False, False, True)} == set(chosen)


def test_at_least_one_target_in_a_short_row_and_none_at_probability_zero():
    assert (run(np.array([9, 10]))[1] != IGNORE_INDEX).sum() == 1
    masked, labels = run(np.array([9, 10]), probability=0.0)
    assert np.array_equal(masked, [9, 10]) and (labels == IGNORE_INDEX).all()


def test_row_without_words_is_left_as_it_is():
    masked, labels = run(np.array([9, 10]), np.zeros(2, bool))
    assert np.array_equal(masked, [9, 10]) and (labels == IGNORE_INDEX).all()


def test_same_generator_gives_the_same_row_and_another_gives_another():
    ids = np.arange(5, 205)
    assert all(np.array_equal(a, b) for a, b in zip(run(ids, seed=3), run(ids, seed=3), strict=True))
    assert not np.array_equal(run(ids, seed=3)[1], run(ids, seed=4)[1])
