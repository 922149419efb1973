"""Text classification, of single texts and of pairs. See `finetune/tasks/__init__.py` for the shape of a task file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from configs.load import ConfigError
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.metrics import classification_metrics
from finetune.models import load_labeller
from finetune.tasks import IGNORE_INDEX, Row
from finetune.texts import Texts, encode_texts, mean_of_windows, read_rows

LABEL = "label"


@dataclass(frozen=True)
class Split:
    texts: list[Texts]
    labels: np.ndarray  # (examples,) int64
    weights: np.ndarray  # (labels,) fp64: of each label in the loss


@dataclass(frozen=True)
class Examples:
    label_names: list[str]
    train: Split
    dev: Split


def load(config: FinetuneConfig) -> Examples:
    """Read both files. Labels are named by the training file, sorted. Raises DataError naming file and line."""
    train, dev = (
        read_rows(Path(file), config.text_keys, config.label_key, config.columns) for file in (config.train, config.dev)
    )
    names = sorted({label for _, label, _ in train}, key=_as_number)
    if len(names) < 2:
        raise DataError(f"{config.train}: all examples have the label {names[0]!r}; a classifier needs at least two")
    index = {name: number for number, name in enumerate(names)}
    for _, label, place in dev:
        if label not in index:
            raise DataError(f"{place}: label {label!r} does not occur in {config.train} (labels there: {names})")

    def split(rows: list[tuple[Texts, str, str]]) -> Split:
        return Split([texts for texts, _, _ in rows], np.array([index[label] for _, label, _ in rows]), weights)

    weights = label_weights(config.tuning.class_weights, names, [index[label] for _, label, _ in train])
    return Examples(names, split(train), split(dev))


def label_weights(wanted: str | dict[str, float] | None, names: list[str], labels: list[int]) -> np.ndarray:
    """The weight of each label in the loss, (labels,) fp64. Raises ConfigError for a label that does not occur. Pure.

    Balanced is examples / (labels x examples of this label), so the weights of all examples have the mean 1.
    """
    if wanted is None:
        return np.ones(len(names))
    if not isinstance(wanted, dict):
        return len(labels) / (len(names) * np.bincount(labels, minlength=len(names)))
    if unknown := wanted.keys() - set(names):
        raise ConfigError(f"tuning.class_weights: there is no label {min(unknown)!r}; labels are {', '.join(names)}")
    return np.array([wanted.get(name, 1.0) for name in names])


def encode(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Row]:
    """The rows of all texts; `labels` is the label's number, of each window that of the whole text."""
    rows = encode_texts(tokenizer, split.texts, config.tuning.max_seq_len, config.tuning.window_overlap)
    rows = [row | {"labels": int(split.labels[row["example"]])} for row in rows]
    if config.tuning.class_weights is None:
        return rows
    return [row | {"weight": float(split.weights[row["labels"]])} for row in rows]


def build_model(config: FinetuneConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    return load_labeller(AutoModelForSequenceClassification, config, tokenizer, examples.label_names)


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies, fp32 scalar, each times its `weight` if there is one; labels are (rows,)."""
    losses = F.cross_entropy(_logits(model, batch), batch["labels"], reduction="none", ignore_index=IGNORE_INDEX)
    return (losses * batch["weight"]).sum() if "weight" in batch else losses.sum()


def predict(model: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """For each row the probability of each label, (labels,) fp32."""
    return list(_logits(model, batch).softmax(-1).cpu().numpy())


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, labels) fp32."""
    return model(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "weight")}).logits.float()


def evaluate(
    config: FinetuneConfig, split: Split, rows: list[Row], probabilities: list[np.ndarray]
) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of the most probable labels, over a text's windows on average."""
    of_texts = mean_of_windows(rows, probabilities)
    return classification_metrics(split.labels, of_texts.argmax(1), of_texts.shape[1])


def records(
    config: FinetuneConfig, examples: Examples, split: Split, rows: list[Row], probabilities: list[np.ndarray]
) -> list[dict[str, Any]]:
    of_texts = mean_of_windows(rows, probabilities)
    return [
        {
            "text": texts[0] if len(texts) == 1 else list(texts),
            "label": examples.label_names[label],
            "prediction": examples.label_names[int(row.argmax())],
            "probability": round(float(row.max()), 6),
        }
        for texts, label, row in zip(split.texts, split.labels, of_texts, strict=True)
    ]


def about(examples: Examples) -> dict[str, Any]:
    return {"label_names": examples.label_names}


def read_input(config: FinetuneConfig, about: dict[str, Any], path: Path) -> Examples:
    """The texts of a file; what its labels are is not looked at."""
    texts = [texts for texts, _, _ in read_rows(path, config.text_keys, None, config.columns)]
    names = about["label_names"]
    weights = np.ones(len(names))
    return Examples(names, *(Split(of, np.zeros(len(of), np.int64), weights) for of in ([], texts)))


def fold_keys(split: Split) -> list[tuple[int, int]]:
    """Every label is spread over all folds."""
    return [(int(label), number) for number, label in enumerate(split.labels)]


def select(split: Split, numbers: np.ndarray) -> Split:
    return replace(split, texts=[split.texts[number] for number in numbers], labels=split.labels[numbers])


def _as_number(name: str) -> tuple[int, float, str]:
    """Sort 2 before 10, and numbers before words."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
