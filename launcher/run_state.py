"""What is known of a run from its directory: whether it runs, how far it is, how it ended. Reads, never writes.

The same for every launcher, from files that any of them leaves: launch.json (who started it), ranks/ (what each rank
does), metrics.jsonl, checkpoints/, incidents.jsonl, stragglers.jsonl. Of metrics.jsonl only the end is read, so the
answer takes as long at step 10 as at step 10^6.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from configs import stragglers
from configs.errors import ConfigError
from configs.incidents import read_incidents
from configs.launches import Launch, read_launch
from configs.phases import Ring, read_ring, read_rings, ring_path
from configs.stalls import process_state, state_of
from launcher.logs import last_lines, log_file

ALIVE = ("running", "blocked", "stopped")  # states of a process
RUNNING = ("queued", "starting", "running")  # states of a run
BAD = ("failed", "ended", "silent")
ENDED_BADLY = ("rank_failed", "stall", "guard_stopped")  # kinds of incidents
LATE_SECONDS = 180.0  # over NFS marks of another machine arrive up to a minute late
TAIL_BYTES = 1 << 16
SPEED_STEPS = 50  # the newest ones: speed and time left are their medians
SQUEUE_SECONDS = 10.0


@dataclass(frozen=True)
class RunState:
    """A run as it was when it was looked at."""

    run_dir: Path
    state: str  # queued, starting, running; finished, stopped (as asked), failed, ended (nothing says why); silent, new
    why: str  # the state in a sentence
    launch: Launch | None  # none: by another program, as a bare srun or deepspeed
    rings: tuple[Ring | None, ...] = ()  # of the ranks of the newest start
    processes: tuple[str, ...] = ()  # running, stopped, blocked, gone, finished, elsewhere, unknown
    step: int = 0  # steps that are done
    num_steps: int | None = None  # none: not known, as in fine-tuning
    steps_left: float | None = None  # with train.budget those for which there is time
    line: dict[str, Any] = field(default_factory=dict)  # the newest one of a step in metrics.jsonl
    evaluation: dict[str, Any] = field(default_factory=dict)  # the newest one of held-out samples
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    checkpoint: int | None = None  # the newest finished one's step
    incidents: tuple[dict[str, Any], ...] = ()
    straggler: dict[str, Any] | None = None  # the newest line of stragglers.jsonl

    @property
    def is_running(self) -> bool:
        return self.state in RUNNING

    @property
    def seconds_left(self) -> float | None:
        """In steps alone: evaluations and waits for checkpoints come on top."""
        if not self.is_running or self.steps_left is None or self.step_seconds is None:
            return None
        return self.steps_left * self.step_seconds

    @property
    def last_mark(self) -> float | None:
        """When the newest mark of any rank was made, in seconds since 1970: the run's heartbeat."""
        return max((ring.since for ring in self.rings if ring), default=None)


def look(run_dir: Path) -> RunState:
    """The run as it is now. Raises ConfigError if the directory is not one of a run."""
    check_is_run(run_dir)
    launch = read_launch(run_dir)
    rings = newest_rings(run_dir)
    processes = tuple(state_of(ring) if ring else "unknown" for ring in rings)
    steps, evaluations = newest_lines(metrics_file(run_dir))
    recent = steps[-SPEED_STEPS:]
    line = steps[-1] if steps else {}
    step = int(line.get("step", evaluations[-1].get("step", 0) if evaluations else 0))
    num_steps = number_of_steps(run_dir)
    incidents = tuple(read_incidents(run_dir))
    state, why = judge(run_dir, launch, rings, processes, step, num_steps, incidents)
    slow = [each for each in tail(run_dir / stragglers.FILE, 4096) if {"rank", "phase", "seconds"} <= each.keys()]
    return RunState(
        run_dir, state, why, launch, rings, processes, step, num_steps, left(recent, num_steps), line,
        evaluations[-1] if evaluations else {},
        _median(recent, "tokens_per_second"), _median(recent, "step_seconds"), newest_checkpoint(run_dir), incidents,
        slow[-1] if slow else None,
    )  # fmt: skip


def check_is_run(run_dir: Path) -> None:
    if any((run_dir / name).exists() for name in ("config.yaml", "launch.json", "ranks", "metrics.jsonl", "logs")):
        return
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such directory; expected the run_dir of a run")
    hint = ""
    if inside := sorted(path.parent for path in run_dir.glob("*/config.yaml")):
        hint = f"; runs in it: {' '.join(map(str, inside[:8]))}"
    raise ConfigError(f"{run_dir}: not the directory of a run: it has no config.yaml, launch.json, ranks or logs{hint}")


def newest_rings(run_dir: Path) -> tuple[Ring | None, ...]:
    """Of all ranks of the newest start, by rank 0's ring or, before it has one, any."""
    first = read_ring(ring_path(run_dir, 0))
    if first is None:
        others = (read_ring(path) for path in (run_dir / "ranks").glob("rank-*.phases"))
        first = max((ring for ring in others if ring), key=lambda ring: ring.started, default=None)
    return tuple(read_rings(run_dir, first.world_size)) if first else ()


def judge(
    run_dir: Path,
    launch: Launch | None,
    rings: tuple[Ring | None, ...],
    processes: tuple[str, ...],
    step: int,
    num_steps: int | None,
    incidents: tuple[dict[str, Any], ...],
) -> tuple[str, str]:
    """(state, why); see RunState."""
    if launch and launch.kind == "slurm" and launch.job and (queued := ask_slurm(launch.job)):
        state, reason = queued
        where = f"job {launch.job} is {state}" + (f" ({reason})" if reason not in ("", "None") else "")
        return ("queued" if state in ("PENDING", "CONFIGURING", "REQUEUED") else "running"), where
    launcher = launcher_state(launch)
    last_mark = max((ring.since for ring in rings if ring), default=0.0)
    quiet = max(0.0, time.time() - last_mark)
    if any(process in ALIVE for process in processes) or (launcher in ALIVE and "elsewhere" in processes):
        if "stopped" in processes:
            rank = processes.index("stopped")
            return "running", f"but the process of rank {rank} is stopped (SIGSTOP): kill -CONT lets it go on"
        if all(ring is None or ring.phase == "start" for ring in rings):
            return "starting", "it imports, opens its data or loads a checkpoint"
        return "running", f"but no rank has made a mark for {duration(quiet)}" if quiet > LATE_SECONDS else ""
    if launcher in ALIVE:
        return "starting", "no rank has made a mark yet: they import, or the launcher waits before a restart"
    over = bool(rings) and all(ring is not None and ring.phase == "end" for ring in rings)
    if "elsewhere" in (launcher, *processes) and not over:
        host = next((ring.host for ring in rings if ring), launch.host if launch else "another machine")
        if quiet < LATE_SECONDS:
            return "running", f"on {host}, by its marks: the last one {duration(quiet)} ago"
        if not _failures(incidents, launch, rings):
            return "silent", f"on {host}, which cannot be asked from here: no mark for {duration(quiet)}"
    return how_it_ended(run_dir, launch, rings, over, step, num_steps, incidents)


def launcher_state(launch: Launch | None) -> str:
    """Of the process that passes signals on to the ranks, as `process_state` names it; unknown without one."""
    if launch is None or launch.pid is None:
        return "unknown"
    return process_state(launch.host, launch.pid, seconds_of(launch.started))


def how_it_ended(
    run_dir: Path,
    launch: Launch | None,
    rings: tuple[Ring | None, ...],
    over: bool,
    step: int,
    num_steps: int | None,
    incidents: tuple[dict[str, Any], ...],
) -> tuple[str, str]:
    if failures := _failures(incidents, launch, rings):
        last = failures[-1]
        code = 70 if last["kind"] == "guard_stopped" else last.get("code")
        return "failed", f"{last.get('text')}" + (f"; exit code {code}" if code is not None else "")
    if num_steps is not None and step >= num_steps:
        return "finished", ""
    results = run_dir / "results.json"  # what fine-tuning writes last
    if results.exists() and results.stat().st_mtime >= _began(launch, rings):
        return "finished", ""
    if over and (num_steps is None or was_in_time(run_dir)):
        return "finished", ""
    if over:
        return "stopped", "as asked; the same command goes on from there"
    if not rings and not step and launch is None:
        return "new", "it has not been started"
    why = "its processes are gone and nothing says why: killed from outside, or the machine went down"
    if all(ring is None or ring.phase == "start" for ring in rings) and (log := log_file(run_dir / "logs", 0)).exists():
        said = [line for line in last_lines(log, 3) if line.strip()]
        why = "before its first step" + (f"; the last it said: {said[-1].strip()}" if said else "")
    return "ended", why


def was_in_time(run_dir: Path) -> bool:
    """Whether a run with train.budget ended because its time was over: nobody asked it to, so it does not say so."""
    steps, _ = newest_lines(metrics_file(run_dir))
    log = log_file(run_dir / "logs", 0)
    if not steps or "time_share" not in steps[-1] or not log.exists():
        return False
    return not any(line.startswith("stopped at step") for line in last_lines(log, 20))


def _failures(
    incidents: tuple[dict[str, Any], ...], launch: Launch | None, rings: tuple[Ring | None, ...]
) -> list[dict[str, Any]]:
    """Those that ended the newest start."""
    began = _began(launch, rings) - 0.002  # incidents are noted to the millisecond
    return [i for i in incidents if i.get("kind") in ENDED_BADLY and seconds_of(i.get("time")) >= began]


def newest_start(run_dir: Path) -> float:
    """When the run was started last, in seconds since 1970; 0 if nothing says so."""
    return _began(read_launch(run_dir), newest_rings(run_dir))


def _began(launch: Launch | None, rings: tuple[Ring | None, ...]) -> float:
    return seconds_of(launch.started if launch else "") or min((ring.started for ring in rings if ring), default=0.0)


def ask_slurm(job: str) -> tuple[str, str] | None:
    """(state, reason) of the job as squeue gives them; none if it is in no queue any more or squeue cannot be asked."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--format=%T|%r", f"--jobs={job}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode or not asked.stdout.strip():
        return None
    state, _, reason = asked.stdout.splitlines()[0].strip().partition("|")
    return state, reason


def metrics_file(run_dir: Path) -> Path:
    """metrics.jsonl; of a fine-tuning that of the seed it is at."""
    own = run_dir / "metrics.jsonl"
    seeds = [] if own.exists() else list(run_dir.glob("seed-*/metrics.jsonl"))
    return max(seeds, key=lambda path: path.stat().st_mtime, default=own)


def newest_lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(of steps, of evaluations): those in the last TAIL_BYTES of metrics.jsonl, oldest first."""
    lines = tail(path)
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def tail(path: Path, num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The JSON lines that lie whole in the end of the file; empty without a file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            content = file.read()
    except OSError:
        return []
    lines = content.split(b"\n")[(1 if size > num_bytes else 0) : -1]
    found = []
    for line in lines:
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            found.append(parsed)
    return found


def number_of_steps(run_dir: Path) -> int | None:
    """train.num_steps of config.yaml; none where there is none."""
    import yaml

    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return int(config["train"]["num_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def left(recent: list[dict[str, Any]], num_steps: int | None) -> float | None:
    """Steps that are left, by num_steps and, where lines have the `time_share` of a budget, by how fast that grows."""
    if num_steps is None or not recent:
        return None
    first, last = recent[0], recent[-1]
    steps = float(max(0, num_steps - last["step"]))
    grown = last.get("time_share", 0.0) - first.get("time_share", 0.0)
    if grown > 0:
        steps = min(steps, (1 - last["time_share"]) * (last["step"] - first["step"]) / grown)
    return steps


def newest_checkpoint(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that was finished."""
    finished = (path.parent.name.removeprefix("step-") for path in run_dir.glob("checkpoints/step-*/manifest.json"))
    return max((int(step) for step in finished if step.isdigit()), default=None)


def duration(seconds: float) -> str:
    """For people: 3.2 s, 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def seconds_of(time: object) -> float:
    """Seconds since 1970 of an ISO 8601 text; 0 of anything else."""
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0


def _median(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
    return statistics.median(values) if values else None
