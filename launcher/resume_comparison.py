"""Compares two runs step by step: `first_differences` is a function of their records alone.

A record is what one run wrote for one step: loss, lr, grad_norm, tokens, sample_ids (of the global batch, in order) and
rng (a random number of each rank). `read_records` collects them from a run directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUANTITIES = ("loss", "lr", "grad_norm", "tokens", "sample_ids", "rng")
Records = Mapping[int, Mapping[str, Any]]  # by step, which counts from 1


@dataclass(frozen=True)
class Difference:
    step: int
    quantity: str
    expected: Any  # of the undisturbed run
    found: Any

    def __str__(self) -> str:
        return f"step {self.step}, {self.quantity}: {self.expected!r} undisturbed, {self.found!r} resumed"


def first_differences(
    expected: Records, found: Records, num_steps: int, tolerances: Mapping[str, float], first_step: int = 1
) -> dict[str, Difference | None]:
    """The first difference of each quantity in `tolerances` over first_step, ..., num_steps; None where there is none.

    tolerances: by quantity, relative to the larger value; 0.0 asks for equality, bit for bit, and a list is always
    compared so. A value that is missing in either run is a difference.
    """
    result: dict[str, Difference | None] = dict.fromkeys(tolerances)
    for step in range(first_step, num_steps + 1):
        for quantity, tolerance in tolerances.items():
            values = [records.get(step, {}).get(quantity) for records in (expected, found)]
            if result[quantity] is None and not agree(values[0], values[1], tolerance):
                result[quantity] = Difference(step, quantity, *values)
    return result


def agree(expected: Any, found: Any, tolerance: float) -> bool:
    """Whether two values of one quantity count as the same; nan agrees with nothing, unless with itself bit for bit."""
    if expected is None or found is None:
        return False
    if tolerance == 0.0 or isinstance(expected, list) or isinstance(found, list):
        return json.dumps(expected) == json.dumps(found)  # floats are written with all of their digits
    return abs(expected - found) <= tolerance * max(abs(expected), abs(found))


def read_records(run_dir: Path, num_ranks: int) -> dict[int, dict[str, Any]]:
    """Records by step out of metrics.jsonl and trace/; of a step that was taken twice, the last one."""
    records = {line["step"]: line for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line}
    traces = [
        {line["step"]: line for line in read_lines(run_dir / "trace" / f"rank-{rank:05d}.jsonl")}
        for rank in range(num_ranks)
    ]
    for step, record in records.items():
        if of_step := [trace[step] for trace in traces if step in trace]:
            record["sample_ids"] = [sample for line in of_step for sample in line["sample_ids"]]
            record["rng"] = [line["rng"] for line in of_step]
    return records


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a jsonl file that may be in the middle of a write; none where there is no file."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
