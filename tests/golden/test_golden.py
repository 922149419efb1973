"""Loss curves of 200 steps, stored, compared at every commit. `python -m tests.golden.test_golden` stores them anew.

A change that alters the numbers of training on purpose stores them anew and says so in its commit; one that does so by
accident stops here. The text is made by this file, the runs are float32 on two ranks with ZeRO-3. Rounding moves a loss
of GPT's run by 5e-7 of its value and one of BERT's, late in the run, by 2e-4 (seen on one rank against two, without
dropout, whose masks depend on the rank). TOLERANCE leaves room for other processors beside that.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_ranks

HERE = Path(__file__).parent
TOLERANCE = {"gpt": 1e-4, "bert": 2e-3}  # relative
CONFIG = """
run_dir: {folder}/run
model: {{architecture: {architecture}, preset: nano, num_layers: 2, hidden_size: 64, num_heads: 2, dropout: 0.1}}
data:
  dir: {folder}/data
  build:
    sources: [{folder}/text.jsonl]
    validation_fraction: 0.1
    tokenizer: {{type: {tokenizer}, vocab_size: 300}}
    num_workers: 1
train:
  num_steps: 200
  seq_len: 64
  global_batch_size: 8
  micro_batch_size: 2
  precision: fp32
  optimizer: {{lr: 3.0e-3}}
  schedule: {{type: cosine, warmup_steps: 20}}
eval: {{every_steps: 100, num_samples: 32}}
checkpoint: {{every_steps: 200}}
log: {{every_steps: 50, tensorboard: false}}
"""
WORDS = ["the", "a", "sun", "moon", "river", "stone", "bird", "king", "runs", "sings", "falls", "under", "slowly"]


def trained(architecture: str, folder: Path, num_ranks: int = 2) -> dict[str, list[float]]:
    """Train in `folder`; the loss after each step and the held-out losses."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(400):
        places = rng.integers(0, len(WORDS), 60).cumsum() * 7 % len(WORDS)  # a language with something to learn
        texts.append(" ".join(WORDS[place] + ("." if place % 5 == 0 else "") for place in places))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = {"gpt": "byte_bpe", "bert": "wordpiece"}[architecture]
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, architecture=architecture, tokenizer=tokenizer))
    run_ranks(1, ["-m", "data_pipeline.build", str(config)], folder / "logs")
    run_ranks(num_ranks, ["-m", "pretrain.train", "--config", str(config)], folder / "logs")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [line["loss"] for line in lines if "loss" in line],
        "eval_loss": [line["eval_loss"] for line in lines if "eval_loss" in line],
    }


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_loss_curve_is_the_stored_one(architecture, tmp_path):
    stored = json.loads((HERE / f"{architecture}.json").read_text())
    seen = trained(architecture, tmp_path)
    for name, curve in stored.items():
        assert len(seen[name]) == len(curve)
        off = [(step, was, now) for step, (was, now) in enumerate(zip(curve, seen[name], strict=True), 1)
               if abs(now - was) > TOLERANCE[architecture] * was]  # fmt: skip
        assert not off, f"{name} differs at {len(off)} of {len(curve)} places, first (step, stored, now): {off[0]}"


if __name__ == "__main__":
    for architecture in ("gpt", "bert"):
        with tempfile.TemporaryDirectory() as folder:
            curves = trained(architecture, Path(folder))
        text = json.dumps({name: [float(f"{value:.7g}") for value in curve] for name, curve in curves.items()})
        (HERE / f"{architecture}.json").write_text(text.replace('], "', '],\n "') + "\n")
        print(f"{architecture}: {curves['loss'][0]:.4f} -> {curves['loss'][-1]:.4f}, held out {curves['eval_loss']}")
