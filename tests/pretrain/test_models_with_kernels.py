"""Models whose operations go to the kernels, run on the CPU: the numbers of the models without them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from configs.schema import ModelConfig
from pretrain.kernels import native
from pretrain.models import build_model
from tests.ranks import run_ranks

VOCAB, SEQ = 101, 24
CASES = {  # preset: architecture, kernels of one layer
    "nano": ("gpt", {"add_norm_forward": 3, "bias_activation_forward": 1}),
    "llama-nano": ("gpt", {"add_norm_forward": 3, "bias_activation_forward": 1, "rotary_positions": 2}),
    "modernbert-nano": ("bert", {"add_norm_forward": 4, "bias_activation_forward": 1, "rotary_positions": 2}),
    "bert-nano": ("bert", {"add_norm_forward": 3, "bias_activation_forward": 1, "embeddings_forward": 1}),
}


def losses_and_gradients(preset: str, dropout: float = 0.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    architecture = CASES[preset][0]
    name = "nano" if preset == "bert-nano" else preset
    config = ModelConfig(architecture=architecture, preset=name, num_layers=1, dropout=dropout)
    model = build_model(config, VOCAB, SEQ).train()
    ids = torch.randint(VOCAB, (2, SEQ))
    pairs = {"next_sentence_label": torch.tensor([0, 1])} if preset == "bert-nano" else {}
    torch.manual_seed(1)
    loss = torch.stack(list(model(ids, labels=ids, **pairs).values())).sum()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("preset", CASES)
def test_loss_and_gradients_are_those_without_kernels(preset, kernels, monkeypatch):
    used = Counter()
    launch = native.launch
    monkeypatch.setattr(native, "launch", lambda name, *a: (used.update([name]), launch(name, *a)))
    found = losses_and_gradients(preset)
    monkeypatch.setattr(native, "device_type", lambda: "none")
    expected = losses_and_gradients(preset)
    assert {name: used[name] for name in CASES[preset][1]} == CASES[preset][1] and used[
        "softmax_gradient_in_place"
    ] == 1
    for tensor, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("preset", CASES)
def test_dropout_with_kernels_is_drawn_from_the_seed(preset, kernels):
    first, second = losses_and_gradients(preset, 0.1), losses_and_gradients(preset, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], losses_and_gradients(preset)[0])


ON_RANKS = """
import ctypes, math
import torch
from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime
from pretrain.kernels import native
from pretrain.models import build_model
from tests.ranks import run_ranks

ranks = runtime.start()
library = ctypes.CDLL("LIBRARY")
native.library = lambda: library

def curve(architecture, device_type):
    native.device_type = lambda: device_type
    model = {"architecture": architecture, "num_layers": 2, "hidden_size": 32, "num_heads": 2}
    model |= {"activation_checkpointing": True}
    train = {"precision": "fp32", "seq_len": 16, "global_batch_size": ranks.world_size, "micro_batch_size": 1}
    config = PretrainConfig.model_validate({"run_dir": "unused", "model": model, "train": train})
    runtime.seed_all(3)
    trained = engine.initialize(
        lambda: build_model(config.model, 101, 16), config.train.optimizer, deepspeed_json(config, ranks.world_size)
    )
    trained.train()
    found = []
    for step in range(2):
        runtime.seed_all(7, step, ranks.rank)
        ids = torch.randint(101, (1, 16))
        loss = torch.stack(list(trained(ids, labels=ids).values())).sum() / 32
        engine.backward(trained, loss)
        engine.update(trained)
        found += [loss.item(), engine.grad_norm(trained)]
    ranks.barrier()
    engine.close(trained)
    return found

for architecture in ("gpt", "bert"):
    plain, with_kernels = curve(architecture, "none"), curve(architecture, "cpu")
    assert all(map(math.isfinite, plain))
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(plain, with_kernels)), (plain, with_kernels)
runtime.end()
"""


@pytest.mark.distributed
def test_under_zero_3_on_two_ranks_losses_and_gradient_norms_are_those_without_kernels(emulated, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.path.insert(0, '.')\n" + ON_RANKS.replace("LIBRARY", emulated._name))
    run_ranks(2, [str(script)], tmp_path / "logs")
