"""Tasks put to a causal model as text, without training, as GPT-2 and GPT-3 were evaluated (Radford et al. 2019, Brown
et al. 2020): a prompt that may show some solved examples, then the likelihoods of what could follow it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.evaluation import EvaluationConfig, EvaluationTask
from configs.load import ConfigError
from data_pipeline import order
from data_pipeline.shards import DataError
from finetune.likelihoods import Request, Score, Scorer, begin_of_text
from finetune.prompts import columns_of, encode_continuations, encode_prompts, fill
from finetune.texts import read_records


@dataclass(frozen=True)
class Question:
    """What stands before the answer, the answers there are, and which of them is right."""

    prompt: str
    options: list[str]  # of a cloze only the target
    right: int

    @property
    def solved(self) -> str:
        """The question with its answer, as an example for others."""
        return self.prompt + _behind(self.prompt, self.options[self.right])


@dataclass(frozen=True)
class Asked:
    """A question as it was put: behind `num_shots` examples, or as many as fit."""

    question: Question
    prompt: str
    num_shots: int
    scores: list[Score]  # of the options
    unconditional: list[Score]  # of the options behind a prompt that says nothing; empty where there is none


def read_questions(task: EvaluationTask, file: str) -> list[Question]:
    """The questions of a file. Raises DataError naming file and line of one that the templates do not fit."""
    questions = []
    for record, place in read_records(Path(file), task.columns):
        columns = {str(key): str(value) for key, value in record.items() if value is not None}
        if task.type == "choice":
            options = _options(task, record, columns, place)
            questions.append(
                Question(_fill(task.prompt, columns, place), options, _right(task, columns, options, place))
            )
        elif task.last_word_of:
            words = _fill(f"{{{task.last_word_of}}}", columns, place).strip()
            before, _, last = words.rpartition(" ")
            if not before:
                raise DataError(f"{place}: `{task.last_word_of}` has no two words, so none comes before the last one")
            questions.append(Question(before, [last], 0))
        else:
            questions.append(
                Question(_fill(task.prompt, columns, place), [_fill(task.target or "", columns, place)], 0)
            )
    return questions


def _options(task: EvaluationTask, record: dict[str, Any], columns: dict[str, str], place: str) -> list[str]:
    if not task.options_key:
        return [_fill(option, columns, place) for option in task.options]
    found = record.get(task.options_key)
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"{place}: `{task.options_key}` is {found!r}, expected a list of two options or more")
    return [str(option) for option in found]


def _right(task: EvaluationTask, columns: dict[str, str], options: list[str], place: str) -> int:
    label = _fill(f"{{{task.label_key}}}", columns, place)
    labels = task.labels or [str(number) for number in range(len(options))]
    if label not in labels[: len(options)]:
        raise DataError(
            f"{place}: `{task.label_key}` is {label!r}, expected one of {labels[: len(options)]}; set `labels`"
        )
    return labels.index(label)


def _fill(template: str, columns: Mapping[str, str], place: str) -> str:
    for name in columns_of(template):
        if name not in columns:
            raise DataError(f"{place}: has no `{name}` (found: {', '.join(columns)})")
    return fill(template, columns)


def _behind(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: behind a space, unless the prompt ends with one or a line."""
    return answer if not prompt or prompt[-1].isspace() else f" {answer}"


def ask(
    config: EvaluationConfig,
    task: EvaluationTask,
    num_shots: int,
    questions: list[Question],
    shown: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> list[Asked]:
    """Every question behind `num_shots` of `shown`, drawn for each by the seed, fewer where they do not fit.

    Where `task.train` is `task.file` itself no question is its own example.
    """
    begin = begin_of_text(tokenizer, config.model)
    if num_shots > len(shown) - (task.train == task.file) and num_shots:
        raise ConfigError(f"num_shots={num_shots}: {task.train} has only {len(shown)} examples")
    prompts, used = [], []
    for number, question in enumerate(questions):
        examples = _draw(config.seed, number, num_shots, shown, own=number if task.train == task.file else None)
        prompt = _prompt(task, examples, question)
        while examples and _num_tokens(tokenizer, prompt, question) > scorer.max_seq_len:
            examples = examples[1:]
            prompt = _prompt(task, examples, question)
        prompts.append(prompt)
        used.append(len(examples))
    pairs = [(prompt, option) for prompt, q in zip(prompts, questions, strict=True) for option in q.options]
    scores = iter(scorer(requests_of(tokenizer, pairs, begin, scorer.max_seq_len)))
    without: Any = iter(())
    if task.unconditional_prompt is not None:
        pairs = [(task.unconditional_prompt, option) for question in questions for option in question.options]
        without = iter(scorer(requests_of(tokenizer, pairs, begin, scorer.max_seq_len)))
    asked = []
    for question, prompt, num in zip(questions, prompts, used, strict=True):
        own = [next(scores) for _ in question.options]
        unconditional = [next(without) for _ in question.options] if task.unconditional_prompt is not None else []
        asked.append(Asked(question, prompt, num, own, unconditional))
    return asked


def _draw(seed: int, number: int, num_shots: int, shown: list[Question], own: int | None) -> list[Question]:
    """`num_shots` of `shown` for question `number`, without its own place `own`. Pure."""
    wanted = np.arange(min(num_shots + 1, len(shown)))
    places = order.permute(wanted, len(shown), order.key(seed, "shots", number)).tolist() if num_shots else []
    return [shown[place] for place in places if place != own][:num_shots]


def _prompt(task: EvaluationTask, examples: list[Question], question: Question) -> str:
    head = [task.description] if task.description else []
    return task.separator.join([*head, *(example.solved for example in examples), question.prompt])


def _num_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, question: Question) -> int:
    texts = [prompt + _behind(prompt, option) for option in question.options]
    return max(len(ids) for ids in encode_prompts(tokenizer, texts))


def requests_of(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], begin: int, max_seq_len: int
) -> list[Request]:
    """The requests for (prompt, answer); spaces at a prompt's end belong to the answer, where tokenizers have them."""
    prompts = [prompt.rstrip() for prompt, _ in pairs]
    answers = [
        prompt[len(bare) :] + _behind(prompt, answer) for bare, (prompt, answer) in zip(prompts, pairs, strict=True)
    ]
    contexts = [ids or [begin] for ids in encode_prompts(tokenizer, prompts)]
    continuations = encode_continuations(tokenizer, prompts, answers)
    for (_, answer), ids in zip(pairs, continuations, strict=True):
        if not 0 < len(ids) <= max_seq_len:
            raise DataError(f"the answer {answer[:60]!r} has {len(ids)} tokens, expected 1 to {max_seq_len}")
    return [Request(*pair) for pair in zip(contexts, continuations, strict=True)]


def evaluate_choice(asked: list[Asked]) -> dict[str, float]:
    """The share of questions whose right option has the largest log-likelihood: as it is, by token, by character and,
    where there is a prompt that says nothing, less the one behind that (Brown et al. 2020). Pure.

    `majority` is what always taking the most frequent place of the right option would reach.
    """
    rights = [one.question.right for one in asked]
    metrics = {}
    for name in rankings(asked[0]):
        hits = [int(np.argmax(rankings(one)[name])) == one.question.right for one in asked]
        metrics[name] = float(np.mean(hits))
    metrics["accuracy_stderr"] = standard_error(metrics["accuracy"], len(asked))
    metrics["majority"] = Counter(rights).most_common(1)[0][1] / len(asked)
    return metrics | _counts(asked)


def rankings(one: Asked) -> dict[str, list[float]]:
    """For each metric of a choice the numbers of which the largest is the prediction."""
    sums = [score.log_likelihood for score in one.scores]
    found = {
        "accuracy": sums,
        "accuracy_per_token": [score.log_likelihood / score.num_tokens for score in one.scores],
        "accuracy_per_character": [
            value / max(1, len(option)) for value, option in zip(sums, one.question.options, strict=True)
        ],
    }
    if one.unconditional:
        found["accuracy_unconditional"] = [
            value - other.log_likelihood for value, other in zip(sums, one.unconditional, strict=True)
        ]
    return found


def evaluate_cloze(asked: list[Asked]) -> dict[str, float]:
    """The share of targets all of whose tokens are the most probable ones, and the perplexity of a target. Pure."""
    accuracy = float(np.mean([one.scores[0].is_greedy for one in asked]))
    mean = float(np.mean([one.scores[0].log_likelihood for one in asked]))
    metrics = {"accuracy": accuracy, "accuracy_stderr": standard_error(accuracy, len(asked))}
    return metrics | {"target_perplexity": math.exp(min(700.0, -mean))} | _counts(asked)


def _counts(asked: list[Asked]) -> dict[str, float]:
    return {"num_examples": len(asked), "mean_shots": float(np.mean([one.num_shots for one in asked]))}


def standard_error(share: float, num: int) -> float:
    """Of a share of `num` questions, as a binomial's (with num - 1 below, as of a sample)."""
    return math.sqrt(share * (1 - share) / (num - 1)) if num > 1 else math.nan


def record_of(task: EvaluationTask, one: Asked) -> dict[str, Any]:
    """What is written of a question into the file of predictions."""
    line: dict[str, Any] = {"prompt": one.prompt, "num_shots": one.num_shots}
    if task.type == "cloze":
        score = one.scores[0]
        return line | {
            "target": one.question.options[0],
            "is_right": score.is_greedy,
            "log_likelihood": round(score.log_likelihood, 6),
        }
    best = int(np.argmax(rankings(one)["accuracy"]))
    options = one.question.options
    return line | {
        "options": options,
        "label": options[one.question.right],
        "prediction": options[best],
        "log_likelihoods": [round(score.log_likelihood, 6) for score in one.scores],
    }
