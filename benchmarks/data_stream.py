"""Batches of (8, 1024) against a memmap gather and the peers' readers.

    python -m benchmarks.data_stream FILES --tokenizers DIR

FILES are texts that `millstream data build` reads; DIR holds the folders gpt2 and bert-base-uncased. The script builds
both datasets, writes the same tokens in the peers' own formats with the peers' own writers, and prints tables:

    throughput   readers (stream_readers.py) take turns, each a process of its own that sleeps meanwhile; "expanded"
                 makes on the CPU what training leaves to the accelerator
    starts       from opening a dataset to its first batch, and to the one at 90 % of the epoch, in a fresh process
                 after its imports, the dataset's files not in memory; ours also on 10 GB
    waits        what a consumer waits for a batch after it was busy, as with a step on an accelerator; also for BERT
    checks       batches of the first epoch, in which every block is compared with its checksum, against later ones
    seek         the samples of a batch at the end of an epoch of ten billion

Medians over the rounds, with the range. The share of the gather is that within a round, because the speed of a shared
machine drifts; the gather is the fastest one of the three ways to write it in numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from benchmarks.stream_readers import OURS, READERS, ROWS, SEQ_LEN, WRITERS
from data_pipeline import order
from data_pipeline.shards import open_dataset, read_manifest, write_manifest

CONTENT = {  # what a reader's batch is
    "memmap, slices": "ids, uint16",
    "memmap, concatenated": "ids, uint16",
    "memmap, index arrays": "ids, uint16",
    "memmap, inputs and targets": "ids, labels",
    "millstream": "ids, uint16: documents can be told from them",
    "millstream, a thread ahead": "the same",
    "millstream, 1 process ahead": "the same",
    "millstream, expanded": "ids, labels, segments, positions, made on the CPU",
    "nanogpt": "ids, labels",
    "mosaicml": "ids, uint16",
    "litdata": "ids, uint16",
    "datasets": "ids",
    "megatron": "ids, labels, constant masks and positions",
    "megatron, documents": "ids, labels, loss mask, positions by document",
}
GATHERS = ("memmap, slices", "memmap, concatenated", "memmap, index arrays")
AHEAD = ["millstream", "millstream, a thread ahead", "millstream, 1 process ahead", "millstream, 2 processes ahead"]
EPOCH_SAMPLES = 10_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=1000, help="a round, of the fast readers")
    parser.add_argument("--large-bytes", type=int, default=10_000_000_000, help="size of the large dataset")
    parser.add_argument("--work", type=Path, help="folder for all of it, kept; default: a temporary one")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        prepare(work, given)
        for name in given.tables:
            print(f"\n{TABLES[name](work, given)}", flush=True)


# ---- datasets


def prepare(work: Path, given: argparse.Namespace) -> None:
    """The folders `gpt`, `bert` and `large` for the readers, as far as they are not in `work` from another run."""
    for folder, architecture, tokenizer in (("gpt", "gpt", "gpt2"), ("bert", "bert", "bert-base-uncased")):
        build(work / folder, architecture, given.tokenizers / tokenizer, given.files)
    write_tokens(work / "gpt")
    for name in WRITERS:
        if not (work / "gpt" / f"{name}.done").exists():
            command = [peers.python(), "-W", "ignore", "-m", "benchmarks.stream_readers", "write", name, work / "gpt"]
            checked(command)
            (work / "gpt" / f"{name}.done").touch()
    if "starts" in given.tables:  # real files, not sparse ones: they are read from the disk
        copy_large(work / "gpt", work / "large", given.large_bytes)


def build(folder: Path, architecture: str, tokenizer: Path, files: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"seq_len": SEQ_LEN, "global_batch_size": ROWS, "micro_batch_size": ROWS}
    if architecture == "bert":
        sizes = {"seq_len": 128, "global_batch_size": 32, "micro_batch_size": 32}
    config = {
        "run_dir": "unused",
        "model": {"architecture": architecture},
        "data": {
            "dir": str(folder / "dataset"),
            "build": {
                "sources": [str(file) for file in files],
                "tokenizer": {"type": "pretrained", "path": str(tokenizer)},
            },
        },
        "train": sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    checked([sys.executable, "-m", "data_pipeline.build", folder / "config.json"])


def write_tokens(folder: Path) -> None:
    """tokens.bin and ends.npy, which the peers' writers read."""
    dataset = open_dataset(folder / "dataset" / "train")
    dataset.tokens(0, dataset.num_tokens).tofile(folder / "tokens.bin")
    lengths = [dataset.document_lengths(shard) for shard in range(len(dataset.shards))]
    np.save(folder / "ends.npy", np.cumsum(np.concatenate(lengths)))


def copy_large(source: Path, folder: Path, num_bytes: int) -> None:
    """The same shard many times over, as one dataset; files of their own, so that each is read from the disk."""
    train = folder / "dataset" / "train"
    if (train / "manifest.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    train.mkdir(parents=True)
    manifest = read_manifest(source / "dataset" / "train")
    for entry in manifest["files"]:
        shutil.copy(source / "dataset" / "train" / entry["file"], train)
    shard = manifest["shards"][0]
    shard["document_end_id"] = manifest["document_end_id"]
    entries = [shard | {"file": f"shard-{number:05d}.tokens"} for number in range(num_bytes // shard["bytes"])]
    for entry in entries:
        shutil.copy(source / "dataset" / "train" / shard["file"], train / entry["file"])
        forget([train / entry["file"]])
    write_manifest(train, entries, manifest["vocab_size"], manifest["tokenizer_fingerprint"], "copies of one shard")
    config = json.loads((source / "config.json").read_text())
    config["data"]["dir"] = str(folder / "dataset")
    (folder / "config.json").write_text(json.dumps(config))


def forget(files: Iterable[Path]) -> None:
    """Have the system drop these files from memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def checked(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-3000:]}")


# ---- readers


class Reader:
    """A process that reads batches when it is told to; `first_seconds`: from opening the dataset to its first batch."""

    def __init__(self, name: str, folder: Path, first: int = 0) -> None:
        self.name = name
        interpreter = sys.executable if name in OURS else peers.python()
        self.process = subprocess.Popen(
            [interpreter, "-W", "ignore", "-m", "benchmarks.stream_readers", "read", name, folder, str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first_seconds = self._answer()

    def seconds(self, batches: int, step_seconds: float = 0.0) -> float:
        """Seconds a batch; before each the reader sleeps for `step_seconds`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batches} {step_seconds or ''}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                return float(line)
            except ValueError:  # something else that a peer prints
                continue
        raise SystemExit(f"{self.name} ended without an answer")


def throughput(work: Path, given: argparse.Namespace) -> str:
    readers = [Reader(name, work / "gpt") for name in READERS if name in CONTENT]
    counts = {}
    for reader in readers:  # a slow one makes fewer batches; all of them warm up
        counts[reader.name] = max(20, min(given.batches, int(0.5 / reader.seconds(50))))
        reader.seconds(counts[reader.name])
    times: dict[str, list[float]] = {reader.name: [] for reader in readers}
    for _ in range(given.rounds):
        for reader in readers:
            times[reader.name].append(reader.seconds(counts[reader.name]))
    for reader in readers:
        reader.close()
    gather = min((times[name] for name in GATHERS), key=statistics.median)
    lines = ["| reader | a batch is | million tokens/s (range) | share of the gather (range) |", "|---|---|---|---|"]
    for name, seconds in times.items():
        speeds = [ROWS * SEQ_LEN / value / 1e6 for value in seconds]
        shares = [base / value for base, value in zip(gather, seconds, strict=True)]
        digits = 0 if min(speeds) >= 20 else 1
        lines.append(f"| {name} | {CONTENT[name]} | {figure(speeds, digits)} | {figure(shares, 2)} |")
    return "\n".join(lines)


def starts(work: Path, given: argparse.Namespace) -> str:
    small, large = (read_manifest(work / folder / "dataset" / "train") for folder in ("gpt", "large"))
    cases = [("millstream", work / "large", large)]
    cases += [(name, work / "gpt", small) for name in ("millstream", "mosaicml", "litdata", "datasets", "megatron")]
    lines = ["| reader | dataset | first batch, ms (range) | at 90 % of the epoch, ms (range) |", "|---|---|---|---|"]
    times: dict[tuple[int, float], list[float]] = {(n, share): [] for n in range(len(cases)) for share in (0.0, 0.9)}
    for _ in range(given.rounds):
        for (number, share), values in times.items():
            name, folder, manifest = cases[number]
            forget(path for path in folder.rglob("*") if path.is_file())
            reader = Reader(name, folder, int(share * manifest["tokens"]) // (ROWS * SEQ_LEN))
            values.append(reader.first_seconds * 1e3)
            reader.close()
    for number, (name, _, manifest) in enumerate(cases):
        size = sum(shard["bytes"] for shard in manifest["shards"])
        shown = f"{size / 1e9:.0f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
        first, resumed = figure(times[number, 0.0], 0), figure(times[number, 0.9], 0)
        lines.append(f"| {name} | {shown} | {first} | {resumed} |")
    return "\n".join(lines)


def waits(work: Path, given: argparse.Namespace) -> str:
    lines = [
        "| millstream | batch | step, ms | waited, microseconds (range) | batches/s without steps (range) |",
        "|---|---|---|---|---|",
    ]
    for folder, batch, step_seconds in (("gpt", f"{ROWS} x {SEQ_LEN}", 0.002), ("bert", "32 x 128", 0.01)):
        readers = [Reader(name, work / folder) for name in AHEAD]
        waited: dict[str, list[float]] = {name: [] for name in AHEAD}
        speeds: dict[str, list[float]] = {name: [] for name in AHEAD}
        time.sleep(3)  # worker processes start
        for number in range(given.rounds + 1):
            for reader in readers:
                busy, alone = reader.seconds(200, step_seconds), reader.seconds(200)
                if number:  # the first round warms up
                    waited[reader.name].append(busy * 1e6)
                    speeds[reader.name].append(1 / alone)
        for reader in readers:
            reader.close()
            way = reader.name.removeprefix("millstream").removeprefix(", ") or "when asked for"
            shown = f"{figure(waited[reader.name], 0)} | {figure(speeds[reader.name], 0)}"
            lines.append(f"| {way} | {batch} | {step_seconds * 1e3:.0f} | {shown} |")
    return "\n".join(lines)


def checks(work: Path, given: argparse.Namespace) -> str:
    tokens = read_manifest(work / "gpt" / "dataset" / "train")["tokens"]
    batches = tokens // (ROWS * SEQ_LEN) - 2
    lines = ["| reader | first epoch, microseconds a batch (range) | later | difference |", "|---|---|---|---|"]
    names = ["memmap, concatenated", "millstream", "millstream, expanded"]
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            reader = Reader(name, work / "gpt")
            times[name].append([reader.seconds(batches) * 1e6 for _ in range(2)])
            reader.close()
    for name in names:
        first, later = zip(*times[name], strict=True)
        more = [a - b for a, b in times[name]]
        lines.append(f"| {name} | {figure(first, 1)} | {figure(later, 1)} | {figure(more, 1)} |")
    return "\n".join(lines)


def seek(work: Path, given: argparse.Namespace) -> str:
    lines = ["| samples looked up | milliseconds (range) |", "|---|---|"]
    for count in (ROWS, 4096):
        times = []
        for number in range(given.rounds + 1):
            began = time.perf_counter()
            order.sample_ids(number, "a dataset", EPOCH_SAMPLES - count, count, EPOCH_SAMPLES)
            times.append((time.perf_counter() - began) * 1e3)
        lines.append(f"| {count:,} | {figure(times[1:], 3)} |")
    return "\n".join(lines)


def figure(values: Iterable[float], digits: int) -> str:
    values = list(values)
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


TABLES = {"throughput": throughput, "starts": starts, "waits": waits, "checks": checks, "seek": seek}

if __name__ == "__main__":
    print(f"torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} cores")
    main()
