"""What test_engine.py runs on every rank: `python tests/pretrain/engine_on_ranks.py FUNCTION`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools
from collections.abc import Sequence

import torch

from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime
from pretrain.models import build_model
from pretrain.optim import make_optimizer

STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
VOCAB_SIZE, SEQ_LEN, BATCH = 131, 16, 4

ranks = runtime.start()


def configuration(stage: int, precision: str, clip: float = 1.0) -> PretrainConfig:
    train = {"precision": precision, "global_batch_size": BATCH, "micro_batch_size": 1, "seq_len": SEQ_LEN}
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2},
            "zero": {"stage": stage, "persistence_threshold": 100},
            "train": train | {"optimizer": {"grad_clip": clip, "lr": 1e-2}},
        }
    )


def start(stage: int, precision: str, clip: float = 1.0):
    config = configuration(stage, precision, clip)
    runtime.seed_all(3)
    return engine.initialize(
        lambda: build_model(config.model, VOCAB_SIZE, SEQ_LEN),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )


def steps(model, numbers) -> list[tuple[float, float]]:
    """The loss and the gradient norm of each step, of which each is a function of its number and the weights."""
    return [step(model, number) for number in numbers]


def step(model, number: int) -> tuple[float, float]:
    model.train()
    total = 0.0
    for micro_step in range(BATCH // ranks.world_size):
        runtime.seed_all(7, number, micro_step, ranks.rank)
        ids = torch.randint(0, VOCAB_SIZE, (1, SEQ_LEN + 1))
        loss = model(input_ids=ids[:, :-1], labels=ids[:, 1:])["clm"] / (BATCH * SEQ_LEN)
        engine.backward(model, loss)
        model.step()
        total += loss.item()
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item(), engine.grad_norm(model)


def copied(fragments) -> dict:
    return {f.name: (f.shape, f.start, {key: t.clone() for key, t in f.tensors.items()}) for f in fragments}


def read_from(parts):
    """As `checkpoint.reader`, from what every rank has `copied`; an element that nobody has is NaN."""

    def read(name: str, key: str, start: int, length: int) -> torch.Tensor:
        found = [part[name] for part in parts if name in part]
        whole = torch.full((torch.Size(found[0][0]).numel(),), float("nan"))
        for _, first, tensors in found:
            whole[first : first + tensors[key].numel()] = tensors[key]
        return whole[start : start + length]

    return read


def each_stage_splits_what_its_definition_says() -> None:
    plain = build_model(configuration(3, "fp32").model, VOCAB_SIZE, SEQ_LEN)
    whole = sum(parameter.numel() for parameter in plain.parameters())
    for stage, precision in STAGES:
        model = start(stage, precision)
        weights = [parameter.numel() for parameter in model.module.parameters() if parameter.numel() > 100]
        assert sum(weights) > 0.9 * whole if stage < 3 else not weights, (stage, weights)
        pieces = engine.pieces(model)
        assert all(piece.master.dtype == torch.float32 for piece in pieces)
        share = sum(piece.length for piece in pieces) / whole
        assert share == 1 if stage == 0 else 0.49 < share < 0.51, (stage, share)
        written = ranks.gather([(f.name, f.start, f.tensors["master"].numel()) for f in engine.fragments(model)])
        places = sorted(place for of_rank in written for place in of_rank if place[2])
        assert sum(length for *_, length in places) == whole, "an element is written twice or not at all"
        for (name, begin, length), (next_name, next_begin, _) in itertools.pairwise(places):
            assert next_begin == (begin + length if next_name == name else 0), places
        engine.close(model)


def what_was_read_out_and_is_filled_in_again_gives_the_same_steps() -> None:
    for stage, precision in STAGES:
        model = start(stage, precision)
        step(model, 0)
        parts = ranks.gather(copied(engine.fragments(model)))
        assert {key for part in parts for *_, tensors in part.values() for key in tensors} == {
            "master",
            "exp_avg",
            "exp_avg_sq",
        }
        first = steps(model, (1, 2, 3))
        engine.load_fragments(model, read_from(parts), 1)
        assert steps(model, (1, 2, 3)) == first and len(set(first)) == 3, (stage, precision)
        engine.close(model)


def reading_out_before_the_first_update_changes_nothing() -> None:
    for stage, precision in STAGES:
        model = start(stage, precision)
        untouched = steps(model, (0, 1))
        engine.close(model)
        model = start(stage, precision)
        before = dict(engine.gather_weights(model))
        parts = ranks.gather(copied(engine.fragments(model)))
        state = [(key, t) for part in parts for *_, tensors in part.values() for key, t in tensors.items()]
        assert {key for key, _ in state} == {"master", "exp_avg", "exp_avg_sq"}
        assert not any(tensor.any() for key, tensor in state if key != "master")
        assert all(torch.equal(weight, before[name]) for name, weight in engine.gather_weights(model))
        assert steps(model, (0, 1)) == untouched, (stage, precision)
        engine.close(model)


def norm_and_clipping_are_the_same_at_every_stage() -> None:
    norms = {}
    for clip in (0.0, 0.1):
        seen = []
        for stage in (0, 1, 2, 3):
            model = start(stage, "fp32", clip)
            seen.append(torch.tensor(steps(model, (0, 1, 2)), dtype=torch.float64))
            engine.close(model)
        for values in seen:
            assert torch.allclose(values, seen[-1], rtol=1e-5, atol=0), (clip, values, seen[-1])
        norms[clip] = seen[-1][:, 1]
    assert norms[0.0][0] == norms[0.1][0] > 0.1, "the norm is that before clipping"
    assert norms[0.0][1] != norms[0.1][1], "clipping has changed nothing"


def number_of_micro_batches_may_change_from_step_to_step() -> None:
    counts = (1, 3, 2, 1)  # of each rank
    reference = plain_steps(counts)
    for stage, precision in STAGES:
        model = start(stage, precision, clip=0.5)
        engine.set_lr(model, 1e-2)
        found = []
        for number, count in enumerate(counts):
            engine.set_accumulation(model, count)
            losses = 0.0
            for micro_step in range(count):
                loss = micro_loss(model, number, micro_step, ranks.rank) / (count * ranks.world_size)
                engine.backward(model, loss)
                model.step()
                losses += loss.item()
            total = ranks.sum(torch.tensor(losses, dtype=torch.float64)).item()
            found.append((total, engine.grad_norm(model)))
        tolerance = 1e-5 if precision == "fp32" else 0.02
        assert torch.allclose(torch.tensor(found), torch.tensor(reference), rtol=tolerance, atol=0), (
            stage, precision, found, reference,
        )  # fmt: skip
        engine.close(model)


def plain_steps(counts: Sequence[int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of the same steps in torch alone, all micro batches of all ranks one after the other."""
    config = configuration(1, "fp32", 0.5)
    runtime.seed_all(3)
    model = build_model(config.model, VOCAB_SIZE, SEQ_LEN)
    optimizer = make_optimizer(model, config.train.optimizer)
    result = []
    for number, count in enumerate(counts):
        total = 0.0
        for micro_step, rank in itertools.product(range(count), range(ranks.world_size)):
            loss = micro_loss(model, number, micro_step, rank) / (count * ranks.world_size)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        optimizer.step()
        optimizer.zero_grad()
        result.append((total, norm))
    return result


def micro_loss(model, number: int, micro_step: int, rank: int) -> torch.Tensor:
    runtime.seed_all(7, number, micro_step, rank)
    ids = torch.randint(0, VOCAB_SIZE, (1, SEQ_LEN + 1))
    return model(input_ids=ids[:, :-1], labels=ids[:, 1:])["clm"] / SEQ_LEN


globals()[sys.argv[1]]()
ranks.barrier()  # as the loop does: a rank that leaves while another still works takes the connection with it
runtime.end()
