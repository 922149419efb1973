"""`millstream prove resume CONFIG [--ranks N] [steps=8] [key=value ...]`: does this configuration resume exactly?

Real runs of the first steps, in a temporary directory beside run_dir, which itself is not touched. One is undisturbed
until it is killed at the end. What it has left behind, up to the checkpoint in the middle, is resumed by two others: at
the same number of ranks, and at another one. What another number of ranks changes by itself is measured by a fourth,
undisturbed one. They differ from the user's run in when they save, in how little they evaluate, in log.trace and in
having no wall-clock budget: num_steps stays, it is the length of the learning-rate schedule.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from configs.batch_sizes import all_sizes, batch_size
from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from launcher.local import Process, Signals, default_num_ranks, run_local, visible_devices
from launcher.loss_comparison import FACTOR, relative_difference, smallest_rounding
from launcher.resume_comparison import QUANTITIES, Records, first_differences, read_lines, read_records
from launcher.watch import Watch

POLL_SECONDS = 0.005
SAME_RANKS = dict.fromkeys(QUANTITIES, 0.0)
EXACT_ELSEWHERE = {"lr": 0.0, "tokens": 0.0, "sample_ids": 0.0}


class KillAt(Signals):
    """Kills all ranks with SIGKILL as soon as metrics.jsonl of `run_dir` shows `step`."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__()
        self.run_dir, self.step, self.ended = run_dir, step, threading.Event()

    def go_to(self, ranks: list[Process], watch: Watch) -> None:
        super().go_to(ranks, watch)
        threading.Thread(target=self._kill, args=[ranks], daemon=True).start()

    def _kill(self, ranks: list[Process]) -> None:
        while not self.ended.wait(POLL_SECONDS):
            if newest_step(self.run_dir) >= self.step:
                for process in ranks:
                    process.send_signal(signal.SIGKILL)
                return


def prove_resume(file: str, words: list[str], num_ranks: int | None) -> int:
    """Run, compare and print; returns 0, or 1 at a difference. Raises ConfigError where the proof cannot be made."""
    overrides = [word for word in words if not word.startswith("steps=")]
    config = load_pretrain(file, overrides)
    num_steps = read_steps(words, config)
    ranks = num_ranks or default_num_ranks()
    others = other_ranks(config, ranks)
    parent = Path(config.run_dir).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove-resume-", dir=parent))
    try:
        return run_and_compare(file, overrides, config, num_steps, ranks, others, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_and_compare(
    file: str,
    overrides: list[str],
    config: PretrainConfig,
    num_steps: int,
    ranks: int,
    others: int | None,
    folder: Path,
) -> int:
    middle = num_steps // 2
    own = [f"checkpoint.every_steps={middle}", "checkpoint.background=false", "log.trace=true", "train.resume=auto"]
    # What the user has at that address and on the nodes' disks is neither read nor changed.
    own += [
        "checkpoint.upload=null",
        "checkpoint.local_dir=null",
        "checkpoint.keep_last=1000",
    ]
    own += ["train.budget=null", "eval.num_samples=1", f"eval.every_steps={config.train.num_steps}"]
    words = ["--config", file, *overrides, *own]
    if config.train.budget is not None:
        print("train.budget is left out: with it the rate follows the clock, and no two runs are equal", flush=True)

    undisturbed, resumed, elsewhere, anew = (folder / name for name in ("undisturbed", "resumed", "elsewhere", "anew"))
    run_to(num_steps, words, undisturbed, ranks)
    expected = read_records(undisturbed, ranks)
    for copy in (resumed, elsewhere):
        copy_as_of(middle, undisturbed, copy)
    run_to(num_steps, words, resumed, ranks)
    steps = range(middle + 1, num_steps + 1)
    is_same = show(f"resumed on {ranks}", expected, read_records(resumed, ranks), steps, SAME_RANKS)
    if others is None:
        print("no other number of ranks divides the global batch into micro batches here: not compared")
        return 0 if is_same else 1
    run_to(num_steps, words, elsewhere, others)
    tolerances = dict(EXACT_ELSEWHERE)
    if not (config.model.dropout or config.model.attention_dropout):  # with it every rank draws its own
        run_to(num_steps, words, anew, others)
        tolerances |= tolerances_elsewhere(config, expected, read_records(anew, others))
    is_near = show(f"resumed on {others}", expected, read_records(elsewhere, others), steps, tolerances)
    return 0 if is_same and is_near else 1


def copy_as_of(step: int, run_dir: Path, copy: Path) -> None:
    """Copy what a killed run has left, without checkpoints after `step`, as if it had been killed before the next one.

    Neither its trace nor its metrics after `step` are copied, so that later steps are the copy's own.
    """
    kept = f"step-{step:08d}"
    if not (run_dir / "checkpoints" / kept).is_dir():
        raise ConfigError(f"prove resume: the run has no checkpoint {kept}, see above")

    def unwanted(folder: str, names: list[str]) -> list[str]:
        if Path(folder) == run_dir:
            return [name for name in names if name in ("trace", "ranks", "logs")]
        return [name for name in names if Path(folder).name == "checkpoints" and name != kept]

    shutil.copytree(run_dir, copy, ignore=unwanted)
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["step"] <= step]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run_to(step: int, words: list[str], run_dir: Path, num_ranks: int) -> None:
    """Train in `run_dir` until metrics.jsonl shows `step`, then kill it. Raises ConfigError if it never does."""
    kill = KillAt(run_dir, step)
    try:
        run_local("pretrain.train", [*words, f"run_dir={run_dir}"], num_ranks, run_dir, kill)
    finally:
        kill.ended.set()
    if kill.number is not None:
        raise ConfigError(f"prove resume: stopped by {signal.Signals(kill.number).name}, nothing is proven")
    if newest_step(run_dir) < step:
        raise ConfigError(f"prove resume: the run on {num_ranks} ranks ended before step {step}, see above")


def newest_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line), default=0)


def read_steps(words: list[str], config: PretrainConfig) -> int:
    """The value of `steps=`: at least 4, so that there is a middle, and at most train.num_steps."""
    value = next((word.removeprefix("steps=") for word in reversed(words) if word.startswith("steps=")), "8")
    if not value.isdigit() or not 4 <= int(value) <= config.train.num_steps:
        raise ConfigError(f"steps={value}: expected a number from 4 to train.num_steps={config.train.num_steps}")
    return int(value)


def other_ranks(config: PretrainConfig, ranks: int) -> int | None:
    """The nearest other number of ranks that divides each global batch into micro batches; None where there is none."""
    num_batches = math.gcd(*all_sizes(config.train)) // config.train.micro_batch_size
    most = len(visible_devices()) or ranks + 1
    fitting = [n for n in range(1, most + 1) if num_batches % n == 0 and n != ranks]
    return min(fitting, key=lambda n: (abs(n - ranks), n), default=None)


def tolerances_elsewhere(config: PretrainConfig, expected: Records, anew: Records) -> dict[str, float]:
    """Of loss and gradient norm: FACTOR times the largest difference between undisturbed runs on both numbers of ranks.

    On other ranks sums have another order, which changes the numbers by rounding whether there is a resume or not; at
    least what is left of the rounding of a sum over the batch's tokens, see `loss_comparison.smallest_rounding`.
    """
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    least = smallest_rounding(precision, batch_size(config.train, 0) * config.train.seq_len)
    tolerances = {}
    for quantity in ("loss", "grad_norm"):
        pairs = [(record[quantity], anew[step][quantity]) for step, record in expected.items() if step in anew]
        tolerances[quantity] = max(least, *(FACTOR * relative_difference(*pair) for pair in pairs))
    return tolerances


def show(title: str, expected: Records, found: Records, steps: range, tolerances: Mapping[str, float]) -> bool:
    """Print the verdict of each quantity; True if there is no difference."""
    differences = first_differences(expected, found, steps[-1], tolerances, steps[0])
    print(f"\n{title} ranks, steps {steps[0]} to {steps[-1]}")
    for quantity in QUANTITIES:
        if quantity not in tolerances:
            verdict = "not compared: ranks draw their own"
        elif difference := differences[quantity]:
            verdict = f"DIFFERS at {difference}"
        elif tolerance := tolerances[quantity]:
            verdict = f"within {tolerance:.1e}, {FACTOR:g} x what these ranks change without a resume"
        else:
            verdict = "equal"
        print(f"  {quantity:12}{verdict}", flush=True)
    return not any(differences.values())
