"""Who is behind when a run stands still, and the report that says so: from the ranks' rings, processes and stacks.

The launcher prints it for the ranks it started; under another launcher (deepspeed, SLURM) a rank does, from the same
files in the run directory. Therefore it lies in `configs/`, below both. Nothing but the standard library.

One rank is stopped, starved or blocked; the others wait for it in a collective and are its victims. So the order of
suspicion is: a process that is gone or stopped; a rank that never opened its ring; the fewest marks; and among ranks at
the same mark the one that gives no stack, or whose stack is not inside of a collective.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.incidents import append_incident
from configs.phases import Ring, read_rings, stacks_path

EXIT_CODE = 124  # of a run that was ended because it stood still
REPORT_SECONDS = 30.0  # in which the report must be there
ANSWER_SECONDS = 3.0  # in which a process writes its stacks after SIGUSR2; it takes milliseconds
LARGEST_TABLE = 32  # ranks; of larger runs the table has the ranks behind and as many others
COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")
COLLECTIVE_FRAMES = 4  # of the innermost ones
HINTS = {
    "start": "it imports, opens its data, meets the other ranks, builds the engine or loads a checkpoint",
    "data": "the batches of that step do not come: look at data.dir, its file system or server, and data.num_workers",
    "evaluate": "a batch of the held-out samples does not come or is not done",
    "save": "the checkpoint is not written: look at the file system of run_dir",
    "end": "the last step is done; it writes the report or leaves the process group",
}


@dataclass(frozen=True)
class Seen:
    """What is known of one rank at a stall."""

    rank: int
    ring: Ring | None  # none: it has not opened one
    state: str  # running, stopped, blocked (uninterruptible), gone, finished; elsewhere: on another machine
    stack: tuple[str, ...] = ()  # of its main thread, innermost call first; empty: it gave none

    @property
    def waits_for_others(self) -> bool:
        """It stands in a call of torch.distributed, or in the wait for one that DeepSpeed has begun."""
        frames = self.stack[:COLLECTIVE_FRAMES]
        called = any(place in frame for frame in frames for place in COLLECTIVE)
        return called or any("/deepspeed/" in frame and frame.endswith(" in wait") for frame in frames)


def look(run_dir: Path, world_size: int, finished: Iterable[int] = ()) -> list[Seen]:
    """Every rank as it is now. Ranks of this machine are asked for their stacks (takes up to ANSWER_SECONDS).

    Those of other machines have written theirs when they noticed the stall themselves.
    """
    rings = read_rings(run_dir, world_size)
    states = [
        "finished" if rank in finished else state_of(ring) if ring else "unknown" for rank, ring in enumerate(rings)
    ]
    asked = [ring for ring, state in zip(rings, states, strict=True) if ring and state in ("running", "blocked")]
    _ask_for_stacks(run_dir, asked)
    seen = []
    for rank, (ring, state) in enumerate(zip(rings, states, strict=True)):
        stack: tuple[str, ...] = ()
        if ring and state in ("running", "blocked", "elsewhere"):
            stack = main_stack(_read(stacks_path(run_dir, rank)), ring.main_thread)
        if ring and not stack and state in ("running", "blocked", "stopped"):
            stack = _py_spy(ring.pid)
        seen.append(Seen(rank, ring, state, stack))
    return seen


def tell(run_dir: Path, world_size: int, quiet_seconds: float, finished: Iterable[int] = ()) -> list[Seen]:
    """Look at all ranks, print the report, keep it as ranks/stall.txt and as an incident; returns those behind."""
    seen = look(run_dir, world_size, finished)
    text = report(seen, quiet_seconds, run_dir)
    print(f"\n{text}\n", file=sys.stderr, flush=True)
    suspects, _ = behind(seen)
    rank = suspects[0].rank if len(suspects) == 1 else None
    ring = suspects[0].ring
    append_incident(
        run_dir, "stall", headline(seen, quiet_seconds), step=ring.step if ring else None, rank=rank,
        phase=ring.phase if ring else None, num_ranks=world_size, code=EXIT_CODE,
    )  # fmt: skip
    report_path(run_dir).parent.mkdir(exist_ok=True)  # no rank may have come so far
    report_path(run_dir).write_text(f"{text}\n")
    return suspects


def report_path(run_dir: Path) -> Path:
    return run_dir / "ranks" / "stall.txt"


def behind(seen: list[Seen]) -> tuple[list[Seen], str]:
    """The ranks that the others wait for, and why one thinks so, as the end of a sentence. Pure."""
    left = [rank for rank in seen if rank.state != "finished"] or seen
    if gone := [rank for rank in left if rank.state == "gone"]:
        return gone, "the process is gone"
    if stopped := [rank for rank in left if rank.state == "stopped"]:
        return stopped, "the process is stopped (by SIGSTOP or a debugger; `kill -CONT PID` would let it go on)"
    if missing := [rank for rank in left if rank.ring is None]:
        return missing, "it has not come as far as its first mark: it was not started, or still imports"
    fewest = min(rank.ring.num_marks for rank in left if rank.ring)
    last = [rank for rank in left if rank.ring and rank.ring.num_marks == fewest]
    if len(last) > 1 and any(rank.stack for rank in last):
        last = [rank for rank in last if not rank.stack] or last
    if len(last) > 1 and not all(rank.waits_for_others for rank in last):
        last = [rank for rank in last if not rank.waits_for_others]
    if len(last) == len(left) > 1 and all(rank.waits_for_others for rank in last):
        return last, "no rank is behind, all wait in the same collective: look at the network between their machines"
    if any(rank.state == "blocked" for rank in last):
        return last, "the process is in a system call that does not return (state D): a disk or network file system"
    if not any(rank.stack for rank in last):
        return last, "the process gives no stack: its machine does not answer, or it is held up outside of Python"
    phase = last[0].ring.phase if last[0].ring else "start"
    return last, HINTS.get(phase, "it computes, or waits for its device")


def report(seen: list[Seen], quiet_seconds: float, run_dir: Path) -> str:
    """Who is behind, in which phase, since when; all ranks; the stack of the (first) one that is behind."""
    suspects, why = behind(seen)
    names = {suspect.rank for suspect in suspects}
    first = suspects[0]
    lines = [headline(seen, quiet_seconds), f"  {why}", ""]
    rows = [["rank", "host", "pid", "step", "phase", "since (UTC)", "process", ""]]
    for rank in _shown(seen, names):
        ring = rank.ring
        if rank.rank in names:
            note = "<- behind" if len(names) < len(seen) or len(seen) == 1 else ""
        else:
            note = "waits in a collective" if rank.waits_for_others else ""
        where = [""] * 5
        if ring:
            where = [ring.host, str(ring.pid), str(ring.step), ring.phase, _clock(ring.since)]
        rows.append([str(rank.rank), *where, rank.state, note])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if len(seen) > len(rows) - 1:
        lines.append(f"  and {len(seen) - len(rows) + 1} more ranks")
    if first.ring and first.ring.marks:
        lines += ["", f"  last marks of rank {first.rank}: {_last_marks(first.ring)}"]
    if first.stack:
        frames = [f"    {frame}" for frame in first.stack]
        lines += ["", f"  stack of rank {first.rank}, innermost call first:", *frames]
    lines += ["", f"  all stacks: {stacks_path(run_dir, 0).parent}/rank-*.stacks"]
    return "\n".join(lines)


def headline(seen: list[Seen], quiet_seconds: float) -> str:
    """The report in one sentence, for incidents.jsonl."""
    suspects, _ = behind(seen)
    first = suspects[0]
    who = f"rank {first.rank}" if len(suspects) == 1 else "ranks " + ", ".join(str(s.rank) for s in suspects[:8])
    who += " and more" if len(suspects) > 8 else ""
    verb = "is" if len(suspects) == 1 else "are"
    if first.ring is None:
        return f"the run has stood still for {quiet_seconds:.0f} s: {who} {verb} behind and made no mark at all"
    place = f"in phase {first.ring.phase} of step {first.ring.step}, since {_clock(first.ring.since)} UTC"
    if len(suspects) == len(seen) > 1:
        return f"the run has stood still for {quiet_seconds:.0f} s: all ranks are {place}"
    return f"the run has stood still for {quiet_seconds:.0f} s: {who} {verb} behind, {place}"


def main_stack(dumps: str, main_thread: int) -> tuple[str, ...]:
    """Of the last dump in what faulthandler wrote, the frames of the main thread, innermost first."""
    frames: list[str] = []
    inside = False
    for line in dumps.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            inside = int(line.split("0x")[1].split()[0].rstrip(":"), 16) == main_thread
            frames = [] if inside else frames
        elif inside and line.startswith('  File "'):
            frames.append(line.strip())
        elif not line.strip():  # other lines, "Garbage-collecting", belong to the thread
            inside = False
    return tuple(frames)


def state_of(ring: Ring) -> str:
    """Of the process that made the ring."""
    state = process_state(ring.host, ring.pid, ring.started)
    return "finished" if state == "gone" and ring.phase == "end" else state


def process_state(host: str, pid: int, started: float) -> str:
    """running, stopped, blocked or gone; elsewhere: on another machine.

    A process that began after `started` (seconds since 1970) is another one that got the same number: ours is gone.
    """
    if host != socket.gethostname():
        return "elsewhere"
    try:
        # pid (name) state ...; the name may hold blanks and brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return "gone"
    began = time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    if began > started + 1 or fields[0] in "ZX":
        return "gone"
    return {"T": "stopped", "t": "stopped", "D": "blocked"}.get(fields[0], "running")


def _ask_for_stacks(run_dir: Path, rings: list[Ring]) -> None:
    """SIGUSR2 to each, and wait until each stacks file has grown and stays as it is, at most ANSWER_SECONDS."""
    before = {ring.rank: _size(stacks_path(run_dir, ring.rank)) for ring in rings}
    for ring in rings:
        try:
            os.kill(ring.pid, signal.SIGUSR2)
        except (ProcessLookupError, PermissionError):
            continue
    deadline, sizes = time.monotonic() + ANSWER_SECONDS, dict(before)
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = {ring.rank: _size(stacks_path(run_dir, ring.rank)) for ring in rings}
        if now == sizes and all(now[rank] > before[rank] for rank in now):
            return
        sizes = now


def _py_spy(pid: int) -> tuple[str, ...]:
    """The main thread's stack as py-spy reads it from outside, which works for a stopped process; empty without it."""
    if not (program := shutil.which("py-spy")):
        return ()
    try:
        command = [program, "dump", "--nonblocking", "--pid", str(pid)]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    _, _, main = shown.partition('"MainThread"')
    frames = []
    for line in main.splitlines()[1:]:
        if not line.startswith("    "):
            break
        frames.append(line.strip())
    return tuple(frames)


def _shown(seen: list[Seen], names: set[int]) -> list[Seen]:
    if len(seen) <= LARGEST_TABLE:
        return seen
    others = [rank for rank in seen if rank.rank not in names][:LARGEST_TABLE]
    suspects = [rank for rank in seen if rank.rank in names][:LARGEST_TABLE]
    return sorted(suspects + others, key=lambda rank: rank.rank)


def _last_marks(ring: Ring, number: int = 6) -> str:
    """For example "step 41: backward 0.21 s, reduce 0.01 s; step 42: data": the phases and what each has taken."""
    shown, last = "", None
    for place in range(max(0, len(ring.marks) - number), len(ring.marks)):
        when, step, phase = ring.marks[place]
        if step != last:
            shown, last = f"{shown}; step {step}: " if shown else f"step {step}: ", step
        else:
            shown += ", "
        lasted = f" {ring.marks[place + 1][0] - when:.2f} s" if place + 1 < len(ring.marks) else ""
        shown += phase + lasted
    return shown


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
