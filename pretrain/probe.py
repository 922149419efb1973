"""A few steps of a configuration with few layers, timed, for `millstream plan --probe`, which starts it.

What is timed is the run's own `train_step`, on the configuration's dataset where it is there, else on random tokens.
Words beside the configuration: layers=N (tiny before it: a model of nearly no size, for what a process has without
one), accumulations=1,2, seconds=S (of steps), vocab_size=N, out=FILE.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.deepspeed_json import deepspeed_json
from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.shards import DataError, write_manifest, write_shard
from data_pipeline.stream import Stream, open_stream
from pretrain import engine, runtime
from pretrain.metrics import open_tensorboard
from pretrain.models import build_model
from pretrain.runtime import Runtime
from pretrain.step import train_step

WARMUP_STEPS, LEAST_STEPS, MOST_STEPS = 3, 5, 500
OWN_WORDS = ("layers", "tiny", "accumulations", "seconds", "vocab_size", "out")
TINY = {"num_layers": 1, "hidden_size": 16, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 16}
DOCUMENT_TOKENS = 300  # of the random dataset: several documents in a row, as in most


def main() -> int:
    file, words = runtime.launch_arguments(__doc__.splitlines()[0])
    own = dict(word.split("=", 1) for word in words if word.partition("=")[0] in OWN_WORDS)
    try:
        config = load_pretrain(file, [word for word in words if word.partition("=")[0] not in own])
        ranks = runtime.start()
        measured = measure(config, own, ranks)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    if ranks.is_first:
        Path(own["out"]).write_text(json.dumps(measured), encoding="utf-8")
    return 0


def measure(config: PretrainConfig, own: dict[str, str], ranks: Runtime) -> dict[str, Any]:
    """Of the asked depth `peak_bytes` and, of steps of N micro batches, `seconds_N`; with tiny also `context_bytes`.

    Each is that of the largest or slowest rank.

    Every rank calls it. Raises ConfigError for a BERT without a dataset: its masks need the tokenizer.
    """
    folder = Path(own["out"]).parent / "random-tokens"
    config = on_some_data(config, int(own["vocab_size"]), folder, ranks)
    if ranks.is_first and config.log.tensorboard:  # as in a run: it takes 60 MB
        open_tensorboard(Path(tempfile.mkdtemp(dir=folder.parent)), 0).close()
    found: dict[str, Any] = {}
    if "tiny" in own:
        timed(with_model(config, TINY), [1], ranks, 0.0)
        found["context_bytes"] = largest(context_bytes(ranks.device), ranks)
    deep = with_model(config, {"num_layers": int(own["layers"])})
    accumulations = [int(number) for number in own["accumulations"].split(",")]
    for accumulation, seconds in timed(deep, accumulations, ranks, float(own["seconds"])).items():
        found[f"seconds_{accumulation}"] = largest(seconds, ranks)
    found["peak_bytes"] = largest(peak_bytes(ranks.device), ranks)
    return found


def on_some_data(config: PretrainConfig, vocab_size: int, folder: Path, ranks: Runtime) -> PretrainConfig:
    """The configuration on its own dataset, or on one of random tokens that rank 0 makes in `folder`."""
    if config.data.mixture or (Path(config.data.dir) / "train" / "manifest.json").exists() or "://" in config.data.dir:
        return config
    if config.model.architecture == "bert":
        raise ConfigError(f"data.dir={config.data.dir}: no dataset; BERT's masking needs its tokenizer to be probed")
    if ranks.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        train = config.train
        wanted = 16 * train.micro_batch_size * ranks.world_size * (train.longest_seq_len + 1)
        lengths = np.full(-(-wanted // DOCUMENT_TOKENS), DOCUMENT_TOKENS)
        tokens = np.random.default_rng(0).integers(1, vocab_size, lengths.sum())
        tokens[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = 0
        (folder / "train").mkdir(parents=True)
        entry = write_shard(folder / "train" / "shard-00000.tokens", [(tokens, lengths)], vocab_size)
        write_manifest(folder / "train", [entry], vocab_size, "none", "random tokens")
    ranks.barrier()
    return config.model_copy(update={"data": config.data.model_copy(update={"dir": str(folder)})})


def with_model(config: PretrainConfig, model: dict[str, int]) -> PretrainConfig:
    """The configuration with another model, one sequence length and one batch size."""
    train = {"seq_len": config.train.longest_seq_len, "phases": [], "batch_ramp": None}
    changed = {
        "model": config.model.model_copy(update=model),
        "train": config.train.model_copy(update=train),
        "guard": config.guard.model_copy(update={"verify_every_steps": None}),
    }
    return config.model_copy(update=changed)


def with_accumulation(config: PretrainConfig, accumulation: int, ranks: Runtime) -> PretrainConfig:
    batch = config.train.micro_batch_size * ranks.world_size * accumulation
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": batch})})


def timed(config: PretrainConfig, accumulations: list[int], ranks: Runtime, seconds: float) -> dict[int, float]:
    """Seconds of a step with each number of micro batches, in turn for `seconds` in all: the lower quartile.

    The quartile, because what else a machine does in these few seconds is not to be extrapolated. Every rank does the
    same number of steps.
    """
    configs = {number: with_accumulation(config, number, ranks) for number in accumulations}
    streams = {number: open_stream(one, "train") for number, one in configs.items()}
    first = configs[accumulations[0]]
    runtime.seed_all(config.train.seed)
    model = engine.initialize(
        lambda: build_model(config.model, streams[accumulations[0]].vocab_size, config.train.seq_len),
        config.train.optimizer,
        deepspeed_json(first, ranks.world_size),
    )
    evaluate_once(model, streams[accumulations[0]], ranks)
    steps: dict[int, list[float]] = {number: [] for number in accumulations}
    began = time.perf_counter()
    step, goes_on = 0, True
    while goes_on:
        for number, stream in streams.items():
            steps[number].append(train_step(configs[number], model, stream, step, ranks)["step_seconds"])
        step += 1
        if step == WARMUP_STEPS:
            began = time.perf_counter()
        is_due = step < WARMUP_STEPS + LEAST_STEPS or time.perf_counter() - began < seconds
        (goes_on,) = ranks.any(is_due and step < MOST_STEPS)
    for stream in streams.values():
        stream.close()
    engine.close(model)
    return {number: statistics.quantiles(found[WARMUP_STEPS:], n=4)[0] for number, found in steps.items()}


@torch.no_grad()
def evaluate_once(model: Any, stream: Stream, ranks: Runtime) -> None:
    """A forward pass alone, as before the first step of a run: ZeRO-3 remembers in what order weights were used."""
    model.eval()
    for made in stream.micro_batches(0, ranks.rank, ranks.world_size):
        model(**stream.expand(runtime.to_device(made, ranks.device)))


def context_bytes(device: torch.device) -> float:
    """Of this process, without a model's: what it has at most had resident; on a GPU what torch has not allocated."""
    if device.type == "cpu":
        return peak_bytes(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))


def peak_bytes(device: torch.device) -> float:
    """The most this process has had resident; on a GPU the most that torch has taken, and what is outside of it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        return float(outside + torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024.0 * float(status.split("VmHWM:")[1].split()[0])


def largest(value: float, ranks: Runtime) -> float:
    return max(float(str(other)) for other in ranks.gather(value))


if __name__ == "__main__":
    runtime.run(main)
