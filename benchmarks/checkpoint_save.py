"""What saving costs a step, by number of ranks: `python -m benchmarks.checkpoint_save [--layers 2] [--ranks 1 2]`.

Ranks train a GPT (bf16, ZeRO-3) and save it every few steps, once in the background and once at once, in one run. A
line of the table has the median wall time of three kinds of steps, each from its beginning to the beginning of the
next: usual ones, in which nothing is saved or written; those that save, in the background and at once; and those
during which a write goes on or is finished, which share the machine with it. Seconds are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, HEADS, VOCAB, CONTEXT = 1024, 16, 8192, 128  # 12.6 M parameters a layer, 8.5 M besides
EVERY_STEPS = 8  # the write in the background is over well before the next save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--saves", type=int, default=4, help="of each way")
    parser.add_argument("--worker", type=Path, help="what a rank does: the folder it saves in")
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments.worker, arguments.layers, arguments.saves)
        return
    print(
        "| parameters | ranks | a rank's file | usual step | while a write goes on | saving, in the background "
        "| saving, at once |\n|---|---|---|---|---|---|---|"
    )
    for num_ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            facts = start_ranks(num_ranks, folder, arguments.layers, arguments.saves)
        seconds = facts["seconds"]
        print(
            f"| {facts['parameters'] / 1e6:,.0f} M | {num_ranks} | {facts['bytes'] / 1e6:,.0f} MB "
            + "".join(f"| {seconds[kind]:.2f} s " for kind in ("usual", "writing", "background", "at once"))
            + "|",
            flush=True,
        )


def start_ranks(num_ranks: int, folder: str, layers: int, saves: int) -> dict[str, Any]:
    """Run the worker on every rank; what the first one printed last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.checkpoint_save", "--worker", folder]
    command += ["--layers", str(layers), "--saves", str(saves)]
    workers = []
    for rank in range(num_ranks):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_PORT": port}
        environment = os.environ | group | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a rank failed: exit codes {[worker.returncode for worker in workers]}")
    facts: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return facts


def measure(folder: Path, layers: int, saves: int) -> None:
    """What a rank does: steps as the loop makes them, each timed and noted by its kind."""
    import torch

    from configs.deepspeed_json import deepspeed_json
    from configs.schema import CheckpointConfig, PretrainConfig
    from pretrain import engine, runtime
    from pretrain.models import build_model
    from pretrain.saver import open_saver
    from pretrain.state import TrainState

    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"num_layers": layers, "hidden_size": HIDDEN, "num_heads": HEADS, "max_seq_len": CONTEXT},
            "train": {"seq_len": CONTEXT, "global_batch_size": 2, "micro_batch_size": 1},
        }
    )
    ranks = runtime.start()
    runtime.seed_all(1)
    json_config = deepspeed_json(config, ranks.world_size)
    model = engine.initialize(lambda: build_model(config.model, VOCAB, CONTEXT), config.train.optimizer, json_config)
    ids = torch.randint(VOCAB, (1, CONTEXT + 1))
    seconds: dict[str, list[float]] = {"usual": [], "writing": [], "background": [], "at once": []}
    for is_background in (True, False):
        way = CheckpointConfig(background=is_background, keep_last=1)
        with open_saver(folder / str(is_background), way, ranks) as saver:
            goes_on = False
            for step in range(1, (saves + 1) * EVERY_STEPS):
                began = time.perf_counter()
                for _ in range(config.train.global_batch_size // ranks.world_size):
                    loss = model(input_ids=ids[:, :-1], labels=ids[:, 1:])["clm"]
                    engine.backward(model, loss / (config.train.global_batch_size * CONTEXT))
                    model.step()
                kind = "writing" if goes_on else "usual"
                goes_on, *others = ranks.any(*saver.flags)
                saver.hear(goes_on, *others)
                if step % EVERY_STEPS == 0:
                    saver.save(TrainState(step, step), engine.fragments(model), {})
                    goes_on, kind = is_background, "background" if is_background else "at once"
                if step >= EVERY_STEPS:  # the steps before are for warming up
                    seconds[kind].append(time.perf_counter() - began)
    slowest = [max(one) for one in zip(*(ranks.gather([statistics.median(v) for v in seconds.values()])), strict=True)]
    size = max(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if ranks.is_first:
        facts = {"parameters": sum(p.ds_numel for p in model.module.parameters()), "bytes": size}
        print(json.dumps(facts | {"seconds": dict(zip(seconds, slowest, strict=True))}))
    ranks.barrier()
    runtime.end()


if __name__ == "__main__":
    main()
