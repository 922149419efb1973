"""Personal data: how much is found on a labelled set and in real text, what stays, and that no text takes long."""

from __future__ import annotations

import json
import random
import re
import string
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.files import open_bytes
from data_pipeline.pii import KINDS, find, looks_random, redact
from data_pipeline.pii_numbers import is_card, is_iban, luhn
from data_pipeline.tally import Tally
from tests.data_pipeline.pii_labelled import labelled_texts, scores

# A little below what was measured: everything 1.0 but e-mail, where precision was 1.0 on the texts the rules were
# developed on and 0.92 on those held out, recall 0.96 and 0.89.
FLOORS = {"key": (0.95, 0.95), "email": (0.9, 0.88), "card": (0.95, 0.95), "ip": (0.95, 0.95), "phone": (0.95, 0.95)}


def read(file: Path) -> list[str]:
    with open_bytes(str(file)) as opened:
        return [json.loads(line)["text"] for line in opened]


def redacted(text: str, kinds=KINDS) -> str:
    return redact(text, kinds, Tally())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True], ids=["developed_on", "held_out"])
def test_precision_and_recall_on_the_labelled_set(held_out, kind):
    texts = [labelled for labelled in labelled_texts() if labelled.held_out == held_out]
    score = scores(texts, lambda text: find(text, KINDS))[kind]
    precision, recall = FLOORS[kind]
    assert score.right + score.missed >= 15
    assert score.precision >= precision
    assert score.recall >= recall


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone_finds_as_much_and_takes_nothing_of_the_others(kind):
    alone = scores(labelled_texts(), lambda text: find(text, [kind]))
    together = scores(labelled_texts(), lambda text: find(text, KINDS))
    assert alone[kind].right == together[kind].right
    assert alone[kind].wrong <= together[kind].wrong + 1


def test_the_labelled_set_is_large_and_half_of_it_is_held_out():
    texts = labelled_texts()
    assert len(texts) >= 250
    assert 0.4 < sum(labelled.held_out for labelled in texts) / len(texts) < 0.6
    assert sum(not labelled.spans for labelled in texts) >= 100
    for labelled in texts:
        assert not set("⟦⟧¦⏎⇥") & set(labelled.text)


def test_replacements_stand_where_the_data_stood_and_the_rest_is_kept():
    text = "Ann <ann@example.org>, tel. (415) 555-0132, from 81.2.69.160, card 4111 1111 1111 1111\tend"
    assert redacted(text) == "Ann <<EMAIL>>, tel. <PHONE>, from <IP>, card <CARD>\tend"
    assert redacted(text, ["phone"]) == text.replace("(415) 555-0132", "<PHONE>")


def test_text_without_personal_data_is_the_same_object(shared_data):
    for novel in read(shared_data / "pretrain/novels.valid.jsonl.zst"):
        assert redact(novel, KINDS, Tally()) is novel


def test_the_tally_counts_and_its_examples_show_no_personal_data():
    tally = Tally()
    marked = [labelled for labelled in labelled_texts() if labelled.spans]
    for labelled in marked:
        redact(labelled.text, KINDS, tally)
    expected = [span for labelled in marked for span in find(labelled.text, KINDS)]
    assert dict(tally.found) == {kind: sum(span[2] == kind for span in expected) for kind in KINDS}
    values = {labelled.text[start:stop] for labelled in marked for start, stop, _ in labelled.spans}
    missed = {"tom at example dot edu", "sarah at example dot org", "bounce+jane=example.org@lists.example.net"}
    for kind, examples in tally.examples.items():
        for example in examples:
            assert f"<{kind.upper()}>" in example
            assert not any(value in example for value in values - missed)


def test_an_example_of_one_kind_does_not_show_the_neighbour_of_another_kind():
    tally = Tally()
    redact("mail ann@example.org or ring (415) 555-0132 today", KINDS, tally)
    assert tally.examples == {
        "email": ["mail <EMAIL> or ring <PHONE> today"],
        "phone": ["mail <EMAIL> or ring <PHONE> today"],
    }


def test_redacting_again_changes_nothing_on_the_labelled_set():
    everything = "\n".join(labelled.text for labelled in labelled_texts())
    for text in [everything, *(labelled.text for labelled in labelled_texts())]:
        once = redacted(text)
        assert redact(once, KINDS, Tally()) is once


FRAGMENTS = st.sampled_from(
    [
        *["030", "415", "555", "0132", "1234567", "4111", "1111", "+1", "00", "１２", "::", "tel.", "call", "x.org"],
        *["example", ".com", "81.2.69.160", "2a02:7388", "sk-", "ghp_", "token=", "password:", "eyJ", "AKIA", "://u:"],
        *["[at]", " AT ", " DOT ", "<PHONE>", "<EMAIL>", "<KEY>", *"01749+()-./:@=\"'<>\n\tté漢٣"],
    ]
)


@given(st.lists(st.one_of(FRAGMENTS, st.just(" "), st.text(max_size=3)), max_size=40).map("".join))
@settings(max_examples=1000, deadline=None)
def test_redacting_again_changes_nothing_whatever_the_text(text):
    once = redacted(text)
    assert redacted(once) == once


def test_what_a_replacement_uncovers_is_replaced_too():
    assert redacted("tel. bob7@example.org 4567890") == "tel. <EMAIL> <PHONE>"


@given(st.text(alphabet=string.ascii_letters + " ,.;!?\n'\"()-:", max_size=300))
@settings(max_examples=300, deadline=None)
def test_words_and_punctuation_alone_are_never_touched(text):
    assert redact(text, ["phone", "ip", "card"], Tally()) is text


# --- what is decided about single cases


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.178.20", "169.254.7.7", "192.0.2.44", "255.255.255.0", "8.8.8.8", "224.0.0.251"],
)
def test_addresses_of_nobody_stay(address):
    assert redacted(f"ping {address} now") == f"ping {address} now"


@pytest.mark.parametrize(
    "text",
    [
        "hash +4915112345678abc",
        "sum 12 + 4155550132 = 4155550144",
        "call f(1234567) or dial 10 000 000 of them",
        "the telephone of 1876-1877",
        "<PHONE> 4567890",
        "0049301234567890123",
        "frequency 206.766 9894 and pages 259-264 1970",
    ],
)
def test_numbers_that_are_no_phone_numbers_stay(text):
    assert redacted(text) == text


def test_both_ends_of_a_range_of_addresses_are_found():
    assert redacted("81.2.69.142-81.2.69.160") == "<IP>-<IP>"


def test_an_address_behind_a_server_is_one_and_behind_ver_is_a_version():
    assert redacted("mail server 91.198.174.192") == "mail server <IP>"
    assert redacted("Adobe Reader ver 91.198.174.192") == "Adobe Reader ver 91.198.174.192"


@given(st.integers(0, 10**15 - 1), st.integers(0, 15), st.integers(1, 9))
def test_luhn_finds_every_wrong_digit(number, place, change):
    body = f"{number:015d}"
    digits = next(body + check for check in "0123456789" if luhn(body + check))
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(digits))  # 16 digits: the first is doubled
    assert total % 10 == 0
    wrong = digits[:place] + str((int(digits[place]) + change) % 10) + digits[place + 1 :]
    assert not luhn(wrong)
    assert not is_card(wrong)


@given(st.integers(4, 21), st.integers(1, 9))
def test_iban_finds_every_wrong_digit(place, change):
    account = "DE89370400440532013000"
    assert is_iban(account)
    wrong = account[:place] + str((int(account[place]) + change) % 10) + account[place + 1 :]
    assert not is_iban(wrong)


def test_random_strings_look_random_and_names_in_programs_do_not():
    rng = random.Random(0)
    base62, hexadecimal = string.ascii_letters + string.digits, "0123456789abcdef"
    for alphabet, length in [(base62, 24), (base62, 40), (hexadecimal, 32), (hexadecimal, 64)]:
        tokens = ["".join(rng.choices(alphabet, k=length)) for _ in range(1000)]
        assert sum(map(looks_random, tokens)) >= 930, (alphabet, length)
    folder = Path(random.__file__).parent
    names = {name for file in sorted(folder.glob("*.py")) for name in re.findall(r"[A-Za-z_]\w{15,}", file.read_text())}
    assert len(names) > 2000
    assert sum(map(looks_random, names)) <= len(names) / 200


# --- real text


def test_in_real_reviews_nothing_but_addresses_and_numbers_is_flagged(shared_data):
    reviews = read(shared_data / "pretrain/reviews.jsonl.zst")
    flagged = [(kind, review[start:stop]) for review in reviews for start, stop, kind in find(review, KINDS)]
    emails = [value for kind, value in flagged if kind == "email"]
    assert len(emails) >= 40
    assert all(re.fullmatch(r"[\w.]+@[\w.]+\.(com|net|ca|co\.uk)", value, re.IGNORECASE) for value in emails)
    others = sorted(value for kind, value in flagged if kind != "email")  # each was looked at in its review
    assert len(others) == 6
    assert all(re.fullmatch(r"(\(?\d{3}\)?[ -])?\d{3}-\d{4}|165\.201\.\d+\.\d+", value) for value in others)


def test_addresses_in_real_reviews_are_all_found(shared_data):
    for review in read(shared_data / "pretrain/reviews.jsonl.zst"):
        assert not re.search(r"\w@\w[\w-]*\.(com|net|org|edu)\b", redacted(review, ["email"]), re.IGNORECASE)


def test_phone_numbers_in_real_usenet_posts_are_found(shared_data):
    """American numbers written in the usual ways; posts of 1993 are full of them."""
    usual = re.compile(r"(?<![\w.)+/-])(?<!\d )(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}(?![\w-])")
    seen = left = 0
    for post in read(shared_data / "tasks/newsgroups/dev.jsonl.zst"):
        seen += len(usual.findall(post))
        left += len(usual.findall(redacted(post, ["phone"])))
    assert seen >= 200
    assert left <= seen / 50


# --- time

MEGABYTE = 1_000_000
HOSTILE = [
    *["a@", "a@a.", "@a.a", "@", "a.", "1-", "1", "1.", "12.34.", "0123 ", "01-", "+1", "00 49 ", "(415) ", "("],
    *["415-555-", "1   ", ":", "2001:", "2001::", "sk-", "_", "ghp_", "eyJ", "eyJaaaaaaaaaaaa.", "-", "://", "://a:"],
    *["-----BEGIN PRIVATE KEY-----", "=", "token=", 'token="aaaaaaaa', "[at]", "x[at]y[dot]", " AT ", "DE89 3704 "],
    *["A", "tel 1", "4111 ", "4111-", "12345678:AA", "@例.", "例", "１２-", "٠١٢٣-", "\0", "'@a.de", "99.99.99.999 "],
    *["\u00a00", "SG."],
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_takes_long(piece):
    text = (piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE]
    start = time.process_time()
    redacted(text)
    assert time.process_time() - start < 3  # about 0.3 s; anything quadratic takes minutes


@pytest.mark.parametrize("piece", ["1234567, ", "(415) 555-0132 ", "a@x.org1 4567890 ", "81.2.69.160-", "030 1234567 "])
def test_replacements_do_not_uncover_one_another_one_by_one(piece):
    text = "tel. " + piece * 20_000
    start = time.process_time()
    redacted(text)
    assert time.process_time() - start < 5  # about 0.5 s; with one replacement a round it takes hours


def test_random_digits_and_signs_do_not_take_long():
    text = "".join(random.Random(0).choices("0123456789 -", k=MEGABYTE // 2))
    start = time.process_time()
    redacted(text)
    assert time.process_time() - start < 3
