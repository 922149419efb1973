"""Starts the ranks of a run on this machine and waits for them.

It sets the same variables as the deepspeed launcher and torchrun, so the started module does not know the difference
(`deepspeed pretrain/train.py --config CONFIG` works as well). It is our own because the deepspeed launcher imports
deepspeed in two processes, one after the other, before the first rank starts, and because after a failure it shows the
output of all ranks at once instead of the first one's traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from configs import stalls
from configs.errors import ConfigError
from configs.incidents import append_incident
from launcher.logs import TRACEBACK_LINES, begin_logs, last_lines, log_file
from launcher.started import Node
from launcher.tee import open_output
from launcher.watch import Watch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED_CODES = frozenset(128 + number for number in STOP_SIGNALS)
SAME_REQUEST_SECONDS = 0.5  # as in pretrain/runtime.py: a signal this soon after the first one is no second request
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL for the ranks that are left after one has failed
STALL_GRACE_SECONDS = 10.0  # the same after a stall
AT_ONCE_SECONDS = 1.0  # the same after a second signal
SETTLE_SECONDS = 1.5  # after a failure on one host what the others say of it is heard too: the cause may be there
MISTAKE, GUARD = 2, 70  # exit codes; docs/running.md lists all of them


class Process(Protocol):
    """A rank, wherever it runs: what the launcher does with it. A subset of Popen."""

    @property
    def host(self) -> str: ...  # empty: this machine
    @property
    def why(self) -> str: ...  # it failed, where that is known here better than its own log says
    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...
    def kill_group(self) -> None: ...


class LocalRank(subprocess.Popen[bytes]):
    """A rank on this machine, with a process group of its own; on a CPU it stays on its share of the cores."""

    host = why = ""

    def __init__(self, command: list[str], env: dict[str, str], **streams: Any) -> None:
        super().__init__(command, env=env, process_group=0, **streams)
        if cores := cores_of_rank(env, sorted(os.sched_getaffinity(0))):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.pid, cores)

    def kill_group(self) -> None:
        """End what it started: workers that were stopped do not notice its end."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


@dataclass(frozen=True)
class Outcome:
    """How a start of a run ended, with the exit code for the command."""

    kind: Literal["finished", "stopped", "failed", "stalled"]  # stopped: by a signal that asked for it
    code: int
    rank: int | None = None  # the one that failed first, or that was behind
    step: int = 0  # it had come to


class Signals:
    """Passes SIGINT, SIGTERM and SIGUSR1 on to the ranks that run, and remembers that the run is to stop.

    The ranks have process groups of their own: Ctrl-C comes from the terminal here alone, and reaches them once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.again = False  # asked a second time: at once
        self._first = 0.0
        self._ranks: list[Process] = []
        self._watch: Watch | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def go_to(self, ranks: list[Process], watch: Watch) -> None:
        self._ranks, self._watch = ranks, watch
        if self.number is not None:  # it came while they were being started
            send(ranks, signal.SIGTERM)

    def come_within(self, seconds: float) -> bool:
        """Wait for that long; True, and at once, if a signal asks for the end."""
        deadline = time.monotonic() + seconds
        while self.number is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.number is not None

    def _receive(self, number: int, frame: object) -> None:
        if self.number is None:
            self.number, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            self.again = True
        for rank, process in enumerate(self._ranks):
            # While it still imports, SIGINT would end it with a traceback; SIGTERM ends it as well.
            imports = self._watch is not None and self._watch.ring(rank) is None
            send([process], signal.SIGTERM if imports and number == signal.SIGINT else number)


def default_num_ranks() -> int:
    """One per visible GPU, or one on a machine without."""
    return max(1, len(visible_devices()))


def visible_devices() -> list[str]:
    """The GPUs a run may use, as CUDA_VISIBLE_DEVICES names them, asked without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    return [str(number) for number in range(count_gpus())]


def count_gpus() -> int:
    """GPUs of this machine; 0 without an NVIDIA driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run_local(
    module: str,
    words: list[str],
    num_ranks: int,
    run_dir: Path,
    signals: Signals,
    stall_seconds: int | None = None,
    devices: Iterable[str] | None = None,
    node: Node | None = None,
) -> Outcome:
    """Run `python -m module words` once per rank and wait for them; with `devices`, on these GPUs only.

    With a `node`, they are the ranks of this machine among those of others, which are started there.

    Every rank writes to run_dir/logs/rank-N.log, after what an earlier start wrote there, rank 0 to the terminal too.
    When a rank fails, the others are ended and the end of its output is shown; when one makes no mark for
    `stall_seconds`, who is behind is shown and all are ended. Raises ConfigError where `run_dir` cannot be written.
    """
    environment = rank_environment(num_ranks, node)
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    logs = make_logs(run_dir)
    first_rank = node.number * num_ranks if node else 0
    watch = Watch(run_dir, num_ranks, stall_seconds, first_rank, int(environment["WORLD_SIZE"]))
    begin_logs(logs, num_ranks, first_rank)
    output = open_output(log_file(logs, first_rank))
    command = [sys.executable, "-m", module, *words]
    ranks: list[Process] = []
    for local_rank in range(num_ranks):
        own = environment | {"RANK": str(first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
        if local_rank == 0:
            ranks.append(LocalRank(command, own, stdout=output.stdout, stderr=output.stderr))
            output.is_taken()
        else:
            with log_file(logs, first_rank + local_rank).open("ab") as log:
                ranks.append(LocalRank(command, own, stdout=log, stderr=log))
    signals.go_to(ranks, watch)
    outcome = wait(ranks, watch, signals, logs, output.drain)
    output.drain()
    return outcome


def make_logs(run_dir: Path) -> Path:
    """The folder of the ranks' logs. Raises ConfigError where `run_dir` cannot be written."""
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written ({error}); choose a directory you can write to"
        ) from None
    return run_dir / "logs"


def free_port(address: str = "127.0.0.1") -> str:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return str(probe.getsockname()[1])


def rank_environment(num_ranks: int, node: Node | None = None) -> dict[str, str]:
    """This process's variables with those of a run of `num_ranks` on this machine added; what is set stays."""
    environment = os.environ | {
        "WORLD_SIZE": str(num_ranks * (node.count if node else 1)),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": node.master_addr if node else "127.0.0.1",
        "MASTER_PORT": node.master_port if node else free_port(),
        "MILLSTREAM_WATCHED": "1",
        "PYTHONUNBUFFERED": "1",  # what a rank has printed is in its log, however it ends
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    if not count_gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    return environment


def cores_of_rank(environment: dict[str, str], cores: list[int]) -> list[int]:
    """Those of `cores` that a rank with this environment is bound to; none where it is free to move. Pure.

    A CPU rank that has as many threads as its share of the cores is bound, so that the system does not move it between
    them; what that is worth is in docs/benchmarks.md (benchmarks/core_binding.py).
    """
    rank, num_ranks = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    share = len(cores) // num_ranks
    if num_ranks == 1 or environment.get("DS_ACCELERATOR") != "cpu" or environment.get("OMP_NUM_THREADS") != str(share):
        return []
    return cores[rank * share : (rank + 1) * share]


def wait(ranks: list[Process], watch: Watch, signals: Signals, logs: Path, drain: Callable[[], None]) -> Outcome:
    """Until all ranks have ended, by themselves or, after a failure, a stall or a second signal, by us.

    `drain` waits until what rank 0 has printed is on the terminal.

    Ranks that were asked to stop leave together; one that is still there GRACE_SECONDS after another waits in vain.
    """
    left_since: float | None = None  # the first rank to leave because it was asked to
    while True:
        codes = [rank.poll() for rank in ranks]
        if signals.again:
            end(ranks, AT_ONCE_SECONDS)
            return Outcome("stopped", 128 + (signals.number or 0))
        stopped, failed = stopped_code(codes, signals.number), first_failure(codes)
        if failed is not None:
            if any(rank.host for rank in ranks):
                time.sleep(SETTLE_SECONDS)
                failed = first_failure([rank.poll() for rank in ranks])
                assert failed is not None
            why = ranks[failed].why
            end(ranks, AT_ONCE_SECONDS if why else GRACE_SECONDS)  # with a host gone no rank can finish anything
            if stopped is not None and not why:  # it failed because that one had left
                return Outcome("stopped", stopped)
            drain()  # rank 0's traceback comes first
            return failure(failed, ranks[failed].returncode or 0, why, watch, logs)
        if stopped is not None:
            left_since = left_since or time.monotonic()
            if time.monotonic() - left_since > GRACE_SECONDS:
                end(ranks, AT_ONCE_SECONDS)
                return Outcome("stopped", stopped)
        if all(code is not None for code in codes):
            return Outcome("finished", 0) if stopped is None else Outcome("stopped", stopped)
        if seconds := watch.stalled([rank for rank, code in enumerate(codes) if code is None]):
            done = [rank for rank, code in enumerate(codes) if code is not None]
            ask_for_stacks(ranks, watch)
            behind = tell_stall(watch, seconds, done)
            end(ranks, STALL_GRACE_SECONDS)
            step = max((seen.ring.step for seen in behind if seen.ring), default=0)
            return Outcome("stalled", stalls.EXIT_CODE, behind[0].rank if len(behind) == 1 else None, step)
        time.sleep(0.1)


def ask_for_stacks(ranks: list[Process], watch: Watch) -> None:
    """Of ranks on other hosts; those of this machine are asked when the report is made."""
    asked = [process for rank, process in enumerate(ranks) if process.host and watch.ring(rank)]
    send(asked, signal.SIGUSR2)
    time.sleep(stalls.ANSWER_SECONDS if asked else 0)


def tell_stall(watch: Watch, seconds: float, finished: list[int]) -> list[stalls.Seen]:
    """Report who is behind; returns them. Given up after REPORT_SECONDS: run_dir may be what does not answer."""
    behind: list[stalls.Seen] = []
    done = [watch.first_rank + rank for rank in finished]
    telling = threading.Thread(
        target=lambda: behind.extend(stalls.tell(watch.run_dir, watch.world_size, seconds, done)), daemon=True
    )
    telling.start()
    telling.join(stalls.REPORT_SECONDS)
    return behind


def stopped_code(codes: list[int | None], asked: int | None) -> int | None:
    """The exit code of a run some rank of which has ended as it was asked to; none if no rank has. Pure.

    `asked` is the signal that this command got; without it, the ranks know which one it was. A rank that was still
    starting dies of the signal, which counts only if it came from here.
    """
    for code in codes:
        if code in STOPPED_CODES or (asked is not None and code is not None and -code in STOP_SIGNALS):
            return code if asked is None else 128 + asked
    return None


def first_failure(codes: list[int | None]) -> int | None:
    """The rank that failed: one that says why, else one that was killed, else the lowest. Pure."""
    failed = [rank for rank, code in enumerate(codes) if code and code not in STOPPED_CODES]
    killed = [rank for rank in failed if (codes[rank] or 0) < 0]
    lost = [rank for rank in killed if codes[rank] == -signal.SIGHUP]  # with its host: what the others got is its doing
    known = [rank for rank in failed if codes[rank] in (MISTAKE, GUARD)]
    return next(iter([*known, *lost, *killed, *failed]), None)


def failure(rank: int, code: int, why: str, watch: Watch, logs: Path) -> Outcome:
    """Show the failure, note it as an incident, and make it this command's exit code."""
    ring = watch.ring(rank)
    rank += watch.first_rank
    place = f", in phase {ring.phase} of step {ring.step}" if ring else ", before its first mark"
    how = why or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}")
    text = f"rank {rank} failed first, {how}{place}"
    print(f"\n{text}", file=sys.stderr)
    if code == -signal.SIGKILL:
        print("it was not this launcher: often it is the kernel, for want of memory (see dmesg)", file=sys.stderr)
    if rank != watch.first_rank and not why:  # the first one wrote to the terminal already
        lines = last_lines(log_file(logs, rank), TRACEBACK_LINES)
        print(f"the end of {log_file(logs, rank)}:", *lines, sep="\n  ", file=sys.stderr)
    code = code if code > 0 else 128 - code
    if code == stalls.EXIT_CODE:  # the rank has noted it
        return Outcome("stalled", code, rank, ring.step if ring else 0)
    before_the_run = code == MISTAKE and (ring is None or ring.phase == "start")
    if code != GUARD and not before_the_run:  # the guard has noted it; a mistake at the start is nobody's incident
        step = ring.step if ring else None
        append_incident(watch.run_dir, "rank_failed", text, step=step, rank=rank, num_ranks=watch.world_size, code=code)
    return Outcome("failed", code, rank, ring.step if ring else 0)


def end(ranks: list[Process], grace_seconds: float) -> None:
    """SIGTERM to those that run, to stopped ones too, and SIGKILL to those that are left after the grace."""
    send(ranks, signal.SIGTERM)
    send(ranks, signal.SIGCONT)
    for number, seconds in ((signal.SIGKILL, grace_seconds), (None, 5.0)):
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        if number is not None:
            send(ranks, number)
    for rank in ranks:
        rank.kill_group()
    if left := [number for number, rank in enumerate(ranks) if rank.poll() is None]:
        print(f"ranks {left} of this start cannot be ended: they hang in a system call (state D)", file=sys.stderr)


def send(ranks: list[Process], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
