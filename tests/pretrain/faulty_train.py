"""A pretraining run with a fault on one rank: `python tests/pretrain/faulty_train.py FAULT RANK --config ...`.

leak          the second block is not causal
activation    in the third step, when it is computed the second time, one bit of one activation is flipped
weight        before the third step one bit of a weight is flipped
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain import runtime, train
from tests.pretrain.bits import flip

fault, rank = sys.argv.pop(1), int(sys.argv.pop(1))
build_model, train_step = train.build_model, train.train_step
forwards = 0  # in training


def built(*arguments):
    model = build_model(*arguments)
    if fault == "leak":
        model.blocks[1].attention.causal = False
    if fault == "activation":
        model.blocks[0].mlp.register_forward_hook(flipped_once)
    return model


def flipped_once(module, given, out):
    global forwards
    if not module.training:
        return out
    forwards += 1
    # two micro batches in two executions: 8 in two verified steps, 2 in the first execution of the third
    return out + (flip(out) - out).detach() if forwards == 11 else out


def step_with_flipped_weight(config, model, data, step, *more):
    if step == 2:
        weight = model.module.blocks[0].mlp.up.weight
        held = weight.ds_tensor if hasattr(weight, "ds_tensor") else weight
        held.data.copy_(flip(held.data))
    return train_step(config, model, data, step, *more)


if int(os.environ["RANK"]) == rank:
    train.build_model = built
    if fault == "weight":
        train.train_step = step_with_flipped_weight
if fault == "unchecked":
    train.sanity.check_start = lambda *arguments: None
runtime.run(train.main)
