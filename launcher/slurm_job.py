"""What a job's script asks at its start and at its end: may the run start, and is the job to be queued again?

    python -m launcher.slurm_job before RUN_DIR RANKS REQUEUES
    python -m launcher.slurm_job after RUN_DIR RANKS REQUEUES CODE none|USR1|TERM
    python -m launcher.slurm_job chained RUN_DIR JOB

The script (launcher/scripts/slurm/pretrain.sbatch) does what needs SLURM's programs; here is what needs the run
directory. The rule is that of restarts.py: a failure counts until there is a checkpoint beyond the step which the run
had reached at the one before. What a job leaves for the next is `run_dir/slurm/state.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs import stalls
from configs.incidents import append_incident
from configs.launches import Launch, read_launch, write_launch
from configs.phases import read_rings
from launcher.local import GUARD, MISTAKE, STOPPED_CODES
from launcher.logs import TRACEBACK_LINES, begin_logs, last_lines, log_file
from launcher.restarts import newest_checkpoint

AGAIN = 75  # EX_TEMPFAIL: queue the job again
GIVEN_UP = 1


@dataclass(frozen=True)
class State:
    """What is known of a run between its jobs."""

    failures: int = 0  # in a row without progress
    step: int = -1  # which the run had reached at the end of the job before
    is_running: bool = False  # a job has started, and has not noted its end
    is_queued: bool = False  # the last job has asked to be queued again


def main(words: list[str]) -> int:
    match words:
        case ["before", run_dir, ranks, requeues]:
            return before(Path(run_dir), int(ranks), int(requeues))
        case ["after", run_dir, ranks, requeues, code, asked]:
            return after(Path(run_dir), int(ranks), int(requeues), int(code), asked)
        case ["chained", run_dir, job]:
            note_job(Path(run_dir), job.partition(";")[0], None)
            return 0
    print(__doc__, file=sys.stderr)
    return MISTAKE


def before(run_dir: Path, ranks: int, requeues: int) -> int:
    """Note that a job starts the run; 0 if it may, GIVEN_UP after too many jobs that were lost without progress."""
    state, checkpoint = read_state(run_dir), newest_checkpoint(run_dir)
    job, restarts = os.environ.get("SLURM_JOB_ID", "?"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if state.is_running:
        state = count(state, checkpoint, reached(run_dir, ranks))
    if state.is_running or (restarts and not state.is_queued):
        why = "it was preempted, requeued, or lost a node"
        if state.is_running:
            why = "its first node was lost, or it was killed before it could note its end"
        text = f"SLURM has started job {job} again ({why}), on {ranks} ranks, from step {checkpoint}"
        say(text)
        append_incident(run_dir, "requeued", text, step=checkpoint, num_ranks=ranks, job=job)
    if state.failures > requeues:
        give_up(run_dir, state, requeues)
        return GIVEN_UP
    note_job(run_dir, job, ranks)
    shutil.rmtree(run_dir / "ranks", ignore_errors=True)  # marks of an earlier start
    begin_logs(run_dir / "logs", ranks)
    write_state(run_dir, replace(state, is_running=True, is_queued=False))
    say(f"job {job} starts {ranks} ranks, from step {checkpoint}; their output is in {run_dir}/logs")
    return 0


def after(run_dir: Path, ranks: int, requeues: int, code: int, asked: str) -> int:
    """Tell how the ranks have ended; AGAIN if the job is to be queued again, else the exit code of the job."""
    messages = (run_dir / "slurm" / "srun.txt").read_text(errors="replace")
    rank, own_code = first_failure(ended_ranks(messages))
    lost = re.search(r"Node failure on (\S+)", messages)
    if lost:
        rank = None
    code = own_code or code
    state, checkpoint = read_state(run_dir), newest_checkpoint(run_dir)
    step = reached(run_dir, ranks)
    saved = code in STOPPED_CODES or asked != "none"
    if lost:  # the ranks failed because of it
        text = f"node {lost[1]} was lost, in step {step}"
        say(text)
        append_incident(run_dir, "node_lost", text, step=step, num_ranks=ranks, node=lost[1])
    elif code and not saved:
        tell_failure(run_dir, ranks, rank, code, step)
    ends = "SLURM queues the job again by itself" if lost else verdict(code, asked)
    if ends is not None:
        say(ends)
        write_state(run_dir, replace(state, is_running=False))
        return code
    state = count(state, checkpoint, max(step, 0), was_asked=saved)
    if state.failures > requeues:
        give_up(run_dir, state, requeues)
        return code
    why = "was asked to save" if saved else "failed"
    text = f"the run {why} in step {step}; the job is queued again, to go on from step {checkpoint}"
    text += f" (failure {state.failures} of {requeues} without progress)" if state.failures else ""
    say(text)
    append_incident(run_dir, "requeue", text, step=checkpoint, rank=rank, num_ranks=ranks, code=code)
    write_state(run_dir, replace(state, is_running=False, is_queued=True))
    return AGAIN


def verdict(code: int, asked: str) -> str | None:
    """Why a run that has ended so is not queued again; none if it is. Pure.

    SIGUSR1 asks to go on in another job; SIGTERM and SIGINT end the run, unless SLURM itself queues the job again.
    """
    if code == 0:
        return "the run has finished"
    if code == MISTAKE:
        return "there is something to mend, see above; submit it again then"
    if code == GUARD:
        return "the guard has stopped the run, see docs/trust.md"
    stopped_for_good = code in STOPPED_CODES and code != 128 + signal.SIGUSR1
    if asked == "TERM" or (asked == "none" and stopped_for_good):
        return "the run was stopped; after preemption or the loss of a node SLURM queues the job again by itself"
    return None


def count(state: State, checkpoint: int, step: int, was_asked: bool = False) -> State:
    """`state` after an end in `step`, where the newest checkpoint is that of step `checkpoint`. Pure.

    One that was asked for is no failure if the run came further than the job before.
    """
    first = 0 if was_asked else 1
    failures = first if checkpoint > state.step else state.failures + 1
    return replace(state, failures=failures, step=max(state.step, step, checkpoint))


def ended_ranks(messages: str) -> dict[int, int]:
    """Rank -> exit code (128 + n after signal n) as srun has told it, in the order of time; those that failed. Pure."""
    signals = {signal.strsignal(number): 128 + number for number in signal.valid_signals()}
    codes: dict[int, int] = {}
    for ranks, how in re.findall(r"^srun: error: \S+: tasks? ([\d,-]+): (.*)$", messages, re.MULTILINE):
        exited = re.match(r"Exited with exit code (\d+)", how)
        code = int(exited[1]) if exited else signals.get(how.partition(" (")[0], 1)
        for part in ranks.split(","):
            first, _, last = part.partition("-")
            for rank in range(int(first), int(last or first) + 1):
                codes.setdefault(rank, code)
    return codes


def first_failure(codes: dict[int, int]) -> tuple[int | None, int]:
    """The rank that failed first, one that says why before others, and its code; (none, 0) without any. Pure."""
    known = [rank for rank, code in codes.items() if code in (MISTAKE, GUARD)]
    rank = next(iter([*known, *codes]), None)
    return rank, codes.get(rank, 0) if rank is not None else 0


def tell_failure(run_dir: Path, ranks: int, rank: int | None, code: int, step: int) -> None:
    """Show the end of the first failing rank's log and note the failure, if nobody else has."""
    who = "the step" if rank is None else f"rank {rank}"
    how = f"killed by {signal.Signals(code - 128).name}" if code > 128 else f"with exit code {code}"
    text = f"{who} failed first, {how}, in step {step}"
    say(text)
    if rank is not None and (log := log_file(run_dir / "logs", rank)).exists():
        print(f"the end of {log}:", *last_lines(log, TRACEBACK_LINES), sep="\n  ", file=sys.stderr)
    if code not in (MISTAKE, GUARD, stalls.EXIT_CODE):
        append_incident(run_dir, "rank_failed", text, step=step, rank=rank, num_ranks=ranks, code=code)


def give_up(run_dir: Path, state: State, requeues: int) -> None:
    text = f"given up after {state.failures} ends without progress (requeues: {requeues}); submit it again to go on"
    say(text)
    append_incident(run_dir, "given_up", text, step=newest_checkpoint(run_dir))
    write_state(run_dir, State(step=state.step))


def reached(run_dir: Path, ranks: int) -> int:
    """The step that the ranks had come to; 0 before the first."""
    return max((ring.step for ring in read_rings(run_dir, ranks) if ring), default=0)


def note_job(run_dir: Path, job: str, ranks: int | None) -> None:
    """Write into launch.json which job it is now that has the run."""
    launch = read_launch(run_dir)
    if launch is None or launch.kind != "slurm":
        launch = Launch("slurm", ["sbatch"])
    write_launch(run_dir, replace(launch, job=job, num_ranks=ranks or launch.num_ranks, started=""))


def read_state(run_dir: Path) -> State:
    try:
        return State(**json.loads(state_file(run_dir).read_text()))
    except (OSError, ValueError, TypeError):
        return State()


def write_state(run_dir: Path, state: State) -> None:
    aside = state_file(run_dir).with_name(f".{os.getpid()}-state.json")
    aside.write_text(json.dumps(asdict(state)) + "\n")
    aside.rename(state_file(run_dir))


def state_file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "state.json"


def say(text: str) -> None:
    print(f"millstream: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
