"""Tagging of words: named entities (BIO, BIOES, IO), parts of speech. `finetune/tasks/__init__.py` has the shape.

A word's tag is predicted at its first piece, as BERT did (Devlin et al. 2019, 5.3). A sentence that is too long becomes
several rows, so every word has a prediction; with `document_context` the room that is left of a row is filled with the
sentences around it, which have no targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from finetune.conll import Sentence, read_sentences, read_words
from finetune.models import load_labeller
from finetune.spans import allowed, are_spans, best_sequence, entity_scores, read_spans, scheme_of, write_tags
from finetune.tasks import IGNORE_INDEX, Row

LABEL = "tags"
Pieces = list[int]


@dataclass(frozen=True)
class Split:
    sentences: list[Sentence]
    label_names: list[str]
    scheme: str | None  # BIO, BIOES or IO; None: tags are no spans
    constrained: bool  # decode to legal sequences only


@dataclass(frozen=True)
class Examples:
    label_names: list[str]
    train: Split
    dev: Split


def load(config: FinetuneConfig) -> Examples:
    """Read both files; the training file's tags, in `tagging.scheme`, are the labels. Raises DataError."""
    train, dev = (read_sentences(Path(file), config.tagging.column) for file in (config.train, config.dev))
    for file, sentences in ((config.train, train), (config.dev, dev)):
        if config.tagging.document_context and not any(one.document for one in sentences):
            raise DataError(f"{file}: names no documents (-DOCSTART-, # newdoc), which tagging.document_context needs")
    tags = [tag for sentence in train for tag in sentence.tags]
    scheme = scheme_of(tags) if are_spans(tags) else None
    if config.tagging.scheme:
        if scheme is None:
            raise DataError(
                f"{config.train}: tagging.scheme={config.tagging.scheme}, but its tags ({tags[0]}, ...) are no spans"
            )
        scheme = config.tagging.scheme
        train = [
            Sentence(one.words, write_tags(read_spans(one.tags), len(one.words), scheme), one.document) for one in train
        ]
    names = sorted({tag for sentence in train for tag in sentence.tags})
    if len(names) < 2:
        raise DataError(f"{config.train}: all words have the tag {names[0]!r}; a tagger needs at least two")
    return Examples(names, *(Split(one, names, scheme, config.tagging.constrained) for one in (train, dev)))


def encode(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Row]:
    """Rows of at most max_seq_len: a sentence's pieces, one row or several, with a label at each word's first piece."""
    prefix, suffix = special_tokens(tokenizer)
    room = config.tuning.max_seq_len - len(prefix) - len(suffix)
    pieces = word_pieces(tokenizer, split.sentences, room)
    index = {name: number for number, name in enumerate(split.label_names)}
    rows = []
    for number, sentence in enumerate(split.sentences):
        for begin, end in cut(pieces[number], room):
            own = [piece for word in pieces[number][begin:end] for piece in word]
            labels = []
            for word, tag in zip(pieces[number][begin:end], sentence.tags[begin:end], strict=True):
                # A tag that only `dev` has is no label; it marks a place for a prediction and counts as a mistake.
                labels += [index.get(tag, 0)] + [IGNORE_INDEX] * (len(word) - 1)
            before: Pieces = []
            after: Pieces = []
            if config.tagging.document_context:
                before, after = context(split.sentences, pieces, number, begin, end, room - len(own))
            ids = [*prefix, *before, *own, *after, *suffix]
            around = [IGNORE_INDEX] * (len(prefix) + len(before)), [IGNORE_INDEX] * (len(after) + len(suffix))
            row: Row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            if "token_type_ids" in tokenizer.model_input_names:
                row["token_type_ids"] = [0] * len(ids)
            rows.append(row | {"labels": [*around[0], *labels, *around[1]], "example": number})
    return rows


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Pieces, Pieces]:
    """What the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def word_pieces(tokenizer: PreTrainedTokenizerBase, sentences: list[Sentence], room: int) -> list[list[Pieces]]:
    """The pieces of each word of each sentence, as in running text: behind a space but for the first. At least one."""
    texts = [[(" " if number else "") + word for number, word in enumerate(one.words)] for one in sentences]
    distinct = list(dict.fromkeys(text for one in texts for text in one))
    encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
    known = {text: list(ids[:room]) or [unknown] for text, ids in zip(distinct, encoded, strict=True)}
    return [[known[text] for text in one] for one in texts]


def cut(words: list[Pieces], room: int) -> list[tuple[int, int]]:
    """Ranges of words, in order, of at most `room` pieces each: a sentence that fits is one range. Pure."""
    ranges, begin, size = [], 0, 0
    for number, word in enumerate(words):
        if size + len(word) > room:
            ranges.append((begin, number))
            begin, size = number, 0
        size += len(word)
    return [*ranges, (begin, len(words))]


def context(
    sentences: list[Sentence], pieces: list[list[Pieces]], number: int, begin: int, end: int, room: int
) -> tuple[Pieces, Pieces]:
    """Up to `room` pieces of the same document before and behind words [begin, end) of a sentence, half on each side.

    What one side cannot use the other gets.
    """
    before: Pieces = [piece for word in pieces[number][:begin] for piece in word]
    after: Pieces = [piece for word in pieces[number][end:] for piece in word]
    same = sentences[number].document
    left, right = number - 1, number + 1
    while len(before) < room and left >= 0 and sentences[left].document == same:
        before = [piece for word in pieces[left] for piece in word] + before
        left -= 1
    while len(after) < room and right < len(sentences) and sentences[right].document == same:
        after += [piece for word in pieces[right] for piece in word]
        right += 1
    num_before = min(len(before), max(room // 2, room - len(after)))
    return before[len(before) - num_before :], after[: room - num_before]


def build_model(config: FinetuneConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    return load_labeller(AutoModelForTokenClassification, config, tokenizer, examples.label_names)


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies over all first pieces, fp32 scalar; labels are (rows, tokens)."""
    logits = _logits(model, batch)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


def predict(model: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """For each row the log probabilities of its words, (words, labels) fp32."""
    scores = _logits(model, batch).log_softmax(-1).cpu().numpy()
    targets = (batch["labels"] != IGNORE_INDEX).cpu().numpy()
    return [row[at] for row, at in zip(scores, targets, strict=True)]


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, tokens, labels) fp32."""
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()


def evaluate(config: FinetuneConfig, split: Split, rows: list[Row], outputs: list[np.ndarray]) -> dict[str, float]:
    """The share of words with the right tag; of spans also F1, precision and recall, and F1 of each type."""
    predicted = decode(split, rows, outputs)
    true = [one.tags for one in split.sentences]
    if split.scheme:  # in the scheme that was trained, or no IO tag would equal a B of the file
        true = [write_tags(read_spans(tags), len(tags), split.scheme) for tags in true]
    pairs = [pair for one, other in zip(true, predicted, strict=True) for pair in zip(one, other, strict=True)]
    accuracy = sum(tag == other for tag, other in pairs) / len(pairs)
    if not split.scheme:
        return {"accuracy": accuracy}
    return entity_scores([one.tags for one in split.sentences], predicted) | {"accuracy": accuracy}


def decode(split: Split, rows: list[Row], outputs: list[np.ndarray]) -> list[list[str]]:
    """The tags of each sentence from its rows: each word's most probable one, or the best legal sequence."""
    rules = allowed(split.label_names, split.scheme) if split.scheme and split.constrained else None
    parts: list[list[np.ndarray]] = [[] for _ in split.sentences]
    for row, output in zip(rows, outputs, strict=True):
        parts[row["example"]].append(output)
    tagged = []
    for scores in map(np.concatenate, parts):
        best: Sequence[int] = best_sequence(scores, *rules) if rules else scores.argmax(1).tolist()
        tagged.append([split.label_names[label] for label in best])
    return tagged


def records(
    config: FinetuneConfig, examples: Examples, split: Split, rows: list[Row], outputs: list[np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {"words": sentence.words, "tags": sentence.tags, "prediction": tags}
        for sentence, tags in zip(split.sentences, decode(split, rows, outputs), strict=True)
    ]


def fold_keys(split: Split) -> list[tuple[int, int]]:
    """Sentences of the same document stay together, where the file names documents."""
    return [(0, one.document or -1 - number) for number, one in enumerate(split.sentences)]


def select(split: Split, numbers: np.ndarray) -> Split:
    return replace(split, sentences=[split.sentences[number] for number in numbers])


def about(examples: Examples) -> dict[str, Any]:
    return {"label_names": examples.label_names, "scheme": examples.dev.scheme}


def read_input(config: FinetuneConfig, about: dict[str, Any], path: Path) -> Examples:
    """The sentences of a file; tags in it are not looked at."""
    names, scheme, constrained = about["label_names"], about["scheme"], config.tagging.constrained
    splits = (Split(sentences, names, scheme, constrained) for sentences in ([], read_words(path)))
    return Examples(names, *splits)
