"""`millstream plan`: reads the words, what is known of dataset and machine, and prints what plan.py computes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from configs import hardware
from configs.errors import ConfigError
from configs.schema import PretrainConfig
from launcher.plan import TABLE_MODELS, Plan, fit, make_plan, smallest_cluster
from launcher.plan_job import Job, count_parameters, make_cluster, make_job
from launcher.plan_memory import PARTS

FLAGS = ("--gpus", "--gpu", "--nodes", "--network", "--price")
SWITCHES = ("--fit", "--probe")
TRAINED = ("byte_bpe", "wordpiece", "unigram")  # tokenizers that get the vocabulary they are asked for
DAYS = 24


def plan(words: list[str]) -> int:
    """Print the plan that `words` ask for; returns 0, or 1 where the run does not fit. Raises ConfigError."""
    values, switches, rest = take_flags(words)
    gpu = hardware.gpu(values.get("--gpu", "h100-80g"))
    if "--price" in values:
        gpu = replace(gpu, price=_number(values, "--price"))
    if rest[:1] == ["table"]:
        print(table(values.get("--gpu", "h100-80g"), gpu, values.get("--network")))
        return 0
    if not rest:
        raise ConfigError("millstream plan: give a configuration file, or `table` for the published sizes")
    from configs.load import load_pretrain

    # With --fit the configuration's own micro batch is replaced, so it need not divide the batch over the GPUs.
    config = load_pretrain(rest[0], [*rest[1:], *(["train.micro_batch_size=1"] if "--fit" in switches else [])])
    num_gpus = int(_number(values, "--gpus", 1))
    num_nodes = int(_number(values, "--nodes")) if "--nodes" in values else None
    if values.get("--gpu") == hardware.CPU:
        gpu = replace(gpu, memory=_machine_bytes() / num_gpus)
    network_name = values.get("--network", gpu.network)
    cluster = make_cluster(num_gpus, num_nodes, gpu, hardware.network(network_name))
    vocab_size, source = vocabulary(config)
    job = make_job(config, vocab_size, num_gpus)
    saves = config.checkpoint.every_steps < config.train.num_steps
    made = fit(job, cluster, saves) if "--fit" in switches else make_plan(job, cluster, None, saves)
    if "--probe" in switches:
        from launcher.plan_measure import measure

        probe = measure(rest[0], rest[1:], made.job, cluster.gpu.is_cpu)
        made = make_plan(made.job, cluster, probe, saves)
    print(describe(made, values.get("--gpu", "h100-80g"), network_name, source, saves))
    if "--fit" in switches:
        print(f"\n{words_of(made.job)}")
    return 0 if made.fits else 1


def take_flags(words: list[str]) -> tuple[dict[str, str], set[str], list[str]]:
    """Split off the flags with a value, those without, and what is left. Raises ConfigError for unknown ones."""
    values: dict[str, str] = {}
    switches: set[str] = set()
    rest = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word in FLAGS:
            if not left:
                raise ConfigError(f"{word}: a value is missing")
            values[word] = left.pop(0)
        elif word in SWITCHES:
            switches.add(word)
        elif word.startswith("--"):
            raise ConfigError(f"unknown flag {word}; millstream plan knows {', '.join(FLAGS + SWITCHES)}")
        else:
            rest.append(word)
    return values, switches, rest


def vocabulary(config: PretrainConfig) -> tuple[int | None, str]:
    """Tokens of the vocabulary, and where that is known from: the dataset, or the tokenizer that is asked for."""
    first = next(iter(config.data.mixture.values()), None)
    manifest = Path(first.dir if first else config.data.dir) / "train" / "manifest.json"
    if manifest.exists():
        return int(json.loads(manifest.read_text(encoding="utf-8"))["vocab_size"]), str(manifest)
    tokenizer = config.data.build.tokenizer
    if tokenizer.type in TRAINED:
        return tokenizer.vocab_size, "data.build.tokenizer.vocab_size"
    return None, f"the published model's: {manifest} is not there"


def describe(plan: Plan, gpu_name: str, network_name: str, vocabulary_source: str, saves: bool) -> str:
    """The whole plan as text."""
    job, cluster, parameters = plan.job, plan.cluster, count_parameters(plan.job)
    shape = job.shape
    lines = [
        f"{'BERT' if job.is_bert else 'GPT'} of {parameters / 1e6:,.1f} M parameters: {shape.num_layers} layers x "
        f"{shape.hidden_size}, vocabulary {shape.vocab_size:,} ({vocabulary_source})",
        f"{cluster.num_gpus} x {gpu_name} on {cluster.num_nodes} node{'s' * (cluster.num_nodes > 1)}, {network_name}; "
        f"ZeRO stage {job.stage}, micro batch {job.micro_batch_size}, accumulation {job.accumulation}, "
        f"{'bf16' if job.element_bytes == 2 else 'fp32'}, "
        f"activation checkpointing {'on' if job.checkpointing else 'off'}, no offload (the schema has none)",
        "",
        *_memory_lines(plan, saves),
        "",
        *_rows(_time_rows(plan)),
    ]
    return "\n".join(lines)


def _memory_lines(plan: Plan, saves: bool) -> list[str]:
    """The parts of a rank's memory, as planned and with the other choice of checkpointing."""
    other = make_plan(replace(plan.job, checkpointing=not plan.job.checkpointing), plan.cluster, None, saves)
    both = [plan, make_plan(plan.job, plan.cluster, None, saves)] if plan.is_probed else [plan]
    columns = [*both, other]
    names = ["memory of a rank, GB", *(["probed", "by the table"] if plan.is_probed else ["planned"])]
    names.append("without checkpointing" if plan.job.checkpointing else "with checkpointing")
    rows = [names]
    for part in PARTS:
        rows.append([f"  {part}", *(f"{column.memory.parts[part] / 1e9:.2f}" for column in columns)])
    rows.append(["  fragmentation", *(f"{column.memory.fragmentation / 1e9:.2f}" for column in columns)])
    rows.append(["  peak", *(f"{column.memory.total / 1e9:.2f}" for column in columns)])
    rows.append(["  in", *(column.memory.moment for column in columns)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    room = plan.cluster.gpu.memory
    verdict = "fits" if plan.fits else "DOES NOT FIT: try --fit, or more GPUs"
    return [*lines, f"  {verdict}: {plan.memory.total / room:.0%} of {room / 1e9:.1f} GB"]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    job, time = plan.job, plan.time
    parts = f"compute {_seconds(time.compute)}, update {_seconds(time.update)}"
    communication = f"communication {_seconds(time.communication)}, of it not hidden {_seconds(time.exposed)}"
    if plan.is_probed and time.communication == 0:
        communication = "communication is in both, as the probe has measured it"
    steps = f"{job.num_steps:,} steps"
    if plan.num_tokens < job.num_tokens:
        steps = f"{plan.num_tokens / job.num_tokens:.0%} of {steps} until train.budget ends it"
    return [
        ("step", f"{_seconds(time.total)}: {parts}, {communication}"),
        ("speed", f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} (PaLM's definition)"),
        ("run", f"{steps}, {plan.num_tokens / 1e6:,.1f} M tokens, {plan.flops:.2e} FLOPs"),
        ("takes", f"{_hours(plan.hours)}, {plan.kilowatt_hours:,.1f} kWh, {plan.dollars:,.0f} US dollars "
                  f"at {plan.cluster.gpu.price:g} an hour and GPU"),
        ("checkpoint", f"{_size(plan.checkpoint_bytes)}, {_size(plan.checkpoint_bytes / job.num_gpus)} a rank, copied "
                       f"to host memory first; exported {_size(4 * count_parameters(job))}"),
        ("data", f"{_size(plan.data_bytes)} of token shards, if no token is seen twice"),
    ]  # fmt: skip


def words_of(job: Job) -> str:
    """What was chosen, to be put behind `millstream pretrain CONFIG`."""
    return (
        f"train.micro_batch_size={job.micro_batch_size} zero.stage={job.stage} "
        f"model.activation_checkpointing={'true' if job.checkpointing else 'false'}"
    )


def table(gpu_name: str, gpu: hardware.Gpu, network_name: str | None) -> str:
    """The smallest cluster of this GPU for each published size, and what it takes for 20 tokens a parameter."""
    head = [
        "model",
        "parameters",
        "GPUs",
        "stage",
        "micro",
        "checkp.",
        "GB/GPU",
        "tokens/s",
        "MFU",
        "days",
        "US dollars",
    ]
    rows = [head]
    for preset in TABLE_MODELS:
        plan = smallest_cluster(preset, gpu, network_name)
        if plan is None:
            rows.append([preset, *["more than 4,096 GPUs"], *[""] * 9])
            continue
        job = plan.job
        rows.append([
            preset, f"{count_parameters(job) / 1e6:,.0f} M", str(job.num_gpus), str(job.stage),
            str(job.micro_batch_size), "yes" if job.checkpointing else "no", f"{plan.memory.total / 1e9:.1f}",
            f"{plan.tokens_per_second:,.0f}", f"{plan.mfu:.0%}", f"{plan.hours / DAYS:,.1f}", f"{plan.dollars:,.0f}",
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)) for row in rows]
    about = f"the fewest {gpu_name} that can train each size in bf16, 0.5 M tokens a step, 20 tokens a parameter"
    return "\n".join([about, *lines])


def _rows(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]


def _number(values: Mapping[str, str], flag: str, default: float | None = None) -> float:
    text = values.get(flag)
    if text is None:
        assert default is not None
        return default
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number <= 0 or (flag != "--price" and number != int(number)):
        raise ConfigError(f"{flag} {text}: expected a positive {'number' if flag == '--price' else 'whole number'}")
    return number


def _machine_bytes() -> float:
    """Memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 3 * DAYS else f"{hours / DAYS:,.1f} days"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
