"""`millstream stop RUN_DIR [--now]`: the run finishes its step, saves a checkpoint and ends; --now ends it at once.

The request is the one that docs/running.md describes, SIGTERM; what differs is who gets it: the launcher on this
machine, the tasks of a SLURM job, or, where another program started the ranks or the launcher is gone, a rank of this
machine (one is enough: all of them stop after the same step). Nothing is sent to a process that began after the run:
its number has been given to another program.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from configs.errors import ConfigError
from configs.launches import Launch
from launcher.run_state import ALIVE, RunState, duration, launcher_state, look
from launcher.status import ranks_line, state_line

WAIT_SECONDS = 600.0  # for a step and a checkpoint
NOW_SECONDS = 60.0  # where nothing is saved: the launcher gives its ranks 20 s
AGAIN_SECONDS = 1.0  # a signal this long after the first is a second request; see pretrain/runtime.py
TELL_SECONDS = 10.0
STILL_RUNS = 1  # exit code


def stop_run(run_dir: Path, now: bool) -> int:
    """Ask the run to stop and wait until it has; returns 0, or STILL_RUNS where it has not in time.

    Raises ConfigError for a run that cannot be reached from here.
    """
    run = look(run_dir)
    if not run.is_running and run.state != "silent":
        print(f"{run_dir} is not running, nothing was sent; {state_line(run)}")
        return 0
    who, ask = receiver(run, now)
    print(f"{run_dir}: asked {who} to {'end at once' if now else 'finish its step, save and end'}", flush=True)
    ask()
    return wait_until_over(run_dir, NOW_SECONDS if now else WAIT_SECONDS)


def receiver(run: RunState, now: bool) -> tuple[str, Callable[[], None]]:
    """(who gets the request, what sends it). Raises ConfigError where it can be sent from another machine only."""
    launch, launches = run.launch, launcher_state(run.launch) in ALIVE
    if launch and launch.kind == "slurm" and launch.job:
        job = launch.job
        return f"job {job}", lambda: cancel(job, run, now)
    ranks = [ring.pid for ring, state in zip(run.rings, run.processes, strict=True) if ring and state in ALIVE]
    if launch and launch.pid and launches and not (ranks and starts_others(launch)):
        pid = launch.pid
        if starts_others(launch) and run.rings and not now:
            raise ConfigError(
                f"{run.run_dir}: its ranks run on {run.rings[0].host if run.rings[0] else 'other machines'}, and their "
                f"launcher here would end them without a checkpoint; nothing was sent. There: millstream stop "
                f"{run.run_dir}; here, without a checkpoint: --now"
            )
        return f"its launcher (pid {pid})", lambda: terminate([pid], now)
    if ranks:
        which = f"its ranks (pids {', '.join(map(str, ranks[:8]))})" if now else f"a rank (pid {ranks[0]})"
        return which, lambda: terminate(ranks if now else ranks[:1], now)
    host = next((ring.host for ring in run.rings if ring), launch.host if launch else "another machine")
    raise ConfigError(
        f"{run.run_dir}: runs on {host}, not on this machine; nothing was sent. There: millstream stop {run.run_dir}"
    )


def starts_others(launch: Launch) -> bool:
    """Whether the ranks are another program's, mpirun's or pdsh's: told to end, it gives them no time to save."""
    words = launch.command
    launcher = words[words.index("--launcher") + 1] if "--launcher" in words[:-1] else "ssh"
    return launch.kind == "mpi" or (launch.kind == "hosts" and launcher != "ssh")


def terminate(pids: list[int], now: bool) -> None:
    """SIGTERM to each; with `now` a second one, which no run waits after."""
    for number in range(2 if now else 1):
        if number:
            time.sleep(AGAIN_SECONDS)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            except PermissionError:
                raise ConfigError(f"process {pid} belongs to another user; ask its owner to stop the run") from None


def cancel(job: str, run: RunState, now: bool) -> None:
    """scancel: SIGTERM to the tasks of a job that runs; one that waits, and any with `now`, is taken away."""
    if not shutil.which("scancel"):
        raise ConfigError(f"{run.run_dir}: is SLURM job {job}, and there is no scancel on this machine")
    gentle = [] if now or run.state == "queued" else ["--signal=TERM"]
    asked = subprocess.run(["scancel", *gentle, job], capture_output=True, text=True)
    if asked.returncode:
        raise ConfigError(f"scancel {' '.join([*gentle, job])}: {asked.stderr.strip()}")


def wait_until_over(run_dir: Path, seconds: float) -> int:
    began, told = time.monotonic(), time.monotonic()
    while (run := look(run_dir)).is_running:
        if time.monotonic() - began > seconds:
            print(f"{run_dir} still runs after {duration(seconds)}: {ranks_line(run)}; --now ends it at once")
            return STILL_RUNS
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"  waiting; {ranks_line(run)}", flush=True)
        time.sleep(0.2)
    saved = "no checkpoint" if run.checkpoint is None else f"the newest checkpoint is of step {run.checkpoint:,}"
    print(f"{run_dir}: {state_line(run)}; {saved}")
    return 0
