"""`millstream status RUN_DIR ...`: what one run does, in lines; several runs, as a table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.launches import Launch
from launcher.logs import CONTROLS
from launcher.run_state import BAD, RunState, duration, look, seconds_of

LARGEST_TABLE = 16  # ranks; of larger runs only the phases are counted
FAILED = 1  # exit code where a run has failed, or ended without saying why


def show_status(run_dirs: Sequence[Path]) -> int:
    """Print it; returns 0, or FAILED if one of the runs is not well. Raises ConfigError for what is no run."""
    states = [look(run_dir) for run_dir in run_dirs]
    print(describe(states[0]) if len(states) == 1 else table(states))
    return FAILED if any(state.state in BAD for state in states) else 0


def describe(run: RunState) -> str:
    """The run in lines of a name and what is to be said of it."""
    rows = [("run", str(run.run_dir)), ("state", state_line(run))]
    if run.launch:
        rows.append(("started", launch_line(run.launch)))
    rows += [("step", step_line(run)), *number_rows(run)]
    if run.is_running and run.rings:
        rows.append(("ranks", ranks_line(run)))
    if run.straggler:
        rows.append(("behind", straggler_line(run.straggler)))
    rows.append(("checkpoint", "none yet" if run.checkpoint is None else f"step {run.checkpoint:,}"))
    if run.incidents:
        number = len(run.incidents)
        rows.append(
            ("incidents", f"{number:,}, the {'last' if number > 1 else 'only'} one {incident_line(run.incidents[-1])}")
        )
    lines = [f"{name:<11} {text}" for name, text in rows]
    if run.state == "failed":
        lines.append(f"{'see':<11} millstream logs {run.run_dir}")
    if run.is_running and 1 < len(run.rings) <= LARGEST_TABLE:
        lines += ["", *rank_table(run)]
    return "\n".join(CONTROLS.sub(" ", line) for line in lines)


def state_line(run: RunState) -> str:
    return f"{run.state}: {run.why}" if run.why else run.state


def launch_line(launch: Launch) -> str:
    parts = [clock(seconds_of(launch.started))]
    parts.append(f"{launch.kind}" + (f", {launch.num_ranks} ranks" if launch.num_ranks else ""))
    if launch.job:
        parts.append(f"job {launch.job}")
    elif launch.pid:
        parts.append(f"pid {launch.pid} on {launch.host}")
    return ", ".join(parts)


def step_line(run: RunState) -> str:
    text = f"{run.step:,}"
    if run.num_steps:
        text += f" of {run.num_steps:,} ({100 * run.step / run.num_steps:.0f} %)"
    if run.seconds_left:
        text += f", about {duration(run.seconds_left)} of steps left"
    return text


def number_rows(run: RunState) -> list[tuple[str, str]]:
    rows = []
    if "loss" in run.line:
        rows.append(("loss", f"{run.line['loss']:.4f}"))
    if "eval_loss" in run.evaluation:
        rows.append(("held out", f"{run.evaluation['eval_loss']:.4f} at step {run.evaluation.get('step', 0):,}"))
    if run.tokens_per_second is not None:
        text = f"{run.tokens_per_second:,.0f} tokens/s"
        if run.step_seconds is not None:
            text += f", {run.step_seconds:.3g} s a step"
        rows.append(("speed", text))
    return rows


def ranks_line(run: RunState) -> str:
    """For example "2 ranks: 1 in forward, 1 in reduce of step 41; last mark 0.1 s ago"."""
    counted = Counter(ring.phase if ring else "no mark yet" for ring in run.rings)
    doing = ", ".join(f"{number} in {phase}" for phase, number in counted.most_common())
    steps = sorted({ring.step + 1 for ring in run.rings if ring})
    text = f"{len(run.rings)} rank{'s' if len(run.rings) > 1 else ''}: {doing}"
    if steps:
        text += f" of step {steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else "")
    return text + (f"; last mark {duration(max(0.0, time.time() - run.last_mark))} ago" if run.last_mark else "")


def straggler_line(line: dict[str, Any]) -> str:
    step_seconds = line.get("step_seconds") or 0.0
    share = f" of {step_seconds:.3g} s" if step_seconds else ""
    text = f"rank {line['rank']} in {line['phase']}, by {line['seconds']:.3g} s a step{share}"
    return f"{text} ({clock(seconds_of(line.get('time')))})"


def incident_line(incident: dict[str, Any]) -> str:
    return f"({clock(seconds_of(incident.get('time')))}) {incident.get('kind')}: {incident.get('text', '')}"


def rank_table(run: RunState) -> list[str]:
    rows = [["rank", "host", "pid", "step", "phase", "for", "process"]]
    for rank, (ring, process) in enumerate(zip(run.rings, run.processes, strict=True)):
        if ring is None:
            rows.append([str(rank), "", "", "", "no mark yet", "", process])
            continue
        since = duration(max(0.0, time.time() - ring.since))
        rows.append([str(rank), ring.host, str(ring.pid), str(ring.step + 1), ring.phase, since, process])
    return aligned(rows)


def table(states: Sequence[RunState]) -> str:
    """One line a run."""
    rows = [["run", "state", "step", "loss", "held out", "tokens/s", "left", "checkpoint", "incidents"]]
    for run in states:
        rows.append([CONTROLS.sub(" ", cell) for cell in table_row(run)])
    return "\n".join(aligned(rows))


def table_row(run: RunState) -> list[str]:
    return [
        str(run.run_dir),
        run.state,
        f"{run.step:,}" + (f"/{run.num_steps:,}" if run.num_steps else ""),
        f"{run.line['loss']:.4f}" if "loss" in run.line else "",
        f"{run.evaluation['eval_loss']:.4f}" if "eval_loss" in run.evaluation else "",
        f"{run.tokens_per_second:,.0f}" if run.tokens_per_second is not None else "",
        duration(run.seconds_left) if run.seconds_left else "",
        "" if run.checkpoint is None else f"{run.checkpoint:,}",
        str(len(run.incidents) or ""),
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def clock(seconds: float) -> str:
    """Of today the time, otherwise the day too; UTC."""
    when, now = datetime.fromtimestamp(seconds, UTC), datetime.now(UTC)
    return when.strftime("%H:%M:%S UTC" if when.date() == now.date() else "%Y-%m-%d %H:%M:%S UTC")
