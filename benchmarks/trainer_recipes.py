"""The peer of `benchmarks.finetune_minilm`: transformers' Trainer as its example scripts for each task use it.

    python -m benchmarks.trainer_recipes --config FILE [key=value ...]

takes a configuration of `millstream finetune` and gives Trainer the same model, files, epochs, batches, rate, warmup,
decay, dropout, precision and seeds. All else is as in run_glue.py, run_ner.py and run_qa.py by their documentation:
rows in the order of Trainer's sampler, a batch padded to its longest row, words of the tagger encoded in their sentence
and what is longer than a row left out, the scripts' losses, and for answers the best of 20 first and 20 last tokens.
Files are read and predictions scored by the same functions as ours, whose scores are those of the official scripts.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from configs.load import load_finetune
from configs.tuning import FinetuneConfig
from finetune.metrics import classification_metrics, regression_metrics
from finetune.models import DROPOUTS
from finetune.spans import entity_scores
from finetune.squad import Squad, squad_scores
from finetune.tasks import classification, qa, regression, tagging
from pretrain import runtime

NUM_BEST, LONGEST_ANSWER = 20, 30
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    train: Rows
    dev: Rows
    collator: Any
    build: Callable[[], Any]
    score: Callable[[Any], dict[str, float]]  # from Trainer's predictions for `dev`


def main() -> int:
    file, overrides = runtime.launch_arguments(__doc__.splitlines()[0])
    config = load_finetune(file, overrides)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    recipe = RECIPES[config.task](config, tokenizer)
    tuning, results = config.tuning, []
    for seed in tuning.seeds:
        set_seed(seed)
        arguments = TrainingArguments(
            tempfile.mkdtemp(),
            per_device_train_batch_size=tuning.batch_size,
            per_device_eval_batch_size=tuning.micro_batch_size,
            num_train_epochs=tuning.num_epochs,
            learning_rate=tuning.optimizer.lr,
            lr_scheduler_type="linear",
            warmup_steps=tuning.warmup_share,  # below 1 it is a share
            weight_decay=tuning.optimizer.weight_decay,
            adam_beta1=tuning.optimizer.betas[0],
            adam_beta2=tuning.optimizer.betas[1],
            max_grad_norm=tuning.optimizer.grad_clip,
            bf16=tuning.precision == "bf16",
            use_cpu=os.environ.get("DS_ACCELERATOR") == "cpu",
            seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            recipe.build(), arguments, recipe.collator, train_dataset=recipe.train, processing_class=tokenizer
        )
        trainer.train()
        dev: Any = recipe.dev  # a list has all that Trainer asks of a Dataset
        results.append(recipe.score(trainer.predict(dev).predictions))
    summary = {
        name: {"mean": float(np.mean([result[name] for result in results])), "per_seed": [r[name] for r in results]}
        for name in results[0]
    }
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    (Path(config.run_dir) / "results.json").write_text(json.dumps({"seeds": tuning.seeds, **summary}, indent=2))
    return 0


def load(auto: Any, config: FinetuneConfig, **head: Any) -> Any:
    """The model with a new head, as from_pretrained gives it, and the configuration's dropout."""
    settings = AutoConfig.from_pretrained(config.model, **head)
    for name in DROPOUTS:
        if config.tuning.dropout is not None and hasattr(settings, name):
            setattr(settings, name, config.tuning.dropout)
    return auto.from_pretrained(config.model, config=settings)


def texts(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """run_glue.py: texts are cut at max_seq_len, also where ours takes windows."""
    is_regression = config.task == "regression"
    examples: Any = (regression if is_regression else classification).load(config)
    num_labels = 1 if is_regression else len(examples.label_names)

    def encode(split: Any) -> Rows:
        columns = [list(column) for column in zip(*split.texts, strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=config.tuning.max_seq_len)
        labels = split.values if is_regression else split.labels
        return [{key: encoded[key][i] for key in encoded} | {"label": labels[i].item()} for i in range(len(labels))]

    def score(logits: np.ndarray) -> dict[str, float]:
        if is_regression:
            return regression_metrics(examples.dev.values, logits.squeeze(-1))
        return classification_metrics(examples.dev.labels, logits.argmax(-1), num_labels)

    return Recipe(
        encode(examples.train),
        encode(examples.dev),
        DataCollatorWithPadding(tokenizer),
        lambda: load(AutoModelForSequenceClassification, config, num_labels=num_labels),
        score,
    )


def tags(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """run_ner.py: a label at each word's first piece, the most probable tag of each word that is in the row."""
    examples = tagging.load(config)
    index = {name: number for number, name in enumerate(examples.label_names)}

    def encode(split: tagging.Split) -> Rows:
        sentences = [sentence.words for sentence in split.sentences]
        encoded = tokenizer(sentences, is_split_into_words=True, truncation=True, max_length=config.tuning.max_seq_len)
        rows = []
        for i, sentence in enumerate(split.sentences):
            words, labels = encoded.word_ids(i), []
            for place, word in enumerate(words):
                is_first = word is not None and (place == 0 or words[place - 1] != word)
                labels.append(index.get(sentence.tags[word], 0) if is_first else -100)
            rows.append({key: encoded[key][i] for key in encoded} | {"labels": labels})
        return rows

    train, dev = encode(examples.train), encode(examples.dev)

    def score(logits: np.ndarray) -> dict[str, float]:
        """A word that is not in its row, because that was cut or it has no piece, counts as wrong, or as outside."""
        is_spans = examples.dev.scheme is not None
        predicted = []
        for i, (row, sentence) in enumerate(zip(dev, examples.dev.sentences, strict=True)):
            best = logits[i].argmax(-1)
            found = dict.fromkeys(range(len(sentence.words)), "O" if is_spans else "none")
            words = tokenizer(
                sentence.words, is_split_into_words=True, truncation=True, max_length=config.tuning.max_seq_len
            ).word_ids()
            for place, label in enumerate(row["labels"]):
                if label != -100:
                    found[words[place]] = examples.label_names[best[place]]
            predicted.append(list(found.values()))
        true = [sentence.tags for sentence in examples.dev.sentences]
        pairs = [pair for a, b in zip(true, predicted, strict=True) for pair in zip(a, b, strict=True)]
        accuracy = {"accuracy": sum(a == b for a, b in pairs) / len(pairs)}
        return entity_scores(true, predicted) | accuracy if is_spans else accuracy

    return Recipe(
        train,
        dev,
        DataCollatorForTokenClassification(tokenizer),
        lambda: load(AutoModelForTokenClassification, config, num_labels=len(index)),
        score,
    )


def answers(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """run_qa.py with --pad_to_max_length False, which is quicker than its default: batches as long as their rows.

    Windows are those of ours; the labels of run_qa.py are the same places.
    """
    examples = qa.load(config)
    train, dev = qa.encode(config, tokenizer, examples.train), qa.encode(config, tokenizer, examples.dev)

    def rows(windows: list[dict[str, Any]], is_train: bool) -> Rows:
        kept = []
        for window in windows:
            row = {key: window[key] for key in tokenizer.model_input_names if key in window}
            first, last = window["labels"]
            kept.append(row | ({"start_positions": first, "end_positions": last} if is_train else {}))
        return kept

    return Recipe(
        rows(train, True),
        rows(dev, False),
        DataCollatorWithPadding(tokenizer),
        lambda: load(AutoModelForQuestionAnswering, config),
        lambda logits: squad_scores(examples.dev, best_answers(examples.dev, dev, *logits)),
    )


def best_answers(squad: Squad, windows: list[dict[str, Any]], starts: np.ndarray, ends: np.ndarray) -> dict[str, str]:
    """For each question the span with the highest sum of scores over all of its windows, of run_qa.py's candidates."""
    best: dict[int, tuple[float, str]] = defaultdict(lambda: (-np.inf, ""))
    refusal: dict[int, float] = defaultdict(lambda: np.inf)
    for window, start_scores, end_scores in zip(windows, starts, ends, strict=True):
        number, offsets = window["example"], window["offsets"]
        context = squad.questions[number].context
        refusal[number] = min(refusal[number], float(start_scores[0] + end_scores[0]))
        for first in np.argsort(-start_scores[: len(offsets)])[:NUM_BEST]:
            for last in np.argsort(-end_scores[: len(offsets)])[:NUM_BEST]:
                if offsets[first, 0] < 0 or offsets[last, 0] < 0 or not 0 <= last - first < LONGEST_ANSWER:
                    continue
                candidate = float(start_scores[first] + end_scores[last]), context[offsets[first, 0] : offsets[last, 1]]
                best[number] = max(best[number], candidate)
    return {
        question.id: "" if squad.is_v2 and refusal[number] > best[number][0] else best[number][1]
        for number, question in enumerate(squad.questions)
    }


RECIPES = {"classification": texts, "regression": texts, "tagging": tags, "qa": answers}


if __name__ == "__main__":
    sys.exit(main())
