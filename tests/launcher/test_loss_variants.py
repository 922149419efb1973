"""Which runs `millstream prove loss` makes: each is one change away from its parents."""

from __future__ import annotations

import pytest
import yaml

from configs.load import load_pretrain
from configs.schema import PretrainConfig
from launcher.loss_variants import REFERENCE, Variant, batch_sizes, loss_variants

GPT = {"run_dir": "runs/x", "train": {"micro_batch_size": 8}}
BERT = {"run_dir": "runs/x", "model": {"architecture": "bert", "dropout": 0.1}, "data": {"unpad": True}}


def variants(values: dict, num_ranks: int = 2) -> dict[str, Variant]:
    return {variant.name: variant for variant in loss_variants(PretrainConfig(**values), num_ranks, 4)}


def changes(one: Variant, other: Variant) -> set[str]:
    """In which settings two runs of the loop differ."""
    of_settings = {key for key in one.settings if one.settings[key] != other.settings[key]}
    return of_settings | ({"ranks"} if one.num_ranks != other.num_ranks else set())


@pytest.mark.parametrize("values", [GPT, BERT])
def test_a_run_of_the_loop_differs_from_its_parent_in_one_thing(values):
    runs = variants(values)
    found = {}
    for name, run in runs.items():
        parents = [runs[parent] for parent in run.parents if runs[parent].plain is None]
        if len(parents) == 1:
            found[name] = changes(run, parents[0])
    assert {"2 ranks, ZeRO 0": {"ranks"}, "2 ranks, ZeRO 2": {"zero.stage"}}.items() <= found.items()
    assert found.pop("bf16, ZeRO 3") == {"train.precision", "zero.stage"}  # ZeRO 0 has no bf16
    assert all(len(of_run) == 1 for of_run in found.values())


@pytest.mark.parametrize("values", [GPT, BERT])
def test_parents_come_first_and_end_in_the_reference(values):
    seen: set[str] = set()
    for name, run in variants(values).items():
        assert set(run.parents) <= seen
        assert run.parents or run.plain
        seen.add(name)
    assert REFERENCE in seen


@pytest.mark.parametrize("values", [GPT, BERT, {**GPT, "deepspeed": {"wall_clock_breakdown": True}}])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_of_them_are_valid_configurations(tmp_path, values, num_ranks):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    for run in variants(values, num_ranks).values():
        config = load_pretrain(file, run.words)
        assert config.train.global_batch_size % (config.train.micro_batch_size * run.num_ranks) == 0
        assert (config.model.dropout, config.model.attention_dropout) == (0, 0)


def test_the_configuration_as_it_is_comes_last_where_it_is_not_one_of_the_others():
    last = list(variants({**GPT, "train": {"precision": "bf16"}, "zero": {"stage": 2}}).values())[-1]
    assert (last.settings["train.precision"], last.settings["zero.stage"], last.precision) == ("bf16", 2, "bf16")
    assert {"bf16, ZeRO 2", "2 ranks, ZeRO 2"} <= set(last.parents)
    assert "2 ranks, ZeRO 3" not in last.parents
    assert not any("as configured" in name for name in variants({**GPT, "train": {"precision": "fp32"}}))


def test_a_deepspeed_section_is_a_change_of_its_own():
    runs = variants({**GPT, "train": {"precision": "fp32"}, "deepspeed": {"prescale_gradients": True}})
    with_section = [name for name, run in runs.items() if run.settings["deepspeed"]]
    assert with_section == ["2 ranks, ZeRO 3, deepspeed: section"]


def test_compiled_is_a_change_of_its_own_where_there_is_a_compiler_and_a_shape_that_stays():
    assert "2 ranks, ZeRO 3, compiled" in variants(GPT)
    assert not any("compiled" in name for name in variants(BERT))  # without padding
    without = loss_variants(PretrainConfig(**GPT), 2, 4, can_compile=False)
    assert not any("compiled" in variant.name for variant in without)


@pytest.mark.parametrize("micro, ranks, expected", [(8, 2, (8, 2)), (1, 1, (2, 1)), (6, 2, (8, 2)), (32, 1, (32, 16))])
def test_batch_is_about_a_micro_batch_and_divides_into_two_micro_batches_a_rank(micro, ranks, expected):
    config = PretrainConfig(run_dir="x", train={"micro_batch_size": micro, "global_batch_size": 96})
    assert batch_sizes(config, ranks) == expected
