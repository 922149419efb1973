"""Tables of texts: read from files, encoded as rows of token ids, a long text as several of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_pipeline.shards import DataError
from data_pipeline.sources import open_bytes
from finetune.tasks import Row

Texts = tuple[str, ...]  # one text, or two


def read_rows(
    path: Path, text_keys: list[str], label_key: str | None, columns: list[str] | None = None
) -> list[tuple[Texts, str, str]]:
    """(texts, label, file:line) of every example of a file of `read_records`; without a key the label is "".

    Raises DataError for a missing column.
    """
    rows = []
    for record, place in read_records(path, columns):
        for key in [*text_keys, label_key] if label_key else text_keys:
            if record.get(key) is None:
                found = ", ".join(str(name) for name in record)
                cure = "set text_keys and label_key" if label_key else "set text_keys"
                raise DataError(f"{place}: has no `{key}` (found: {found}); {cure}")
        label = str(record[label_key]) if label_key else ""
        rows.append((tuple(str(record[key]) for key in text_keys), label, place))
    return rows


def read_records(path: Path, columns: list[str] | None = None) -> list[tuple[dict[str, Any], str]]:
    """(record, file:line) of every line of a .jsonl(.gz|.zst), .tsv or .csv file.

    A .tsv or .csv starts with the names of its columns, unless these are given as `columns`. Raises DataError for a
    missing file, a broken line or an empty file.
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
        lines, names = io.StringIO(content, newline=""), columns or None
        if path.suffix == ".tsv" or "\t" in content.partition("\n")[0]:
            # a quotation mark is text there, as in GLUE's files and in STS-B's, which are called .csv
            reader = csv.DictReader(lines, names, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(lines, names)
        records = [(dict(record), f"{path}:{reader.line_num}") for record in reader]
    else:
        raise DataError(f"{path}: unknown kind of file; known: .jsonl, .jsonl.gz, .jsonl.zst, .tsv, .csv")
    if not records:
        raise DataError(f"{path}: holds no examples")
    return records


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[Texts], max_seq_len: int, overlap: int | None
) -> list[Row]:
    """Token ids with special tokens, at most `max_seq_len` of them; what is longer is cut.

    With `overlap`, a longer text becomes several rows, each of which begins with the last `overlap` tokens of the one
    before.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    windows: dict[str, Any] = {} if overlap is None else {"return_overflowing_tokens": True, "stride": overlap}
    encoded = tokenizer(*columns, truncation=True, max_length=max_seq_len, **windows)
    example = encoded.pop("overflow_to_sample_mapping", range(len(texts)))
    return [{name: encoded[name][i] for name in encoded} | {"example": example[i]} for i in range(len(example))]


def mean_of_windows(rows: list[Row], outputs: list[np.ndarray]) -> np.ndarray:
    """(examples, ...): the mean over each example's rows; `outputs` is one array for each row."""
    example = np.array([row["example"] for row in rows])
    total = np.zeros((example.max() + 1, *np.shape(outputs[0])))
    np.add.at(total, example, np.stack(outputs))
    return (total.T / np.bincount(example)).T


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
