"""What pretraining is worth on real tasks: `python -m benchmarks.pretraining_gain TEXT... --steps 1500 --out DIR`.

A small BERT is pretrained by millstream on the TEXTs (jsonl, jsonl.zst, txt). Its checkpoints after an eighth, a
quarter, a half and all of the steps, and random weights, are fine-tuned on the tasks of `benchmarks.finetune_minilm`
that are named by --tasks. The table and --plot show each metric over the steps, with its range over the seeds. The
checkpoints are of one run with one schedule: the earlier ones are taken while the rate is high. DIR keeps what is done
and the same command goes on from there, so the work can be cut into pieces (Ctrl-C ends one).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.finetune_minilm import ROOT, TASKS, prepare, processor_seconds

PARTS = 8  # of the run; a checkpoint after each
TUNING = {  # of so small a model: a high rate, no dropout
    "sst2": {"tuning.num_epochs": 3},
    "imdb": {"tuning.num_epochs": 3, "tuning.max_seq_len": 128, "tuning.window_overlap": "null"},  # as pretrained
    "pos": {"tuning.num_epochs": 2},
}
SHARED = {"tuning.optimizer.lr": 5e-4, "tuning.dropout": 0.0, "tuning.warmup_share": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/tasks")
    parser.add_argument("--steps", type=int, default=1500, help=f"of 4,096 tokens, a multiple of {PARTS}")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TUNING, default=list(TUNING))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--plot", type=Path, help="a picture, .png or .svg")
    arguments = parser.parse_args()
    if arguments.steps % PARTS:
        parser.error(f"--steps {arguments.steps} is not a multiple of {PARTS}")
    pretrain(arguments)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in arguments.tasks}
    for step in [0, *(arguments.steps // part for part in (8, 4, 2, 1))]:
        for name in arguments.tasks:
            found[name][step] = finetune(arguments, name, step)
            print(f"{name} after {step} steps: {found[name][step]}", file=sys.stderr, flush=True)
    minutes = json.loads((arguments.out / "pretrained.json").read_text())["cpu_minutes"]
    print(table(found, minutes, arguments.steps))
    if arguments.plot:
        plot(found, minutes, arguments.steps, arguments.plot)


def pretrain(arguments: argparse.Namespace) -> None:
    """Build the dataset and train, or go on with it; DIR/pretrained.json says how much processor time the run took."""
    done, spent = arguments.out / "pretrained.json", arguments.out / "cpu-minutes.json"
    if done.exists():
        return
    settings = [
        "configs/bert/nano.yaml",
        f"run_dir={arguments.out}/bert",
        f"data.dir={arguments.out}/data",
        f"data.build.sources={json.dumps([str(text.resolve()) for text in arguments.texts])}",
        "data.build.tokenizer.vocab_size=8192",
    ]
    if not (arguments.out / "data/train/manifest.json").exists():
        millstream("data", "build", *settings)
    every = arguments.steps // PARTS
    training = [
        f"train.num_steps={arguments.steps}",
        f"checkpoint.every_steps={every}",
        f"checkpoint.keep_last={PARTS}",
    ]
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    began = processor_seconds()
    try:
        millstream("pretrain", *settings, *training, "--ranks", str(arguments.ranks))
    finally:
        spent.write_text(json.dumps(before + (processor_seconds() - began) / 60))
    done.write_text(json.dumps({"cpu_minutes": json.loads(spent.read_text())}))


def finetune(arguments: argparse.Namespace, name: str, step: int) -> list[float]:
    """The task's first metric for each seed, from the checkpoint after `step` steps; 0: from random weights."""
    out = arguments.out / f"{name}-{step}"
    if not (out / "results.json").exists():
        export = arguments.out / f"export-{step or arguments.steps}"
        if not (export / "config.json").exists():
            millstream("export", f"{arguments.out}/bert", f"step={step or arguments.steps}", f"output={export}")
        train, dev = prepare(TASKS[name], arguments.data, arguments.out / name)
        files = {"model": export, "train": train, "dev": dev, "run_dir": out, "from_scratch": str(not step).lower()}
        words = (files | SHARED | TUNING[name] | {"tuning.seeds": json.dumps(arguments.seeds)}).items()
        config = f"configs/finetune/{TASKS[name].config}.yaml"
        millstream("finetune", config, *(f"{key}={value}" for key, value in words))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return results[TASKS[name].metrics[0]]["per_seed"]


def millstream(*words: str) -> None:
    environment = {"DS_ACCELERATOR": "cpu"} | os.environ
    process = subprocess.Popen([sys.executable, "-m", "launcher.cli", *words], cwd=ROOT, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # which it has heard too; a pretraining run saves and ends
        process.wait()
        raise
    if code:
        raise SystemExit(f"exit code {code}: millstream {' '.join(words)}")


def table(found: dict[str, dict[int, list[float]]], minutes: float, steps: int) -> str:
    lines = [f"| steps | CPU minutes | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    for step in next(iter(found.values())):
        cells = [
            f"{sum(values) / len(values):.3f} ({min(values):.3f} - {max(values):.3f})"
            for values in (of_steps[step] for of_steps in found.values())
        ]
        lines.append(f"| {step:,} | {minutes * step / steps:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[int, list[float]]], minutes: float, steps: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.6 * len(found), 3.0), squeeze=False)
    for axis, (name, of_steps) in zip(axes[0], found.items(), strict=True):
        x = [minutes * step / steps for step in of_steps]
        values: Any = list(of_steps.values())
        means = [sum(one) / len(one) for one in values]
        axis.fill_between(x, [min(one) for one in values], [max(one) for one in values], alpha=0.2, linewidth=0)
        axis.plot(x, means, marker="o")
        axis.axhline(means[0], color="grey", linestyle=":", linewidth=1)
        axis.set_title(f"{name}: {TASKS[name].metrics[0]}")
        axis.set_xlabel("pretraining, CPU minutes")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
