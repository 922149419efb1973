"""What a verified step costs (`guard.verify_every_steps`), by ZeRO stage: `python -m benchmarks.verify [--layers 4]`.

Two ranks, one thread each, train a GPT of 256 dimensions in bf16; every second step is verified. A line has the median
wall time of usual and of verified steps, of the slowest rank, how much of it is for comparing the weights, and what
verifying every 100th step adds to a run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

VOCAB, CONTEXT, BATCH, NUM_STEPS = 8192, 128, 16, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--worker", type=int, help="what a rank does: at this stage")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        measure(arguments.worker, arguments.layers)
        return
    print("| stage | parameters | usual step | verified step | of it weights | every 100th step |")
    print("|---|---|---|---|---|---|")
    for stage in (1, 2, 3):
        facts = start_ranks(stage, arguments.layers)
        usual, verified = facts["usual"], facts["verified"]
        print(
            f"| {stage} | {facts['parameters'] / 1e6:.1f} M | {usual:.3f} s | {verified:.3f} s "
            f"| {facts['weights']:.3f} s | + {(verified / usual - 1):.2f} % |",
            flush=True,
        )


def start_ranks(stage: int, layers: int) -> dict[str, Any]:
    """Run the worker on two ranks; what the first one printed last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.verify", "--worker", str(stage), "--layers", str(layers)]
    workers = []
    for rank in range(2):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = os.environ | group | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a rank failed: exit codes {[worker.returncode for worker in workers]}")
    facts: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return facts


def measure(stage: int, layers: int) -> None:
    """What a rank does: steps as the loop makes them, each timed."""
    import torch

    from configs.deepspeed_json import deepspeed_json
    from configs.schema import PretrainConfig
    from pretrain import engine, runtime, verify
    from pretrain.models import build_model
    from pretrain.step import add_up_gradient

    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"num_layers": layers, "hidden_size": 256, "num_heads": 4, "max_seq_len": CONTEXT},
            "train": {"seq_len": CONTEXT, "global_batch_size": BATCH, "micro_batch_size": 4},
            "guard": {"verify_every_steps": 2},
            "zero": {"stage": stage},
        }
    )
    ranks = runtime.start()
    runtime.seed_all(1)
    json_config = deepspeed_json(config, ranks.world_size)
    model = engine.initialize(lambda: build_model(config.model, VOCAB, CONTEXT), config.train.optimizer, json_config)
    model.train()
    ids = torch.randint(VOCAB, (4, CONTEXT + 1))
    batches = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * (BATCH // 4 // ranks.world_size)
    plain = config.model_copy(update={"guard": config.guard.model_copy(update={"verify_every_steps": None})})
    seconds: dict[str, list[float]] = {"usual": [], "verified": []}
    for step in range(NUM_STEPS):
        ranks.barrier()
        began = time.perf_counter()
        is_due = verify.is_due(config.guard, step)
        add_up_gradient(config if is_due else plain, model, batches, step, ranks)
        engine.update(model)
        if is_due:
            verify.check_norm(engine.grad_norm(model), config, step, ranks)
        if step >= 4:  # those before are for warming up
            seconds["verified" if is_due else "usual"].append(time.perf_counter() - began)
    began = time.perf_counter()
    weights = [verify.checksum(weight) for _, weight in engine.whole_weights(model)]
    engine.unlike_masters(model)
    ranks.gather([int(weight) for weight in weights])
    of_weights = time.perf_counter() - began
    medians = [statistics.median(values) for values in seconds.values()]
    slowest = [max(one) for one in zip(*(ranks.gather([*medians, of_weights])), strict=True)]
    if ranks.is_first:
        count = sum(torch.Size(shape).numel() for shape in engine.shapes(model).values())
        print(json.dumps({"parameters": count, **dict(zip((*seconds, "weights"), slowest, strict=True))}))
    ranks.barrier()
    runtime.end()


if __name__ == "__main__":
    main()
