"""SQuAD's files and its scores, exactly as the official scripts compute them, and their form for other languages.

An answer is compared after normalisation: lower case, no punctuation, no articles, single spaces (Rajpurkar et al.
2016, 2018). For languages other than English the articles and what counts as punctuation are those of MLQA's script
(Lewis et al. 2020), and Chinese is compared by characters.

    python -m finetune.squad DATA.json PREDICTIONS.json [LANGUAGE]     the scores of a file {question id: answer}
"""

from __future__ import annotations

import json
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards import DataError

ENGLISH = "en"
ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "ar": "ال",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "hi": None,
    "ru": None,
    "zh": None,
}
HAN = re.compile("[\u4e00-\u9fa5]")  # MLQA's range


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]  # (text, first character in the context); none: it has no answer


@dataclass(frozen=True)
class Squad:
    questions: list[Question]
    is_v2: bool  # whether to answer is part of the task


def read_squad(path: Path, is_answered: bool = True) -> Squad:
    """Read a file of SQuAD's format, version 1.1 or 2.0. Raises DataError naming file, place and what is wrong.

    Where it is not `is_answered`, questions need no answers, and those that are there are left out.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not a JSON file in UTF-8 ({error})") from None
    questions, is_v2 = [], False
    for a, article in enumerate(_list(content, "data", str(path))):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}: data[{a}]")):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            context = _string(paragraph, "context", place)
            for q, entry in enumerate(_list(paragraph, "qas", place)):
                questions.append(_question(entry, context, f"{place}.qas[{q}]", is_answered))
                is_v2 |= "is_impossible" in entry or not questions[-1].answers
    if not questions:
        raise DataError(f"{path}: holds no questions")
    if twice := [name for name, times in Counter(question.id for question in questions).items() if times > 1]:
        raise DataError(f"{path}: {len(twice)} ids stand there twice, such as {twice[0]}; predictions are kept by id")
    return Squad(questions, is_v2)


def _question(entry: Any, context: str, place: str, is_answered: bool) -> Question:
    name, question = str(_field(entry, "id", place)), _string(entry, "question", place)
    answers = []
    for number, answer in enumerate(_list(entry, "answers", place) if is_answered else []):
        text, start = _string(answer, "text", place), _field(answer, "answer_start", place)
        found = context[start : start + len(text)] if isinstance(start, int) and start >= 0 else None
        if found != text:
            raise DataError(
                f"{place} (id {name}), answer {number}: at answer_start={start} the context has {found!r}, expected "
                f"{text!r}; correct answer_start, in characters, or remove the question"
            )
        answers.append((text, start))
    return Question(name, question, context, tuple(answers))


def _field(record: Any, key: str, place: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place}: has no `{key}` (found: {found}); expected SQuAD's format")
    return record[key]


def _list(record: Any, key: str, place: str) -> list[Any]:
    value = _field(record, key, place)
    if not isinstance(value, list):
        raise DataError(f"{place}: `{key}` is a {type(value).__name__}, expected a list")
    return value


def _string(record: Any, key: str, place: str) -> str:
    value = _field(record, key, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: `{key}` is a {type(value).__name__}, expected a text")
    return value


def squad_scores(squad: Squad, predictions: Mapping[str, str], language: str = ENGLISH) -> dict[str, float]:
    """`exact` and `f1` in percent, over all questions; of version 2 also over those with and without an answer.

    A question without a prediction counts as wrong in version 1.1, and is left out in version 2, as in the scripts.
    """
    scores = scores_by_id(squad, predictions, language)
    if not squad.is_v2:
        return _mean(list(scores.values()), len(squad.questions))
    answerable = {question.id for question in squad.questions if question.answers}
    has = [value for name, value in scores.items() if name in answerable]
    no = [value for name, value in scores.items() if name not in answerable]
    parts = {"has_answer": _mean(has, len(has)), "no_answer": _mean(no, len(no))}
    return _mean([*has, *no], len(scores)) | {
        f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()
    }


def scores_by_id(
    squad: Squad, predictions: Mapping[str, str], language: str = ENGLISH
) -> dict[str, tuple[float, float]]:
    """(exact, f1), each from 0 to 1, of every question that has a prediction."""
    score = _score_v2 if squad.is_v2 else _score_v1
    return {
        question.id: score(question, predictions[question.id], language)
        for question in squad.questions
        if question.id in predictions
    }


def best_f1_threshold(squad: Squad, answers: Mapping[str, str], margins: Mapping[str, float]) -> tuple[float, float]:
    """Of version 2: the highest F1 in percent that a threshold can give, and the threshold.

    `answers` are the best ones that are not "", `margins` by how much the score of no answer is above theirs; a
    question whose margin is at most the threshold is answered. Chosen on the answers themselves: an upper bound.
    """
    scores = scores_by_id(squad, answers)
    answerable = {question.id for question in squad.questions if question.answers}
    total = best = float(len(scores) - sum(name in answerable for name in scores))  # none is answered
    ordered = sorted(scores, key=margins.__getitem__)
    threshold = margins[ordered[0]] - 1.0
    for name in ordered:
        total += scores[name][1] if name in answerable else -float(bool(answers[name]))
        if total > best:
            best, threshold = total, margins[name]
    return 100.0 * best / len(scores), threshold


def _mean(scores: list[tuple[float, float]], num: int) -> dict[str, float]:
    sums = [sum(column) for column in zip(*scores, strict=True)] or [0.0, 0.0]
    return {name: 100.0 * total / max(1, num) for name, total in zip(("exact", "f1"), sums, strict=True)}


def _score_v1(question: Question, prediction: str, language: str) -> tuple[float, float]:
    """Against the answer it fits best; a text of nothing but articles and punctuation has F1 0."""
    pairs = [(normalize(prediction, language), normalize(text, language)) for text, _ in question.answers]
    exact = max((float(ours == theirs) for ours, theirs in pairs), default=0.0)
    return exact, max((_f1(ours.split(), theirs.split()) for ours, theirs in pairs), default=0.0)


def _score_v2(question: Question, prediction: str, language: str) -> tuple[float, float]:
    """As version 1.1, but answers of articles and punctuation do not count; "" is right where there is no answer."""
    answers = [text for text in (normalize(text, language) for text, _ in question.answers) if text] or [""]
    ours = normalize(prediction, language)
    exact = float(ours in answers)
    return exact, max(_f1(ours.split(), text.split()) if ours and text else float(ours == text) for text in answers)


def _f1(ours: list[str], theirs: list[str]) -> float:
    """Of two lists of words, each word as often as it occurs."""
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def normalize(text: str, language: str = ENGLISH) -> str:
    """What is compared of an answer: words, a space between them. Pure."""
    text = "".join(char for char in text.lower() if not _is_punctuation(char, language))
    if pattern := ARTICLES[language]:
        text = re.sub(pattern, " ", text)
    if language == "zh":
        text = HAN.sub(lambda found: f" {found[0]} ", text)
    return " ".join(text.split())


def _is_punctuation(char: str, language: str) -> bool:
    return char in string.punctuation or (language != ENGLISH and unicodedata.category(char).startswith("P"))


def main(words: list[str]) -> int:
    data, file, *rest = words
    language = rest[0] if rest else ENGLISH
    if language not in ARTICLES:
        raise DataError(f"language {language}: unknown; known: {', '.join(ARTICLES)}")
    squad = read_squad(Path(data))
    try:
        predictions = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); expected {{question id: answer}}") from None
    if not isinstance(predictions, dict) or not all(isinstance(text, str) for text in predictions.values()):
        raise DataError(f"{file}: expected an object {{question id: answer}}, each answer a text")
    missing = sum(question.id not in predictions for question in squad.questions)
    if missing:
        print(f"{file}: {missing} of {len(squad.questions)} questions have no prediction", file=sys.stderr)
    print(json.dumps(squad_scores(squad, predictions, language), indent=2))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DataError as error:
        sys.exit(str(error))
