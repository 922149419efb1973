"""How far each optimizer comes in the same steps: `python -m benchmarks.optimizers`.

The nano GPT (configs/gpt/nano.yaml: 4 layers x 128, docstrings of the installed packages) for a few hundred steps of 16
x 64 tokens, cosine schedule, by the command that users run. For each optimizer a sweep over three learning rates with
one seed, then the best rate with two more: the held-out loss of the weights and of their moving average after the last
step, mean and range over the three seeds, and the time of a step. The rate is chosen by the loss that is reported, so
small differences mean nothing; nor does one model of 1.3 million parameters say what a large one wants.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RATES = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "lion": (3e-4, 6e-4, 1.2e-3),
    "lamb": (1e-2, 2e-2, 4e-2),
    "muon": (8e-3, 1.6e-2, 3.2e-2),
}
SETTINGS = {  # of docs/training.md
    "adamw": "betas: [0.9, 0.95], weight_decay: 0.1",
    "lion": "betas: [0.9, 0.99], weight_decay: 0.5",
    "lamb": "betas: [0.9, 0.999], eps: 1.0e-6, weight_decay: 0.01",
    "muon": "betas: [0.9, 0.95], weight_decay: 0.1",
}
SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:  # a run has one thread
        folder = Path(name)
        call("data_pipeline.build", "configs/gpt/nano.yaml", f"data.dir={folder}/data")
        sweep = [(kind, lr, SEEDS[0]) for kind, rates in RATES.items() for lr in rates]
        found = dict(zip(sweep, pool.map(lambda run: train(folder, steps, *run), sweep), strict=True))
        best = {kind: min(rates, key=lambda lr: found[kind, lr, SEEDS[0]][0]) for kind, rates in RATES.items()}
        more = [(kind, lr, seed) for kind, lr in best.items() for seed in SEEDS[1:]]
        found |= dict(zip(more, pool.map(lambda run: train(folder, steps, *run), more), strict=True))
    print(f"after {steps} steps; of the sweep, seed {SEEDS[0]}:")
    for kind, rates in RATES.items():
        print(f"  {kind:6s}" + ", ".join(f"lr {lr:g}: {found[kind, lr, SEEDS[0]][0]:.3f}" for lr in rates))
    print("\n| optimizer | lr | held-out loss, mean (range) | of the average | ms a step |\n|---|---|---|---|---|")
    for kind, lr in best.items():
        losses, averages, seconds = zip(*(found[kind, lr, seed] for seed in SEEDS), strict=True)
        speed = 1000 * statistics.median(seconds)
        print(f"| {kind} | {lr:g} | {spread(losses)} | {spread(averages)} | {speed:.0f} |")


def train(folder: Path, steps: int, kind: str, lr: float, seed: int) -> tuple[float, float, float]:
    """Held-out loss of the weights and of their average after the last step, and the median seconds of a step."""
    run_dir = folder / f"{kind}-{lr}-{seed}"
    call(
        "pretrain.train", "--config", "configs/gpt/nano.yaml", f"run_dir={run_dir}", f"data.dir={folder}/data",
        f"train.num_steps={steps}", f"train.seed={seed}", "train.seq_len=64", "train.global_batch_size=16",
        f"train.optimizer={{type: {kind}, lr: {lr}, ema_decay: 0.98, {SETTINGS[kind]}}}",
        f"eval.every_steps={steps}", f"checkpoint.every_steps={steps}", "log.tensorboard=false",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    print(f"{kind:6s} lr {lr:g} seed {seed}: {lines[-1]['eval_loss']:.3f}", flush=True)
    return lines[-1]["eval_loss"], lines[-1]["eval_ema_loss"], statistics.median(seconds)


def call(module: str, *words: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", module, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(words)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def spread(values: tuple[float, ...]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


if __name__ == "__main__":
    main()
