"""`millstream data build` against the peers, from compressed text to a finished dataset, on two cores.

    python -m benchmarks.data_build FILES --tokenizers DIR [--scale 1 4]

FILES are jsonl.zst with a field `text`; DIR holds the folders gpt2 and bert-base-uncased. Each contestant is a process
of its own (build_contestants.py), and in every round each has its turn. Speeds are MB (10^6 bytes of UTF-8 text) a
second: of the whole process from start to exit, and of its work without start and imports, which are not told apart for
`millstream data build`. A contestant's processes are looked at five times a second: `CPU` is the processor time of all
of them, `memory` the largest sum of what each has in memory, a page that several share divided among them (PSS).
The ids of all contestants are compared, documents and borders, and have to be the same.

With --scale N the corpus is built N times as large, copies of FILES, for its memory.
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
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import peers
from benchmarks.build_contestants import digest, read_texts
from data_pipeline.shards import open_dataset

CORES = 2
POLL_SECONDS = 0.2  # a look costs some milliseconds
BASE = "datasets.map"
# what the tables call them, and whether they end with a dataset on the disk
TITLES = {
    "build": "`millstream data build`",
    "cleaned": "the same with all stages",
    "datasets.map": "`datasets.map(num_proc=2)`, saved",
    "megatron": "Megatron-Core's indexed dataset, 2 workers",
    "encode_batch": "`tokenizers.encode_batch` alone, 2 threads",
    "tiktoken": "tiktoken alone, 1 thread",
    "millstream": "millstream's encoder alone, 1 thread",
}
RUNS = {
    "gpt2": ["build", "cleaned", "datasets.map", "megatron", "encode_batch", "tiktoken", "millstream"],
    "bert-base-uncased": ["build", "datasets.map", "encode_batch", "millstream"],
}
OURS = ("build", "cleaned", "millstream")
STAGES = {
    "html": True,
    "mojibake": True,
    "unicode": "NFC",
    "languages": ["en"],
    "quality": ["gopher", "gopher_repetition", "c4"],
    "pii": ["email", "phone", "ip", "card", "key"],
}


@dataclass
class Result:
    """One run of a contestant."""

    whole_seconds: float
    work_seconds: float | None
    cpu_seconds: float  # of all its processes
    memory: int  # bytes
    digest: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="0: only the tables of --scale")
    parser.add_argument("--scale", type=int, nargs="*", default=[1, 4], help="how often the corpus is repeated")
    parser.add_argument("--only", nargs="+", default=list(TITLES), choices=TITLES, help="these, with datasets.map")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    files = [file.resolve() for file in given.files]
    megabytes = sum(len(text.encode()) for text in read_texts(list(map(str, files)))) / 1e6
    print(f"{megabytes:.0f} MB of text in {len(files)} files; {CORES} cores; {given.rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for tokenizer, names in RUNS.items() if given.rounds else ():
            results: dict[str, list[Result]] = {name: [] for name in names if name in (BASE, *given.only)}
            for _ in range(given.rounds):
                for name in results:
                    results[name].append(run(name, work, given.tokenizers.resolve() / tokenizer, files))
            check_ids(results)
            print(f"\n{tokenizer}\n\n{table(results, megabytes)}", flush=True)
        if given.scale:
            print(f"\n{memory_table(given, work, files, megabytes)}")


def run(name: str, work: Path, tokenizer: Path, files: list[Path]) -> Result:
    """One contestant from start to exit; its files are removed afterwards."""
    out = work / "out"
    try:
        if name in ("build", "cleaned"):
            return build(out, tokenizer, files, STAGES if name == "cleaned" else {})
        interpreter = sys.executable if name in OURS else peers.python()
        arguments = [name, tokenizer, out, *files]
        command = [interpreter, "-W", "ignore", "-m", "benchmarks.build_contestants", *arguments]
        seconds, cpu_seconds, memory, output = watched(command)
        found = json.loads(output.splitlines()[-1])
        # the digest is no part of the work
        spent = found["digest_seconds"]
        return Result(seconds - spent, found["seconds"], cpu_seconds - spent, memory, found["digest"])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def build(out: Path, tokenizer: Path, files: list[Path], stages: dict[str, Any]) -> Result:
    """`millstream data build`; without stages the training split is all documents of the files, to be compared."""
    out.mkdir()
    (out / "held-out.jsonl").write_text('{"text": "held out"}\n')
    is_gpt = (tokenizer / "merges.txt").exists()
    config = {
        "run_dir": "unused",
        "model": {"architecture": "gpt" if is_gpt else "bert"},
        "data": {
            "dir": str(out / "dataset"),
            "build": {
                "sources": list(map(str, files)),
                "validation_sources": [] if stages else [str(out / "held-out.jsonl")],
                "tokenizer": {"type": "pretrained", "path": str(tokenizer)},
                "clean": stages,
                "deduplicate": {"exact": bool(stages), "near": bool(stages)},
                "num_workers": CORES,
            },
        },
    }
    (out / "config.json").write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("millstream")), "data", "build", out / "config.json"]
    seconds, cpu_seconds, memory, _ = watched(command)
    if stages:
        return Result(seconds, None, cpu_seconds, memory, None)
    dataset = open_dataset(out / "dataset" / "train")
    lengths = np.concatenate([dataset.document_lengths(shard) for shard in range(len(dataset.shards))])
    documents = np.split(dataset.tokens(0, dataset.num_tokens), np.cumsum(lengths)[:-1])
    return Result(seconds, None, cpu_seconds, memory, digest(documents, None))


def watched(command: list[Any]) -> tuple[float, float, int, str]:
    """(seconds from start to exit, processor seconds, largest memory in bytes, what it printed) of a command."""
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(CORES),
        "HF_HUB_OFFLINE": "1",
        "TIKTOKEN_CACHE_DIR": "",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    largest, ended = 0, threading.Event()
    cpu_seconds: dict[int, float] = {}  # process -> what was last seen

    def watch(process: psutil.Process) -> None:
        nonlocal largest
        while not ended.wait(POLL_SECONDS):
            largest = max(largest, look_at(process, cpu_seconds))

    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=errors)
        watcher = threading.Thread(target=watch, args=[psutil.Process(process.pid)])
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{errors.read()[-3000:]}")
        return seconds, sum(cpu_seconds.values()), largest, output.read()


def look_at(process: psutil.Process, cpu_seconds: dict[int, float]) -> int:
    """Bytes in memory of a process and its descendants; notes the processor time of each."""
    total = 0
    with suppress(psutil.Error):  # has ended
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += member.memory_full_info().pss
                times = member.cpu_times()
                cpu_seconds[member.pid] = times.user + times.system
    return total


def check_ids(results: dict[str, list[Result]]) -> None:
    digests = {result.digest for runs in results.values() for result in runs} - {None}
    if len(digests) != 1:
        found = {name: sorted({result.digest or "" for result in runs}) for name, runs in results.items()}
        raise SystemExit(f"the ids differ: {found}")


def table(results: dict[str, list[Result]], megabytes: float) -> str:
    lines = [
        f"| | MB/s, whole process (range) | MB/s, its work | rate against `{BASE}` (range) | CPU, s | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        whole = [megabytes / result.whole_seconds for result in runs]
        ratios = [base.whole_seconds / own.whole_seconds for base, own in zip(results[BASE], runs, strict=True)]
        work = [megabytes / result.work_seconds for result in runs if result.work_seconds]
        memory = max(result.memory for result in runs) / 1e6
        cpu = statistics.median(result.cpu_seconds for result in runs)
        shown = f"{statistics.median(work):.1f}" if work else ""
        lines.append(
            f"| {TITLES[name]} | {figure(whole, 1)} | {shown} | {figure(ratios, 2)} | {cpu:.1f} | {memory:,.0f} |"
        )
    return "\n".join(lines)


def memory_table(given: argparse.Namespace, work: Path, files: list[Path], megabytes: float) -> str:
    names = [name for name in ("build", "cleaned") if name in given.only]
    titles = [f"{TITLES[name]}, MB/s | CPU, s | memory, MB" for name in names]
    lines = [f"| corpus, MB | {' | '.join(titles)} |", "|---" * (1 + 3 * len(names)) + "|"]
    for scale in given.scale:
        folder = work / "corpus"
        folder.mkdir()
        copies = [folder / f"{number:03d}-{file.name}" for number in range(scale) for file in files]
        for number, copy in enumerate(copies):
            shutil.copy(files[number % len(files)], copy)
        results = [run(name, work, given.tokenizers.resolve() / "gpt2", copies) for name in names]
        size = scale * megabytes
        cells = [
            f"{size / result.whole_seconds:.1f} | {result.cpu_seconds:.1f} | {result.memory / 1e6:,.0f}"
            for result in results
        ]
        lines.append(f"| {size:,.0f} | {' | '.join(cells)} |")
        shutil.rmtree(folder)
    return "\n".join(lines)


def figure(values: list[float], digits: int) -> str:
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


if __name__ == "__main__":
    main()
