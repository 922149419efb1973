"""Batches of (8, 1024) against a plain memmap gather of the same shards: `python -m benchmarks.gather DATASET`.

DATASET is data.dir of a GPT dataset, shuffled over its training split. The plain gather is what nanoGPT's loader does
before it makes tensors: for random rows, slices of np.memmap copied into one array of 8 x 1,025 ids, and nothing else.
Ours, made when they are asked for: the ids as an int64 tensor in the order of the stream; and the whole batch with
labels, segment_ids and position_ids. Then the same batches made ahead, by a thread and by two processes, while the
consumer is busy with a step (it sleeps): what it waits for a batch after that.
Each round times every contestant once, one after the other; a row is the median over the rounds, with its range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from configs.schema import PretrainConfig
from data_pipeline.samples import Samples
from data_pipeline.shards import Dataset
from data_pipeline.stream import Stream, open_stream

ROWS, SEQ_LEN = 8, 1024
AHEAD = {"a thread": 0, "two processes": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=1500, help="per round")
    parser.add_argument("--step-seconds", type=float, default=0.002, help="of the consumer of batches made ahead")
    given = parser.parse_args()
    stream = open_stream(settings(given.dataset), "train")
    dataset = stream.samples.sources[0]
    contestants: dict[str, Callable[[int], object]] = {
        "plain memmap gather, uint16": plain(dataset, given.dataset),
        "ours, ids only, int64 tensor": lambda step: ids_only(stream.samples, step),
        "ours, complete batch": lambda step: complete(stream, step),
    }
    for run in contestants.values():
        for step in range(given.batches):  # into the page cache; checksums compared
            run(step)
    per_document = dataset.num_tokens / dataset.num_documents
    print(
        f"{dataset.num_tokens:,} tokens in {len(dataset.shards)} shards, {per_document:.0f} tokens a document; torch "
        f"{torch.__version__}; median of {given.rounds} rounds of {given.batches} batches\n"
    )
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(given.rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            for step in range(given.batches):
                run(step)
            seconds[name].append((time.perf_counter() - began) / given.batches)
    report(seconds)
    print()
    waits = {f"complete batch made ahead by {name}": waiting(given, num) for name, num in AHEAD.items()}
    report({"plain memmap gather, uint16": seconds["plain memmap gather, uint16"], **waits})
    stream.close()


def waiting(given: argparse.Namespace, num_workers: int) -> list[float]:
    """Seconds a consumer waits for a batch, per round."""
    stream = open_stream(settings(given.dataset, num_workers), "train")
    while len(stream._ahead._ready) < num_workers:
        time.sleep(0.01)
    medians = []
    for number in range(given.rounds):
        waits = []
        for step in range(number * 200, (number + 1) * 200):
            time.sleep(given.step_seconds)
            began = time.perf_counter()
            stream.micro_batches(step, 0, 1)
            waits.append(time.perf_counter() - began)
        medians.append(statistics.median(waits))
    stream.close()
    return medians


def settings(directory: str, num_workers: int = 0) -> PretrainConfig:
    sizes = {"seq_len": SEQ_LEN, "global_batch_size": ROWS, "micro_batch_size": ROWS}
    return PretrainConfig.model_validate(
        {"run_dir": "unused", "data": {"dir": directory, "num_workers": num_workers}, "train": sizes}
    )


def plain(dataset: Dataset, directory: str) -> Callable[[int], np.ndarray]:
    folder = Path(directory) / "train"
    shards = [
        np.memmap(folder / shard["file"], dataset.dtype, "r", shape=(shard["tokens"],)) for shard in dataset.shards
    ]
    # rows that do not reach over a shard's end, in an order drawn beforehand
    rows = [(n, low) for n, shard in enumerate(shards) for low in range(0, len(shard) - SEQ_LEN - 1, SEQ_LEN)]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()

    def gather(step: int) -> np.ndarray:
        batch = np.empty((ROWS, SEQ_LEN + 1), dataset.dtype)
        for row in range(ROWS):
            number, low = rows[order[(step * ROWS + row) % len(order)]]
            batch[row] = shards[number][low : low + SEQ_LEN + 1]
        return batch

    return gather


def ids_only(samples: Samples, step: int) -> torch.Tensor:
    """The way to a complete batch as far as the ids: order, gather, conversion."""
    phase = samples.phase_at(step)
    _, numbers = samples._chosen(phase, step * ROWS, ROWS)
    tokens = samples.sources[0].gather(phase.rows[0].first_tokens(numbers), SEQ_LEN + 1)
    return torch.from_numpy(tokens.astype(np.int64))


def complete(stream: Stream, step: int) -> list[dict[str, torch.Tensor]]:
    return [
        {name: torch.from_numpy(a) for name, a in arrays.items()} for arrays in stream.samples.micro_batches(step, 0, 1)
    ]


def report(seconds: dict[str, list[float]]) -> None:
    print("| | microseconds a batch | million tokens a second | rate against plain (range) |\n|---|---|---|---|")
    reference = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(reference, times, strict=True)]
        middle = statistics.median(times)
        print(
            f"| {name} | {1e6 * middle:.1f} | {ROWS * SEQ_LEN / middle / 1e6:.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
