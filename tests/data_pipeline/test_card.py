"""The data card: what a build did, on one page that needs nothing else and runs nothing of the texts it shows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from data_pipeline.card import data_card, lengths
from data_pipeline.tally import Tally

HOSTILE = '<script>alert("x")</script>'


def content() -> dict[str, Any]:
    read, quality, pii, tokenize = Tally(100), Tally(100), Tally(97, changed=2), Tally(90)
    for _ in range(3):
        quality.drop("gopher: too few words", f"short {HOSTILE}")
    pii.find("email", 4, f"write to <EMAIL> {HOSTILE}")
    fit = {"texts": 5, "bytes": 900, "bytes_per_token": 4.5, "tokens_per_word": 1.31, "unknown_share": 0.0125}
    return {
        "stages": {
            "read": read.to_json(),
            "quality": quality.to_json(),
            "pii": pii.to_json(),
            "tokenize": tokenize.to_json(),
        },
        "duplicates": {"exact": 5, "near": 2, "examples": {"exact": [["the dropped one", f"the first {HOSTILE}"]]}},
        "sources": {f"{HOSTILE}.jsonl": {"files": 1, "documents": 100, "characters": 5000, "licence": "not given"}},
        "splits": {
            "train": {"documents": 80, "tokens": 12_345_678, "lengths": {"4": 60, "16": 20}},
            "validation": {"documents": 10, "tokens": 900, "lengths": {"8": 10}},
        },
        "tokenizer": {"vocab_size": 300, "model": "BPE", "labels": {"en": {**fit, "round_trip_failures": 0}}},
        "settings": {"text_key": HOSTILE},
    }


def test_page_is_well_formed_and_shows_texts_as_text():
    page = data_card(content())
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Checker().feed(page)
    assert opened == []


def test_page_needs_nothing_from_elsewhere():
    assert not re.search(r"(src|href)=|url\(|@import", data_card(content()))


def test_page_says_what_was_kept_dropped_and_found():
    page = data_card(content())
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    for expected in (
        "90 documents",
        "12.3 M tokens",
        "90.0 % of the documents read were kept",
        "gopher: too few words: 3",
        "email (occurrences): 4",
        "5 documents had the words of an earlier one, 2 nearly so",
        "100.0 % not given",
        "en 5 4.50 1.31 1.25 % 0",
        "duplicates 97 0 7 see below tokenize 90 0 0",
    ):
        assert expected in text, expected


def test_lengths_without_documents_between_two_others_are_shown_as_none():
    rows = re.findall(r"<td class=n>([\d, to]+)</td><td class=n>(\d+)</td>", lengths({"4": 60, "16": 20}))
    assert rows == [("4 to 7", "60"), ("8 to 15", "0"), ("16 to 31", "20")]


def test_page_is_the_same_every_time():
    assert data_card(content()) == data_card(content())


def test_share_of_kept_documents_counts_one_that_was_cut_in_two_once():
    cut = content()
    cut["stages"]["tokenize"]["found"] = {"cut in two": 90}
    cut["splits"]["validation"]["documents"] = cut["splits"]["train"]["documents"] = 90
    assert "<b>180</b><span>documents" in data_card(cut) and "<b>90.0 %</b>" in data_card(cut)
