"""The engine on two real ranks: who holds what at which ZeRO stage, and what is read out of it and filled in again."""

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
runtime.end()
"""


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_each_rank_holds_half_of_the_model_from_the_first_layer_on(architecture, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.path.insert(0, '.')\n" + SCRIPT.replace("ARCHITECTURE", architecture))
    run_ranks(2, [str(script)], tmp_path / "logs")


def run_function(name: str, tmp_path) -> None:
    run_ranks(2, ["tests/pretrain/engine_on_ranks.py", name], tmp_path / "logs")


def test_each_stage_splits_what_its_definition_says_and_every_element_is_written_once(tmp_path):
    run_function("each_stage_splits_what_its_definition_says", tmp_path)


def test_what_was_read_out_and_is_filled_in_after_more_steps_gives_bitwise_the_same_steps(tmp_path):
    run_function("what_was_read_out_and_is_filled_in_again_gives_the_same_steps", tmp_path)


def test_reading_out_before_the_first_update_gives_a_zero_state_and_changes_nothing(tmp_path):
    run_function("reading_out_before_the_first_update_changes_nothing", tmp_path)


def test_gradient_norm_and_clipping_are_the_same_at_every_stage(tmp_path):
    run_function("norm_and_clipping_are_the_same_at_every_stage", tmp_path)


def test_number_of_micro_batches_may_change_from_step_to_step_at_every_stage(tmp_path):
    run_function("number_of_micro_batches_may_change_from_step_to_step", tmp_path)
