"""`make demo`: raw text -> pretrained BERT and GPT -> a fine-tuned classifier, and one table of what came of it.

Every step is a command that could be typed by hand, and is shown as such. A step whose inputs have not changed since it
was finished is not run again, so a second `make demo` goes straight to the table.

The text is what this environment carries (docstrings of the installed packages) or the files named on the command line.
The downstream task is the same for both: which package does a docstring document?
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.load import ConfigError

ROOT = Path("demo")
RANKS = 2
SEEDS = [1, 2, 3]


def main() -> int:
    console = Console()
    started = time.monotonic()
    try:
        text = sources(sys.argv[1:])
        run_steps(text, console)
    except (ConfigError, StepFailed) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    console.print(table(time.monotonic() - started))
    print_samples(console)
    return 0


class StepFailed(RuntimeError):
    """A step's command ended with an error; what it said is on the terminal above."""


def sources(files: list[str]) -> list[str]:
    """The user's files, or the corpus this environment carries. Raises ConfigError for a file that does not exist."""
    for file in files:
        if not Path(file).exists():
            raise ConfigError(f"TEXT: {file}: no such file; give files like TEXT='a.txt b.jsonl.zst'")
    return files or [str(ROOT / "corpus.jsonl")]


def run_steps(text: list[str], console: Console) -> None:
    step = Steps(console)
    step("corpus and task from docstrings", ["-m", "data_pipeline.docstrings", str(ROOT)], [], ROOT / "task.dev.jsonl")
    for name in ("bert", "gpt"):
        config, overrides = f"configs/{name}/nano.yaml", common(name, text)
        data, run = ROOT / f"{name}-data", ROOT / name
        step(
            f"{name}: text to tokens",
            ["data", "build", config, *overrides],
            [*text, config],
            data / "train/manifest.json",
        )
        step(f"{name}: pretrain on {RANKS} ranks", ["pretrain", config, "--ranks", str(RANKS), *overrides],
             [data / "train/manifest.json", config], run / "report.html")  # fmt: skip
        step(f"{name}: export", ["export", str(run)], [run / "report.html"], run / "export/parity.json")
    for start in ("pretrained", "scratch"):
        overrides = [
            f"run_dir={ROOT / f'classifier-{start}'}",
            f"from_scratch={str(start == 'scratch').lower()}",
            f"tuning.seeds={SEEDS}",
        ]
        config = "configs/finetune/docstrings.yaml"
        step(f"classifier, {start}", ["finetune", config, *overrides], [ROOT / "bert/export/parity.json", config],
             ROOT / f"classifier-{start}/results.json")  # fmt: skip


def common(name: str, text: list[str]) -> list[str]:
    quoted = ", ".join(json.dumps(str(file)) for file in text)
    return [f"run_dir={ROOT / name}", f"data.dir={ROOT / f'{name}-data'}", f"data.build.sources=[{quoted}]"]


class Steps:
    """Runs commands one after the other; remembers in `demo/.done/` with which words and inputs each was finished."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.number = 0

    def __call__(self, title: str, words: list[str], inputs: list[Any], result: Path) -> None:
        self.number += 1
        stamp = ROOT / ".done" / f"{self.number:02d}"
        key = fingerprint(words, inputs)
        if result.exists() and stamp.exists() and stamp.read_text() == key:
            self.console.rule(f"[dim]{self.number}. {title}: already done", align="left", style="dim")
            return
        command = words if words[0] == "-m" else ["-m", "launcher.cli", *words]
        shown = "python " + " ".join(words) if words[0] == "-m" else "millstream " + " ".join(words)
        self.console.rule(f"[bold]{self.number}. {title}", align="left")
        self.console.print(f"[dim]$ {shown}[/dim]", highlight=False, soft_wrap=True)
        began = time.monotonic()
        if code := subprocess.run([sys.executable, *command]).returncode:
            raise StepFailed(f"step {self.number} ({title}) ended with exit code {code}: {shown}")
        self.console.print(f"[dim]{time.monotonic() - began:.0f} s[/dim]", highlight=False)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(fingerprint(words, inputs))


def fingerprint(words: list[str], inputs: list[Any]) -> str:
    """Of the command and of its input files' sizes and times."""
    stats = [
        (str(path), Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in inputs if Path(path).exists()
    ]
    return hashlib.sha256(json.dumps([words, stats]).encode()).hexdigest()


def table(seconds: float) -> Table:
    """What came of it, all of it read from the files the steps left behind."""
    out = Table(title=f"raw text to a fine-tuned model in {seconds:.0f} s", title_justify="left")
    for column in ("", "before", "after", "where"):
        out.add_column(column, justify="left" if column in ("", "where") else "right")
    for name, title in (("bert", "BERT"), ("gpt", "GPT")):
        lines = [json.loads(line) for line in (ROOT / name / "metrics.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if "eval_loss" in line]
        speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
        first, last = evaluations[0], evaluations[-1]
        out.add_row(
            f"{title} held-out loss",
            f"{first['eval_loss']:.2f}",
            f"{last['eval_loss']:.2f}",
            str(ROOT / name / "report.html"),
        )
        out.add_row(
            f"{title} held-out perplexity",
            f"{first['eval_perplexity']:.0f}",
            f"{last['eval_perplexity']:.1f}",
            str(ROOT / name / "metrics.jsonl"),
        )
        out.add_row(f"{title} tokens/s (median, {RANKS} ranks)", "", f"{speed:,.0f}", str(ROOT / name / "export"))
    accuracy = {
        start: json.loads((ROOT / f"classifier-{start}/results.json").read_text())["accuracy"]
        for start in ("scratch", "pretrained")
    }
    shown = {start: f"{a['mean']:.3f} (spread {a['spread']:.3f})" for start, a in accuracy.items()}
    out.add_row(
        "classifier accuracy: from scratch, from pretrained",
        shown["scratch"],
        shown["pretrained"],
        str(ROOT / "classifier-pretrained/model"),
    )
    return out


def print_samples(console: Console) -> None:
    for sample in json.loads((ROOT / "gpt/samples.json").read_text()):
        console.print("\n[bold]the GPT writes[/bold]")
        console.print(sample, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
