"""Ranks of fine-tunings with LoRA: at ZeRO stages 3 and 2, and at stage 3 once more, interrupted in the middle."""

from __future__ import annotations

import sys
from pathlib import Path

from configs.load import load_finetune
from finetune import run, training
from pretrain import runtime
from tests.finetune.training_on_ranks import crash, disturb


def main() -> int:
    folder, ranks = Path(sys.argv[1]), runtime.start()
    undisturbed = training.train_step

    def start(name: str, stage: int) -> None:
        run.finetune(load_finetune(folder / "lora.yaml", [f"run_dir={folder / name}", f"zero.stage={stage}"]), ranks)

    start("lora-3", 3)
    start("lora-2", 2)
    disturb(15, crash)
    try:
        start("lora-killed", 3)
    except RuntimeError:
        training.train_step = undisturbed
    start("lora-killed", 3)
    return 0


if __name__ == "__main__":
    runtime.run(main)
