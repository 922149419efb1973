"""Tokenizers: published vocabularies give the published ids; what is trained here loads in transformers."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
from transformers import AutoTokenizer

from configs.schema import TokenizerConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import (
    continues_word,
    copy_tokenizer,
    encoder,
    end_of_text_id,
    ends_sentence,
    fim_ids,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
    ordinary_ids,
    save_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It was not amused!\n\nA second paragraph, with naïve café words.",
    "def f(x):\n    return x ** 2  # squares, 1234567890 times\n",
    "Ein Satz auf Deutsch: größer, schöner, weiter. 日本語の文章です。 Привет, мир! 🎉🎉",
] * 20
TRAINED = ["byte_bpe", "wordpiece", "unigram", "characters"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """kind -> (tokenizer, folder it is saved in)"""
    made = {}
    for kind in TRAINED:
        folder = tmp_path_factory.mktemp(kind)
        vocab_size = {"unigram": 150}.get(kind, 400)
        made[kind] = (make_tokenizer(TokenizerConfig(type=kind, vocab_size=vocab_size), TEXTS, folder), folder)
        save_tokenizer(made[kind][0], folder, 128)
    return made


@pytest.mark.parametrize(
    ("folder", "key"), [("gpt2", "gpt2"), ("bert-base-uncased", "bert_uncased"), ("bert-base-cased", "bert_cased")]
)
def test_published_vocabulary_gives_exactly_the_golden_ids(shared_data, folder, key):
    goldens = [json.loads(line) for line in (shared_data / "goldens/tokenizer_goldens.jsonl").open(encoding="utf-8")]
    encode = encoder(load_tokenizer(shared_data / "tokenizers" / folder))
    assert len(goldens) >= 160
    for golden, ids in zip(goldens, encode([golden["text"] for golden in goldens]), strict=True):
        assert ids.tolist() == golden[key], golden["text"]


def test_sentencepiece_model_gives_exactly_sentencepieces_ids(shared_data):
    import sentencepiece

    folder = shared_data / "tokenizers/t5"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    goldens = [json.loads(line) for line in (shared_data / "goldens/tokenizer_goldens.jsonl").open(encoding="utf-8")]
    texts = [*(golden["text"] for golden in goldens), "an end </s> spelled out", "<unk> <pad>", "a</s>"]
    for text, ids in zip(texts, encoder(load_tokenizer(folder))(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), text


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_tokenizer_loads_in_transformers_with_the_same_ids(trained, kind):
    tokenizer, folder = trained[kind]
    theirs = AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(TEXTS[:3], encoder(tokenizer)(TEXTS[:3]), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert len(theirs) == tokenizer.get_vocab_size()


@pytest.mark.parametrize("kind", ["byte_bpe", "characters"])
def test_text_round_trips_without_loss(trained, kind):
    tokenizer, _ = trained[kind]
    for text in TEXTS[:3]:
        assert tokenizer.decode(encoder(tokenizer)([text])[0].tolist()) == text


def test_byte_level_takes_text_it_was_not_trained_on(trained):
    tokenizer, _ = trained["byte_bpe"]
    text = "ᚠᛇᚻ never seen \x00 \u200d 𝔘𝔫𝔦"
    assert tokenizer.decode(encoder(tokenizer)([text])[0].tolist()) == text


@pytest.mark.parametrize("kind", TRAINED)
def test_text_that_looks_like_a_special_token_is_text(trained, kind):
    tokenizer, _ = trained[kind]
    ids = encoder(tokenizer)(["a <|endoftext|> b </s> c [SEP] d"])[0]
    assert end_of_text_id(tokenizer) not in ids


def test_fast_path_has_the_ids_of_the_tokenizer_itself(trained):
    tokenizer, _ = trained["byte_bpe"]
    for text, ids in zip(TEXTS, encoder(tokenizer)(TEXTS), strict=True):
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_wordpiece_pairs_get_bert_special_tokens_and_types(trained):
    theirs = AutoTokenizer.from_pretrained(trained["wordpiece"][1])
    encoded = theirs("quick", "lazy")
    tokens = theirs.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2 and tokens[-1] == "[SEP]"
    first = tokens.index("[SEP]")
    assert encoded["token_type_ids"] == [0] * (first + 1) + [1] * (len(tokens) - first - 1)
    assert theirs.pad_token_id == 0


@pytest.mark.parametrize("kind", TRAINED)
def test_training_twice_gives_the_same_tokenizer(trained, kind, tmp_path):
    config = TokenizerConfig(type=kind, vocab_size={"unigram": 150}.get(kind, 400))
    assert fingerprint(make_tokenizer(config, TEXTS, tmp_path)) == fingerprint(trained[kind][0])


@pytest.mark.parametrize("kind", TRAINED)
def test_saved_tokenizer_is_the_same_when_it_is_read_again(trained, kind):
    tokenizer, folder = trained[kind]
    assert fingerprint(load_tokenizer(folder)) == fingerprint(tokenizer)


@pytest.mark.parametrize("folder", ["gpt2", "bert-base-uncased", "bert-base-cased", "t5"])
def test_published_vocabulary_is_the_same_when_it_is_read_again(shared_data, folder, tmp_path):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / folder)
    save_tokenizer(tokenizer, tmp_path, 128)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)


def test_tables_over_the_vocabulary(trained):
    tokenizer, _ = trained["wordpiece"]
    continues, ends = continues_word(tokenizer), ends_sentence(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        assert continues[index] == token.startswith("##")
        if token in ".!?":
            assert ends[index]
    special = {tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert set(np.arange(tokenizer.get_vocab_size())) - set(ordinary_ids(tokenizer)) == special


def test_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer \(looked for tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"data.build.tokenizer.path is missing"):
        make_tokenizer(TokenizerConfig(type="pretrained"), [], tmp_path)


def test_unigram_vocabulary_of_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="too little for a unigram vocabulary"):
        make_tokenizer(TokenizerConfig(type="unigram", vocab_size=100), ["  ", "\n"], tmp_path)


def test_unigram_model_does_not_say_where_it_was_made(tmp_path):
    make_tokenizer(TokenizerConfig(type="unigram", vocab_size=150), TEXTS, tmp_path)
    assert tmp_path.name.encode() not in (tmp_path / "spiece.model").read_bytes()


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "characters"])
def test_trained_tokenizer_has_the_sentinels_of_fim_within_its_size_and_in_transformers(kind, tmp_path):
    size = {"unigram": 150}.get(kind, 300)
    tokenizer = make_tokenizer(TokenizerConfig(type=kind, vocab_size=size, fim_tokens=True), TEXTS, tmp_path)
    assert tokenizer.get_vocab_size() <= size
    prefix, middle, suffix = fim_ids(tokenizer)
    assert not {prefix, middle, suffix} & set(ordinary_ids(tokenizer).tolist())
    save_tokenizer(tokenizer, tmp_path, 128)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.get_vocab_size()
    assert theirs.convert_tokens_to_ids(["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]) == [
        prefix,
        middle,
        suffix,
    ]
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
    text = encoder(tokenizer)(["a<|fim_prefix|> b <|fim_middle|>"])[0]
    assert not {prefix, middle, suffix} & set(text.tolist())


def test_published_tokenizer_gets_the_sentinels_behind_its_own_ids(shared_data, tmp_path):
    folder = shared_data / "tokenizers/gpt2"
    config = TokenizerConfig(type="pretrained", path=str(folder), fim_tokens=True)
    assert fim_ids(load_tokenizer(folder)) is None
    with_sentinels = make_tokenizer(config, [], tmp_path)
    assert fim_ids(with_sentinels) == (50_257, 50_258, 50_259)
    for text, ids in zip(TEXTS[:3], encoder(with_sentinels)(TEXTS[:3]), strict=True):
        assert ids.tolist() == encoder(load_tokenizer(folder))([text])[0].tolist()


@pytest.mark.parametrize(
    "spelling",
    [
        ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen2.5-Coder
        ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
        ("▁<PRE>", "▁<MID>", "▁<SUF>"),  # Code Llama
    ],
)
def test_sentinels_that_a_published_tokenizer_has_are_used_in_its_own_spelling(trained, spelling, tmp_path):
    tokenizer = load_tokenizer(trained["byte_bpe"][1])
    tokenizer.add_special_tokens(list(spelling))
    save_tokenizer(tokenizer, tmp_path, 128)
    again = make_tokenizer(TokenizerConfig(type="pretrained", path=str(tmp_path), fim_tokens=True), [], tmp_path)
    assert again.get_vocab_size() == tokenizer.get_vocab_size()
    assert fim_ids(again) == tuple(again.token_to_id(token) for token in spelling)


def test_copied_tokenizer_has_the_modes_of_new_files_and_nothing_else_of_a_dataset(tmp_path):
    dataset = tmp_path / "dataset"
    dataset.mkdir(mode=0o755)
    for name in ("tokenizer.json", "vocab.txt", "manifest.json", "shard-00000.tokens", "card.html", ".cache"):
        (dataset / name).write_text(name)
        (dataset / name).chmod(0o644)
    usual = os.umask(0o077)
    try:
        copy_tokenizer(dataset, tmp_path / "run/tokenizer")
    finally:
        os.umask(usual)
    copies = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert copies == {"tokenizer": 0o700, "tokenizer.json": 0o600, "vocab.txt": 0o600}
