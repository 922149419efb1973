"""What a step was made of, for `millstream prove resume`: run_dir/trace/rank-00000.jsonl, one line a step and rank.

Only with log.trace. A step that is taken again after a resume has a second line, and the last one counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch


def write_trace(run_dir: Path, rank: int, step: int, sample_ids: list[list[int]]) -> None:
    """Append {"step", "sample_ids", "rng"} with a single write; call it right after runtime.seed_all.

    step: counts from 1, as in metrics.jsonl. sample_ids: [source, sample] of each sample of the rank, in order.
    rng: the next random number of the CPU's generator, from a copy, so that the run draws the same as without a trace.
    """
    copy = torch.Generator()
    copy.set_state(torch.get_rng_state())
    line = {"step": step, "sample_ids": sample_ids, "rng": torch.rand((), generator=copy).item()}
    folder = run_dir / "trace"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
