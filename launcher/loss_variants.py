"""The runs of `millstream prove loss`: which single changes lead from the reference to the user's configuration.

A list made from the configuration and the number of ranks, without running anything:

    reference   float32, one process, plain PyTorch, every document alone (pretrain/reference.py)
      + one part of the loop each: rows of many documents, batches without padding, the fused kernels
    the training loop with all of these: one rank, ZeRO 0, float32, the batch at once
      + accumulation, + ranks, + ZeRO 1, 2, 3, + activation checkpointing, + torch.compile, + bf16, + the `deepspeed:`
        section
    the configuration as it is

Each knows its parents, the runs that it differs from by one change; that is what names a culprit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs.schema import PretrainConfig

REFERENCE, FP64, BF16 = "reference", "reference in float64", "reference in bf16"
Changes = Mapping[str, Any]  # dotted key of the configuration -> value


@dataclass(frozen=True)
class Variant:
    """A run; `settings` are put over the user's configuration. Those without parents are references."""

    name: str
    settings: Changes
    parents: tuple[str, ...] = ()
    look: str = ""  # at what, if this change makes the difference
    num_ranks: int = 1
    precision: str = "fp32"
    plain: Mapping[str, Any] | None = None  # arguments of reference.train_plainly; none: it is the training loop

    @property
    def words(self) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]


def loss_variants(config: PretrainConfig, num_ranks: int, num_steps: int, can_compile: bool = True) -> list[Variant]:
    """All runs; a parent comes before its children. can_compile: whether torch.compile works on this machine."""
    base = base_settings(config, num_ranks, num_steps)
    parts = part_variants(config, base)
    used = tuple(p.name for p in parts if p.settings["data.unpad"] == config.data.unpad or "kernels" in (p.plain or {}))
    _, small = batch_sizes(config, num_ranks)
    loop = loop_variants(config, base | {"data.unpad": config.data.unpad}, small, num_ranks, used, can_compile)
    return [*references(base), *parts, *loop]


def batch_sizes(config: PretrainConfig, num_ranks: int) -> tuple[int, int]:
    """Samples of every run's batch, about a micro batch of the configuration, and of the small micro batches.

    The batch fits on one rank at once; in small micro batches there are two for each rank.
    """
    small = -(-config.train.micro_batch_size // (2 * num_ranks))
    return 2 * num_ranks * small, small


def base_settings(config: PretrainConfig, num_ranks: int, num_steps: int) -> dict[str, Any]:
    """What all runs begin with. The rate is the peak: weights that hardly move would hide faults of the update."""
    whole, _ = batch_sizes(config, num_ranks)
    return {
        "train.num_steps": num_steps,
        "train.global_batch_size": whole,
        "train.micro_batch_size": whole,
        "train.precision": "fp32",
        "train.schedule": {"type": "constant"},
        "model.dropout": 0.0,
        "model.attention_dropout": 0.0,
        "model.activation_checkpointing": False,
        "model.compile": False,
        "data.unpad": False,
        "data.num_workers": 0,
        "zero.stage": 0,
        "deepspeed": {},
        "train.batch_ramp": None,
        "train.budget": None,
    }


def references(base: Changes) -> list[Variant]:
    """The reference, and the same in two other precisions, by which rounding is measured."""
    precisions = ((REFERENCE, "fp32"), (FP64, "fp64"), (BF16, "bf16"))
    return [Variant(name, base, precision=precision, plain={"precision": precision}) for name, precision in precisions]


def part_variants(config: PretrainConfig, base: Changes) -> list[Variant]:
    """The reference with one part of the loop each."""
    without_padding = {**base, "data.unpad": True}
    gpt: list[tuple[str, str, Changes, Changes]] = [
        (
            f"rows of many documents (data.packing={config.data.packing})",
            "attention across the ends of documents, positions or targets there (data_pipeline/pack.py, expand.py)",
            base,
            {"layout": "rows"},
        )
    ]
    bert: list[tuple[str, str, Changes, Changes]] = [
        ("rows with padding", "attention to padding, or targets in it", base, {"layout": "rows"}),
        (
            "rows without padding (data.unpad=true)",
            "varlen_attention in pretrain/kernels/attention.py, unpad in data_pipeline/bert_rows.py",
            without_padding,
            {"layout": "rows"},
        ),
    ]
    kernels: list[tuple[str, str, Changes, Changes]] = [
        ("fused output layer and loss", "pretrain/kernels/linear_cross_entropy.py", base, {"kernels": ["loss"]}),
        ("attention kernel", "pretrain/kernels/attention.py", base, {"kernels": ["attention"]}),
        (
            "norms, activations and embeddings as on this device",
            "add_norm.py, activation.py and embeddings.py in pretrain/kernels; MILLSTREAM_KERNELS=off is without them",
            base,
            {"kernels": ["between"]},
        ),
    ]
    listed = [*(gpt if config.model.architecture == "gpt" else bert), *kernels]
    return [Variant(name, settings, (REFERENCE,), look, plain=plain) for name, look, settings, plain in listed]


def loop_variants(
    config: PretrainConfig, base: Changes, small: int, num_ranks: int, parts: tuple[str, ...], can_compile: bool
) -> list[Variant]:
    """The training loop, from its simplest form to the configuration as it is; its `parts` are tried before."""
    whole, stage = base["train.global_batch_size"], config.zero.stage
    ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
    at_once = Variant(
        f"training loop, ZeRO 0, {whole} samples at once",
        base,
        (REFERENCE, *parts),
        "train_step in pretrain/step.py, pretrain/engine.py, pretrain/objective.py",
    )
    look = "sums or weights kept in bf16 that should be in float32"
    split = stage or 1  # DeepSpeed's stage 0 has no bf16 with sums in fp32
    bf16 = change(at_once, f"bf16, ZeRO {split}", look, {"train.precision": "bf16", "zero.stage": split})
    name = f"accumulation, {whole // small} x {small} samples"
    look = "a mean over micro batches in place of a sum over targets that is divided by one count"
    accumulated = on_ranks = change(at_once, name, look, {"train.micro_batch_size": small})
    runs = [at_once, bf16, accumulated]
    if num_ranks > 1:
        look = "sums and counts over ranks, and which samples each rank takes"
        on_ranks = change(accumulated, f"{ranks}, ZeRO 0", look, {}, num_ranks)
        runs.append(on_ranks)
    stages = {0: on_ranks}
    for number in (1, 2, 3):
        look = f"pretrain/engine.py at stage {number}, DeepSpeed's version, the zero: section"
        stages[number] = change(on_ranks, f"{ranks}, ZeRO {number}", look, {"zero.stage": number})
    runs += [stages[1], stages[2], stages[3]]
    name, look = f"{ranks}, ZeRO {stage}, checkpointing", "a recomputation in backward that is not what forward was"
    runs.append(change(stages[stage], name, look, {"model.activation_checkpointing": True}))
    if can_compile and not config.data.unpad:  # which is not compiled, see configs/schema.py
        name, look = f"{ranks}, ZeRO {stage}, compiled", "pretrain/models/compiled.py, or torch's compiler itself"
        runs.append(change(stages[stage], name, look, {"model.compile": True}))
    if config.deepspeed:
        name, look = f"{ranks}, ZeRO {stage}, deepspeed: section", f"its keys: {', '.join(config.deepspeed)}"
        runs.append(change(stages[stage], name, look, {"deepspeed": config.deepspeed}))
    return [*runs, *as_configured(config, stages[stage], base, runs)]


def as_configured(config: PretrainConfig, on_stage: Variant, base: Changes, runs: list[Variant]) -> list[Variant]:
    """The configuration as it is, unless one of `runs` is that already; its parents are those with parts of it."""
    own = {
        "train.precision": config.train.precision,
        "model.activation_checkpointing": config.model.activation_checkpointing,
        "model.compile": config.model.compile,
        "deepspeed": config.deepspeed,
    }
    name = f"{on_stage.name}, {config.train.precision}, as configured"
    whole = change(on_stage, name, "how the changes meet: each of them alone is right", own)
    if any((run.settings, run.num_ranks) == (whole.settings, whole.num_ranks) for run in runs):
        return []

    def is_part(run: Variant) -> bool:
        changed = {key: value for key, value in run.settings.items() if value != base[key]}
        if run.precision == "bf16":  # which stage 0 does not have
            changed.pop("zero.stage")
        return changed.items() <= whole.settings.items()

    return [replace(whole, parents=tuple(run.name for run in runs if is_part(run)))]


def change(parent: Variant, name: str, look: str, settings: Changes, num_ranks: int | None = None) -> Variant:
    """`parent` with other settings, or on more ranks."""
    merged = {**parent.settings, **settings}
    precision = merged["train.precision"]
    return Variant(name, merged, (parent.name,), look, num_ranks or parent.num_ranks, precision)
