"""Training on the CPU against transformers' Trainer and plain PyTorch, in one run: `python -m benchmarks.train_cpu`.

The same GPT-2 (`--size`: nano, 6x384 or 12x768), bf16, the same random batches, on one process with all cores:
millstream's ZeRO-3 engine, without and with `model.compile`; transformers' Trainer, plain and with DeepSpeed ZeRO-3;
and the three loops of plain_loop.py. Rounds go round-robin, because the speed of a shared machine drifts; each row is
the median over the rounds of tokens/s, with the range, the ratio to plain Trainer of the same round, and the share of
the operations a second that a bf16 matrix product alone reached in that round. Each contestant has its own process.
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
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    vocab: int
    context: int
    batch: int


SIZES = {
    "nano": Size(4, 128, 2, 4_096, 128, 32),
    "6x384": Size(6, 384, 6, 16_384, 512, 8),
    "12x768": Size(12, 768, 12, 50_257, 512, 4),
}
WARMUP_STEPS = 2
CONTESTANTS = (
    "millstream", "millstream_compiled", "trainer", "trainer_zero3", "plain_autocast", "plain_bf16", "plain_compiled",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="6x384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="of each contestant in a round, the first two to warm up")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--contestant", choices=CONTESTANTS, help="run one and print its seconds a step")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step of millstream goes")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.contestant:
        print(json.dumps(globals()[arguments.contestant](size, arguments.steps)))
        return
    if arguments.profile:
        profile(size)
        return
    speeds: dict[str, list[float]] = {name: [] for name in arguments.only}
    ceilings = []
    for number in range(arguments.rounds):
        ceilings.append(matmul_flops())
        for name in arguments.only:
            seconds = run(name, arguments.size, arguments.steps)
            speeds[name].append(size.batch * size.context / statistics.median(seconds))
            print(f"round {number + 1}: {name:20s} {speeds[name][-1]:8,.0f} tokens/s", flush=True)
    print(table(speeds, ceilings, size))
    print(f"\na bf16 matrix product alone: {', '.join(f'{c / 1e12:.2f}' for c in ceilings)} TFLOP/s, by round")


def run(name: str, size: str, steps: int) -> list[float]:
    """Seconds of each timed step of one contestant, in its own process."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-m", "benchmarks.train_cpu", "--contestant", name]
    command += ["--size", size, "--steps", str(steps)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def table(speeds: dict[str, list[float]], ceilings: list[float], size: Size) -> str:
    lines = [
        "",
        "| contestant | tokens/s, median (range) | TFLOP/s | of a product's | ratio to Trainer, median (range) |",
        "|---|---|---|---|---|",
    ]
    for name, values in speeds.items():
        shares = [value * flops_per_token(size) / ceiling for value, ceiling in zip(values, ceilings, strict=True)]
        middle, ratio = statistics.median(values), ""
        if "trainer" in speeds:
            ratios = [a / b for a, b in zip(values, speeds["trainer"], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        lines.append(
            f"| {name} | {middle:,.0f} ({min(values):,.0f} - {max(values):,.0f}) "
            f"| {middle * flops_per_token(size) / 1e12:.3f} | {statistics.median(shares):.0%} | {ratio} |"
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


def flops_per_token(size: Size) -> float:
    """Forward and backward, matrix products only: 6 per weight in blocks and head, attention scores on top."""
    weights = size.layers * 12 * size.hidden**2 + size.vocab * size.hidden
    return 6 * weights + 12 * size.layers * size.context * size.hidden / 2  # half: causal


def batch(size: Size, seed: int):
    import torch

    rng = torch.Generator().manual_seed(seed)
    return torch.randint(size.vocab, (size.batch, size.context + 1), generator=rng)


def start_engine(size: Size, compile: bool):
    """The engine, and a function that takes one step with it."""
    from configs.deepspeed_json import deepspeed_json
    from configs.schema import PretrainConfig
    from pretrain import engine, runtime
    from pretrain.models import build_model
    from pretrain.objective import count_targets, global_mean

    shape = {"num_layers": size.layers, "hidden_size": size.hidden, "num_heads": size.heads}
    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"preset": "gpt2", **shape, "max_seq_len": size.context, "compile": compile},
            "train": {"seq_len": size.context, "global_batch_size": size.batch, "micro_batch_size": size.batch},
        }
    )
    runtime.start()
    model = engine.initialize(
        lambda: build_model(config.model, size.vocab, size.context), config.train.optimizer, deepspeed_json(config, 1)
    )

    def step(ids) -> None:
        inputs = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        engine.backward(model, global_mean(model(**inputs), count_targets([inputs])))
        engine.update(model)
        engine.grad_norm(model)

    return step


def millstream(size: Size, steps: int, compile: bool = False) -> list[float]:
    step = start_engine(size, compile)
    seconds = []
    for number in range(steps):
        ids = batch(size, number)
        began = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - began)
    return seconds[WARMUP_STEPS:]


def millstream_compiled(size: Size, steps: int) -> list[float]:
    return millstream(size, steps, compile=True)


def profile(size: Size) -> None:
    from torch.profiler import profile as recorded

    step = start_engine(size, compile=False)
    for number in range(WARMUP_STEPS + 1):
        step(batch(size, number))
    with recorded() as found:
        step(batch(size, WARMUP_STEPS + 1))
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def plain(size: Size, steps: int, way: str) -> list[float]:
    import torch

    from benchmarks.plain_loop import PlainGPT, train

    torch.manual_seed(0)
    model = PlainGPT(size.layers, size.hidden, size.heads, size.vocab, size.context)
    return train(way, model, [batch(size, number) for number in range(steps)])[WARMUP_STEPS:]


def plain_autocast(size: Size, steps: int) -> list[float]:
    return plain(size, steps, "autocast")


def plain_bf16(size: Size, steps: int) -> list[float]:
    return plain(size, steps, "bf16")


def plain_compiled(size: Size, steps: int) -> list[float]:
    return plain(size, steps, "compiled")


def trainer(size: Size, steps: int, deepspeed: dict | None = None) -> list[float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_, **__) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            self.times.append(time.perf_counter() - self.began)

    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=size.batch,
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
        vocab_size=size.vocab, n_positions=size.context, n_embd=size.hidden, n_layer=size.layers, n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    rows = torch.cat([batch(size, step)[:, :-1] for step in range(steps)])
    samples = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=samples, callbacks=[clock]).train()
    return clock.times[WARMUP_STEPS:]


def trainer_zero3(size: Size, steps: int) -> list[float]:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    return trainer(
        size,
        steps,
        {
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
    )


if __name__ == "__main__":
    main()
