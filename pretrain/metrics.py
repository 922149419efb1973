"""The numbers of a run: metrics.jsonl (every step, exact), TensorBoard (curves), the terminal (progress).

Only rank 0 writes. A resumed run drops the lines after the checkpoint it goes on from, because it writes them again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.schema import LogConfig

FILE = "metrics.jsonl"
ROLLED_BACK = "rolled_back.jsonl"


class Metrics:
    """Where the lines of a run go; made by `open_metrics`."""

    def __init__(self, run_dir: Path, step: int, num_steps: int, config: LogConfig) -> None:
        self.run_dir, self.config, self.num_steps = run_dir, config, num_steps
        self.file = (run_dir / FILE).open("a", encoding="utf-8")
        self.tensorboard = open_tensorboard(run_dir, step) if config.tensorboard else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        console = Console(file=sys.stdout)
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("step", total=num_steps, completed=step, shown="")
        self.progress.start()

    def log(self, line: dict[str, Any]) -> None:
        """Write one line; it has `step` and numbers. Infinite and not-a-number values are written as such."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        step = line["step"]
        if self.tensorboard:
            for name, value in line.items():
                if name != "step":
                    group = "eval" if name.startswith("eval_") else "train"
                    self.tensorboard.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, step)
        shown = describe(line)
        if "loss" in line:
            self.progress.update(self.task, completed=step, shown=shown)
        is_due = (
            "loss" not in line or "skipped" in line or step % self.config.every_steps == 0 or step == self.num_steps
        )
        if is_due and (self.progress.disable or "loss" not in line):
            self.progress.console.print(f"step {step:>6}/{self.num_steps}  {shown}", highlight=False, soft_wrap=True)

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: the lines after it become lines of rolled_back.jsonl."""
        self.file.close()
        gone = [line for line in read_metrics(self.run_dir) if line["step"] > step]
        with (self.run_dir / ROLLED_BACK).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in gone))
        drop_after(self.run_dir, step)
        self.file = (self.run_dir / FILE).open("a", encoding="utf-8")
        if self.tensorboard:
            self.tensorboard.close()
            self.tensorboard = open_tensorboard(self.run_dir, step)
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        self.progress.stop()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


class Silent:
    """The other ranks' metrics: nothing is written."""

    def log(self, line: dict[str, Any]) -> None:
        pass

    def go_back(self, step: int) -> None:
        pass


@contextmanager
def open_metrics(
    run_dir: Path, step: int, num_steps: int, config: LogConfig, is_first: bool
) -> Iterator[Metrics | Silent]:
    """Metrics of a run that goes on after `step` (0: starts anew); closed at the end, also after an error."""
    if not is_first:
        yield Silent()
        return
    drop_after(run_dir, step)
    metrics = Metrics(run_dir, step, num_steps, config)
    try:
        yield metrics
    finally:
        metrics.close()


def open_tensorboard(run_dir: Path, step: int) -> Any:
    """A writer of curves that goes on after `step`: what is there of later steps is not shown any more."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)


def drop_after(run_dir: Path, step: int) -> None:
    """Keep the lines up to `step`, without a half-written last one; the file is replaced in one move."""
    path = run_dir / FILE
    if not path.exists():
        return
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if step else []
    aside = path.with_name(f".writing-{FILE}")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl; a last line that a crash cut off is left out."""
    lines = (run_dir / FILE).read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{run_dir / FILE}:{number}: is not JSON: {line[:80]!r}") from None
    return parsed


def describe(line: dict[str, Any]) -> str:
    """One line for a person: loss, rate, speed; or the held-out numbers."""
    if "loss" not in line:
        return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in line.items() if name != "step")
    parts = [f"loss {line['loss']:.4f}"]
    if "lr" in line:
        parts.append(f"lr {line['lr']:.2e}")
    if "tokens_per_second" in line:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if not math.isfinite(line["loss"]):
        parts.append("NOT FINITE")
    if "skipped" in line:
        parts.append(f"NO UPDATE (gradient norm {line['grad_norm']:.4g})")
    return "  ".join(parts)
