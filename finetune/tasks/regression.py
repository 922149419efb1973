"""A number for a text or for a pair of texts, such as their similarity (STS-B)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.metrics import regression_metrics
from finetune.models import load_model
from finetune.tasks import Row
from finetune.texts import Texts, encode_texts, mean_of_windows, read_rows

LABEL = "label"


@dataclass(frozen=True)
class Split:
    texts: list[Texts]
    values: np.ndarray  # (examples,) fp64


@dataclass(frozen=True)
class Examples:
    train: Split
    dev: Split


def load(config: FinetuneConfig) -> Examples:
    """Read both files. Raises DataError naming file and line of a label that is no finite number."""
    return Examples(*(_split(Path(file), config) for file in (config.train, config.dev)))


def _split(path: Path, config: FinetuneConfig) -> Split:
    rows = read_rows(path, config.text_keys, config.label_key, config.columns)
    return Split([texts for texts, _, _ in rows], np.array([_number(label, place) for _, label, place in rows]))


def _number(label: str, place: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{place}: label {label!r} is no number; a regression needs one, or use task=classification")
    return value


def encode(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Row]:
    """The rows of all texts; `labels` is the number, of each window that of the whole text."""
    rows = encode_texts(tokenizer, split.texts, config.tuning.max_seq_len, config.tuning.window_overlap)
    return [row | {"labels": float(split.values[row["example"]])} for row in rows]


def build_model(config: FinetuneConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    return load_model(AutoModelForSequenceClassification, config, tokenizer, num_labels=1, problem_type="regression")


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the squared errors, fp32 scalar; labels are (rows,) fp32."""
    values, labels = _values(model, batch), batch["labels"]
    return (values - torch.where(labels.isnan(), values.detach(), labels)).square().sum()


def predict(model: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """For each row its number, () fp32."""
    return list(_values(model, batch).cpu().numpy())


def _values(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows,) fp32."""
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float().squeeze(-1)


def evaluate(config: FinetuneConfig, split: Split, rows: list[Row], outputs: list[np.ndarray]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the root of the mean squared error; a text's windows on average."""
    return regression_metrics(split.values, mean_of_windows(rows, outputs))


def records(
    config: FinetuneConfig, examples: Examples, split: Split, rows: list[Row], outputs: list[np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {
            "text": texts[0] if len(texts) == 1 else list(texts),
            "label": float(value),
            "prediction": round(float(prediction), 6),
        }
        for texts, value, prediction in zip(split.texts, split.values, mean_of_windows(rows, outputs), strict=True)
    ]


def fold_keys(split: Split) -> list[tuple[int, int]]:
    return [(0, number) for number in range(len(split.texts))]


def select(split: Split, numbers: np.ndarray) -> Split:
    return Split([split.texts[number] for number in numbers], split.values[numbers])


def about(examples: Examples) -> dict[str, Any]:
    return {}


def read_input(config: FinetuneConfig, about: dict[str, Any], path: Path) -> Examples:
    """The texts of a file; what its labels are is not looked at."""
    texts = [texts for texts, _, _ in read_rows(path, config.text_keys, None, config.columns)]
    return Examples(Split([], np.zeros(0)), Split(texts, np.zeros(len(texts))))
