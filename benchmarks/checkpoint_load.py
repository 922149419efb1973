"""How long resuming takes, by size: `python -m benchmarks.checkpoint_load [--layers 2 8 16]`.

Two ranks train one step of a GPT (bf16, ZeRO-3) and save it in millstream's layout and in DeepSpeed's own. Then it is
resumed on two ranks and on one. millstream compares every byte with its checksum, then loads. DeepSpeed loads unchecked
on the same number of ranks; for another one it has to convert its checkpoint first (`ds_to_universal`, a command of its
own: seconds with the start of Python). Beside them, as what reading costs at least, `torch.load` of one file with the
same tensors. Files are out of the kernel's page cache before each measurement. Seconds are those of the slowest rank,
medians over the rounds; the building of the engine is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, HEADS, VOCAB, CONTEXT = 1024, 16, 8192, 64  # 12.6 M parameters a layer, 8.5 M besides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 9, 15], help="one size each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help="what a rank does: save, millstream, deepspeed, universal or torch_load")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        globals()[arguments.worker](arguments.folder, arguments.layers[0])
        return
    print(
        "| parameters | checkpoint | ranks | millstream: check | and load | together | DeepSpeed: convert | and load "
        "| together | torch.load |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(Path(folder), layers, arguments.rounds):
                print(line, flush=True)


def measure(folder: Path, layers: int, rounds: int) -> list[str]:
    """The lines of the table for one size: two ranks, then one."""
    facts = start_ranks(2, "save", folder, layers)
    bytes_of_ours = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*.safetensors"))
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for _ in range(rounds):
        note("torch_load", start_ranks(1, "torch_load", folder, layers)["load"])
        for ranks in (2, 1):
            ours = start_ranks(ranks, "millstream", folder, layers)
            note(f"check {ranks}", ours["check"])
            note(f"load {ranks}", ours["load"])
        note("convert 2", 0.0)
        note("deepspeed 2", start_ranks(2, "deepspeed", folder, layers)["load"])
        note("convert 1", convert(folder))
        note("deepspeed 1", start_ranks(1, "universal", folder, layers)["load"])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        f"| {facts['parameters'] / 1e6:,.0f} M | {bytes_of_ours / 1e6:,.0f} MB | 2 -> {ranks} "
        f"| {middle[f'check {ranks}']:.2f} s | {middle[f'load {ranks}']:.2f} s "
        f"| {middle[f'check {ranks}'] + middle[f'load {ranks}']:.2f} s "
        f"| {middle[f'convert {ranks}']:.2f} s | {middle[f'deepspeed {ranks}']:.2f} s "
        f"| {middle[f'convert {ranks}'] + middle[f'deepspeed {ranks}']:.2f} s | {middle['torch_load']:.2f} s |"
        for ranks in (2, 1)
    ]


def start_ranks(num_ranks: int, worker: str, folder: Path, layers: int) -> dict[str, Any]:
    """Run `worker` on `num_ranks` processes; what the first one prints last. Files leave the page cache before."""
    forget(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.checkpoint_load", "--worker", worker]
    command += ["--folder", str(folder), "--layers", str(layers)]
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"{worker} failed:\n{errors[-3000:]}")
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def forget(folder: Path) -> None:
    """Have the kernel drop the files' pages, so that they are read from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def convert(folder: Path) -> float:
    """Seconds of DeepSpeed's conversion to its universal format."""
    forget(folder)
    target = folder / "universal" / "step"
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
         "--input_folder", str(folder / "deepspeed/step"), "--output_folder", str(target)],
        env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"ds_to_universal failed:\n{done.stderr[-3000:]}")
    (folder / "universal/latest_universal").write_text("step")
    return seconds


def start(layers: int, universal: bool = False) -> tuple[Any, Any]:
    """The engine, which has made no step, and the ranks."""
    from configs.deepspeed_json import deepspeed_json
    from configs.schema import PretrainConfig
    from pretrain import engine, runtime
    from pretrain.models import build_model

    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"num_layers": layers, "hidden_size": HIDDEN, "num_heads": HEADS, "max_seq_len": CONTEXT},
            "train": {"seq_len": CONTEXT, "global_batch_size": 2, "micro_batch_size": 1},
            "deepspeed": {"checkpoint": {"load_universal": True}} if universal else {},
        }
    )
    ranks = runtime.start()
    runtime.seed_all(1)
    json = deepspeed_json(config, ranks.world_size)
    model = engine.initialize(lambda: build_model(config.model, VOCAB, CONTEXT), config.train.optimizer, json)
    return model, ranks


def report(ranks: Any, **values: float) -> None:
    """Print the largest value of each rank's, on the first, and leave the group: the rank's work is done."""
    from pretrain import runtime

    of_all = ranks.gather(values)
    if ranks.is_first:
        print(json.dumps({name: max(one[name] for one in of_all) for name in values}))
    ranks.barrier()
    runtime.end()


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def save(folder: Path, layers: int) -> None:
    import torch

    from configs.schema import CheckpointConfig
    from pretrain import checkpoint, engine
    from pretrain.saver import open_saver
    from pretrain.state import TrainState

    model, ranks = start(layers)
    ids = torch.randint(VOCAB, (1, CONTEXT + 1))
    engine.backward(model, model(input_ids=ids[:, :-1], labels=ids[:, 1:])["clm"] / (2 * CONTEXT))
    model.step()
    with open_saver(folder, CheckpointConfig(), ranks) as saver:
        saver.save(TrainState(1, 1), engine.fragments(model), {})
    model.save_checkpoint(str(folder / "deepspeed"), tag="step")
    if ranks.is_first:
        found = checkpoint.open_checkpoint(folder / "checkpoints/step-00000001")
        read = checkpoint.reader(found)
        sizes = {name: torch.Size(shape).numel() for name, shape in found.shapes.items()}
        keys = ("master", "exp_avg", "exp_avg_sq")
        torch.save(
            {f"{key}/{name}": read(name, key, 0, sizes[name]) for name in sizes for key in keys}, folder / "one.pt"
        )
    report(ranks, parameters=sum(p.ds_numel for p in model.module.parameters()))


def millstream(folder: Path, layers: int) -> None:
    from pretrain import checkpoint, engine

    model, ranks = start(layers)
    ranks.barrier()
    check, found = timed(lambda: checkpoint.newest_valid(folder, print, ranks))
    load, _ = timed(lambda: engine.load_fragments(model, checkpoint.reader(found), found.state.updates))
    report(ranks, check=check, load=load)


def deepspeed(folder: Path, layers: int) -> None:
    model, ranks = start(layers)
    ranks.barrier()
    load, _ = timed(lambda: model.load_checkpoint(str(folder / "deepspeed"), tag="step"))
    report(ranks, load=load)


def universal(folder: Path, layers: int) -> None:
    model, ranks = start(layers, universal=True)
    ranks.barrier()
    load, _ = timed(lambda: model.load_checkpoint(str(folder / "universal"), tag="step"))
    report(ranks, load=load)


def torch_load(folder: Path, layers: int) -> None:
    import torch

    load, _ = timed(lambda: torch.load(folder / "one.pt", weights_only=True))
    print(json.dumps({"load": load}))


if __name__ == "__main__":
    main()
