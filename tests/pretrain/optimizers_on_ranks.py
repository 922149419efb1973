"""What test_optimizers.py runs on every rank: `python tests/pretrain/optimizers_on_ranks.py TYPE FILE`.

Trains for a few steps at every ZeRO stage, reads the optimizer out in the middle, fills it in again, looks at the
average and goes on, and writes what it saw as JSON: stage and precision -> losses, and the weights and their average
after the last step as sums of squares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime
from pretrain.models import build_model

SETUPS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
VOCAB_SIZE, SEQ_LEN, BATCH, NUM_STEPS, MIDDLE = 131, 16, 4, 4, 2

ranks = runtime.start()


def start(stage: int, precision: str, kind: str):
    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2},
            "zero": {"stage": stage, "persistence_threshold": 40},  # at stage 3 some stay whole
            "train": {"precision": precision, "global_batch_size": BATCH, "micro_batch_size": 1, "seq_len": SEQ_LEN}
            | {"optimizer": {"type": kind, "lr": 1e-2, "ema_decay": 0.9}},
        }
    )
    runtime.seed_all(3)
    return engine.initialize(
        lambda: build_model(config.model, VOCAB_SIZE, SEQ_LEN),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )


def step(model, number: int) -> float:
    """A step on BATCH rows that depend on its number alone, shared out over the ranks."""
    model.train()
    rows = torch.randint(0, VOCAB_SIZE, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(number))
    total = 0.0
    for row in rows[ranks.rank :: ranks.world_size]:
        ids = row[None]
        loss = model(input_ids=ids[:, :-1], labels=ids[:, 1:])["clm"] / (BATCH * SEQ_LEN)
        engine.backward(model, loss)
        model.step()
        total += loss.item()
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item()


def copied(model) -> dict:
    return {f.name: (f.shape, f.start, {k: t.clone() for k, t in f.tensors.items()}) for f in engine.fragments(model)}


def read_from(parts):
    def read(name: str, key: str, start: int, length: int) -> torch.Tensor:
        found = [part[name] for part in parts if name in part]
        whole = torch.full((torch.Size(found[0][0]).numel(),), float("nan"))
        for _, first, tensors in found:
            whole[first : first + tensors[key].numel()] = tensors[key]
        return whole[start : start + length]

    return read


def squares(parts, key: str) -> dict[str, float]:
    read = read_from(parts)
    shapes = {name: shape for part in parts for name, (shape, *_) in part.items()}
    return {
        name: read(name, key, 0, torch.Size(shape).numel()).double().square().sum().item()
        for name, shape in sorted(shapes.items())
    }


seen = {}
for stage, precision in SETUPS:
    model = start(stage, precision, sys.argv[1])
    losses = [step(model, number) for number in range(MIDDLE)]
    parts = ranks.gather(copied(model))
    rest = [step(model, number) for number in range(MIDDLE, NUM_STEPS)]
    after = ranks.gather(copied(model))
    engine.load_fragments(model, read_from(parts), MIDDLE)
    read = read_from(parts)
    with engine.averaged_weights(model):
        for name, weight in engine.gather_weights(model):
            average = read(name, "ema", 0, weight.numel())
            assert torch.equal(weight.flatten(), average.to(weight.dtype)), (stage, precision, name)
    again = [step(model, number) for number in range(MIDDLE, NUM_STEPS)]
    assert again == rest, (stage, precision, again, rest)
    assert squares(ranks.gather(copied(model)), "ema") == squares(after, "ema"), (stage, precision)
    seen[f"{precision}, stage {stage}"] = {"losses": losses + rest} | {
        key: squares(after, key) for key in ("master", "ema")
    }
    engine.close(model)
if ranks.is_first:
    Path(sys.argv[2]).write_text(json.dumps(seen))
ranks.barrier()
runtime.end()
