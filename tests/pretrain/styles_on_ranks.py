"""What test_styles_on_ranks.py runs on every rank: steps of every style at ZeRO-3, and of one process without it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from configs.deepspeed_json import deepspeed_json
from configs.schema import ModelConfig, PretrainConfig
from pretrain import engine, runtime
from pretrain.models import build_model
from pretrain.optim import make_optimizer

VOCAB_SIZE, SEQ_LEN, BATCH, STEPS = 131, 24, 4, 3
SMALL = {"num_layers": 3, "hidden_size": 32, "activation_checkpointing": True}
STYLES = [
    ("gpt", "llama-nano", "adamw"),
    ("gpt", "llama-nano", "muon"),
    ("gpt", "qwen3-nano", "adamw"),
    ("gpt", "gpt-neo-nano", "lamb"),
    ("bert", "modernbert-nano", "muon"),
]

ranks = runtime.start()


def configuration(architecture: str, preset: str, optimizer: str) -> PretrainConfig:
    local = {"local_window": 8} if preset.startswith(("gpt-neo", "modernbert")) else {}
    train = {"precision": "fp32", "global_batch_size": BATCH, "micro_batch_size": 1, "seq_len": SEQ_LEN}
    model = ModelConfig.model_validate({"architecture": architecture, "preset": preset} | SMALL | local)
    return PretrainConfig.model_validate(
        {"run_dir": "unused", "model": model, "train": train | {"optimizer": {"type": optimizer, "lr": 1e-2}}}
    )


def sample(number: int) -> dict[str, torch.Tensor]:
    """A row of two documents, (1, seq), the same on every rank."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, VOCAB_SIZE, (1, SEQ_LEN + 1), generator=generator)
    cut = 5 + number % 14
    second = torch.arange(SEQ_LEN) >= cut
    places = torch.arange(SEQ_LEN) - cut * second
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "segment_ids": (1 + second.int())[None],
        "position_ids": places[None],
    }


def loss_of(model, number: int) -> torch.Tensor:
    (total,) = model(**sample(number)).values()
    return total / (BATCH * SEQ_LEN)


def plain_losses(config: PretrainConfig) -> list[float]:
    runtime.seed_all(3)
    model = build_model(config.model, VOCAB_SIZE, SEQ_LEN).train()
    optimizer = make_optimizer(model, config.train.optimizer)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(model, row) for row in range(BATCH)]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.optimizer.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def engine_losses(config: PretrainConfig) -> list[float]:
    runtime.seed_all(3)
    model = engine.initialize(
        lambda: build_model(config.model, VOCAB_SIZE, SEQ_LEN),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )
    model.train()
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for row in range(ranks.rank, BATCH, ranks.world_size):
            loss = loss_of(model, row)
            engine.backward(model, loss)
            model.step()
            total += loss.item()
        losses.append(ranks.sum(torch.tensor(total, dtype=torch.float64)).item())
    engine.close(model)
    return losses


for style in STYLES:
    config = configuration(*style)
    expected, found = plain_losses(config), engine_losses(config)
    assert expected[0] - expected[-1] > 0.05, (style, expected)
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= 2e-5 * other, (style, found, expected)
ranks.barrier()
runtime.end()
