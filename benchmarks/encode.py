"""Text to ids, ours against the peers: `python -m benchmarks.encode FILE... --gpt2 DIR --bert DIR`.

FILEs are jsonl, jsonl.zst or txt; DIRs hold published vocabularies. Our encoder remembers what it has seen, so it is
timed twice: with an empty table, and on the same text after it has read another half of the documents, as in the middle
of a build. Every contestant gets the same documents and must give the same ids. Each round times every contestant once,
one after the other, because the speed of a shared machine drifts; a row is the median over the rounds, in MB of UTF-8 a
second of wall time, and of the ratio to `tokenizers` in the same round, with its range.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "2")  # the threads of `tokenizers`, as many as datasets gets processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tiktoken
import zstandard
from tokenizers import Tokenizer

from data_pipeline import byte_level
from data_pipeline.tokenizer import flat_encoder, load_tokenizer

NUM_PROCESSES = 2


@dataclass(frozen=True)
class Contestant:
    """`prepare` is not timed and gives the function that is; `flatten` makes (tokens,) ids of what that returns."""

    prepare: Callable[[], Callable[[], Any]]
    flatten: Callable[[Any], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--gpt2", type=Path, help="folder of vocab.json and merges.txt")
    parser.add_argument("--bert", type=Path, help="folder of vocab.txt")
    parser.add_argument("--megabytes", type=float, default=4, help="text that is encoded; as much again is read before")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    documents = read(arguments.files, 2e6 * arguments.megabytes)
    before, texts = documents[0::2], documents[1::2]
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{size:.1f} MB in {len(texts):,} documents, {os.cpu_count()} cores, median of {arguments.rounds} rounds\n")
    print("| ids | encoder | MB/s | times `tokenizers` (range) |\n|---|---|---|---|")
    for name, folder in (("GPT-2", arguments.gpt2), ("BERT", arguments.bert)):
        if folder is not None:
            contestants = make_contestants(load_tokenizer(folder), before, texts)
            for row in rows(name, contestants, size, arguments.rounds):
                print(row, flush=True)


def read(files: list[Path], num_bytes: float) -> list[str]:
    """Documents of all files, as many bytes from each."""
    texts = []
    for file in files:
        left = num_bytes / len(files)
        with file.open("rb") as opened:
            stream = zstandard.ZstdDecompressor().stream_reader(opened) if file.suffix == ".zst" else opened
            lines = io.TextIOWrapper(stream, encoding="utf-8")
            found = [lines.read()] if file.suffix == ".txt" else (json.loads(line)["text"] for line in lines)
            for text in found:
                texts.append(text)
                left -= len(text.encode())
                if left <= 0:
                    break
    return texts


def make_contestants(tokenizer: Tokenizer, before: list[str], texts: list[str]) -> dict[str, Contestant | None]:
    """name -> contestant, the first being `tokenizers`; None where a peer is not installed."""

    def ours_amid_a_build() -> Callable[[], Any]:
        encode_flat = flat_encoder(tokenizer)
        encode_flat(before, None)
        return lambda: encode_flat(texts, None)

    contestants: dict[str, Contestant | None] = {
        "tokenizers, 2 threads": Contestant(
            lambda: lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
            lambda encodings: np.concatenate([encoding.ids for encoding in encodings]),
        ),
        "datasets.map, 2 processes": Contestant(
            lambda: by_datasets(tokenizer, texts),
            lambda mapped: np.concatenate(mapped.with_format("numpy")["ids"]),
        ),
        "ours, 1 thread, from nothing": Contestant(
            lambda: partial(flat_encoder(tokenizer), texts, None), lambda found: found[0]
        ),
        "ours, 1 thread, amid a build": Contestant(ours_amid_a_build, lambda found: found[0]),
    }
    ranks = byte_level.tiktoken_ranks(tokenizer, json.loads(tokenizer.to_str()))
    if ranks is not None:
        theirs = tiktoken.Encoding("gpt2", pat_str=byte_level.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        contestants["tiktoken, 1 thread"] = Contestant(
            lambda: lambda: [theirs.encode_to_numpy(text) for text in texts], np.concatenate
        )
        contestants["gigatoken, 1 thread, amid a build"] = by_gigatoken(tokenizer, before, texts)
    else:
        contestants["nanotoken, 1 thread, amid a build"] = by_nanotoken(tokenizer, before, texts)
    return contestants


def by_datasets(tokenizer: Tokenizer, texts: list[str]) -> Callable[[], Any]:
    from datasets import Dataset, disable_caching, disable_progress_bars

    disable_caching()
    disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the processes; here the threads are already chosen

    def ids(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids for encoding in found]}

    dataset = Dataset.from_dict({"text": texts})
    return lambda: dataset.map(ids, batched=True, num_proc=NUM_PROCESSES, remove_columns=["text"])


def by_gigatoken(tokenizer: Tokenizer, before: list[str], texts: list[str]) -> Contestant | None:
    try:
        import gigatoken
    except ImportError:
        return None

    def prepare() -> Callable[[], Any]:
        made = gigatoken.Tokenizer.from_json(tokenizer.to_str())
        made.encode_batch(before, parallel=False)
        return lambda: made.encode_batch(texts, parallel=False)

    return Contestant(prepare, lambda found: np.concatenate([np.asarray(ids) for ids in found]))


def by_nanotoken(tokenizer: Tokenizer, before: list[str], texts: list[str]) -> Contestant | None:
    try:
        import nanotoken
    except ImportError:
        return None

    def prepare() -> Callable[[], Any]:
        made = nanotoken.WordPieceTokenizer.from_json(tokenizer.to_str())
        made.encode_batch(before, add_special_tokens=False, parallel=False)
        return lambda: made.encode_batch(texts, add_special_tokens=False, parallel=False)

    return Contestant(prepare, lambda found: found[0])


def rows(name: str, contestants: dict[str, Contestant | None], size: float, rounds: int) -> Iterator[str]:
    """Rows of the table. Raises AssertionError if a contestant gives other ids than the first."""
    seconds: dict[str, list[float]] = {peer: [] for peer in contestants}
    wanted: np.ndarray | None = None
    for _ in range(rounds):
        for peer, contestant in contestants.items():
            if contestant is None:
                continue
            run = contestant.prepare()
            began = time.perf_counter()
            found = run()
            seconds[peer].append(time.perf_counter() - began)
            if len(seconds[peer]) == 1:
                ids = contestant.flatten(found)
                wanted = ids if wanted is None else wanted
                assert np.array_equal(ids, wanted), f"{peer}: other ids than `tokenizers`"
    first = next(iter(seconds.values()))
    for peer, times in seconds.items():
        if not times:
            yield f"| {name} | {peer} | not installed | |"
            continue
        ratios = [theirs / own for theirs, own in zip(first, times, strict=True)]
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} - {max(ratios):.1f})"
        yield f"| {name} | {peer} | {size / statistics.median(times):.1f} | {spread} |"


if __name__ == "__main__":
    main()
