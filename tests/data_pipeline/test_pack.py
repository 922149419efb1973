"""From a window of tokens to a sample: boundaries, labels, sentence pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.pack import IGNORE_INDEX, next_sentence_pair, pack_gpt, pad_bert, whole_sentences

ENDS = np.zeros(100, bool)
ENDS[9] = True  # token 9 is the full stop


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


def test_bert_row_has_the_special_tokens_types_and_padding():
    row = pad_bert([np.array([11, 12]), np.array([13])], 2, 3, 8)
    assert row["input_ids"].tolist() == [2, 11, 12, 3, 13, 3, 0, 0]
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert row["special"].tolist() == [True, False, False, True, False, True, True, True]


def test_whole_sentences_begin_and_end_at_sentence_ends():
    tokens = np.array([50, 9, 51, 52, 9, 53, 54, 9, 55])
    part = whole_sentences(tokens, np.array([], int), ENDS, 7)
    assert tokens[part].tolist() == [51, 52, 9, 53, 54, 9]


def test_sentence_longer_than_the_window_is_cut():
    tokens = np.arange(20, 40)
    assert whole_sentences(tokens, np.array([], int), ENDS, 10) == slice(0, 10)


def test_half_of_the_pairs_are_random_and_the_others_are_neighbours():
    tokens = np.array([20, 21, 9, 22, 23, 9, 24, 25, 26, 9])
    other = np.arange(60, 70)
    kinds = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        a, b, is_random = next_sentence_pair(tokens, np.array([0]), other, np.array([0]), ENDS, 10, rng)
        assert a[-1] == 9 and len(a) + len(b) <= 10
        assert a.tolist() == tokens[: len(a)].tolist()
        expected = other[: len(b)] if is_random else tokens[len(a) :]
        assert b.tolist() == expected.tolist()
        kinds.append(is_random)
    assert np.mean(kinds) == pytest.approx(0.5, abs=4 * 0.5 / 20)


def test_true_pair_never_spans_two_documents():
    tokens = np.array([20, 21, 22, 30, 31, 32, 33, 34, 9, 35])
    for seed in range(50):
        rng = np.random.default_rng(seed)
        a, b, is_random = next_sentence_pair(tokens, np.array([3]), tokens[:3], np.array([0]), ENDS, 10, rng)
        assert a.min() >= 9 and not set(a) & {20, 21, 22}
        if not is_random:
            assert not set(b) & {20, 21, 22}
