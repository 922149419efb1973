"""Signatures of texts: what counts as the same words, and how well equal values estimate the Jaccard similarity."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.schema import DedupeConfig
from data_pipeline import minhash
from data_pipeline.minhash import Bands, choose_bands, estimated_similarity, signatures

NEAR = DedupeConfig(exact=True, near=True)
# Few different words, so that texts often agree: cases, digits, accents, quotation marks, Cyrillic, a NUL.
SPACED = st.text(st.sampled_from("aAb_9éÉ ж\t\n.’-\0"), max_size=12)
# What a text may hold: long words, scripts without spaces, marks, an unpaired surrogate, letters with odd cases.
ANYTHING = st.lists(
    st.sampled_from(["ab", "Ab ", "x" * 70, "日本", "کی", "की", "\0", "\ud800", "ΑΣ", "İ", ". ", "’", "ﾊ"])
).map("".join)


def exact(text: str) -> bytes:
    return signatures([text], DedupeConfig(exact=True))["exact"].tobytes()


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def similarity(text: str, other: str) -> float:
    a, b = shingle_set(text), shingle_set(other)
    return len(a & b) / len(a | b)


@given(SPACED, SPACED)
@example("A b c.", "a  b\nC")
@settings(max_examples=300, deadline=None)
def test_exact_hashes_are_equal_if_and_only_if_the_lower_case_words_are(text, other):
    words, others = (re.findall(r"\w+", each.lower()) for each in (text, other))
    if words or others:
        assert (exact(text) == exact(other)) == (words == others)


def test_texts_without_words_are_the_same_only_if_they_are_written_the_same():
    assert exact("!!!") == exact("!!!")
    assert len({exact(text) for text in ("", "!!!", "???", "\U0001f600", "\U0001f601")}) == 5


def test_vowel_signs_count_in_scripts_that_write_them_as_combining_marks():
    assert exact("की") != exact("का")  # Hindi; \w+ finds the same letter in both
    assert exact("e\u0301te") != exact("ete")


def test_words_differ_wherever_they_differ_and_however_long_they_are():
    words = ["x" * length for length in range(1, 150)]
    words += ["x" * place + "y" + "x" * (149 - place) for place in range(150)]
    assert len({exact(word) for word in words}) == len(words)


def test_a_cut_off_text_differs_from_the_whole_even_where_a_long_word_is_cut():
    assert len({exact("a " + "x" * length + " b") for length in (63, 64, 65, 127, 128, 129)}) == 6


@given(st.lists(ANYTHING, max_size=8))
@settings(max_examples=80, deadline=None)
def test_a_text_has_the_same_signature_alone_among_others_and_in_blocks(texts):
    together = signatures(texts, NEAR)
    assert together.shape == (len(texts),)
    with pytest.MonkeyPatch.context() as patch:
        for text, row in zip(texts, together, strict=True):
            assert signatures([text], NEAR)[0] == row
            for length in (1, 7, 64):
                patch.setattr(minhash, "BLOCK_CHARACTERS", length)
                assert signatures([text], NEAR)[0] == row
            patch.undo()


def test_exact_hashes_do_not_depend_on_whether_near_duplicates_are_looked_for():
    texts = ["one two three", "!", "日本語"]
    np.testing.assert_array_equal(
        signatures(texts, NEAR)["exact"], signatures(texts, DedupeConfig(exact=True))["exact"]
    )


def test_values_are_the_minima_over_the_set_of_shingles():
    """Of a union they are the smaller ones of both, whatever the order and number of the shingles."""
    minima = minhash._minima
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 2**63, 40, dtype=np.uint64) for _ in range(2))

    def each_shingle(words: np.ndarray) -> np.ndarray:
        return np.stack([minima(words[start : start + 5], np.array([5]))[0] for start in range(len(words) - 4)])

    both = minima(np.concatenate([first, second, first[:3]]), np.array([40, 40, 3]))
    np.testing.assert_array_equal(both[0], each_shingle(first).min(0))
    np.testing.assert_array_equal(both[1], each_shingle(second).min(0))
    np.testing.assert_array_equal(both[2], minima(first[:3], np.array([3]))[0])
    assert not (both[2] == both[0]).all()


@pytest.mark.parametrize("num_words", [12, 100, 1500])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_the_estimate_errs_as_256_independent_hash_functions_would(num_words, share):
    rng = np.random.default_rng(num_words)
    num_pairs = 400 if num_words < 1000 else 100
    texts, others = [], []
    for pair in range(num_pairs):
        words = [f"{pair}w{number}" for number in rng.integers(0, 10_000, num_words)]
        changed = [f"new{number}" if rng.random() < share else word for number, word in enumerate(words)]
        texts.append(" ".join(words))
        others.append(" ".join(changed))
    true = np.array([similarity(text, other) for text, other in zip(texts, others, strict=True)])
    found = estimated_similarity(signatures(texts, NEAR)["values"], signatures(others, NEAR)["values"])
    agree = true + (1 - true) / 256  # of one-byte values
    expected = np.sqrt(agree * (1 - agree) / 256) * 256 / 255
    assert np.abs(found - true)[true == 1].sum() < 1e-9
    errors = (found - true)[true < 1] / expected[true < 1]
    assert abs(errors.mean()) < 4 / np.sqrt(len(errors))
    assert 0.85 < errors.std() < 1.15  # of up to 400 pairs: more than 4 standard errors


def test_of_scripts_without_spaces_characters_are_compared():
    characters = "".join(chr(code) for code in np.random.default_rng(0).integers(0x4E00, 0x9F00, 300))
    for text in (characters, "".join(chr(0x0E01 + ord(c) % 46) for c in characters)):  # Chinese, Thai
        changed = text[:150] + ("語" if text[150] != "語" else "本") + text[151:]
        values = signatures([text, changed], NEAR)["values"]
        assert estimated_similarity(values[:1], values[1:])[0] > 0.9  # one character of 300 is in 5 shingles of 296


@pytest.mark.parametrize("asked", [0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0])
def test_bands_find_95_percent_of_the_pairs_at_the_similarity_asked_for_and_no_fewer_would(asked):
    bands = choose_bands(asked)
    assert bands.num_bands * bands.rows <= minhash.NUM_VALUES
    assert bands.recall(asked) >= 0.95
    assert bands.num_bands == 1 or Bands(bands.num_bands - 1, bands.rows).recall(asked) < 0.95


@pytest.mark.parametrize("asked", [0.5, 0.8])
@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8])
def test_pairs_meet_with_the_probability_of_the_s_curve(asked, similarity):
    rng = np.random.default_rng(0)
    num_pairs = 4000
    values = rng.integers(0, 256, (num_pairs, minhash.NUM_VALUES), dtype=np.uint8)
    fresh = rng.integers(0, 256, values.shape, dtype=np.uint8)
    others = np.where(rng.random(values.shape) < similarity, values, fresh)
    bands = choose_bands(asked)
    met = (bands.keys(values) == bands.keys(others)).any(0).mean()
    expected = bands.recall(similarity)
    assert abs(met - expected) <= 4 * np.sqrt(expected * (1 - expected) / num_pairs)


def test_the_memory_for_a_text_of_any_length_is_that_of_a_block():
    text = "some words and " * 2_000_000  # 30 MB
    tracemalloc.start()
    signatures([text], NEAR)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000
