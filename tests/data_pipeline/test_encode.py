"""Every encoder gives exactly the ids of `tokenizers`, for any text, however it is cut and with whom it travels."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from configs.schema import TokenizerConfig
from data_pipeline import encode
from data_pipeline.byte_level import cut
from data_pipeline.encode import ordinary
from data_pipeline.tokenizer import encoder, flat_encoder, load_tokenizer, make_tokenizer, save_tokenizer

SAMPLE = [
    "The quick brown fox jumps over the lazy dog. It's not amused, isn't it?\n\nA second paragraph: naïve café words!",
    "def f(x):\n    return x ** 2  # squares, 1234567890 times\n",
    "Größer, schöner. 日本語の文章です。 Привет, мир! 🎉🎉 मानव अधिकारों",
] * 20
KINDS = ["byte_bpe", "odd_bpe", "wordpiece", "uncased", "unigram", "characters"]
PUBLISHED = ["gpt2", "bert-base-uncased", "bert-base-cased", "t5"]

# What is special to one of the tokenizers: white space of all kinds, characters that are dropped, joined, decomposed or
# reordered, contractions, ideographs, special tokens spelled out, words at the limit of 100 characters.
ODD = [
    *"\x00\x01\x0b\x0c\x1c\x1f\x7f\x85\xa0\xad\u0301\u0308\u0340\u0345\u0e33\u0d4e\u1680\u2003\u200b\u200d\u2028\u202f"
]
ODD += [
    *"\u2060\u2581\u3000\u3001\u302a\u302e\u4e00\uac00\ufdfa\ufeff\ufffd\ue000\U0001d165\U0001f1e6\U0001f3fb\U0010ffff"
]
WORDS = [
    "don't",
    "I'LL",
    "'s",
    "' s",
    "ﬁne",
    "İst",
    "straße",
    "Ångström",
    "hello,world",
    "a--b",
    "...",
    "x2y",
    "“So”",
    "²",
]
WORDS += [
    "[SEP]",
    "[MASK]",
    "<|endoftext|>",
    "</s>",
    "<| |>",
    "##ing",
    "x" * 100,
    "x" * 101,
    "é" * 100,
    "日本語",
    "कार",
]
SPACES = [" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n"]
ANY_TEXT = st.lists(
    st.sampled_from(WORDS) | st.sampled_from(SPACES) | st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]),
    max_size=40,
).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {"odd_bpe": odd_bpe()}
    for kind in set(KINDS) - {"odd_bpe"}:
        type_ = "wordpiece" if kind == "uncased" else kind
        config = TokenizerConfig(type=type_, vocab_size={"unigram": 150}.get(kind, 500), lowercase=kind == "uncased")
        made[kind] = make_tokenizer(config, SAMPLE, tmp_path_factory.mktemp(kind))
    return made


def odd_bpe() -> Tokenizer:
    """Merges over all borders that GPT-2's pattern knows, so that a wrong cut gives other ids."""
    drawn = random.Random(0)
    characters = [*ODD, *SPACES, *"aé1²'.,日", " ", " ", "\xa0"]
    texts = ["".join(drawn.choices(characters, k=30)) for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def by_tokenizers(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """The ids of `tokenizers` itself, special tokens in a text being text."""
    if isinstance(tokenizer.model, models.Unigram):  # else the model takes "</s>" for a word, as SentencePiece does not
        copy = ordinary(tokenizer)
    else:
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.encode_special_tokens = True
    return lambda texts: [encoding.ids for encoding in copy.encode_batch(texts, add_special_tokens=False)]


def checker(tokenizer: Tokenizer) -> Callable[[list[str]], None]:
    """A function that fails for texts whose ids are not those of `tokenizers`; it needs a fast encoder."""
    encode_flat, reference = flat_encoder(tokenizer), by_tokenizers(tokenizer)
    assert "plain_encoder" not in encode_flat.__qualname__

    def check(texts: list[str]) -> None:
        tokens, lengths = encode_flat(texts, None)
        found = np.split(tokens, np.cumsum(lengths))[:-1]
        for text, ids, wanted in zip(texts, found, reference(texts), strict=True):
            assert ids.tolist() == wanted, repr(text)

    return check


@pytest.mark.parametrize("kind", KINDS)
def test_trained_kinds_have_an_encoder_with_the_ids_of_tokenizers(tokenizers, kind):
    check = checker(tokenizers[kind])
    settings(max_examples=150, deadline=None)(given(st.lists(ANY_TEXT, max_size=4))(check))()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies_have_the_ids_of_tokenizers(shared_data, name):
    check = checker(load_tokenizer(shared_data / "tokenizers" / name))
    goldens = [json.loads(line) for line in (shared_data / "goldens/tokenizer_goldens.jsonl").open(encoding="utf-8")]
    check([golden["text"] for golden in goldens])
    settings(max_examples=150, deadline=None)(given(st.lists(ANY_TEXT, max_size=4))(check))()


@pytest.mark.parametrize("name", PUBLISHED)
def test_388_languages_and_emoji_have_the_ids_of_tokenizers(shared_data, name):
    texts = [text[:2000] for text in read(shared_data / "pretrain/udhr.jsonl.zst")]
    assert len(texts) == 388
    texts.append((shared_data / "pretrain/emoji.txt").read_text("utf-8")[:50_000])
    checker(load_tokenizer(shared_data / "tokenizers" / name))(texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_20_mb_of_english_and_all_languages_have_the_ids_of_tokenizers(shared_data, name):
    check = checker(load_tokenizer(shared_data / "tokenizers" / name))
    for file, num_bytes in (("novels.train", 10_000_000), ("reviews", 10_000_000), ("udhr", 10_000_000)):
        check(read(shared_data / f"pretrain/{file}.jsonl.zst", num_bytes))


def may_differ(code: int) -> bool:
    """Every character but most of the 900,000 ideographs, private and unassigned ones, of which one is like another."""
    kind = unicodedata.category(chr(code))
    return (
        code < 0x20000 or code % 16 == 0 or kind not in ("Lo", "Co", "Cn") or unicodedata.decomposition(chr(code)) != ""
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_all_kinds_of_characters_of_unicode_have_the_ids_of_tokenizers(shared_data, name):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and may_differ(code)]
    parts = [characters[start : start + 4000] for start in range(0, len(characters), 4000)]
    check = checker(load_tokenizer(shared_data / "tokenizers" / name))
    check(["".join(f"a{c}a 1{c} {c}!" for c in part) for part in parts])


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_documents_are_ended_and_counted_one_by_one(tokenizers, kind):
    tokenizer = tokenizers["byte_bpe" if kind == "plain" else kind]
    encode_flat = encode.plain_encoder(tokenizer, np.dtype(np.uint16)) if kind == "plain" else flat_encoder(tokenizer)
    texts = ["", "The fox", "", " \n", *SAMPLE[:3], "x", ""]
    tokens, lengths = encode_flat(texts, 7)
    alone = [[*ids, 7] for ids in by_tokenizers(tokenizer)(texts)]
    assert tokens.tolist() == [index for ids in alone for index in ids]
    assert tokens.dtype == np.uint16
    assert lengths.tolist() == [len(ids) for ids in alone] and lengths.dtype == np.int64
    assert [[*ids.tolist(), 7] for ids in encoder(tokenizer)(texts)] == alone
    assert [len(array) for array in encode_flat([], 7)] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_are_taken_in_pieces_with_the_same_ids(tokenizers, kind, monkeypatch):
    check = checker(tokenizers[kind])

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(ANY_TEXT, min_size=1, max_size=8).map(" ".join), st.integers(1, 60))
    def run(text, size):
        monkeypatch.setattr(encode, "GROUP_BYTES", size)
        check([text, *SAMPLE[:3], text])

    run()


def test_pieces_are_the_text_and_end_where_asked(monkeypatch):
    monkeypatch.setattr(encode, "GROUP_BYTES", 100)
    text = "Some words, again and again. " * 50 + "y" * 1000 + " and a few more words"
    pieces = list(encode.pieces(text, cut))
    assert "".join(pieces) == text
    assert len(pieces) > 15 and sorted(map(len, pieces))[-2] <= 100  # all but the one with the long word


def test_memory_does_not_grow_with_the_document(tokenizers):
    peaks = []
    for copies in (8, 64):
        text = SAMPLE[0] * (copies * 10_000)
        encode_flat = flat_encoder(tokenizers["byte_bpe"])
        encode_flat(SAMPLE, None)
        tracemalloc.start()
        tokens, _ = encode_flat([text], None)
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * tokens.nbytes)  # the ids, once more when joined
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000_000  # of a text that is 60 MB longer


def test_special_tokens_in_a_text_are_text_as_transformers_can_be_told(tokenizers, tmp_path):
    tokenizer = tokenizers["uncased"]
    save_tokenizer(tokenizer, tmp_path, 128)
    text = "the fox [SEP] jumps [MASK] over [CLS][PAD] it"
    ids = encoder(tokenizer)([text])[0].tolist()
    special = {tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    assert not special & set(ids)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids


def test_tokens_added_by_hand_are_found_in_the_text(tokenizers):
    for kind in KINDS:
        tokenizer = Tokenizer.from_str(tokenizers[kind].to_str())
        tokenizer.add_tokens([AddedToken("quick brown", special=False)])
        ids = encoder(tokenizer)(["The quick brown fox"])[0].tolist()
        assert tokenizer.token_to_id("quick brown") in ids
        assert ids == by_tokenizers(tokenizer)(["The quick brown fox"])[0]


def test_nothing_is_cut_off_or_filled_up_by_the_settings_of_the_tokenizer(tokenizers):
    for kind in KINDS:
        tokenizer = Tokenizer.from_str(tokenizers[kind].to_str())
        tokenizer.add_tokens([AddedToken("quick brown", special=False)])  # the way without a table
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=300)
        for made in (tokenizer, tokenizers[kind]):
            lengths = flat_encoder(made)(SAMPLE[:3], None)[1]
            assert min(lengths) > 4 and max(lengths) < 300


def read(path, num_bytes: int = 1 << 40) -> list[str]:
    texts: list[str] = []
    with path.open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            texts.append(json.loads(line)["text"])
            num_bytes -= len(texts[-1].encode())
            if num_bytes <= 0:
                break
    return texts
