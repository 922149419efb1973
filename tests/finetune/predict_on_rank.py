"""One rank that fine-tunes a model for each configuration in a folder, and predicts its dev file with each of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from configs.load import load_finetune
from finetune import predict, run
from pretrain import runtime


def main() -> int:
    alone = runtime.start()
    runtime.start = lambda: alone  # it may be started once in a process
    for file in sorted(Path(sys.argv[1]).glob("predict-*.yaml")):
        config = load_finetune(file, ["tuning.num_epochs=1", "max_train_examples=48", "log.tensorboard=false"])
        run.finetune(config, alone)
        found = predict.predictions(Path(config.run_dir) / "model", Path(config.dev or config.train), [])
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        (Path(config.run_dir) / "again.jsonl").write_text(lines)
    return 0


if __name__ == "__main__":
    runtime.run(main)
