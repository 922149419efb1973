"""Learning-rate schedules against their formulas; which parameters decay."""

from __future__ import annotations

import math

import pytest

from configs.schema import ModelConfig, ScheduleConfig
from pretrain.models import build_model
from pretrain.optim import learning_rate, parameter_groups


def rates(num_steps: int, **settings) -> list[float]:
    return [learning_rate(step, num_steps, 2.0, ScheduleConfig(**settings)) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_starts_above_zero_and_reaches_the_peak(kind):
    assert rates(100, type=kind, warmup_steps=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_floor():
    curve = rates(101, type="cosine", final_share=0.1)
    assert curve[0] == 2.0
    assert curve[50] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert curve[25] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert curve[100] == pytest.approx(0.2)


def test_linear_falls_in_equal_parts():
    curve = rates(11, type="linear", final_share=0.0)
    assert curve == pytest.approx([2.0 - 0.2 * step for step in range(11)])


def test_wsd_is_flat_until_the_last_decay_steps():
    curve = rates(100, type="wsd", decay_steps=20, final_share=0.0)
    assert set(curve[:81]) == {2.0}
    assert curve[81] < 2.0 and curve[-1] == 0.0


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_matrices_decay_biases_and_norms_do_not_and_none_is_lost(architecture):
    model = build_model(ModelConfig(architecture=architecture), 61, 16)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
