"""`millstream prove resume CONFIG [--ranks N] [steps=8] [key=value ...]`: does this configuration resume exactly?

Three real runs of the first steps, in a temporary directory beside run_dir, which itself is not touched: undisturbed;
killed in the middle and resumed; the same killed run resumed at another number of ranks. They differ from the user's
run in when they save and in log.trace only: num_steps stays, it is the length of the learning-rate schedule.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from pathlib import Path

from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from launcher.local import Process, Signals, default_num_ranks, run_local, visible_devices
from launcher.resume_comparison import QUANTITIES, first_differences, read_lines, read_records
from launcher.watch import Watch

POLL_SECONDS = 0.005
SAME_RANKS = dict.fromkeys(QUANTITIES, 0.0)
RELATIVE = {"fp32": 1e-4, "bf16": 2e-2}  # at another number of ranks sums have another order


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
                    process.kill()
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
    own += ["checkpoint.upload=null", "checkpoint.local_dir=null"]
    words = ["--config", file, *overrides, *own]

    undisturbed, resumed, elsewhere = (folder / name for name in ("undisturbed", "resumed", "elsewhere"))
    run_to(num_steps, words, undisturbed, ranks)
    run_to(middle + 1, words, resumed, ranks)
    if newest_step(resumed) >= num_steps:
        raise ConfigError(f"steps={num_steps}: over before the run could be killed; take more steps")
    if others is not None:
        shutil.copytree(resumed, elsewhere)
        shutil.rmtree(elsewhere / "trace")  # so that the resumed steps alone are in it
    run_to(num_steps, words, resumed, ranks)
    expected = read_records(undisturbed, ranks)
    is_same = show(f"resumed on {ranks}", expected, read_records(resumed, ranks), num_steps, SAME_RANKS)
    if others is None:
        print("no other number of ranks divides the global batch into micro batches here: not compared")
        return 0 if is_same else 1
    run_to(num_steps, words, elsewhere, others)
    found = read_records(elsewhere, others)
    before = {step: expected[step] for step in range(1, middle + 1)}  # not taken at that number of ranks
    title, tolerances = f"resumed on {others}", tolerances_elsewhere(config)
    is_near = show(title, expected, found | before, num_steps, tolerances)
    return 0 if is_same and is_near else 1


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
    """The nearest other number of ranks that divides the global batch into micro batches; None where there is none."""
    num_batches = config.train.global_batch_size // config.train.micro_batch_size
    most = len(visible_devices()) or ranks + 1
    fitting = [n for n in range(1, most + 1) if num_batches % n == 0 and n != ranks]
    return min(fitting, key=lambda n: (abs(n - ranks), n), default=None)


def tolerances_elsewhere(config: PretrainConfig) -> dict[str, float]:
    """By quantity, at another number of ranks; each rank draws its own dropout, with which the losses cannot agree."""
    exact = {"lr": 0.0, "tokens": 0.0, "sample_ids": 0.0}
    if config.model.dropout or config.model.attention_dropout:
        return exact
    near = RELATIVE["fp32" if config.train.precision == "fp32" else "bf16"]
    return {"loss": near, "grad_norm": near, **exact}


def show(title: str, expected: dict, found: dict, num_steps: int, tolerances: dict[str, float]) -> bool:
    """Print the verdict of each quantity; True if there is no difference."""
    differences = first_differences(expected, found, num_steps, tolerances)
    print(f"\n{title} ranks, {num_steps} steps")
    for quantity in QUANTITIES:
        if quantity not in tolerances:
            verdict = "not compared: ranks draw their own"
        elif difference := differences[quantity]:
            verdict = f"DIFFERS at {difference}"
        else:
            verdict = f"within {tolerances[quantity]:g}" if tolerances[quantity] else "equal"
        print(f"  {quantity:12}{verdict}", flush=True)
    return not any(differences.values())
