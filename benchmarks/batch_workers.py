"""What a rank waits for batches that are made ahead of it: `python -m benchmarks.batch_workers FILES`.

FILES are texts that `millstream data build` reads (jsonl, txt, compressed ones too), a few megabytes; a GPT and a BERT
dataset are made of them. Batches of (8, 1024) for GPT and of (8, 512), masked, for BERT are made by a thread or by
processes (`data.num_workers`) while the rank does something of its own: it sleeps, as one that waits for an
accelerator, or it runs Python, which keeps a thread from running. All streams are open in one process and take turns,
because the speed of a shared machine drifts. `waited` is the time within `Stream.micro_batches`; medians over the
rounds, with the range.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from configs.load import load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.stream import Stream, open_stream

WAYS = {0: "a thread", 1: "1 worker", 2: "2 workers"}
SHAPES = {"gpt": (8, 1024), "bert": (8, 512)}
OWN_WORK = [("none", 0.0), ("sleeps", 0.002), ("sleeps", 0.01), ("runs Python", 0.002), ("runs Python", 0.01)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="a round")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    titles = [f"{way}: {unit} (range)" for unit in ("waited, microseconds", "steps/s") for way in WAYS.values()]
    print(f"| batch | own work a step | {' | '.join(titles)} |\n" + "|---" * (2 + len(titles)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for architecture, (rows, seq_len) in SHAPES.items():
            config = build(Path(folder) / architecture, architecture, given.files)
            streams = {num_workers: opened(config, num_workers) for num_workers in WAYS}
            for kind, seconds in OWN_WORK:
                results = measure(list(streams.values()), own_work(kind, seconds), given.rounds, given.steps)
                figures = [figure(values) for of_unit in zip(*results, strict=True) for values in of_unit]
                work = f"{kind}, {seconds * 1e3:.0f} ms" if seconds else kind
                batch = f"{architecture.upper()}, {rows} x {seq_len}"
                print(f"| {batch} | {work} | {' | '.join(figures)} |", flush=True)
            for stream in streams.values():
                stream.close()


def build(folder: Path, architecture: str, files: list[Path]) -> PretrainConfig:
    rows, seq_len = SHAPES[architecture]
    kind = "wordpiece" if architecture == "bert" else "byte_bpe"
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"architecture": architecture},
        "data": {
            "dir": str(folder / "data"),
            "build": {
                "sources": [str(file.absolute()) for file in files],
                "tokenizer": {"type": kind, "vocab_size": 8192, "sample_bytes": 5_000_000},
            },
        },
        "train": {"seq_len": seq_len, "global_batch_size": rows, "micro_batch_size": rows},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(settings))
    subprocess.run([sys.executable, "-m", "data_pipeline.build", folder / "config.yaml"], check=True, stdout=sys.stderr)
    return load_pretrain(folder / "config.yaml")


def opened(config: PretrainConfig, num_workers: int) -> Stream:
    """A stream whose workers have started."""
    data = config.data.model_copy(update={"num_workers": num_workers})
    stream = open_stream(config.model_copy(update={"data": data}), "train")
    while len(stream._ahead._ready) < num_workers:
        time.sleep(0.01)
    return stream


def own_work(kind: str, seconds: float) -> Callable[[], object]:
    """What the rank does between two steps; Python runs as many turns as take `seconds` when nothing else runs."""
    if kind != "runs Python":
        return lambda: time.sleep(seconds) if seconds else None
    best = min(timed(turn, 100_000) for _ in range(5))
    turns = int(seconds / best * 100_000)
    return lambda: turn(turns)


def turn(count: int) -> None:
    for _ in range(count):
        pass


def measure(
    streams: list[Stream], work: Callable[[], object], rounds: int, steps: int
) -> list[tuple[list[float], list[float]]]:
    """For every stream: microseconds waited a step, and steps a second, of each round."""
    results: list[tuple[list[float], list[float]]] = [([], []) for _ in streams]
    for number in range(rounds + 1):
        for stream, (waited, speeds) in zip(streams, results, strict=True):
            first = number * steps
            stream.micro_batches(first, 0, 1)  # what was made ahead for another kind of work is given up
            time.sleep(0.05)
            seconds = 0.0
            began = time.perf_counter()
            for step in range(first + 1, first + 1 + steps):
                work()
                seconds += timed(stream.micro_batches, step, 0, 1)
            if number:  # the first round warms up
                speeds.append(steps / (time.perf_counter() - began))
                waited.append(seconds / steps * 1e6)
    return results


def timed(run: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def figure(values: list[float]) -> str:
    low, middle, high = (f"{value:,.0f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


if __name__ == "__main__":
    main()
