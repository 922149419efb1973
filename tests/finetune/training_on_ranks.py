"""Ranks of a fine-tuning that is disturbed in several ways. Started by test_training.py with the folder of its files.

All runs have the same configuration. Each writes what it returned, or raised, into RUN.code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from configs.load import load_finetune
from finetune import run, training
from pretrain import runtime

train_step = training.train_step


def disturb(at: int, happens: Any) -> None:
    """Let something happen in step `at`, counted from the start of the process's next run."""
    count = 0

    def disturbed(*arguments: Any) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == at:
            happens()
        return train_step(*arguments)

    training.train_step = disturbed


def crash() -> None:
    raise RuntimeError("as if it were killed")


def main() -> int:
    folder = Path(sys.argv[1])
    ranks = runtime.start()

    def start(name: str, *overrides: str) -> None:
        config = load_finetune(folder / "training.yaml", [f"run_dir={folder / name}", *overrides])
        try:
            code: Any = run.finetune(config, ranks)
        except (RuntimeError, ValueError) as error:
            code = str(error)
        if ranks.is_first:
            (folder / f"{name}.codes").open("a").write(json.dumps(code) + "\n")

    start("undisturbed")
    disturb(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    start("disturbed")
    disturb(9, crash)
    start("disturbed")
    training.train_step = train_step
    start("disturbed")
    start("disturbed")  # nothing is left to do
    start("disturbed", "tuning.optimizer.lr=1e-3")
    start("folds", "folds=3", "tuning.num_epochs=0.2")
    start("hopeless", "tuning.optimizer.lr=1e30", "tuning.eval_every=100", "tuning.warmup_share=0")
    return 0


if __name__ == "__main__":
    runtime.run(main)
