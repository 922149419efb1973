"""Does it help to bind each CPU rank to its own cores? The same run with and without, alternating.

    python -m benchmarks.core_binding CONFIG [--ranks 2] [--repeats 3] [key=value ...]

Prints tokens/s of the later half of each run's steps (median). Free ranks have as many threads as bound ones cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from configs.load import load_pretrain
from launcher import local
from launcher.local import Signals, cores_of_rank, run_local


def free(environment: dict[str, str], cores: list[int]) -> list[int]:
    """In place of `cores_of_rank`: no rank is bound."""
    return []


def tokens_per_second(binding: Callable[..., list[int]], config: str, overrides: list[str], num_ranks: int) -> float:
    local.cores_of_rank = binding
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", config, *overrides, f"run_dir={folder}", "checkpoint.every_steps=1000000"]
        assert run_local("pretrain.train", words, num_ranks, Path(folder), Signals()).code == 0
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    return statistics.median(speeds[len(speeds) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    load_pretrain(arguments.config, arguments.overrides)
    for repeat in range(arguments.repeats):
        for name, binding in (("free", free), ("bound", cores_of_rank)):
            speed = tokens_per_second(binding, arguments.config, arguments.overrides, arguments.ranks)
            print(f"repeat {repeat}  {name:5}  {speed:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
