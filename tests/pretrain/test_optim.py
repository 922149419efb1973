"""Learning-rate schedules against their formulas; which parameters decay, and which learn slower."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, get_scheduler

from configs.load import ConfigError
from configs.schema import ModelConfig, OptimizerConfig, ScheduleConfig
from pretrain.models import build_model
from pretrain.optim import distances_from_head, learning_rate, make_optimizer, parameter_groups


def rates(num_steps: int, **settings) -> list[float]:
    return [learning_rate(step, num_steps, 2.0, ScheduleConfig(**settings)) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
def test_warmup_is_linear_starts_above_zero_and_reaches_the_peak(kind):
    assert rates(100, type=kind, warmup_steps=4)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


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
    assert curve[80:] == pytest.approx([2.0 * (1 - step / 19) for step in range(20)])
    assert set(rates(100, type="wsd", warmup_steps=5)[5:91]) == {2.0}  # without decay_steps a tenth


def test_constant_stays_at_its_peak():
    assert set(rates(50, type="constant", final_share=0.0, warmup_steps=1)) == {2.0}


@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        ({"type": "cosine", "final_share": 0.1}, "cosine_with_min_lr", {"num_training_steps": 100, "min_lr_rate": 0.1}),
        ({"type": "linear", "final_share": 0.0}, "linear", {"num_training_steps": 100}),
        (
            {"type": "wsd", "final_share": 0.0, "decay_steps": 21},
            "warmup_stable_decay",
            {"num_stable_steps": 76, "num_decay_steps": 20, "decay_type": "linear"},
        ),
        ({"type": "inverse_sqrt", "final_share": 0.0}, "inverse_sqrt", {}),
        ({"type": "constant"}, "constant_with_warmup", {}),
    ],
)
def test_schedules_are_those_of_transformers(ours, name, theirs):
    """They begin with an update at rate 0 and end one update before the floor; ours have neither: 101 steps for 100."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = theirs.pop("num_training_steps", None)
    schedule = get_scheduler(name, optimizer, 4, steps, scheduler_specific_kwargs=theirs).lr_lambdas[0]
    config = ScheduleConfig(warmup_steps=4, **ours)
    for step in range(101):
        same = step + 1 if step < 4 or name == "inverse_sqrt" else step
        assert learning_rate(step, 101, 1.0, config) == pytest.approx(schedule(same), rel=1e-12, abs=1e-12), step


def test_inverse_sqrt_is_the_rate_of_the_transformer():
    """Vaswani et al. 2017, equation 3: d^-0.5 min(n^-0.5, n w^-1.5) at the n-th update, with w warmup steps."""
    width, warmup = 512, 40
    formula = [width**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 1001)]
    schedule = ScheduleConfig(type="inverse_sqrt", warmup_steps=warmup, final_share=0.0)
    peak = (width * warmup) ** -0.5
    assert [learning_rate(step, 1000, peak, schedule) for step in range(1000)] == pytest.approx(formula)


def test_inverse_sqrt_stays_above_its_floor_and_with_decay_steps_ends_at_it():
    curve = rates(1000, type="inverse_sqrt", warmup_steps=4, final_share=0.1)
    assert curve[99] == pytest.approx(2.0 * 0.2) and set(curve[400:]) == {0.2}
    cooled = rates(100, type="inverse_sqrt", warmup_steps=4, final_share=0.1, decay_steps=11)
    assert cooled[:90] == curve[:90] and cooled[-1] == pytest.approx(0.2)
    assert cooled[94] == pytest.approx(2.0 * (0.1 + ((4 / 95) ** 0.5 - 0.1) / 2))


def test_inverse_sqrt_without_a_scale_is_refused():
    with pytest.raises(ValueError, match="set warmup_steps"):
        ScheduleConfig(type="inverse_sqrt")


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_matrices_decay_biases_and_norms_do_not_and_none_is_lost(architecture):
    model = build_model(ModelConfig(architecture=architecture), 61, 16)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


# Encoders and decoders whose layers are named in different ways: layer.0, layers.0, h.0, transformer.layer.0.
FAMILIES = {
    "bert": {},
    "roberta": {},
    "electra": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 3},
    "deberta-v2": {"relative_attention": True, "position_buckets": 8},
    "mpnet": {},
    "modernbert": {},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_any_family_are_counted_from_the_head_down_to_the_embeddings(family):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64}
    settings = AutoConfig.for_model(family, vocab_size=50, pad_token_id=0, **(sizes | FAMILIES[family]))
    model = AutoModelForSequenceClassification.from_config(settings)
    distances = distances_from_head(model)
    assert distances.keys() == {name for name, _ in model.named_parameters()}
    for number in range(3):
        inside = [distance for name, distance in distances.items() if f".{number}." in name]
        assert len(inside) > 4 and set(inside) == {3 - number}
    outside = {name: distance for name, distance in distances.items() if not any(f".{i}." in name for i in range(3))}
    embeddings = {name for name, distance in outside.items() if distance == 4}
    names = ("embed", ".wte", ".wpe", "relative_attention_bias")
    assert embeddings and all(any(part in name for part in names) for name in embeddings)
    heads = {name.split(".")[0] for name, distance in outside.items() if distance == 0}
    assert heads & {"classifier", "score"} and set(outside.values()) == {0, 4}


def test_rate_falls_by_layer_decay_from_the_head_down_and_everything_is_in_one_group():
    model = build_model(ModelConfig(architecture="bert", num_layers=2), 61, 16)
    groups = make_optimizer(model, OptimizerConfig(), layer_decay=0.5).param_groups
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["nsp_output.weight"] == found["pooler.bias"] == 1
    assert found["blocks.1.mlp.up.weight"] == found["blocks.1.mlp_norm.bias"] == 0.5
    assert found["blocks.0.mlp.up.weight"] == 0.25
    assert found["word_embeddings.weight"] == found["embedding_norm.weight"] == 0.125
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays[id(model.blocks[0].mlp_norm.weight)] == 0 and decays[id(model.blocks[0].mlp.up.weight)] == 0.1


@pytest.mark.parametrize(("kind", "layer_decay"), [("muon", 1.0), ("adamw", 0.9)])
def test_model_without_layers_is_refused_where_layers_are_needed(kind, layer_decay):
    with pytest.raises(ConfigError, match="Linear: has no list of layers"):
        make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(type=kind), layer_decay)
