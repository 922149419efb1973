"""Extractive question answering: the words of a context that answer a question (SQuAD 1.1, 2.0 and files like them).

A context that is longer than a row becomes several windows, which overlap (Devlin et al. 2019). The model scores every
token as the answer's first and as its last; the best pair over all windows is the answer. A window without the answer
points at its first token, and so does a question without one (SQuAD 2.0).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from configs.tuning import AnswersConfig, FinetuneConfig
from finetune.models import load_model
from finetune.squad import Squad, best_f1_threshold, read_squad, squad_scores
from finetune.tasks import IGNORE_INDEX, Row

LABEL = "answers"
LONGEST_QUESTION = 64  # in tokens, as BERT's, and at most a quarter of the row; longer ones are cut at their end
DEFAULT_OVERLAP = 128  # in tokens, and at most a third of the row


@dataclass(frozen=True)
class Examples:
    train: Squad
    dev: Squad


@dataclass(frozen=True)
class Answer:
    """What the model says to a question."""

    text: str  # "" where it says that there is no answer
    best_text: str  # the best answer that is not ""
    margin: float  # by how much the score of no answer is above that of the best one
    candidates: list[
        dict[str, Any]
    ]  # text, start (in characters), score (sum of two logits) and probability among them


def load(config: FinetuneConfig) -> Examples:
    """Read both files. Raises DataError naming file and place."""
    return Examples(read_squad(Path(config.train)), read_squad(Path(config.dev)))


def encode(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, split: Squad) -> list[Row]:
    """The windows of all questions; `labels`: the answer's first and last token, (0, 0) in windows without it.

    `offsets`: (tokens, 2) ints, the first character of each token of the context and the one behind it, else -1.
    """
    longest = config.tuning.max_seq_len
    most = min(LONGEST_QUESTION, longest // 4)
    parts = tokenizer([q.question for q in split.questions], add_special_tokens=False, return_offsets_mapping=True)
    questions = [
        question.question[: offsets[most - 1][1]] if len(offsets) > most else question.question
        for question, offsets in zip(split.questions, parts["offset_mapping"], strict=True)
    ]
    encoded = tokenizer(
        questions,
        [question.context for question in split.questions],
        truncation="only_second",
        max_length=longest,
        stride=config.tuning.window_overlap or min(DEFAULT_OVERLAP, longest // 3),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    examples, all_offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    rows = []
    for i, (example, pairs) in enumerate(zip(examples, all_offsets, strict=True)):
        of_context = np.array([part == 1 for part in encoded.sequence_ids(i)])
        offsets = np.where(of_context[:, None], pairs, -1)
        row = {name: encoded[name][i] for name in encoded}
        labels = answer_tokens(offsets, split.questions[example].answers)
        rows.append(row | {"labels": labels, "example": example, "offsets": offsets})
    return rows


def answer_tokens(offsets: np.ndarray, answers: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    """Places of the first and last token of the first answer that lies wholly in the window, else (0, 0). Pure."""
    context = np.flatnonzero(offsets[:, 0] >= 0)
    for text, start in answers:
        end = start + len(text)
        inside = context[(offsets[context, 0] < end) & (start < offsets[context, 1])]
        if len(inside) and offsets[context[0], 0] <= start and end <= offsets[context[-1], 1]:
            return int(inside[0]), int(inside[-1])
    return 0, 0


def build_model(config: FinetuneConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    return load_model(AutoModelForQuestionAnswering, config, tokenizer)


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies of first and last tokens, fp32 scalar; labels are (rows, 2)."""
    return F.cross_entropy(_logits(model, batch), batch["labels"], reduction="sum", ignore_index=IGNORE_INDEX)


def predict(model: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """For each row the scores of its tokens as first and as last, (2, tokens) fp32."""
    scores, lengths = _logits(model, batch).cpu().numpy(), batch["attention_mask"].sum(1).tolist()
    return [row[:length].T for row, length in zip(scores, lengths, strict=True)]


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, tokens, 2) fp32; of padding minus infinity."""
    out = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    logits = torch.stack([out.start_logits, out.end_logits], -1).float()
    return logits.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, float("-inf"))


def evaluate(config: FinetuneConfig, split: Squad, rows: list[Row], outputs: list[np.ndarray]) -> dict[str, float]:
    """Exact match and F1 of SQuAD's scripts, in percent; of version 2 also with the best threshold there is."""
    found = answers_of(config.answers, split, rows, outputs)
    predictions = {name: answer.text for name, answer in found.items()}
    metrics = squad_scores(split, predictions, config.answers.language)
    if split.is_v2:
        best, margins = ({n: getattr(a, key) for n, a in found.items()} for key in ("best_text", "margin"))
        metrics["best_f1"], metrics["best_f1_threshold"] = best_f1_threshold(split, best, margins)
    return metrics


def records(
    config: FinetuneConfig, examples: Examples, split: Squad, rows: list[Row], outputs: list[np.ndarray]
) -> list[dict[str, Any]]:
    found = answers_of(config.answers, split, rows, outputs)
    return [
        {
            "id": question.id,
            "question": question.question,
            "answers": [text for text, _ in question.answers],
            "prediction": found[question.id].text,
            "no_answer_margin": round(found[question.id].margin, 6),
            "candidates": found[question.id].candidates,
        }
        for question in split.questions
    ]


def fold_keys(split: Squad) -> list[tuple[int, str]]:
    """Questions about the same text stay together."""
    return [(0, question.context) for question in split.questions]


def select(split: Squad, numbers: np.ndarray) -> Squad:
    return replace(split, questions=[split.questions[number] for number in numbers])


def about(examples: Examples) -> dict[str, Any]:
    return {"is_v2": examples.dev.is_v2}


def read_input(config: FinetuneConfig, about: dict[str, Any], path: Path) -> Examples:
    """The questions of a file; answers in it are not looked at. Whether some have none is as in the dev file."""
    return Examples(Squad([], about["is_v2"]), replace(read_squad(path, is_answered=False), is_v2=about["is_v2"]))


def answers_of(settings: AnswersConfig, split: Squad, rows: list[Row], outputs: list[np.ndarray]) -> dict[str, Answer]:
    """The answer to every question, by its id, from the scores of all of its windows. Pure."""
    windows: dict[int, list[tuple[Row, np.ndarray]]] = defaultdict(list)
    for row, scores in zip(rows, outputs, strict=True):
        windows[row["example"]].append((row, scores))
    return {
        question.id: _answer(settings, question.context, windows[number], split.is_v2)
        for number, question in enumerate(split.questions)
    }


def _answer(settings: AnswersConfig, context: str, windows: list[tuple[Row, np.ndarray]], may_refuse: bool) -> Answer:
    spans: dict[tuple[int, int], float] = {}  # (first, behind last character) -> best score over the windows
    for row, scores in windows:
        for span, score in best_spans(row["offsets"], scores, settings.longest, settings.num_best):
            spans[span] = max(score, spans.get(span, score))
    best = sorted(spans.items(), key=lambda item: -item[1])[: settings.num_best]
    refusal = min(float(scores[:, 0].sum()) for _, scores in windows)
    if not best:  # a context without a token
        return Answer("", "", 0.0, [])
    weights = np.exp(np.array([score for _, score in best]) - best[0][1])
    candidates: list[dict[str, Any]] = [
        {"text": context[start:end], "start": start, "score": round(score, 4), "probability": round(float(weight), 6)}
        for ((start, end), score), weight in zip(best, weights / weights.sum(), strict=True)
    ]
    margin = refusal - best[0][1]
    text = candidates[0]["text"]
    return Answer("" if may_refuse and margin > settings.no_answer_threshold else text, text, margin, candidates)


def best_spans(offsets: np.ndarray, scores: np.ndarray, longest: int, num: int) -> list[tuple[tuple[int, int], float]]:
    """The `num` best ((first, behind last character), score) of a window, at most `longest` tokens each. Pure.

    `scores` is (2, tokens) fp32: of each token as the first and as the last one.
    """
    context = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(context):
        return []
    first, last = scores[0, context], scores[1, context]
    width = min(longest, len(context))
    sums = np.full((len(context), width), -np.inf)  # (first token, tokens behind it)
    for more in range(width):
        sums[: len(context) - more, more] = first[: len(context) - more] + last[more:]
    places = np.argsort(-sums, axis=None, kind="stable")[:num]
    found = []
    for start, more in zip(*np.unravel_index(places, sums.shape), strict=True):
        if np.isfinite(sums[start, more]):
            span = int(offsets[context[start], 0]), int(offsets[context[start + more], 1])
            found.append((span, float(sums[start, more])))
    return found
