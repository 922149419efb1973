"""Starts the ranks of a run on the hosts of a hostfile, one ssh a host, and waits for them as if they were here.

On each host ssh starts `launcher/host.py`, which gets its job over the connection: no variable and no argument of the
run stands on a command line. A rank there is a `RemoteRank` here, with what `launcher/local.py` needs of a process, so
that signals, the first failure, hangs and restarts are handled by the same code as for ranks of this machine.

A host whose connection ends, or that is not heard for `launch.silence_seconds`, is gone: its ranks count as failed, and
the others are ended. The host, if it still runs, notices the same and ends its ranks by itself.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.load import ConfigError
from launcher.exports import exports
from launcher.local import MISTAKE, Outcome, Process, Signals, make_logs, wait
from launcher.logs import begin_logs
from launcher.watch import Watch

CONNECT_SECONDS = 30  # in which every host must have answered
OTHERS_SECONDS = 3.0  # from the first host that failed to the report, for other hosts to fail too
CLOSE_SECONDS = 10.0  # from the end of a host's last rank to that of its ssh
LOST = -signal.SIGHUP  # the exit code of a rank whose host is gone
RECORD = b"\x1e"  # begins what a host says; it ends with the line


class Host:
    """One connection, with a thread that reads what the host says and one that writes to it."""

    def __init__(self, name: str, silence_seconds: float) -> None:
        self.name, self.silence_seconds = name, silence_seconds
        self.port: int | None = None
        self.error: str | None = None  # what the host itself found wrong
        self.codes: dict[int, int] = {}  # of ranks that have ended
        self.lost: str | None = None  # why it is gone
        self._heard = time.monotonic()
        self._unwritten: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        program = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('host.py')))}"
        self.process = subprocess.Popen(
            ["ssh", *ssh_options(), name, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        for target in (self._read, self._write):
            threading.Thread(target=target, name=f"{name} {target.__name__}", daemon=True).start()

    def tell(self, record: dict[str, Any]) -> None:
        """May be called inside of a signal handler."""
        self._unwritten.put(record)

    def look(self) -> None:
        """Set `lost` if it is gone."""
        if self.lost is None and self.process.poll() is not None:
            self.lost = f"its ssh connection has ended (exit code {self.process.returncode})"
        elif self.lost is None and time.monotonic() - self._heard > self.silence_seconds:
            self.lost = f"nothing was heard of it for {self.silence_seconds:g} s"
            self.process.kill()

    def close(self, deadline: float) -> None:
        """End the connection, and with it what is left there."""
        self._unwritten.put(None)
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _read(self) -> None:
        stream, unread = self.process.stdout, b""
        assert stream is not None
        while content := os.read(stream.fileno(), 1 << 16):
            self._heard = time.monotonic()
            unread += content
            while unread:
                printed, mark, rest = unread.partition(RECORD)
                if printed:
                    sys.stdout.buffer.write(printed)
                    sys.stdout.buffer.flush()
                record, line_end, rest = rest.partition(b"\n")
                if not line_end:
                    unread = mark + record
                    break
                self._take(json.loads(record))
                unread = rest

    def _take(self, record: dict[str, Any]) -> None:
        match record:
            case {"port": port}:
                self.port = port
            case {"error": text}:
                self.error = text
            case {"exit": [rank, code]}:
                self.codes[rank] = code

    def _write(self) -> None:
        stream = self.process.stdin
        assert stream is not None
        while True:
            try:
                record = self._unwritten.get(timeout=self.silence_seconds / 6)
            except queue.Empty:
                record = {"alive": True}
            try:
                if record is None:
                    stream.close()
                    return
                stream.write(json.dumps(record).encode() + b"\n")
                stream.flush()
            except OSError:  # `look` finds it out
                return


class RemoteRank:
    """A rank of a host, as a process of this machine would be one."""

    def __init__(self, rank: int, connection: Host) -> None:
        self.rank, self.connection = rank, connection
        self.host = connection.name
        self.returncode: int | None = None

    @property
    def why(self) -> str:
        if self.connection.error:
            return f"host {self.host}: {self.connection.error}"
        return f"its host {self.host} is gone: {self.connection.lost}" if self.returncode == LOST else ""

    def poll(self) -> int | None:
        if self.returncode is None:
            self.connection.look()
            gone = MISTAKE if self.connection.error else LOST if self.connection.lost else None
            self.returncode = self.connection.codes.get(self.rank, gone)
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.connection.tell({"signal": int(number), "rank": self.rank})

    def kill_group(self) -> None:
        self.connection.tell({"kill_group": self.rank})


def run_hosts(
    words: list[str],
    slots: dict[str, int],
    run_dir: Path,
    signals: Signals,
    stall_seconds: int | None,
    silence_seconds: float,
) -> Outcome:
    """Run `python words` once per slot of each host and wait for all of them; see `local.run_local`.

    Raises ConfigError, before any rank is started, where a host does not answer.
    """
    num_ranks = sum(slots.values())
    address = os.environ.get("MASTER_ADDR") or address_of(next(iter(slots)))
    if len(slots) > 1 and (address == "localhost" or address.startswith("127.")):
        raise ConfigError(f"the other hosts cannot reach rank 0 at {address}: name the first host as they know it")
    logs = make_logs(run_dir)
    watch = Watch(run_dir, num_ranks, stall_seconds)
    begin_logs(logs, num_ranks)
    hosts = [Host(name, silence_seconds) for name in slots]
    try:
        wait_for_answers(hosts, signals)
        if signals.number is not None:
            return Outcome("stopped", 128 + signals.number)
        port = os.environ.get("MASTER_PORT") or str(hosts[0].port)
        variables = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": address, "MASTER_PORT": port}
        with proof(run_dir) as path:
            ranks = start(hosts, slots, job(words, run_dir, path, silence_seconds) | {"variables": variables})
            signals.go_to(ranks, watch)
            return wait(ranks, watch, signals, logs, lambda: None)
    finally:
        deadline = time.monotonic() + CLOSE_SECONDS
        for host in hosts:
            host.close(deadline)


def wait_for_answers(hosts: list[Host], signals: Signals) -> None:
    """Until every host has said its port, or a signal comes; raises ConfigError that names all that do not answer."""
    deadline = time.monotonic() + CONNECT_SECONDS
    others_deadline = deadline  # after the first fault: a moment for the others, to name all of them at once
    while (waiting := [host for host in hosts if host.port is None]) and signals.number is None:
        ended = [host for host in waiting if host.process.poll() is not None]
        if ended:
            others_deadline = min(others_deadline, time.monotonic() + OTHERS_SECONDS)
        silent = waiting if time.monotonic() > deadline else []
        if silent or len(ended) == len(waiting) or time.monotonic() > others_deadline:
            faults = [
                f"host {host.name}: ssh ended with exit code {host.process.returncode}, what it said is above; "
                f"`ssh {host.name} true` must work without a question"
                for host in ended
            ]
            faults += [f"host {host.name}: no answer in {CONNECT_SECONDS} s" for host in silent if host not in ended]
            raise ConfigError("\n".join(faults))
        time.sleep(0.05)


def job(words: list[str], run_dir: Path, proof: Path, silence_seconds: float) -> dict[str, Any]:
    """What every host is told, but for what it gets with its ranks."""
    return {
        "command": words,
        "folder": str(Path.cwd()),
        "run_dir": str(run_dir.absolute()),
        "proof": str(proof.absolute()),
        "environment": exports(os.environ),
        "silence_seconds": silence_seconds,
    }


def start(hosts: list[Host], slots: dict[str, int], job: dict[str, Any]) -> list[Process]:
    """Give each host its job; returns all ranks, in their order."""
    ranks: list[Process] = []
    for host in hosts:
        numbers = range(len(ranks), len(ranks) + slots[host.name])
        host.tell({"job": job | {"ranks": list(numbers)}})
        ranks += [RemoteRank(number, host) for number in numbers]
    return ranks


@contextmanager
def proof(run_dir: Path) -> Iterator[Path]:
    """A file by which a host sees that its `run_dir` is this machine's."""
    path = run_dir / "logs" / f".{uuid.uuid4().hex}"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def address_of(name: str) -> str:
    """A host's name without the user's."""
    return name.rpartition("@")[2]


def ssh_options() -> list[str]:
    """It never asks, and it never takes a host key that is not known: that is up to the user's own settings."""
    own = shlex.split(os.environ.get("MILLSTREAM_SSH_ARGS", ""))
    return [*own, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]


def hosts_that_answer(names: Iterable[str]) -> list[str]:
    """Those on which ssh can run a program now, asked all at once."""
    tried = {name: subprocess.Popen(["ssh", *ssh_options(), name, "true"], stdin=subprocess.DEVNULL) for name in names}
    deadline, answering = time.monotonic() + CONNECT_SECONDS, []
    for name, process in tried.items():
        try:
            if process.wait(max(0.0, deadline - time.monotonic())) == 0:
                answering.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
    return answering
