"""Text classification, of single texts and of pairs. See `finetune/tasks/__init__.py` for the shape of a task file."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from configs.schema import FinetuneConfig
from data_pipeline.shards import DataError
from data_pipeline.sources import open_bytes
from finetune.metrics import classification_metrics
from finetune.models import load_model
from finetune.tasks import IGNORE_INDEX, Row


@dataclass(frozen=True)
class Split:
    texts: list[tuple[str, ...]]  # one text, or two
    labels: np.ndarray  # (examples,) int64


@dataclass(frozen=True)
class Examples:
    label_names: list[str]
    train: Split
    dev: Split


def load(config: FinetuneConfig) -> Examples:
    """Read both files. Labels are named by the training file, sorted. Raises DataError naming file and line."""
    train, dev = (read_rows(Path(file), config.text_keys, config.label_key) for file in (config.train, config.dev))
    names = sorted({label for _, label, _ in train}, key=_as_number)
    if len(names) < 2:
        raise DataError(f"{config.train}: all examples have the label {names[0]!r}; a classifier needs at least two")
    index = {name: number for number, name in enumerate(names)}
    for _, label, place in dev:
        if label not in index:
            raise DataError(f"{place}: label {label!r} does not occur in {config.train} (labels there: {names})")

    def split(rows: list[tuple[tuple[str, ...], str, str]]) -> Split:
        return Split([texts for texts, _, _ in rows], np.array([index[label] for _, label, _ in rows]))

    return Examples(names, split(train), split(dev))


def read_rows(path: Path, text_keys: list[str], label_key: str) -> list[tuple[tuple[str, ...], str, str]]:
    """(texts, label, file:line) of every example of a .jsonl(.gz|.zst), .tsv or .csv file.

    A .tsv or .csv starts with the names of its columns. Raises DataError for a missing file or column, a broken line or
    an empty file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open_bytes(str(path)) as file:
        try:
            content = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 (byte {error.start}); convert it") from None
    if ".jsonl" in path.name:
        records = _json_records(path, content)
    elif path.suffix in (".tsv", ".csv"):
        lines = io.StringIO(content, newline="")
        if path.suffix == ".tsv":  # a quotation mark is text there, as in GLUE's files
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(lines)
        records = [(dict(record), f"{path}:{reader.line_num}") for record in reader]
    else:
        raise DataError(f"{path}: unknown kind of file; known: .jsonl, .jsonl.gz, .jsonl.zst, .tsv, .csv")
    if not records:
        raise DataError(f"{path}: holds no examples")
    rows = []
    for record, place in records:
        for key in [*text_keys, label_key]:
            if record.get(key) is None:
                found = ", ".join(str(name) for name in record)
                raise DataError(f"{place}: has no `{key}` (found: {found}); set text_keys and label_key")
        rows.append((tuple(str(record[key]) for key in text_keys), str(record[label_key]), place))
    return rows


def encode(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Row]:
    """Token ids of each example, with special tokens, cut to max_seq_len; `labels` is the label's number."""
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=config.tuning.max_seq_len)
    return [
        {name: encoded[name][i] for name in encoded} | {"labels": int(label)} for i, label in enumerate(split.labels)
    ]


def build_model(config: FinetuneConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    names = dict(enumerate(examples.label_names))
    ids = {name: number for number, name in names.items()}
    return load_model(
        AutoModelForSequenceClassification, config, tokenizer, num_labels=len(names), id2label=names, label2id=ids
    )


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies, fp32 scalar; labels are (rows,)."""
    return F.cross_entropy(_logits(model, batch), batch["labels"], reduction="sum", ignore_index=IGNORE_INDEX)


def predict(model: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """For each row the probability of each label, (labels,) fp32."""
    return list(_logits(model, batch).softmax(-1).cpu().numpy())


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, labels) fp32."""
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()


def evaluate(split: Split, probabilities: list[np.ndarray]) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of the most probable labels."""
    predictions = np.stack(probabilities).argmax(1)
    return classification_metrics(split.labels, predictions, len(probabilities[0]))


def records(examples: Examples, split: Split, probabilities: list[np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "text": texts[0] if len(texts) == 1 else list(texts),
            "label": examples.label_names[label],
            "prediction": examples.label_names[int(row.argmax())],
            "probability": round(float(row.max()), 6),
        }
        for texts, label, row in zip(split.texts, split.labels, probabilities, strict=True)
    ]


def _json_records(path: Path, content: str) -> list[tuple[dict[str, Any], str]]:
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: is not valid JSON ({error}); repair or remove the line") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: is a {type(record).__name__}, expected an object with keys")
            found.append((record, f"{path}:{number}"))
    return found


def _as_number(name: str) -> tuple[int, float, str]:
    """Sort 2 before 10, and numbers before words."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
