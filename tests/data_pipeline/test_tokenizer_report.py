"""The report counts what a slow look at the same tokens counts, and finds what a tokenizer loses."""

from __future__ import annotations

import io
import json

import pytest
import zstandard
from rich.console import Console

from configs.schema import TokenizerConfig
from data_pipeline.encode import ordinary
from data_pipeline.tokenizer import load_tokenizer, make_tokenizer
from data_pipeline.tokenizer_report import show_tokenizer_report, tokenizer_report

TEXTS = ["The quick brown fox. It does not jump!\n", "Größer, schöner, weiter. Do not stop."] * 30


@pytest.fixture(scope="module")
def languages(shared_data) -> list[tuple[str, str]]:
    """(language, the Universal Declaration of Human Rights)"""
    with (shared_data / "pretrain/udhr.jsonl.zst").open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        return [(record["id"], record["text"]) for record in map(json.loads, lines)]


def trained(tmp_path, **settings):
    return make_tokenizer(TokenizerConfig(**settings), TEXTS, tmp_path)


def test_counts_are_those_of_a_slow_look(languages, shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/bert-base-uncased")
    wanted = {"eng", "deu_1996", "rus", "hin", "jpn"}
    texts = [(label, text) for label, text in languages if label in wanted]
    report = tokenizer_report(tokenizer, [*texts, ("eng", "an anteater [SEP]")])
    assert report["labels"].keys() == {label for label, _ in texts}
    text = dict(texts)["eng"]
    ids = [ordinary(tokenizer).encode(part).ids for part in (text, "an anteater [SEP]")]
    tokens = ids[0] + ids[1]
    words = len(text.split()) + 3
    counts = report["labels"]["eng"]
    assert counts["texts"] == 2 and counts["tokens"] == len(tokens)
    assert counts["bytes_per_token"] == pytest.approx((len(text.encode()) + 17) / len(tokens))
    assert counts["characters_per_token"] == pytest.approx((len(text) + 17) / len(tokens))
    assert counts["tokens_per_word"] == pytest.approx(len(tokens) / words)
    assert counts["unknown_share"] == tokens.count(100) / len(tokens)
    assert counts["vocabulary_use"] == pytest.approx(len(set(tokens) - {0, 100, 101, 102, 103}) / (30_522 - 5))
    together = report["all"]
    for name in ("texts", "bytes", "tokens", "round_trip_failures"):
        assert together[name] == sum(counts[name] for counts in report["labels"].values())
    assert together["vocabulary_use"] > counts["vocabulary_use"]


def test_fertility_tells_served_languages_from_others(languages, shared_data):
    gpt2 = tokenizer_report(load_tokenizer(shared_data / "tokenizers/gpt2"), languages)
    bert = tokenizer_report(load_tokenizer(shared_data / "tokenizers/bert-base-uncased"), languages)
    assert len(gpt2["labels"]) == len(bert["labels"]) == 388
    for report in (gpt2, bert):
        fertility = {label: counts["tokens_per_word"] for label, counts in report["labels"].items()}
        assert fertility["eng"] < fertility["rus"]
    assert bert["labels"]["eng"]["tokens_per_word"] < 1.3
    assert gpt2["labels"]["tam"]["tokens_per_word"] > 15  # byte by byte
    assert gpt2["all"]["round_trip_failures"] == 0 and gpt2["all"]["unknown_share"] == 0
    assert bert["labels"]["eng"]["round_trip_failures"] == 0
    assert bert["labels"]["amh"]["unknown_share"] == 1  # no Ethiopic in the vocabulary
    assert "[UNK]" in bert["labels"]["amh"]["round_trip_example"]["decoded"]


@pytest.mark.parametrize(
    ("settings", "compared"),
    [
        ({"type": "byte_bpe", "vocab_size": 400}, "the text"),
        ({"type": "characters"}, "the text"),
        ({"type": "wordpiece", "vocab_size": 300}, "the normalized text but for white space"),
        ({"type": "wordpiece", "vocab_size": 300, "lowercase": True}, "the normalized text but for white space"),
        ({"type": "unigram", "vocab_size": 120}, "the normalized text"),
    ],
)
def test_text_trained_on_makes_the_round_trip(settings, compared, tmp_path):
    report = tokenizer_report(trained(tmp_path, **settings), [("train", text) for text in TEXTS])
    assert report["compared"] == compared
    assert report["all"]["round_trip_failures"] == 0 and report["all"]["round_trip_example"] is None
    assert report["all"]["unknown_share"] == 0
    assert 0 < report["all"]["vocabulary_use"] <= 1
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "characters"])
def test_lost_characters_are_counted_with_an_example(kind, tmp_path):
    tokenizer = trained(tmp_path, type=kind, vocab_size=120 if kind == "unigram" else 300)
    report = tokenizer_report(
        tokenizer, [("kept", "The fox"), ("lost", "The fox, " * 20 + "日本"), ("lost", "The fox")]
    )
    assert report["labels"]["kept"]["round_trip_failures"] == 0
    lost = report["labels"]["lost"]
    assert (lost["texts"], lost["round_trip_failures"]) == (2, 1)
    assert lost["unknown_share"] > 0
    assert "日" in lost["round_trip_example"]["text"] and "日" not in lost["round_trip_example"]["decoded"]
    assert len(lost["round_trip_example"]["text"]) <= 80
    assert report["all"]["round_trip_example"] == lost["round_trip_example"]


def test_longest_tokens_are_shown_as_text(shared_data):
    report = tokenizer_report(load_tokenizer(shared_data / "tokenizers/gpt2"), [])
    assert len(report["longest_tokens"]) == 10
    assert "-" * 64 in report["longest_tokens"]
    lengths = [len(token) for token in report["longest_tokens"]]
    assert lengths == sorted(lengths, reverse=True)
    assert report["labels"] == {} and report["all"]["tokens"] == 0 and report["all"]["bytes_per_token"] == 0


def test_terminal_shows_the_largest_labels_and_all(tmp_path):
    report = tokenizer_report(
        trained(tmp_path, type="wordpiece", vocab_size=300),
        [(f"label-{number:02d}", TEXTS[0] * (number + 1)) for number in range(25)] + [("[b]odd[/b]", "日本")],
    )
    console = Console(file=io.StringIO(), width=120)
    show_tokenizer_report(report, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "label-24" in shown and "label-00" not in shown and "and 6 more" in shown
    assert "1 of 26" in shown and "'日本' came back as '[UNK][UNK]'" in shown
