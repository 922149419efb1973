"""Optimizers against the formulas of their papers, and split over ranks at every ZeRO stage against unsplit ones."""

from __future__ import annotations

import json
import math
import shutil
import signal

import pytest
import torch

from configs.schema import ModelConfig, OptimizerConfig
from pretrain.models import build_model
from pretrain.optim import make_optimizer
from pretrain.optimizers.average import keep_average
from pretrain.optimizers.lamb import Lamb
from pretrain.optimizers.lion import Lion
from pretrain.optimizers.muon import Muon, direction, orthogonalize
from pretrain.optimizers.slices import Slice
from tests.pretrain.test_train import config, has_reached, lines, losses, pretrain, words  # noqa: F401
from tests.ranks import kill_when, run_ranks, start_ranks


def two_steps(optimizer_of, shape=(6, 4)) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Weights before, the two gradients, weights after."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(shape, generator=generator))
    before = weights.detach().clone()
    grads = [torch.randn(shape, generator=generator) for _ in range(2)]
    optimizer = optimizer_of([weights])
    for grad in grads:
        weights.grad = grad.clone()
        optimizer.step()
    return before, grads, weights.detach()


def test_lion_is_algorithm_2_of_chen_et_al():
    before, grads, after = two_steps(lambda w: Lion([{"params": w, "weight_decay": 0.1}], 0.01, (0.9, 0.99)))
    weights, momentum = before, torch.zeros_like(before)
    for grad in grads:
        update = torch.sign(0.9 * momentum + 0.1 * grad)
        weights = weights - 0.01 * (update + 0.1 * weights)
        momentum = 0.99 * momentum + 0.01 * grad
    assert torch.allclose(after, weights, rtol=1e-6, atol=1e-7)


def test_lamb_is_algorithm_2_of_you_et_al():
    groups = lambda w: [{"params": w, "weight_decay": 0.1}]  # noqa: E731
    before, grads, after = two_steps(lambda w: Lamb(groups(w), 0.01, (0.9, 0.999), 1e-6))
    weights, mean, square = before, torch.zeros_like(before), torch.zeros_like(before)
    for step, grad in enumerate(grads, 1):
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-6)
        update = ratio + 0.1 * weights
        weights = weights - 0.01 * weights.norm() / update.norm() * update
    assert torch.allclose(after, weights, rtol=1e-5, atol=1e-6)


def test_lamb_without_trust_is_adam():
    _, _, after = two_steps(lambda w: Lamb([{"params": w, "trust": False}], 0.01, (0.9, 0.95), 1e-8))
    _, _, expected = two_steps(lambda w: torch.optim.AdamW(w, 0.01, (0.9, 0.95), 1e-8, weight_decay=0.0))
    assert torch.allclose(after, expected, rtol=1e-5, atol=1e-6)


def test_lamb_takes_the_plain_step_where_the_weights_are_zero():
    weights = torch.nn.Parameter(torch.zeros(3))
    weights.grad = torch.tensor([1.0, -2.0, 3.0])
    Lamb([weights], 0.01, (0.9, 0.999), 1e-12).step()
    assert torch.allclose(weights.detach(), torch.tensor([-0.01, 0.01, -0.01]))


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (16, 16)])
def test_orthogonalized_matrix_keeps_the_directions_and_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalize(matrix) @ vt.T  # diagonal, as the iteration is a polynomial of the singular values
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-3)
    assert 0.6 < inside.diagonal().min() <= inside.diagonal().max() < 1.3


def test_muon_is_nesterov_momentum_made_orthogonal_with_the_size_of_an_adamw_update():
    groups = lambda w: [{"params": w, "weight_decay": 0.1, "orthogonalize": True}]  # noqa: E731
    before, grads, after = two_steps(lambda w: Muon(groups(w), 0.01, 0.95, (0.9, 0.95), 1e-8))
    weights, momentum = before, torch.zeros_like(before)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        update = 0.2 * math.sqrt(6) * orthogonalize(0.95 * momentum + 0.05 * grad)
        weights = weights - 0.01 * (update + 0.1 * weights)
    assert torch.allclose(after, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
def test_muon_is_torchs_with_the_rate_matched_to_adamw(shape):
    groups = lambda w: [{"params": w, "orthogonalize": True, "weight_decay": 0.1}]  # noqa: E731
    before, _, ours = two_steps(lambda w: Muon(groups(w), 0.01, 0.95, (0.9, 0.95), 1e-8), shape)
    reference = lambda w: torch.optim.Muon(w, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")  # noqa: E731
    _, _, theirs = two_steps(reference, shape)
    assert (ours - theirs).norm() < 0.02 * (ours - before).norm()  # theirs iterates in bf16


def test_muon_makes_query_key_and_value_orthogonal_each_for_itself():
    matrix = (
        torch.randn((48, 16), generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0] * 16 + [9.0] * 32)[:, None]
    )
    made = direction(matrix, Slice("blocks.0.attention.qkv.weight", (48, 16), 0, (768,)))
    alone = Slice("blocks.0.attention.output.weight", (16, 16), 0, (256,))
    assert torch.equal(made, torch.cat([direction(part, alone) for part in matrix.chunk(3)]))


def test_muon_without_zero_takes_fused_matrices_apart_too():
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_layers=1, hidden_size=32, num_heads=2), 100, 16)
    optimizer = make_optimizer(model, OptimizerConfig(type="muon", lr=0.1, weight_decay=0.0))
    weight = model.blocks[0].attention.qkv.weight
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    expected = direction(weight.grad, Slice("qkv.weight", (96, 32), 0, (96 * 32,)))  # the first momentum is a gradient
    optimizer.step()
    torch.testing.assert_close((before - weight.detach()) / 0.1, expected, atol=1e-4, rtol=1e-4)


def test_muon_leaves_everything_but_the_matrices_of_the_blocks_to_adamw():
    model = build_model(ModelConfig(num_layers=2, hidden_size=32, num_heads=2), 100, 16)
    optimizer = make_optimizer(model, OptimizerConfig(type="muon"))
    chosen = {id(p) for group in optimizer.param_groups if group["orthogonalize"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert names == {
        f"blocks.{block}.{layer}.weight"
        for block in (0, 1)
        for layer in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    }


def test_average_of_the_weights_is_ramped_up_to_its_decay():
    weights = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([weights], lr=0.1)
    keep_average(optimizer, 0.5)
    expected = 0.0
    for step in range(20):
        weights.grad = torch.tensor([float(step % 3 - 1)])
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        now = weights.item()
        expected = now if step == 0 else decay * expected + (1 - decay) * now
    assert optimizer.state[weights]["ema"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["adamw", "lion", "lamb", "muon"])
def test_optimizer_and_average_are_the_same_at_every_stage_on_one_and_two_ranks(kind, tmp_path):
    """And what is read out in the middle and filled in again gives bitwise the same steps (asserted on the ranks)."""
    seen = {}
    for num_ranks in (1, 2):
        file = tmp_path / f"{num_ranks}.json"
        run_ranks(num_ranks, ["tests/pretrain/optimizers_on_ranks.py", kind, str(file)], tmp_path / f"logs-{num_ranks}")
        seen |= {(num_ranks, setup): values for setup, values in json.loads(file.read_text()).items()}
    whole = seen[1, "fp32, stage 0"]
    assert len(set(whole["losses"])) == len(whole["losses"]) and whole["ema"] != whole["master"]
    for (_, setup), values in seen.items():
        # sign(c) of lion and the orthogonal factor of muon turn rounding into steps where c is nearly 0
        rounding = 2e-2 if "bf16" in setup else 1e-3 if kind in ("lion", "muon") else 1e-5
        assert values["losses"] == pytest.approx(whole["losses"], rel=rounding), setup
        for key in ("master", "ema"):  # 1e-3: the keys' biases have no gradient but rounding, which Adam makes large
            assert values[key] == pytest.approx(whole[key], rel=20 * rounding, abs=1e-3), setup


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["gpt"], indirect=True)
@pytest.mark.parametrize(("kind", "stage"), [("lion", 3), ("lamb", 1), ("lamb", 3), ("muon", 1), ("muon", 3)])
def test_killed_run_resumes_bitwise_and_on_another_number_of_ranks_to_rounding(config, kind, stage):  # noqa: F811
    settings = [
        f"train.optimizer={{type: {kind}, lr: 2.0e-3, ema_decay: 0.9}}",
        *(f"zero.stage={stage}", "train.precision=fp32", "model.dropout=0", "checkpoint.background=false"),
    ]
    whole = pretrain(config, f"{kind}-{stage}", 2, *settings)
    killed = config.parent / f"{kind}-{stage}-killed"
    processes = start_ranks(2, words(config, killed, *settings), config.parent / f"{killed.name}-logs")
    kill_when(processes, has_reached(killed, 5), signal.SIGKILL)
    alone = config.parent / f"{kind}-{stage}-alone"
    shutil.copytree(killed / "checkpoints/step-00000003", alone / "checkpoints/step-00000003")

    pretrain(config, killed.name, 2, *settings)
    assert lines(killed) == lines(whole)
    pretrain(config, alone.name, 1, *settings)
    rounding = 1e-4 if kind == "lion" else 1e-5  # lion: the sign of what is nearly 0
    assert losses(alone) == pytest.approx(losses(whole)[3:], rel=rounding)
    averages = [[line["eval_ema_loss"] for line in lines(run) if line.get("eval_ema_loss")] for run in (alone, whole)]
    assert averages[0] == pytest.approx(averages[1], rel=rounding)
