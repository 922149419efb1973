"""What is special to BERT's WordPiece: words that are too long, what the normalizer drops, layouts that are refused."""

from __future__ import annotations

import base64
import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_pipeline import wordpiece
from data_pipeline.encode import ordinary
from data_pipeline.tokenizer import encoder, load_tokenizer
from data_pipeline.wordpiece import cut, wordpiece_encoder

VOCABULARY = {"[UNK]": 0, "a": 1, "##a": 2, "b": 3, "##b": 4, ",": 5, "é": 6, "##é": 7, "中": 8}


def bert(**changes) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]", **changes))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def same(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids, after a look at those of `tokenizers` itself."""
    found = encoder(tokenizer)([text])[0].tolist()
    assert found == tokenizer.encode(text).ids
    return found


def test_words_are_spelled_in_pieces_and_unknown_ones_are_one_token():
    assert same(bert(), "ab,ba xab 中ab") == [1, 4, 5, 3, 2, 0, 8, 1, 4]


def test_word_of_more_than_100_characters_is_unknown():
    assert same(bert(), "a" * 100) == [1] + [2] * 99
    assert same(bert(), "a" * 101) == [0]
    assert same(bert(), "a" * 99 + "é") == [1] + [2] * 98 + [7]
    assert same(bert(max_input_chars_per_word=3), "aab aaba aba") == [1, 2, 4, 0, 1, 4, 2]


def test_dropped_characters_join_what_is_around_them():
    assert same(bert(), "a\x00b a\x0bb a\x1cb a\u200bb") == [1, 4] * 4
    assert same(bert(), "\x00 \x0b") == []
    assert same(bert(), "a\u3000b\u2028a") == [1, 3, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalizer", normalizers.BertNormalizer(clean_text=False)),
        ("normalizer", normalizers.Lowercase()),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("model", models.WordLevel(VOCABULARY, unk_token="[UNK]")),
    ],
)
def test_other_layouts_are_refused(name, value):
    tokenizer = bert()
    setattr(tokenizer, name, value)
    assert wordpiece_encoder(tokenizer, json.loads(tokenizer.to_str()), np.dtype(np.uint16)) is None


def test_words_are_forgotten_and_stay_right(monkeypatch):
    monkeypatch.setattr(wordpiece, "REMEMBERED_WORDS", 10)
    tokenizer = bert()
    encode = encoder(tokenizer)
    drawn = random.Random(0)
    for _ in range(20):
        text = " ".join("".join(drawn.choices("abé,x", k=5)) for _ in range(20))
        assert encode([text])[0].tolist() == tokenizer.encode(text).ids


def test_cut_is_at_white_space_and_around_signs():
    data = np.frombuffer(b"\xff" + "Hello,  (wor\x00ld)...é\t\xff".encode("latin-1"), np.uint8)
    starts, ends = cut(data)
    chunks = [bytes(data[start:end]) for start, end in zip(starts, ends, strict=True)]
    assert chunks == [b"Hello", b",", b"(", b"wor\x00ld", b")...", b"\xe9"]


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_long_words_are_normalized_in_pieces_with_the_same_ids(shared_data, name, monkeypatch):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    encode, reference = encoder(tokenizer), ordinary(tokenizer)
    characters = st.sampled_from("aé\u0301\u0308\u302e\x00\u200b中。カ🎉क\u093f한İ,") | st.characters(
        exclude_categories=["Cs"]
    )

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.text(characters, max_size=60), st.integers(4, 20))
    def run(text, size):
        monkeypatch.setattr(wordpiece, "NORMALIZED_AT_ONCE", size)
        assert encode([text])[0].tolist() == reference.encode(text).ids

    run()


def test_marks_are_put_in_order_across_the_pieces_of_a_long_word(monkeypatch):
    # U+302E goes after U+1D165 when a text is decomposed; neither is dropped with the accents
    vocabulary = VOCABULARY | {"##\u302e": 9, "##\U0001d165": 10}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert same(tokenizer, "aa\u302e\U0001d165a") == [1, 2, 10, 9, 2]
    for size in (3, 4):  # more than there are marks in a row
        monkeypatch.setattr(wordpiece, "NORMALIZED_AT_ONCE", size)
        assert same(tokenizer, "aa\u302e\U0001d165a") == [1, 2, 10, 9, 2]


@pytest.mark.parametrize("name", ["one letter", "ideographs", "base64", "accents", "spaces"])
def test_megabytes_without_white_space_have_the_ids_of_tokenizers(shared_data, name):
    drawn = random.Random(0)
    text = {
        "one letter": "a" * 1_000_000,
        "ideographs": "日本語。" * 50_000,
        "base64": base64.b64encode(drawn.randbytes(150_000)).decode(),
        "accents": "e\u0301" * 200_000,
        "spaces": " " * 1_000_000 + "x",
    }[name]
    tokenizer = load_tokenizer(shared_data / "tokenizers/bert-base-uncased")
    assert encoder(tokenizer)([text])[0].tolist() == ordinary(tokenizer).encode(text).ids
