"""What test_guard.py runs on every rank: `python tests/pretrain/guard_on_ranks.py FUNCTION`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import math

import torch
from torch import nn

from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime
from pretrain.models import build_model

STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
CASES = [(*stage, "adamw") for stage in STAGES] + [
    (stage, "fp32", optimizer) for stage in (0, 2, 3) for optimizer in ("lion", "lamb", "muon")
]
VOCAB_SIZE, SEQ_LEN, HIDDEN_SIZE, BATCH = 131, 16, 32, 4

ranks = runtime.start()


def start(stage: int, precision: str, optimizer: str, build=None):
    train = {"precision": precision, "global_batch_size": BATCH, "micro_batch_size": 1, "seq_len": SEQ_LEN}
    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"num_layers": 2, "hidden_size": HIDDEN_SIZE, "num_heads": 2},
            "zero": {"stage": stage, "persistence_threshold": 100},
            "train": train | {"optimizer": {"type": optimizer, "lr": 1e-2, "ema_decay": 0.9}},
        }
    )
    runtime.seed_all(3)
    return engine.initialize(
        build or (lambda: build_model(config.model, VOCAB_SIZE, SEQ_LEN)),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )


def step(model, number: int, seq_len: int, is_wanted: bool = True) -> tuple[float, float, bool]:
    """Loss, gradient norm, and whether there was an update, of a step on rows of this length."""
    model.train()
    total = 0.0
    for micro_step in range(BATCH // ranks.world_size):
        if micro_step:
            model.step()
        runtime.seed_all(7, number, micro_step, ranks.rank)
        ids = torch.randint(0, VOCAB_SIZE, (1, seq_len + 1))
        loss = model(input_ids=ids[:, :-1], labels=ids[:, 1:])["clm"] / (BATCH * seq_len)
        engine.backward(model, loss)
        total += loss.item()
    norm = math.sqrt(sum(gradient.norm().item() ** 2 for _, gradient in engine.gradients(model)))
    is_updated = engine.update(model, is_wanted)
    assert math.isnan(norm) or math.isclose(norm, engine.grad_norm(model), rel_tol=1e-5)
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item(), engine.grad_norm(model), is_updated


def copied(model) -> dict[str, dict[str, torch.Tensor]]:
    return {f.name: {key: t.clone() for key, t in f.tensors.items()} for f in engine.fragments(model)}


def poison_a_position(model) -> None:
    """Make an element of the position table infinite that only rows of SEQ_LEN tokens look up."""
    parts = ranks.gather({f.name: (f.shape, f.start, f.tensors) for f in engine.fragments(model)})

    def read(name: str, key: str, start: int, length: int) -> torch.Tensor:
        found = [part[name] for part in parts if name in part]
        whole = torch.empty(torch.Size(found[0][0]).numel())
        for _, first, tensors in found:
            whole[first : first + tensors[key].numel()] = tensors[key]
        if name == "position_embeddings.weight" and key == "master":
            whole[SEQ_LEN * HIDDEN_SIZE - 1] = float("inf")
        return whole[start : start + length]

    engine.load_fragments(model, read, 1)


def step_that_is_not_finite_changes_nothing() -> None:
    for case in CASES:
        model = start(*case)
        step(model, 0, 8)
        poison_a_position(model)
        before = copied(model)
        loss, norm, is_updated = step(model, 1, SEQ_LEN)
        assert math.isnan(loss) and math.isnan(norm) and not is_updated, (case, loss, norm, is_updated)
        after = copied(model)
        assert {key for tensors in after.values() for key in tensors} >= {"master", "ema"}
        for name, tensors in before.items():
            assert all(torch.equal(tensor, after[name][key]) for key, tensor in tensors.items()), (case, name)
        went_on = [step(model, 2, 8), step(model, 3, 8)]
        engine.close(model)

        model = start(*case)
        step(model, 0, 8)
        poison_a_position(model)
        assert repr(went_on) == repr([step(model, 2, 8), step(model, 3, 8)]), (case, went_on)
        # LAMB's step size is the norm of the whole table, so its second update cannot be finite either.
        assert [is_updated for *_, is_updated in went_on] == [True, case[2] != "lamb"], (case, went_on)
        engine.close(model)


class Line(nn.Module):
    """w . x, whose gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 3e20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def infinite_loss_with_a_finite_gradient_changes_nothing() -> None:
    for stage in (0, 1, 2, 3):
        model = start(stage, "fp32", "adamw", Line)
        before = copied(model)
        for micro_step in range(BATCH // ranks.world_size):
            if micro_step:
                model.step()
            loss = model(torch.full((6,), 1e18))
            engine.backward(model, loss / BATCH)
        assert math.isinf(loss.item())
        assert not engine.update(model, is_wanted=math.isfinite(loss.item()))
        assert abs(engine.grad_norm(model) / (1e18 * 6**0.5) - 1) < 1e-6, (stage, engine.grad_norm(model))
        after = copied(model)
        assert all(torch.equal(before[n][key], after[n][key]) for n in before for key in before[n])
        for micro_step in range(BATCH // ranks.world_size):
            if micro_step:
                model.step()
            engine.backward(model, model(torch.ones(6)) / BATCH)
        assert engine.update(model), stage
        assert abs(engine.grad_norm(model) / 6**0.5 - 1) < 1e-6, "the gradient that was refused was not cleared"
        engine.close(model)


globals()[sys.argv[1]]()
ranks.barrier()  # as the loop does: a rank that leaves while another still works takes the connection with it
runtime.end()
