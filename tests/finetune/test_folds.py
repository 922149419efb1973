"""Cross-validation: how examples are dealt into folds."""

from __future__ import annotations

import numpy as np
import pytest

from configs.load import ConfigError
from finetune.conll import Sentence
from finetune.folds import assign_folds, rows_of
from finetune.squad import Question, Squad
from finetune.tasks import classification, qa, tagging


def test_folds_are_of_equal_size_and_each_label_is_spread_over_them():
    labels = np.array([0] * 50 + [1] * 10)
    split = classification.Split([("x",)] * 60, labels, np.ones(2))
    fold = assign_folds(classification.fold_keys(split), 5, seed=1)
    assert np.bincount(fold).tolist() == [12] * 5
    assert np.bincount(fold[labels == 1]).tolist() == [2] * 5
    assert (fold != assign_folds(classification.fold_keys(split), 5, seed=2)).any()


def test_questions_about_one_text_and_sentences_of_one_document_stay_together():
    squad = Squad([Question(str(n), "?", f"text {n // 3}", ()) for n in range(30)], is_v2=False)
    sentences = [Sentence(["x"], ["O"], 1 + n // 3) for n in range(30)]
    for keys in (qa.fold_keys(squad), tagging.fold_keys(tagging.Split(sentences, ["O"], None, True))):
        fold = assign_folds(keys, 5, seed=1).reshape(10, 3)
        assert (fold == fold[:, :1]).all() and np.bincount(fold[:, 0]).tolist() == [2] * 5


def test_sentences_without_documents_are_dealt_one_by_one():
    split = tagging.Split([Sentence(["x"], ["O"], 0)] * 10, ["O"], None, True)
    assert np.bincount(assign_folds(tagging.fold_keys(split), 5, seed=1)).tolist() == [2] * 5


def test_more_folds_than_examples_are_refused():
    with pytest.raises(ConfigError, match=r"folds=3: the training file has only 2 examples that can be parted"):
        assign_folds([(0, "a"), (0, "b"), (0, "a")], 3, seed=1)


def test_rows_of_a_fold_are_numbered_anew():
    rows = [{"example": number, "input_ids": [number]} for number in (0, 1, 1, 2, 3)]
    found = rows_of(rows, np.array([1, 3]))
    assert [(row["example"], row["input_ids"]) for row in found] == [(0, [1]), (0, [1]), (1, [3])]
