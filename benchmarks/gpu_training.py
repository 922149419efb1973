"""One model trained for some steps through the ZeRO-3 engine: speed, memory and a profile, as JSON on the last line.

    python -m benchmarks.gpu_training '{"architecture": "gpt", "preset": "gpt3-125m", "seq_len": 2048, ...}'

`benchmarks/gpu.py` starts it, a process a model, so that a model that does not fit in memory costs only its own row.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from configs.deepspeed_json import deepspeed_json
from configs.schema import PretrainConfig
from pretrain import engine, runtime
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX
from pretrain.models import build_model
from pretrain.objective import count_targets, global_mean

WARMUP_STEPS = 3
TARGET_SHARE = 0.15  # of BERT's tokens
PROFILED_KERNELS = 15


def main() -> int:
    job = json.loads(sys.argv[1])
    ranks = runtime.start()
    print(json.dumps(train(job, ranks.device)))
    return 0


def train(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """job: architecture, preset, seq_len, micro_batch_size, steps, is_profiled; optionally vocab_size, `model` keys."""
    seq_len, batch_size = job["seq_len"], job["micro_batch_size"]
    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"architecture": job["architecture"], "preset": job["preset"], **job.get("model", {})},
            "train": {"seq_len": seq_len, "global_batch_size": batch_size, "micro_batch_size": batch_size},
        }
    )
    vocab = job.get("vocab_size", 50_257 if job["architecture"] == "gpt" else 30_522)
    torch.manual_seed(0)
    model = engine.initialize(
        lambda: build_model(config.model, vocab, seq_len), config.train.optimizer, deepspeed_json(config, 1)
    )
    model.train()
    batch = make_batch(job["architecture"], batch_size, seq_len, vocab, device)
    seconds = [step(model, batch, device) for _ in range(WARMUP_STEPS + job["steps"])][WARMUP_STEPS:]
    found = {
        "tokens_per_second": batch_size * seq_len / statistics.median(seconds),
        "seconds": seconds,
        "flops_per_token": flops_per_token(model.module, vocab, seq_len),
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
    }
    if job["is_profiled"]:
        found["profile"] = profile(model, batch, device)
    return found


def make_batch(
    architecture: str, batch_size: int, seq_len: int, vocab: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random ids (batch_size, seq_len); for BERT TARGET_SHARE of them are targets, and there are pairs."""
    ids = torch.randint(vocab, (batch_size, seq_len + 1), device=device)
    if architecture == "gpt":
        return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    is_target = torch.rand(batch_size, seq_len, device=device) < TARGET_SHARE
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "token_type_ids": torch.zeros_like(ids[:, 1:]),
        "labels": torch.where(is_target, ids[:, 1:], IGNORE_INDEX),
        "next_sentence_label": torch.zeros(batch_size, dtype=torch.int64, device=device),
    }


def step(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> float:
    """Seconds of one whole step."""
    began = time.perf_counter()
    engine.backward(model, global_mean(model(**batch), count_targets([batch])))
    engine.update(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def flops_per_token(model: torch.nn.Module, vocab: int, seq_len: int) -> float:
    """6 N + 12 L H T (PaLM, Chowdhery et al. 2022, appendix B).

    N are the parameters that a token is multiplied with: positions, which are looked up, are not among them, and the
    word embedding is as the output layer, for BERT for the share of tokens that are targets.
    """
    shape = model.shape
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    share = 1.0 if model.architecture == "gpt" else TARGET_SHARE
    looked_up = shape.max_seq_len * shape.hidden_size + (1 - share) * vocab * shape.hidden_size
    return 6 * (parameters - looked_up) + 12 * shape.num_layers * shape.hidden_size * seq_len


def profile(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> list[dict[str, Any]]:
    """What a step's time on the device goes to, by kernel, the largest first."""
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if device.type == "cuda" else [kind.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        seconds = step(model, batch, device)
    if device.type == "cuda":
        times = {event.key: event.self_device_time_total for event in seen.key_averages()}
    else:
        times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    largest = sorted(times.items(), key=lambda item: -item[1])[:PROFILED_KERNELS]
    busy = {"name": "(all of it)", "ms": sum(times.values()) / 1e3, "share": sum(times.values()) / 1e6 / seconds}
    return [busy, *({"name": key, "ms": us / 1e3, "share": us / 1e6 / seconds} for key, us in largest)]


if __name__ == "__main__":
    runtime.run(main)
