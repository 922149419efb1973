"""What test_verify.py runs on every rank: `python tests/pretrain/verify_on_ranks.py FUNCTION`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime, verify
from pretrain.guard import GuardStop
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models import build_model
from pretrain.step import add_up_gradient
from tests.pretrain.bits import flip

STAGES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
VOCAB_SIZE, SEQ_LEN = 131, 32

ranks = runtime.start()
folder = tempfile.mkdtemp()


def start(stage: int, precision: str, every: int | None, architecture: str = "gpt"):
    model = {"architecture": architecture, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "dropout": 0.1}
    config = PretrainConfig.model_validate(
        {
            "run_dir": folder,
            "model": model | {"activation_checkpointing": stage == 3},
            "zero": {"stage": stage, "persistence_threshold": 40},  # at stage 3 some stay whole
            "guard": {"verify_every_steps": every},
            "train": {"precision": precision, "global_batch_size": 8, "micro_batch_size": 2, "seq_len": SEQ_LEN}
            | {"label_smoothing": 0.1, "z_loss": 1e-3, "optimizer": {"lr": 1e-2}},
        }
    )
    runtime.seed_all(3)
    build = lambda: build_model(config.model, VOCAB_SIZE, SEQ_LEN)  # noqa: E731
    return config, engine.initialize(build, config.train.optimizer, deepspeed_json(config, ranks.world_size))


def batches(step: int, architecture: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 * step + ranks.rank)
    made = []
    for _ in range(2):
        ids = torch.randint(VOCAB_SIZE, (2, SEQ_LEN + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
        batch["labels"][:, :: 2 + ranks.rank] = IGNORE_INDEX
        if architecture == "bert":
            batch |= {"token_type_ids": batch["input_ids"] % 2, "next_sentence_label": torch.tensor([0, 1])}
        made.append(batch)
    return made


def steps(config, model, numbers) -> list:
    """What each step gave, down to the last bit."""
    seen = []
    for number in numbers:
        runtime.seed_all(config.train.seed, number, ranks.rank)
        engine.set_lr(model, 1e-2)
        model.train()
        losses = add_up_gradient(config, model, batches(number, config.model.architecture), number, ranks)
        engine.update(model)
        norm = engine.grad_norm(model)
        if verify.is_due(config.guard, number):
            verify.check_norm(norm, config, number, ranks)
        seen.append((losses, norm, torch.rand(()).item()))
    return seen


def stopped(config, model, number: int) -> str:
    try:
        steps(config, model, [number])
    except GuardStop as stop:
        return str(stop)
    raise AssertionError("the step went through")


def verified_steps_change_nothing_at_any_stage() -> None:
    for stage, precision in STAGES:
        for architecture in ("gpt", "bert") if (stage, precision) in ((1, "bf16"), (3, "bf16")) else ("gpt",):
            runs = []
            for every in (None, 1):
                config, model = start(stage, precision, every, architecture)
                seen = steps(config, model, range(3))
                weights = {name: verify.checksum(weight).item() for name, weight in engine.whole_weights(model)}
                runs.append((seen, weights))
                engine.close(model)
            assert runs[0] == runs[1], (stage, precision, architecture)
            assert len({str(of_step) for of_step in runs[0][0]}) == 3


def flipped_bit_of_either_execution_is_named_with_rank_and_step() -> None:
    for stage, precision in STAGES:
        # The first execution has two micro batches, whose forwards are made again in backward by checkpointing.
        for forward, right in ((0, "second"), (4 if stage == 3 else 2, "first")):
            config, model = start(stage, precision, 2)
            steps(config, model, [0])
            count = 0

            def once(module, given, out, at=forward):
                nonlocal count
                count += 1
                return out + (flip(out) - out).detach() if count == at + 1 else out

            if ranks.rank == 1:
                model.module.blocks[0].attention.output.register_forward_hook(once)
            text = stopped(config, model, 1)
            assert "step 2: silent data corruption: rank 1 computed the step twice on the same data" in text, text
            assert "rank 0" not in text and "there is no checkpoint yet" in text, text
            assert f"a third time with the {right} result" in text, (stage, precision, text)
            engine.close(model)


def flipped_bit_of_a_weight_is_named_with_its_rank_and_parameter() -> None:
    for stage, precision in STAGES:
        config, model = start(stage, precision, 1)
        steps(config, model, [0])
        if ranks.rank == 1:
            weight = model.module.blocks[1].mlp.up.weight
            held = weight.ds_tensor if stage == 3 else weight
            held.data.copy_(flip(held.data))
        text = stopped(config, model, 1)
        name = "blocks.1.mlp.up.weight"
        if stage in (1, 2):  # rank 0 has the fp32 weights of this stretch or rank 1 has; the copies differ anyway
            assert f"have other weights: {name}" in text, (stage, precision, text)
        elif stage == 3:
            assert f"rank 1: its weights are not its fp32 weights, rounded: {name}" in text, text
        else:
            assert f"all 2 ranks, no majority of which agrees, have other weights: {name}" in text, text
        engine.close(model)


def other_norm_on_one_rank_is_named() -> None:
    config, model = start(3, "bf16", 1)
    right = engine.grad_norm
    engine.grad_norm = lambda model: right(model) * (1 + 1e-12 * ranks.rank)
    assert "other values of the norm of the gradient" in stopped(config, model, 0)
    engine.close(model)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
    ranks.barrier()
    runtime.end()
