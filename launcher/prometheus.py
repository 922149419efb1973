"""The numbers of watched runs in Prometheus' text format, version 0.0.4, for /metrics.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from launcher.board import Board
from launcher.run_state import RunState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("queued", "starting", "running", "finished", "stopped", "failed", "ended", "silent", "new")
Sample = tuple[dict[str, str], float]


def metrics_text(board: Board) -> str:
    """All families, each with one sample a run, rank or kind; a number that is not known is left out."""
    families: dict[str, tuple[str, str, list[Sample]]] = {}
    for run in board.runs:
        for name, kind, meaning, labels, value in samples(run.state, run.mfu):
            family = families.setdefault(name, (kind, meaning, []))
            family[2].append(({"run": run.name} | labels, value))
    lines = []
    for name, (kind, meaning, found) in families.items():
        lines += [f"# HELP millstream_{name} {meaning}", f"# TYPE millstream_{name} {kind}"]
        for labels, value in found:
            shown = ",".join(f'{label}="{escape(text)}"' for label, text in labels.items())
            lines.append(f"millstream_{name}{{{shown}}} {number(value)}")
    return "\n".join(lines) + "\n"


def samples(state: RunState, mfu: float | None) -> Iterator[tuple[str, str, str, dict[str, str], float]]:
    """(name, type, meaning, labels, value) of one run."""
    for name in STATES:
        yield "state", "gauge", "1 for the state the run is in", {"state": name}, float(state.state == name)
    yield "step", "gauge", "Steps that are done", {}, state.step
    known: list[tuple[str, str, Any]] = [
        ("num_steps", "Steps of the whole run", state.num_steps),
        ("loss", "Training loss of the newest step", state.line.get("loss")),
        ("eval_loss", "Loss over the held-out samples", state.evaluation.get("eval_loss")),
        ("learning_rate", "Learning rate of the newest step", state.line.get("lr")),
        ("grad_norm", "Gradient norm of the newest step, before clipping", state.line.get("grad_norm")),
        ("tokens", "Tokens seen", state.line.get("tokens")),
        ("tokens_per_second", "Median over the newest 50 steps", state.tokens_per_second),
        ("step_seconds", "Median over the newest 50 steps", state.step_seconds),
        ("mfu", "Model FLOPs utilisation at that speed, 0 to 1", mfu),
        ("seconds_left", "In steps, at the newest speed", state.seconds_left),
        ("checkpoint_step", "Step of the newest finished checkpoint", state.checkpoint),
        ("ranks", "Ranks of the newest start", len(state.rings)),
        ("memory_bytes", "Of the largest rank on rank 0's machine", (state.straggler or {}).get("memory_bytes")),
        ("gpu_bytes", "Allocated on rank 0's GPU at most", (state.straggler or {}).get("gpu_bytes")),
    ]
    for name, meaning, value in known:
        if isinstance(value, int | float):
            yield name, "gauge", meaning, {}, value
    for kind, count in Counter(str(each.get("kind")) for each in state.incidents).items():
        yield "incidents_total", "counter", "Lines of incidents.jsonl", {"kind": kind}, count
    if state.is_running:
        for rank, ring in enumerate(state.rings):
            if ring:
                labels = {"rank": str(rank), "phase": ring.phase}
                quiet = max(0.0, time.time() - ring.since)
                yield "rank_quiet_seconds", "gauge", "Since the rank's newest mark", labels, quiet


def escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)
