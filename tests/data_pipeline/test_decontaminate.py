"""Overlap with test sets: never missed (against sets of tuples), read from every format, found in real documents."""

from __future__ import annotations

import gzip
import json
import random
import re
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import decontaminate
from data_pipeline.decontaminate import contaminated_by, load_ngrams
from data_pipeline.errors import DataError
from data_pipeline.files import open_bytes

HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
QUESTION = "Which river did the engineers cross before they reached the old stone bridge at dawn?"  # 15 words


def slow_words(text: str) -> list[str]:
    return re.findall(rf"(?!\W)[{HAN_KANA}]|[^\W{HAN_KANA}]+", unicodedata.normalize("NFKC", text).casefold())


def slow_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = slow_words(text)
    n = min(n, len(words)) if len(words) >= min(8, n) else n
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def slow_overlap(document: str, tests: list[str], n: int) -> bool:
    known = set().union(*(slow_ngrams(test, n) for test in tests))
    words = slow_words(document)
    return any(
        tuple(words[i : i + length]) in known
        for length in {len(ngram) for ngram in known}
        for i in range(len(words) - length + 1)
    )


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


WORDS = st.sampled_from(["a", "b", "B", "c_1", "straße", "STRASSE", "漢字", "かな", "é", "e\u0301", "ﬁ", "٣", "x" * 30])
GAPS = st.sampled_from([" ", " ", " ", "\n", ", ", " — ", "...", "\u00a0", "-"])


@st.composite
def texts(draw, most: int) -> str:
    words = draw(st.lists(WORDS, min_size=1, max_size=most))
    return "".join(word + draw(GAPS) for word in words)


@given(st.lists(texts(20), min_size=1, max_size=4), texts(60), st.integers(1, 15), st.sampled_from([4, 37, 1 << 17]))
@settings(max_examples=400, deadline=None)
def test_what_is_found_is_what_sets_of_tuples_find_wherever_the_document_is_cut(
    tmp_path_factory, tests, document, n, piece_characters
):
    tests = [test.replace("\n", " ") for test in tests]
    file = lines(tmp_path_factory.mktemp("tests") / "tests.txt", [*tests, " ".join(f"only{i}" for i in range(n))])
    ngrams = load_ngrams([file], n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decontaminate, "PIECE_CHARACTERS", piece_characters)
        found = contaminated_by(document, ngrams)
    assert (found == file) == slow_overlap(document, tests, n)


@given(st.text(max_size=200), st.text(max_size=200))
@settings(max_examples=500, deadline=None)
def test_words_of_any_text_are_those_of_the_regular_expression(left, right):
    text = left + " " + right
    hashes = decontaminate._hash_words(text).tolist()
    words = slow_words(text)
    assert len(hashes) == len(words)
    assert len(set(hashes)) == len(set(words)) == len(set(zip(hashes, words, strict=True)))


def test_case_punctuation_and_unicode_forms_do_not_matter(tmp_path):
    text = "Le café où naïve élèves — dès 1789 — ﬁnirent leur goûter près d'ici hier soir, déjà."
    ngrams = load_ngrams([lines(tmp_path / "t.txt", [text])], 13)
    other = unicodedata.normalize("NFD", text.upper()).replace("—", "(").replace(",", " ;\n")
    assert contaminated_by(f"Before. {other} After.", ngrams)


def test_a_changed_word_in_each_thirteen_is_no_overlap(tmp_path):
    ngrams = load_ngrams([lines(tmp_path / "t.txt", [QUESTION])], 13)
    assert contaminated_by(f"Tell me: {QUESTION}", ngrams)
    assert contaminated_by(QUESTION.replace("old", "new"), ngrams) is None


def test_a_short_example_is_found_whole_and_a_very_short_one_not_at_all(tmp_path):
    file = lines(tmp_path / "t.txt", ["one two three four five six seven eight", "in the end he went", QUESTION])
    ngrams = load_ngrams([file], 13)
    assert contaminated_by("zero one two three four five six seven eight nine", ngrams) == file
    assert contaminated_by("zero one two three four five six seven, then eight nine", ngrams) is None
    assert contaminated_by("And in the end he went home.", ngrams) is None


def test_the_file_that_is_hit_is_named(tmp_path):
    first, second = (
        lines(tmp_path / "a.txt", ["alpha " * 20]),
        lines(tmp_path / "b.txt", [QUESTION, "other words " * 9]),
    )
    ngrams = load_ngrams([first, second], 13)
    assert contaminated_by("say alpha " + "alpha " * 13, ngrams) == first
    assert contaminated_by(QUESTION, ngrams) == second
    assert contaminated_by("alpha beta " * 20, ngrams) is None
    assert contaminated_by("", ngrams) is None


def write_formats(folder: Path) -> list[str]:
    """The same question in every format, among other fields."""
    import pyarrow
    import pyarrow.parquet

    record = {"id": 7, "data": [{"paragraphs": [{"label": "x", "question": QUESTION}]}], "none": None}
    line = json.dumps(record).encode()
    contents = {
        "q.jsonl": b'{"id": 1}\n\n' + line + b"\n",
        "q.jsonl.gz": gzip.compress(line),
        "q.jsonl.zst": zstandard.compress(line),
        "q.json": json.dumps({"version": "1", "all": [record]}, indent=1).encode(),
        "q.csv": f'label,text\n1,"He said: ""{QUESTION}"", twice"\n'.encode(),
        "q.tsv": f'text\tlabel\n"unclosed\t0\n{QUESTION}\t1\n'.encode(),
        "with_tabs.csv": f"a\tb, c\t{QUESTION}\n".encode(),
        "q.txt": f"first\n{QUESTION}\n".encode(),
        "val.en": f"first\r\n{QUESTION}\r\n".encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), folder / "q.parquet")
    return sorted(str(path) for path in folder.iterdir())


def test_every_format_is_read(tmp_path):
    files = write_formats(tmp_path)
    assert len(files) == 10
    for file in files:
        assert contaminated_by(f"Here: {QUESTION}", load_ngrams([file], 13)) == file, file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": "x"}\n{"q": ', r"a\.jsonl:2: is not valid JSON"),
        ("a.json", b"[1, 2", r"a\.json: cannot be read by its ending's format"),
        ("a.txt", b"caf\xe9 one two three four five six seven eight", r"a\.txt: is not UTF-8"),
        ("a.txt", b"too\nfew\nwords", r"a\.txt: has no text of 8 or more words"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: is not a whole parquet file"),
        ("a.jsonl.zst", zstandard.compress(b'{"q": "x"}\n' * 99)[:-9], r"a\.jsonl\.zst: is (cut off|damaged)"),
    ],
)
def test_a_broken_test_set_is_an_error_that_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_ngrams([str(tmp_path / name)], 13)


def test_a_missing_test_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file.*data\.build\.clean\.decontaminate"):
        load_ngrams([str(tmp_path / "nowhere.jsonl")], 13)


def test_memory_does_not_grow_with_the_document(tmp_path):
    ngrams = load_ngrams([lines(tmp_path / "t.txt", [QUESTION])], 13)
    document = ("Some words that go on and on, " * 1_000_000) + QUESTION  # 31 MB
    tracemalloc.start()
    assert contaminated_by(document, ngrams)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# --- real test sets and documents


def read(file: Path) -> list[str]:
    with open_bytes(str(file)) as opened:
        return [json.loads(line)["text"] for line in opened]


def test_squad_planted_in_novels_is_found_and_novels_are_clean(shared_data):
    file = str(shared_data / "tasks/squad/v1.1.dev.json")
    ngrams = load_ngrams([file], 13)
    novels = read(shared_data / "pretrain/novels.valid.jsonl.zst")
    assert [contaminated_by(novel, ngrams) for novel in novels] == [None] * len(novels)
    rng = random.Random(0)
    paragraphs = [p for article in json.loads(Path(file).read_text())["data"] for p in article["paragraphs"]]
    planted = [p["context"] for p in paragraphs]
    planted += [qa["question"] for p in paragraphs for qa in p["qas"] if len(slow_words(qa["question"])) >= 8]
    for text in rng.sample(planted, 300):
        novel = rng.choice(novels)
        place = rng.randrange(len(novel) - 3000)
        assert contaminated_by(f"{novel[place : place + 3000]} {text.upper()} {novel[:500]}", ngrams) == file


def test_real_reviews_overlap_as_sets_of_tuples_say(shared_data):
    file = shared_data / "tasks/imdb/dev.jsonl.zst"
    ngrams = load_ngrams([str(file)], 13)
    known = set().union(*(slow_ngrams(text, 13) for text in read(file)))
    reviews = read(shared_data / "pretrain/reviews.jsonl.zst")[:4000]
    found = [contaminated_by(review, ngrams) is not None for review in reviews]
    assert found == [not known.isdisjoint(slow_ngrams(review, 13)) for review in reviews]
    assert any(found)


def test_chinese_questions_are_found_without_spaces(shared_data):
    file = str(shared_data / "tasks/xquad/zh.json")
    ngrams = load_ngrams([file], 13)
    udhr = read(shared_data / "pretrain/udhr.jsonl.zst")
    assert [contaminated_by(text, ngrams) for text in udhr] == [None] * len(udhr)
    context = json.loads(Path(file).read_text(encoding="utf-8"))["data"][0]["paragraphs"][0]["context"]
    chinese = next(text for text in udhr if "人人生而自由" in text)
    assert contaminated_by(chinese[:100] + context[20:80] + chinese[100:], ngrams) == file
