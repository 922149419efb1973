"""tiktoken is used where it is exact, and only there; documents it cannot take are taken apart first."""

from __future__ import annotations

import base64
import json
import random
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline import byte_level
from data_pipeline.byte_level import byte_characters, tiktoken_ranks
from data_pipeline.encode import ordinary
from data_pipeline.tokenizer import encoder, load_tokenizer


@pytest.fixture(scope="module")
def gpt2(shared_data) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers/gpt2")


@pytest.fixture(scope="module")
def encode_gpt2(gpt2):
    return encoder(gpt2)


def byte_bpe(*merges: tuple[str, str], **changes) -> Tokenizer:
    """A vocabulary of the 256 bytes and these merges."""
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary | changes.pop("vocabulary", {}), list(merges), **changes))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def ranks(tokenizer: Tokenizer) -> dict[bytes, int] | None:
    return tiktoken_ranks(tokenizer, json.loads(tokenizer.to_str()))


def test_ranks_are_the_bytes_and_the_merged_tokens():
    found = ranks(byte_bpe(("a", "b"), ("Ġ", "ab")))
    assert found is not None and len(found) == 258
    assert (found[b"ab"], found[b" ab"], found[b"\xff"]) == (256, 257, 255)


def test_token_that_no_merge_makes_is_never_given():
    tokenizer = byte_bpe(("a", "b"), vocabulary={"xyz": 300})
    found = ranks(tokenizer)
    assert found is not None and b"xyz" not in found
    assert encoder(tokenizer)(["xyz ab"])[0].tolist() == tokenizer.encode("xyz ab").ids


def test_ids_that_do_not_ascend_with_the_merges_are_refused():
    tokenizer = byte_bpe(("a", "b"), ("c", "d"), vocabulary={"ab": 257, "cd": 256})
    assert ranks(tokenizer) is None
    assert encoder(tokenizer)(["abcd"])[0].tolist() == tokenizer.encode("abcd").ids


def test_token_that_its_own_merges_do_not_reach_is_refused():
    # "abc" is made of "a" and "bc", but "ab" is always joined first; tiktoken would take the word "abc" as it is
    tokenizer = byte_bpe(("a", "b"), ("b", "c"), ("a", "bc"))
    assert len(tokenizer.encode("abc").ids) == 2
    assert ranks(tokenizer) is None
    assert encoder(tokenizer)(["abc"])[0].tolist() == tokenizer.encode("abc").ids


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"model": models.BPE(byte_bpe().get_vocab(), [], ignore_merges=True)},
        {"model": models.BPE(byte_bpe().get_vocab(), [], end_of_word_suffix="</w>")},
    ],
)
def test_other_layouts_are_refused(change):
    tokenizer = byte_bpe()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    assert ranks(tokenizer) is None


def test_vocabulary_without_some_byte_is_refused():
    vocabulary = byte_bpe().get_vocab()
    del vocabulary["ÿ"]
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ranks(tokenizer) is None


def test_gpt2_is_taken_with_all_its_tokens(gpt2):
    found = ranks(gpt2)
    assert found is not None and len(found) == 50_256  # all but <|endoftext|>


def test_what_looks_like_the_mark_between_chunks_is_text():
    tokenizer = byte_bpe(("<", "|"), ("Ġ", "|"), ("|", ">"))
    texts = [byte_level.BETWEEN_CHUNKS * 3, f"a{byte_level.BETWEEN_CHUNKS}", f" {byte_level.BETWEEN_CHUNKS} \n"]
    for text, ids in zip(texts, encoder(tokenizer)(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text).ids


def long_documents(size: int) -> dict[str, str]:
    drawn = random.Random(0)
    return {
        "one letter": "a" * size,
        "letters": "".join(drawn.choices("abcdefgh", k=size)),
        "base64": base64.b64encode(drawn.randbytes(size * 3 // 4)).decode(),
        "spaces, then a word": " " * size + "x",
        "spaces at the end": "x" + " " * size,
        "mixed white space": "x" + " \n" * (size // 2) + "\tx",
        "unbreakable spaces": "a" + "\xa0" * size + " b",
        "NUL": "\0" * size,
    }


@pytest.mark.parametrize("name", long_documents(1))
def test_document_without_a_place_to_cut_has_the_ids_of_tokenizers(gpt2, encode_gpt2, name, monkeypatch):
    monkeypatch.setattr(byte_level, "LONG_CHUNK", 5_000)  # so that short documents go the way of the long ones
    for text in (long_documents(12_000)[name], "Before it. " + long_documents(12_001)[name] + " After it."):
        assert encode_gpt2([text])[0].tolist() == ordinary(gpt2).encode(text).ids


@pytest.mark.parametrize("name", long_documents(1))
def test_merges_of_white_space_reach_as_far_as_in_tokenizers(name, monkeypatch):
    tokenizer = byte_bpe(
        ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "Ċ"), ("ĠĊ", "ĠĊ"), ("Ċ", "ĉ"), ("Â", "ł"), ("Âł", "Âł"), ("Âł", "Ġ")
    )
    encode = encoder(tokenizer)
    monkeypatch.setattr(byte_level, "LONG_CHUNK", 10)
    for size in (20, 21, 22, 23):
        for text in (long_documents(size)[name], f"y {long_documents(size)[name]} y"):
            assert encode([text])[0].tolist() == tokenizer.encode(text).ids, repr(text)


@pytest.mark.parametrize("first", [*"aZ19'.-_~\x00\x1f\x7f \n\téя日²٣½。’\xa0\u2003\u200b🎉"])
def test_cut_never_parts_what_the_pattern_keeps_together(first):
    to_character = byte_characters()
    for second in "sZ1'.-\x00 \n\té日²٣。’\xa0🎉":
        tokenizer = byte_bpe((to_character[first.encode()[-1]], to_character[second.encode()[0]]))
        encode = encoder(tokenizer)
        for text in (f"{first}{second}", f"a{first}{second}s", f" {first}{second} ", f"'{first}{second}\n\n"):
            assert encode([text])[0].tolist() == tokenizer.encode(text).ids, repr(text)


@pytest.mark.parametrize("space", byte_level._SPACES)
def test_white_space_that_is_not_ascii_is_not_parted_from_spaces_after_it(space):
    to_character = byte_characters()
    first = [to_character[byte] for byte in space.encode()]
    tokenizer = byte_bpe((first[-1], "Ġ"), ("Ġ", "Ġ"))
    assert ranks(tokenizer) is not None
    for text in (f"x{space}  y", f"x{space} y", f"x{space} ", f"é{space}   "):
        assert encoder(tokenizer)([text])[0].tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", ["one letter", "spaces, then a word"])
def test_ten_megabytes_of_one_character_take_seconds(encode_gpt2, name):
    text = ("a" if name == "one letter" else " ") * 10_000_000 + ("" if name == "one letter" else "x")
    began = time.process_time()
    ids = encode_gpt2([text])[0]
    assert time.process_time() - began < 30  # 3 s when nothing else runs; quadratic work would take hours
    assert len(ids) == (2_500_000 if name == "one letter" else 10_000_000)  # "aaaa" is a token, two spaces are none


def test_word_beyond_the_limit_is_cut_before_punctuation_if_there_is_some(monkeypatch):
    monkeypatch.setattr(byte_level, "LONGEST_WORD", 100)
    text = ("x" * 30 + ".") * 20
    parts = list(byte_level._parts(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 100
    assert all(part.startswith(".") for part in parts[1:])
    assert list(byte_level._parts("y" * 250)) == ["y" * 100, "y" * 100, "y" * 50]


def test_cut_leaves_white_space_before_the_word_and_contractions_whole():
    text = "Don't  stop,\n\n(now) 12th\xa0 x é."
    data = np.frombuffer(b"\xff" + text.encode() + b"\xff", np.uint8)
    starts, ends = byte_level.cut(data)
    chunks = [bytes(data[start:end]).decode() for start, end in zip(starts, ends, strict=True)]
    assert chunks == ["Don", "'t", "  stop", ",", "\n\n(", "now", ")", " 12", "th\xa0 x", " é."]
