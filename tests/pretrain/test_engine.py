"""The engine on two real ranks: no rank holds the whole model, and what is gathered is what was built."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

SCRIPT = """
import torch
from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime
from pretrain.models import build_model

config = PretrainConfig.model_validate({
    "run_dir": "unused", "model": {"architecture": "ARCHITECTURE"}, "train": {"seq_len": 32, "precision": "fp32"},
})
ranks = runtime.start()
runtime.seed_all(3)

def build():
    model = build_model(config.model, 501, 32)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "a parameter is whole after building"
    return model

model = engine.initialize(build, config.train.optimizer, deepspeed_json(config, ranks.world_size))
parameters = dict(model.module.named_parameters())
held = sum(parameter.ds_tensor.numel() for parameter in parameters.values())
whole = sum(parameter.ds_numel for parameter in parameters.values())
assert whole / 2 <= held <= whole / 2 + len(parameters), (held, whole)

shapes = {name: tuple(weight.shape) for name, weight in engine.gather_weights(model)}
plain = build_model(config.model, 501, 32)
assert shapes == {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
sums = ranks.gather([float(weight.double().sum()) for _, weight in engine.gather_weights(model)])
assert sums[0] == sums[1]
assert all(parameter.numel() == 0 for parameter in parameters.values()), "a gathered parameter was kept"
ranks.barrier()  # as the loop does: a rank that leaves while another still works takes the connection with it
engine.close(model)
runtime.stop()
"""


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_each_rank_holds_half_of_the_model_from_the_first_layer_on(architecture, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.path.insert(0, '.')\n" + SCRIPT.replace("ARCHITECTURE", architecture))
    run_ranks(2, [str(script)], tmp_path / "logs")
