"""Spans and tags: against seqeval's own numbers, and against the slow obvious search."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from finetune.spans import (
    allowed,
    are_spans,
    best_sequence,
    entity_scores,
    read_spans,
    scheme_of,
    write_tags,
)
from tests.conftest import ROOT

# Random sequences in BIO, BIOES and IO, most of them not legal, scored by seqeval 1.2.2
GOLDEN = json.loads((ROOT / "tests/golden/entity_scores.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_spans_and_scores_are_those_of_seqeval(case):
    true, predicted = ([line.split() for line in case[name]] for name in ("true", "predicted"))
    assert [list(span) for span in read_spans(true[0])] == case["spans"]
    assert entity_scores(true, predicted) == pytest.approx(case["scores"])


def test_without_any_entity_the_scores_are_zero():
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


@pytest.mark.parametrize("scheme", ["BIO", "BIOES", "IO"])
def test_tags_of_every_scheme_give_the_spans_back(scheme):
    spans = [("per", 0, 2), ("per", 3, 4), ("loc", 4, 7)]
    tags = write_tags(spans, 8, scheme)
    assert read_spans(tags) == spans
    assert scheme_of(tags) == scheme
    if scheme == "BIOES":
        assert tags == ["B-per", "E-per", "O", "S-per", "B-loc", "I-loc", "E-loc", "O"]


def test_parts_of_speech_are_no_spans():
    assert are_spans(["O", "B-per", "I-per"])
    assert not are_spans(["NOUN", "VERB", "O"])
    assert not are_spans(["IN", "EX", "O"])
    assert not are_spans(["O", "O"])


NAMES = {
    "BIO": ["B-x", "B-y", "I-x", "I-y", "O"],
    "BIOES": ["B-x", "E-x", "I-x", "O", "S-x"],
    "IO": ["I-x", "I-y", "O"],
}


@pytest.mark.parametrize("scheme", NAMES)
def test_the_best_legal_sequence_is_that_of_trying_all(scheme):
    names, rng = NAMES[scheme], np.random.default_rng(3)
    rules = allowed(names, scheme)
    for length in (1, 2, 4):
        legal = [
            path
            for path in itertools.product(range(len(names)), repeat=length)
            if write_tags(read_spans([names[i] for i in path]), length, scheme) == [names[i] for i in path]
        ]
        for _ in range(20):
            scores = rng.normal(size=(length, len(names)))
            best = max(legal, key=lambda path: sum(scores[word, tag] for word, tag in enumerate(path)))
            assert best_sequence(scores, *rules) == list(best)
