"""Our schema -> DeepSpeed's JSON, as a pure function, so that it can be printed without importing deepspeed.

The raw `deepspeed:` section is merged in last: it may add keys, but a key that is generated here keeps its value,
because the same value in two places is how two configurations drift apart (transformers#29348, accelerate#1644).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.batch_sizes import all_sizes
from configs.load import ConfigError
from configs.schema import PretrainConfig, ZeroConfig
from configs.tuning import FinetuneConfig


def deepspeed_json(config: PretrainConfig | FinetuneConfig, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run on `world_size` ranks.

    Raises ConfigError where the batch does not divide over the ranks, DeepSpeed has no such ZeRO stage, or the
    `deepspeed:` section contradicts the rest.
    """
    if isinstance(config, PretrainConfig):
        batch = config.train.global_batch_size
        sizes = all_sizes(config.train)
        micro, precision, optimizer = config.train.micro_batch_size, config.train.precision, config.train.optimizer
    else:
        batch = config.tuning.batch_size
        sizes = [batch]
        micro, precision, optimizer = config.tuning.micro_batch_size, config.tuning.precision, config.tuning.optimizer
    if config.zero.stage == 0 and precision == "bf16":
        section = "train" if isinstance(config, PretrainConfig) else "tuning"
        raise ConfigError(
            f"zero.stage=0 with {section}.precision=bf16: DeepSpeed would sum gradients in bf16 there. Set "
            f"zero.stage=1, where every rank holds the whole weights and gradients too, or {section}.precision=fp32"
        )
    check_sizes(sizes, micro, world_size)
    generated = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation_steps(batch, micro, world_size),
        "gradient_clipping": optimizer.grad_clip,
        "bf16": {"enabled": precision == "bf16"},
        # Sums of gradients in fp32: bf16 sums lose the small addends, and the loss then depends on the rank count.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero_section(config.zero),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,  # the run's own progress line is the only one
    }
    return _merge(generated, config.deepspeed, "deepspeed")


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro batches each rank adds up before one optimizer step; ConfigError where it is not a whole number."""
    if batch_size % (micro_batch_size * world_size):
        fitting = [m for m in range(1, micro_batch_size + 1) if batch_size % (m * world_size) == 0]
        cure = f"choose a global batch that is a multiple of {world_size}"
        if fitting:
            cure = f"a micro batch of {fitting[-1]} would divide"
        raise ConfigError(
            f"a global batch of {batch_size} samples does not divide into micro batches of {micro_batch_size} "
            f"on {world_size} ranks: {batch_size} / ({micro_batch_size} x {world_size}) is not a whole number; {cure}"
        )
    return batch_size // (micro_batch_size * world_size)


def check_sizes(sizes: Sequence[int], micro_batch_size: int, world_size: int) -> None:
    """Raises ConfigError unless every size of a ramp, ascending, divides into micro batches on all ranks."""
    accumulation_steps(sizes[-1], micro_batch_size, world_size)
    if unfit := [str(size) for size in sizes if size % (micro_batch_size * world_size)]:
        raise ConfigError(
            f"train.batch_ramp: global batches of {', '.join(unfit)} samples do not divide into micro batches of "
            f"{micro_batch_size} on {world_size} ranks; choose start_size and increment that are multiples of "
            f"{micro_batch_size * world_size}, or a smaller micro batch"
        )


def _zero_section(zero: ZeroConfig) -> dict[str, Any]:
    if zero.stage == 0:
        return {"stage": 0}
    section = {
        "stage": zero.stage,
        "reduce_bucket_size": zero.bucket_elements,
        "contiguous_gradients": True,
        "overlap_comm": zero.stage > 1,  # stage 1 reduces once a step, after the last backward
    }
    if zero.stage == 3:
        section["stage3_param_persistence_threshold"] = zero.persistence_threshold
        section["stage3_prefetch_bucket_size"] = zero.bucket_elements
    return section


def _merge(generated: dict[str, Any], raw: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(generated)
    for key, value in raw.items():
        place = f"{where}.{key}"
        if key not in generated:
            merged[key] = value
        elif isinstance(generated[key], dict) and isinstance(value, dict):
            merged[key] = _merge(generated[key], value, place)
        elif generated[key] != value:
            raise ConfigError(
                f"`{place}` is {value!r}, but the rest of the configuration makes it {generated[key]!r}; "
                f"remove it and set the millstream key it comes from"
            )
    return merged
