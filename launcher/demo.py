"""`make demo`: raw text -> pretrained BERT and GPT -> a fine-tuned classifier, and one table of what came of it.

Every step is a command that could be typed by hand, and is shown as such. A step whose inputs have not changed since it
was finished is not run again, so a second `make demo` goes straight to the table; an interrupted one goes on.

The text is what this environment carries (docstrings of the installed packages) or the files named on the command line.
The downstream task is the same for both: which package does a docstring document?
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from configs.load import ConfigError

RANKS = 2
SEEDS = [1, 2, 3]
TASK_CONFIG = "configs/finetune/docstrings.yaml"


def main() -> int:
    console = Console(highlight=False)
    began = time.monotonic()
    try:
        files = [check_file(file) for file in sys.argv[1:]]
        root = Path("demo-text" if files else "demo")
        run_steps(root, files, console)
    except (ConfigError, StepFailed) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    show_results(root, time.monotonic() - began, console)
    return 0


class StepFailed(RuntimeError):
    """A step's command ended with an error; what it said is on the terminal above."""


def check_file(file: str) -> str:
    if not Path(file).exists():
        raise ConfigError(f"TEXT: {file}: no such file; give files like TEXT='a.txt b.jsonl.zst'")
    return file


def run_steps(root: Path, files: list[str], console: Console) -> None:
    step = Steps(root, console)
    step("corpus and task from docstrings", ["-m", "data_pipeline.docstrings", str(root)], [], root / "task.dev.jsonl")
    text = files or [str(root / "corpus.jsonl")]
    for name in ("bert", "gpt"):
        config, data, run = f"configs/{name}/nano.yaml", root / f"{name}-data", root / name
        overrides = [f"run_dir={run}", f"data.dir={data}", f"data.build.sources={json.dumps(text)}"]
        if files:  # few long documents: hold out the end of each
            overrides.append("data.build.split_by=tail")
        else:  # done already, together with the task's examples
            overrides += ["data.build.deduplicate.exact=false", "data.build.deduplicate.near=false"]
        built, trained = data / "train/manifest.json", run / "report.html"
        step(f"{name}: text to tokens", ["data", "build", config, *overrides], [*text, config], built, data)
        pretrain = ["pretrain", config, "--ranks", str(RANKS), *overrides]
        step(f"{name}: pretrain on {RANKS} ranks", pretrain, [built, config], trained, run)
        step(f"{name}: export", ["export", str(run)], [run / "metrics.jsonl"], run / "export/parity.json")
    for start, title in (("tuned", "from the pretrained BERT"), ("scratch", "from random weights")):
        words = [
            "finetune", TASK_CONFIG, "--ranks", str(RANKS), f"run_dir={root / start}", f"model={root}/bert/export",
            f"train={root}/task.train.jsonl", f"dev={root}/task.dev.jsonl", f"tuning.seeds={SEEDS}",
            f"from_scratch={str(start == 'scratch').lower()}",
        ]  # fmt: skip
        inputs = [root / "bert/export/model.safetensors", root / "task.train.jsonl", TASK_CONFIG]
        step(f"classifier {title}", words, inputs, root / start / "results.json", root / start)


class Steps:
    """Runs commands one after the other; remembers in ROOT/.steps with which words and inputs each was finished."""

    def __init__(self, root: Path, console: Console) -> None:
        self.root, self.console = root, console
        self.number = 0

    def __call__(
        self, title: str, words: list[str], inputs: list[Any], result: Path, stale: Path | None = None
    ) -> None:
        """Run `words` unless `result` was made with the same words from the same `inputs`.

        The directory `stale` is removed first if it was begun with others; if with the same, the command goes on.
        """
        self.number += 1
        key = fingerprint(words, inputs)
        begun, finished = (self.root / ".steps" / f"{self.number:02d}-{state}" for state in ("begun", "finished"))
        if result.exists() and finished.exists() and finished.read_text() == key:
            self.console.rule(f"[dim]{self.number}. {title}: already done", align="left", style="dim")
            return
        if stale and stale.exists() and not (begun.exists() and begun.read_text() == key):
            shutil.rmtree(stale)
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(key)
        command = words if words[0] == "-m" else ["-m", "launcher.cli", *words]
        shown = "python " + " ".join(words) if words[0] == "-m" else "millstream " + " ".join(words)
        self.console.rule(f"[bold]{self.number}. {title}", align="left")
        self.console.print(f"$ {shown}", style="dim", markup=False, soft_wrap=True)
        started = time.monotonic()
        if code := subprocess.run([sys.executable, *command]).returncode:
            raise StepFailed(f"step {self.number} ({title}) ended with exit code {code}: {shown}")
        self.console.print(f"{time.monotonic() - started:.0f} s", style="dim")
        finished.write_text(key)


def fingerprint(words: list[str], inputs: list[Any]) -> str:
    """Of the command and of its input files' sizes and times."""
    stats = [(str(path), Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in inputs]
    return hashlib.sha256(json.dumps([words, stats]).encode()).hexdigest()


def show_results(root: Path, seconds: float, console: Console) -> None:
    """The GPT's samples, then the table, then the verdict; all of it read from the files the steps left behind."""
    for number, sample in enumerate(json.loads((root / "gpt/samples.json").read_text(encoding="utf-8")), 1):
        console.rule(f"the GPT writes, sample {number}", align="left", style="dim")
        console.print(sample, markup=False)
    console.print(table(root, seconds))
    accuracy = {start: accuracy_of(root, start) for start in ("scratch", "tuned")}
    gain = accuracy["tuned"]["mean"] - accuracy["scratch"]["mean"]
    spread = max(entry["spread"] for entry in accuracy.values())
    relation = "more" if gain > spread else "NOT more"
    console.print(
        f"Pretraining gained {100 * gain:.1f} points of accuracy, {relation} than the largest spread over "
        f"{len(SEEDS)} seeds ({100 * spread:.1f} points)."
    )


def accuracy_of(root: Path, start: str) -> dict[str, float]:
    return json.loads((root / start / "results.json").read_text(encoding="utf-8"))["accuracy"]


def table(root: Path, seconds: float) -> Table:
    out = Table(title=f"Raw text to a fine-tuned model: {seconds:.0f} s", title_justify="left", box=box.SIMPLE_HEAD)
    out.add_column("", no_wrap=True)
    for column in ("before", "after"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("where", no_wrap=True)
    for name in ("bert", "gpt"):
        lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        first, *_, last = [line for line in lines if "eval_loss" in line]
        speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
        rows = [
            ("held-out loss", f"{first['eval_loss']:.2f}", f"{last['eval_loss']:.2f}", "report.html"),
            ("perplexity", f"{first['eval_perplexity']:,.0f}", f"{last['eval_perplexity']:,.1f}", "metrics.jsonl"),
            ("tokens/s", "", f"{speed:,.0f}", "export"),
        ]
        for title, before, after, file in rows:
            out.add_row(f"{name.upper()} {title}", before, after, str(root / name / file), end_section=file == "export")
    scratch, tuned = accuracy_of(root, "scratch"), accuracy_of(root, "tuned")
    out.add_row("", "scratch", "pretrained", "", style="bold")
    for title, key, file in (
        ("classifier accuracy", "mean", "model"),
        (f"spread over {len(SEEDS)} seeds", "spread", "results.json"),
    ):
        where = str(root / "tuned" / file)
        out.add_row(title, f"{scratch[key]:.3f}", f"{tuned[key]:.3f}", where)
    return out


if __name__ == "__main__":
    sys.exit(main())
