"""Training speed on the CPU against transformers' Trainer, in one run: `python -m benchmarks.train_cpu`.

The same GPT-2 (6 layers x 384, vocabulary 16,384, context 512), bf16, the same random batches of 8 samples, on one
process with all cores: millstream's ZeRO-3 engine, transformers' Trainer plain, and Trainer with DeepSpeed ZeRO-3.
Rounds go round-robin, because the speed of a shared machine drifts; each row is the median over the rounds of tokens/s,
with the range, and the ratio to plain Trainer of the same round. Each contestant runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

LAYERS, HIDDEN, HEADS, VOCAB, CONTEXT, BATCH = 6, 384, 6, 16_384, 512, 8
WARMUP_STEPS, TIMED_STEPS = 2, 5
CONTESTANTS = ("millstream", "trainer", "trainer_zero3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", choices=CONTESTANTS, help="run one and print its seconds a step")
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(globals()[arguments.contestant]()))
        return
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(arguments.rounds):
        for name in CONTESTANTS:
            speeds[name].append(BATCH * CONTEXT / statistics.median(run(name)))
            print(f"round {number + 1}: {name:14s} {speeds[name][-1]:8,.0f} tokens/s", flush=True)
    print(table(speeds))
    print(f"\na bf16 matrix product alone: {matmul_flops() / 1e12:.2f} TFLOP/s")


def run(name: str) -> list[float]:
    """Seconds of each timed step of one contestant, in its own process."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-m", "benchmarks.train_cpu", "--contestant", name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def table(speeds: dict[str, list[float]]) -> str:
    lines = [
        "",
        "| contestant | tokens/s, median (range) | TFLOP/s | ratio to Trainer, median (range) |",
        "|---|---|---|---|",
    ]
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(values, speeds["trainer"], strict=True)]
        middle, ratio = statistics.median(values), statistics.median(ratios)
        lines.append(
            f"| {name} | {middle:,.0f} ({min(values):,.0f} - {max(values):,.0f}) "
            f"| {middle * flops_per_token() / 1e12:.3f} | {ratio:.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |"
        )
    return "\n".join(lines)


def matmul_flops() -> float:
    """Floating-point operations a second of a bf16 product of (4096, 4096) matrices, the median of seven."""
    import torch

    a, b = torch.randn(2, 4096, 4096).bfloat16()
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 4096**3 / statistics.median(seconds[1:])  # the first one warms up


def flops_per_token() -> float:
    """Forward and backward, matrix products only: 6 per weight in blocks and head, attention scores on top."""
    weights = LAYERS * 12 * HIDDEN**2 + VOCAB * HIDDEN
    return 6 * weights + 12 * LAYERS * CONTEXT * HIDDEN / 2  # half: causal


def batch(seed: int):
    import torch

    ids = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return ids


def millstream() -> list[float]:
    from configs.deepspeed_json import deepspeed_json
    from configs.schema import PretrainConfig
    from pretrain import engine, runtime
    from pretrain.models import build_model
    from pretrain.objective import count_targets, global_mean

    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {
                "preset": "gpt2",
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_heads": HEADS,
                "max_seq_len": CONTEXT,
            },
            "train": {"seq_len": CONTEXT, "global_batch_size": BATCH, "micro_batch_size": BATCH},
        }
    )
    runtime.start()
    model = engine.initialize(
        lambda: build_model(config.model, VOCAB, CONTEXT), config.train.optimizer, deepspeed_json(config, 1)
    )
    seconds = []
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        ids = batch(step)
        inputs = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        began = time.perf_counter()
        engine.backward(model, global_mean(model(**inputs), count_targets([inputs])))
        model.step()
        engine.grad_norm(model)
        seconds.append(time.perf_counter() - began)
    return seconds[WARMUP_STEPS:]


def trainer(deepspeed: dict | None = None) -> list[float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_, **__) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            self.times.append(time.perf_counter() - self.began)

    steps = WARMUP_STEPS + TIMED_STEPS
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=deepspeed,
        optim="adamw_torch",
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    rows = torch.cat([batch(step)[:, :-1] for step in range(steps)])
    samples = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=samples, callbacks=[clock]).train()
    return clock.times[WARMUP_STEPS:]


def trainer_zero3() -> list[float]:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    return trainer(
        {
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
    )


if __name__ == "__main__":
    main()
