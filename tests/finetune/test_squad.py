"""SQuAD's files and scores: against numbers that the official scripts gave, and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import DataError
from finetune.squad import Question, Squad, best_f1_threshold, normalize, read_squad, squad_scores
from tests.conftest import ROOT

CONTEXT = "The Walt Disney Company, in Burbank, owns the network."


def squad_file(*entries: dict) -> dict:
    return {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": list(entries)}]}]}


def entry(name: str, text: str = "Burbank", start: int = 28, **more) -> dict:
    return {"id": name, "question": "Where?", "answers": [{"text": text, "answer_start": start}], **more}


def write(path, content) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("prediction", "exact", "f1"),
    [
        ("the walt disney company!", 100, 100),
        ("Disney", 0, 50),
        ("a Disney company", 0, 80),
        ("", 0, 0),
        ("Disney Disney Disney", 0, 100 / 3),  # a word counts as often as it occurs
    ],
)
def test_an_answer_is_compared_without_case_articles_and_punctuation(prediction, exact, f1):
    squad = Squad([Question("q", "Who?", CONTEXT, (("The Walt Disney Company", 0),))], is_v2=False)
    assert squad_scores(squad, {"q": prediction}) == pytest.approx({"exact": exact, "f1": f1})


def test_question_without_a_prediction_is_wrong_in_version_1_and_left_out_in_version_2():
    questions = [Question(name, "Where?", CONTEXT, (("Burbank", 28),)) for name in "ab"]
    assert squad_scores(Squad(questions, is_v2=False), {"a": "Burbank"})["exact"] == 50
    assert squad_scores(Squad(questions, is_v2=True), {"a": "Burbank"})["exact"] == 100


def test_answer_of_an_article_has_no_f1_in_version_1_and_does_not_count_in_version_2():
    question = Question("q", "Which word?", "the", (("the", 0),))
    assert squad_scores(Squad([question], is_v2=False), {"q": "the"}) == {"exact": 100, "f1": 0}
    assert squad_scores(Squad([question], is_v2=True), {"q": ""})["f1"] == 100


def random_predictions(squad: Squad, seed: int) -> dict[str, str]:
    """The answer, words of the context around it, or nothing."""
    rng = np.random.default_rng(seed)
    found = {}
    for question in squad.questions:
        words = question.context.split()
        start, length = rng.integers(len(words)), rng.integers(1, 6)
        answers = [text for text, _ in question.answers] or [""]
        found[question.id] = [answers[-1], " ".join(words[start : start + length]), f"the {answers[0]}.", ""][
            rng.integers(4)
        ]
    return found


# (exact, f1) that the official scripts (SQuAD 1.1 and 2.0, MLQA) gave for `random_predictions(squad, 0)`.
OFFICIAL = {
    "squad/v1.1.dev": (49.055330634278, 50.383321625064625),
    "squad/v1.1.train": (50.777273352593205, 51.861367137187464),
    "squad/v2.0.dev": (63.008849557522126, 63.520859671302155),
    "xquad/ar": (25.529767911200807, 45.48983870259624),
    "xquad/hi": (25.529767911200807, 45.62017830445641),
    "xquad/zh": (24.318869828456105, 49.15397648920222),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_scores_of_real_questions_are_those_of_the_official_scripts(shared_data, name):
    squad = read_squad(shared_data / f"tasks/{name}.json")
    scores = squad_scores(squad, random_predictions(squad, 0), name.removeprefix("xquad/") if "xquad" in name else "en")
    assert (scores["exact"], scores["f1"]) == pytest.approx(OFFICIAL[name], abs=1e-9)


def test_parts_and_best_threshold_of_version_2_are_those_of_the_official_script(shared_data):
    squad = read_squad(shared_data / "tasks/squad/v2.0.dev.json")
    predictions = random_predictions(squad, 0)
    scores = squad_scores(squad, predictions)
    assert scores["has_answer_exact"] == pytest.approx(51.578947368421055)
    assert scores["has_answer_f1"] == pytest.approx(52.593984962406)
    rng = np.random.default_rng(0)
    margins = {name: float(rng.normal()) for name in predictions}
    answers = {name: text or "something" for name, text in predictions.items()}
    best, threshold = best_f1_threshold(squad, answers, margins)
    assert (best, threshold) == pytest.approx((50.159292035398224, -2.9671837099839435))
    answered = {name: text if margins[name] <= threshold else "" for name, text in answers.items()}
    assert squad_scores(squad, answered)["f1"] == pytest.approx(best)


def test_every_answer_of_the_real_files_scores_100(shared_data):
    for name in (
        "squad/v1.1.dev",
        "squad/v1.1.train",
        "squad/v2.0.dev",
        "xquad/ar",
        "xquad/hi",
        "xquad/ru",
        "xquad/zh",
    ):
        squad = read_squad(shared_data / f"tasks/{name}.json")
        language = name.removeprefix("xquad/") if "xquad" in name else "en"
        predictions = {q.id: q.answers[-1][0] if q.answers else "" for q in squad.questions}
        scores = squad_scores(squad, predictions, language)
        assert scores["exact"] == 100 and scores["f1"] > 99.8, name
        assert squad.is_v2 == ("v2.0" in name)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "The  A-bomb, an end", "abomb end"),
        ("en", "«Das Haus»", "«das haus»"),
        ("de", "«Das  Haus»", "haus"),
        ("es", "¿El perro?", "perro"),
        ("zh", "北京, 2008年", "北 京 2008 年"),
        ("ru", "— Река Волга.", "река волга"),
        ("ar", "البيت", "بيت"),
    ],
)
def test_normalisation_knows_the_articles_and_punctuation_of_the_language(language, text, expected):
    assert normalize(text, language) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("red blue the sea".split()), max_size=6), st.data())  # noqa: SIM905
def test_f1_is_symmetric_and_one_for_the_same_words_in_any_order(words, data):
    shuffled = data.draw(st.permutations(words))
    other = data.draw(st.lists(st.sampled_from(["red", "blue", "sun"]), min_size=1, max_size=5))

    def f1(answer: list[str], prediction: list[str]) -> float:
        squad = Squad([Question("q", "?", "", ((" ".join(answer), 0),))], is_v2=False)
        return squad_scores(squad, {"q": " ".join(prediction)})["f1"]

    if Counter(words) - Counter(["the"] * 9):
        assert f1(words, shuffled) == pytest.approx(100)
    assert f1(words, other) == pytest.approx(f1(other, words))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{broken", r"a.json: is not a JSON file in UTF-8"),
        ([], r"a.json: has no `data` \(found: list\)"),
        ({"data": 3}, r"`data` is a int, expected a list"),
        ({"data": []}, "holds no questions"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\]: has no `context` \(found: qas\)"),
        (squad_file({"id": 1, "answers": []}), r"qas\[0\]: has no `question` \(found: id, answers\)"),
        (squad_file(entry("x", start=27)), r"\(id x\), answer 0: at answer_start=27 the context has ' Burban'"),
        (squad_file(entry("x", start="28")), r"at answer_start=28 the context has None, expected 'Burbank'"),
        (squad_file(entry("x"), entry("x")), "1 ids stand there twice, such as x"),
    ],
)
def test_broken_file_is_named_with_the_place_in_it(tmp_path, content, expected):
    write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=expected):
        read_squad(tmp_path / "a.json")


def test_command_scores_a_file_of_predictions_and_says_what_is_missing(tmp_path):
    write(tmp_path / "data.json", squad_file(entry("x"), entry("y")))
    write(tmp_path / "predictions.json", {"x": "in Burbank"})
    words = [sys.executable, "-m", "finetune.squad", str(tmp_path / "data.json"), str(tmp_path / "predictions.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"exact": 0, "f1": pytest.approx(100 / 3)}
    assert "1 of 2 questions have no prediction" in done.stderr
    write(tmp_path / "predictions.json", ["x"])
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "expected an object {question id: answer}" in done.stderr
