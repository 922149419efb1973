"""How well a tokenizer fits a text: bytes and words per token, unknowns, round trips, use of the vocabulary.

Fertility is tokens per word, words being what white space separates (Acs 2019; Rust et al. 2021). It says nothing about
scripts that write no spaces; characters per token does. English and the best served languages are near 1.3, and a
vocabulary that spells a language out in bytes has 5 or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from data_pipeline.encode import EncodeFlat
from data_pipeline.tokenizer import flat_encoder, ordinary_ids

BATCH_CHARACTERS = 1 << 19  # texts that are encoded together
NUM_LONGEST = 10  # tokens that are listed
EXAMPLE_CHARACTERS = 40  # on both sides of the first difference of a failed round trip
ROWS = 20  # of the table in the terminal


@dataclass
class _Counts:
    """Of the texts with one label."""

    seen: np.ndarray  # (vocab,) bool: ids that occurred
    texts: int = 0
    num_bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0
    failures: int = 0
    example: dict[str, str] | None = field(default=None)

    def add(self, other: _Counts) -> None:
        self.seen |= other.seen
        for name in ("texts", "num_bytes", "characters", "words", "tokens", "unknown", "failures"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.example = self.example or other.example

    def to_json(self, used: np.ndarray) -> dict[str, Any]:
        tokens = max(self.tokens, 1)
        return {
            "texts": self.texts,
            "bytes": self.num_bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.num_bytes / tokens,
            "characters_per_token": self.characters / tokens,
            "tokens_per_word": self.tokens / max(self.words, 1),
            "unknown_share": self.unknown / tokens,
            "round_trip_failures": self.failures,
            "round_trip_example": self.example,
            "vocabulary_use": float(self.seen[used].mean()),
        }


def tokenizer_report(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What `tokenizer` makes of `texts`, pairs of a label (a language, a source) and a text; see `prepare_report`."""
    return prepare_report(tokenizer, flat_encoder(tokenizer))(texts)


def prepare_report(
    tokenizer: Tokenizer, encode_flat: EncodeFlat
) -> Callable[[Iterable[tuple[str, str]]], dict[str, Any]]:
    """A function that makes the report of texts; what does not depend on them, a tenth of a second, is done now.

    encode_flat: the tokenizer's `flat_encoder`. The report is {"model", "vocab_size", "compared": what a round
    trip must restore, "longest_tokens": as text, "labels": {label: counts}, "all": counts}. Counts are texts, bytes,
    tokens, bytes_per_token, characters_per_token, tokens_per_word, unknown_share (of the tokens), round_trip_failures
    (texts), round_trip_example (the first failure: {"text", "decoded"} around the first difference, or None) and
    vocabulary_use (share of the ordinary ids that occur).
    """
    layout = orjson.loads(tokenizer.to_str())
    round_trip, used = _RoundTrip(tokenizer, layout), ordinary_ids(tokenizer)
    fixed = {
        "model": layout["model"]["type"],
        "vocab_size": tokenizer.get_vocab_size(),
        "compared": round_trip.compared,
        "longest_tokens": _longest_tokens(tokenizer, used),
    }
    unknown, num_ids = _unknown_id(tokenizer, layout), max(tokenizer.get_vocab().values()) + 1

    def report(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
        counts = _count(texts, encode_flat, round_trip, unknown, num_ids)
        together = _Counts(np.zeros(num_ids, bool))
        for found in counts.values():
            together.add(found)
        return {
            **fixed,
            "labels": {label: counts[label].to_json(used) for label in sorted(counts)},
            "all": together.to_json(used),
        }

    return report


def _count(
    texts: Iterable[tuple[str, str]], encode_flat: EncodeFlat, round_trip: _RoundTrip, unknown: int | None, num_ids: int
) -> dict[str, _Counts]:
    """Counts of the texts of each label."""
    counts: dict[str, _Counts] = {}
    for batch in _batches(texts):
        tokens, lengths = encode_flat([text for _, text in batch], None)
        starts = np.cumsum(lengths) - lengths
        for (label, text), start, length in zip(batch, starts.tolist(), lengths.tolist(), strict=True):
            found = counts.setdefault(label, _Counts(np.zeros(num_ids, bool)))
            ids = tokens[start : start + length]
            found.seen[ids] = True
            found.texts += 1
            found.num_bytes += len(text.encode())
            found.characters += len(text)
            found.words += len(text.split())
            found.tokens += length
            found.unknown += 0 if unknown is None else int((ids == unknown).sum())
            wanted, got = round_trip.texts(text, ids)
            if wanted != got:
                found.failures += 1
                found.example = found.example or _around_difference(wanted, got)
    return counts


def show_tokenizer_report(report: dict[str, Any], console: Console) -> None:
    """Print a report of `tokenizer_report`: the labels with most text, then all together."""
    columns = ("language", "MB", "bytes/token", "tokens/word", "unknown", "failed round trips", "vocabulary used")
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    for column in table.columns[1:]:
        column.justify = "right"
    labels = sorted(report["labels"].items(), key=lambda item: -item[1]["bytes"])
    shown = labels[:ROWS] if len(labels) > 1 else []
    for label, counts in [*shown, ("all", report["all"])]:
        table.add_row(
            label,
            f"{counts['bytes'] / 1e6:,.2f}",
            f"{counts['bytes_per_token']:.2f}",
            f"{counts['tokens_per_word']:.2f}",
            f"{counts['unknown_share']:.2%}",
            f"{counts['round_trip_failures']:,} of {counts['texts']:,}",
            f"{counts['vocabulary_use']:.1%}",
        )
    console.print(f"tokenizer: {report['model']}, {report['vocab_size']:,} tokens", highlight=False)
    console.print(table)
    if len(labels) > len(shown) > 0:
        console.print(f"and {len(labels) - len(shown)} more", highlight=False)
    console.print(f"a round trip restores {report['compared']}", highlight=False)
    if example := report["all"]["round_trip_example"]:
        console.print(f"  {example['text']!r} came back as {example['decoded']!r}", highlight=False, markup=False)
    longest = ", ".join(repr(token) for token in report["longest_tokens"])
    console.print(f"longest tokens: {longest}", highlight=False, markup=False)


class _RoundTrip:
    """What of a text its tokens must restore, and what they do restore."""

    def __init__(self, tokenizer: Tokenizer, layout: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.normalize: Callable[[str], str] = str
        if tokenizer.normalizer is not None:
            self.normalize = tokenizer.normalizer.normalize_str
        model = layout["model"]
        self.prefix = model["continuing_subword_prefix"] if model["type"] == "WordPiece" else None
        self.compared = "the text"
        if self.prefix is not None:
            self.compared = "the normalized text but for white space"
        elif tokenizer.normalizer is not None:
            self.compared = "the normalized text"

    def texts(self, text: str, ids: np.ndarray) -> tuple[str, str]:
        """(wanted, got)"""
        if self.prefix is not None:  # its decoder makes "don't" of "do not"
            tokens = [self.tokenizer.id_to_token(index) or "" for index in ids.tolist()]
            joined = "".join(token.removeprefix(self.prefix) for token in tokens)
            return "".join(self.normalize(text).split()), joined
        return self.normalize(text), self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _batches(texts: Iterable[tuple[str, str]]) -> Iterable[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for label, text in texts:
        batch.append((label, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _unknown_id(tokenizer: Tokenizer, layout: dict[str, Any]) -> int | None:
    model = layout["model"]
    if (token := model.get("unk_token")) is not None:
        return tokenizer.token_to_id(token)
    return model.get("unk_id")


def _longest_tokens(tokenizer: Tokenizer, used: np.ndarray) -> list[str]:
    """The longest tokens as they read in a text, the longest first."""
    decoded = tokenizer.decode_batch(used[:, None].tolist(), skip_special_tokens=False)
    lengths = sorted(map(len, decoded))
    least = lengths[-NUM_LONGEST:][0] if lengths else 0
    longest = [text for text in decoded if len(text) >= least]
    return sorted(longest, key=lambda text: (-len(text), text))[:NUM_LONGEST]


def _around_difference(wanted: str, got: str) -> dict[str, str]:
    first = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    start, stop = max(first - EXAMPLE_CHARACTERS, 0), first + EXAMPLE_CHARACTERS
    return {"text": wanted[start:stop], "decoded": got[start:stop]}
