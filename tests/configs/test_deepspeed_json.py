"""The generated DeepSpeed configuration, and the raw section that may extend but not contradict it."""

from __future__ import annotations

import pytest

from configs.deepspeed_json import accumulation_steps, deepspeed_json
from configs.load import ConfigError
from configs.schema import PretrainConfig
from configs.tuning import FinetuneConfig


def config(**deepspeed) -> PretrainConfig:
    train = {"global_batch_size": 24, "micro_batch_size": 4, "optimizer": {"grad_clip": 0.5}}
    return PretrainConfig.model_validate({"run_dir": "r", "train": train, "deepspeed": deepspeed})


def test_batch_clipping_precision_and_stage_follow_the_configuration():
    json = deepspeed_json(config(), 2)
    assert json["train_micro_batch_size_per_gpu"] == 4
    assert json["gradient_accumulation_steps"] == 3
    assert json["gradient_clipping"] == 0.5
    assert json["bf16"] == {"enabled": True}
    assert json["zero_optimization"]["stage"] == 3


def test_raw_section_extends_at_any_depth():
    json = deepspeed_json(config(wall_clock_breakdown=True, zero_optimization={"round_robin_gradients": True}), 1)
    assert json["wall_clock_breakdown"] is True
    assert json["zero_optimization"]["round_robin_gradients"] is True
    assert json["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("raw", "key"),
    [({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping"),
     ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage")],
)  # fmt: skip
def test_raw_section_may_not_contradict(raw, key):
    with pytest.raises(ConfigError, match=rf"`{key}` is .*remove it and set the millstream key"):
        deepspeed_json(config(**raw), 1)


def test_raw_section_may_repeat_what_is_so_anyway():
    assert deepspeed_json(config(gradient_clipping=0.5), 1)["gradient_clipping"] == 0.5


def test_batch_that_does_not_divide_names_a_micro_batch_that_does():
    with pytest.raises(ConfigError, match=r"a micro batch of 4 would divide"):
        accumulation_steps(24, 5, 2)
    with pytest.raises(ConfigError, match=r"a global batch that is a multiple of 5"):
        accumulation_steps(24, 4, 5)


def test_ramp_names_the_sizes_that_do_not_divide_over_the_ranks():
    train = {"global_batch_size": 24, "micro_batch_size": 2}
    train |= {"batch_ramp": {"start_size": 4, "increment": 2, "num_samples": 100}}
    ramped = PretrainConfig.model_validate({"run_dir": "r", "train": train})
    assert deepspeed_json(ramped, 1)["gradient_accumulation_steps"] == 12
    with pytest.raises(
        ConfigError, match=r"batches of 6, 10, 14, 18, 22 samples do not .*on 2 ranks; .*multiples of 4"
    ):
        deepspeed_json(ramped, 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stage_decides_the_zero_section(stage):
    given = PretrainConfig.model_validate({"run_dir": "r", "zero": {"stage": stage}, "train": {"precision": "fp32"}})
    section = deepspeed_json(given, 1)["zero_optimization"]
    assert section["stage"] == stage
    assert ("reduce_bucket_size" in section) == (stage > 0)
    assert ("stage3_param_persistence_threshold" in section) == (stage == 3)


@pytest.mark.parametrize(
    ("kind", "other", "section"),
    [(PretrainConfig, {}, "train"),
     (FinetuneConfig, {"task": "classification", "model": "m", "train": "t", "dev": "d"}, "tuning")],
)  # fmt: skip
def test_stage_0_in_bf16_is_refused_with_the_cure(kind, other, section):
    given = kind.model_validate({"run_dir": "r", "zero": {"stage": 0}, **other})
    with pytest.raises(ConfigError, match=rf"{section}.precision=bf16.*zero.stage=1.*or {section}.precision=fp32"):
        deepspeed_json(given, 1)
