"""Near-duplicate removal: recall on planted near-duplicates, and what is different stays."""

from __future__ import annotations

import numpy as np

from data_pipeline.dedupe import drop_duplicates
from data_pipeline.sources import Document

WORDS = np.array([f"word{i}" for i in range(2000)])


def text(rng: np.random.Generator, length: int = 200) -> list[str]:
    return rng.choice(WORDS, length).tolist()


def kept(texts: list[str]) -> list[str]:
    return [document.text for document in drop_duplicates(Document(t, "") for t in texts)]


def test_exact_duplicates_go_whatever_their_case_and_spacing_and_the_first_stays():
    assert kept(["A b c.", "a  b\nC", "a b d"]) == ["A b c.", "a b d"]


def test_different_texts_all_stay():
    rng = np.random.default_rng(0)
    texts = [" ".join(text(rng)) for _ in range(500)]
    assert kept(texts) == texts


def test_nearly_all_documents_with_one_changed_word_are_found():
    rng = np.random.default_rng(1)
    originals = [text(rng) for _ in range(300)]
    changed = [[*words] for words in originals]
    for words in changed:  # one word of 200 is in 5 of 196 shingles: similarity 191 / 201 = 0.95
        words[rng.integers(200)] = "other"
    left = kept([" ".join(words) for words in originals + changed])
    assert len(left) <= 300 + 3


def test_short_texts_of_fewer_words_than_a_shingle_are_compared_whole():
    assert kept(["one two", "one two three", "one two"]) == ["one two", "one two three"]
