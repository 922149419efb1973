"""The ranks of one host of a run over ssh: what `launcher/ssh.py` starts there, one process a host.

It reads what to do from its standard input, one JSON object a line, so that nothing of it stands on a command line, and
answers on its standard output, between what rank 0 prints there: a record begins with RS (0x1e) and ends with its line.

    in    {"job": {...}}   {"signal": 15, "rank": 3}   {"kill_group": 3}   {"alive": true}
    out   {"port": 40123}  {"error": "..."}            {"exit": [3, 1]}    {"alive": true}

The connection is the ranks' life line: where it ends, or nothing has come for `silence_seconds`, they get SIGTERM and
GRACE_SECONDS later SIGKILL. They also die with this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from configs.errors import ConfigError
from launcher.local import GRACE_SECONDS, LocalRank, Process, count_gpus, end, free_port, log_file, rank_environment
from launcher.tee import Output, open_output

RECORD = b"\x1e"
POLL_SECONDS = 0.1
SAME_FOLDER_SECONDS = 10.0  # until a file that was made on another machine must be seen here
PR_SET_PDEATHSIG = 1


class ConnectionLost(Exception):
    """The launcher has gone, or is not heard any more."""


class Host:
    def __init__(self) -> None:
        self.ranks: dict[int, LocalRank] = {}
        self.told: set[int] = set()  # ranks whose end was told
        self.silence_seconds = 60.0  # until the job says another number
        self.last_alive = time.monotonic()
        self.output: Output | None = None
        self.log: Path | None = None
        self._unread = b""

    def serve(self) -> None:
        """Until all ranks have ended; raises ConnectionLost."""
        self.listen_for(self.silence_seconds)
        say({"port": int(free_port(""))})
        while True:
            if select.select([0], [], [], POLL_SECONDS)[0]:
                self.read()
            for number, rank in self.ranks.items():
                if number not in self.told and rank.poll() is not None:
                    if self.output and number == 0:
                        self.output.drain()  # what it has printed comes before its end
                    say({"exit": [number, rank.returncode]})
                    self.told.add(number)
            if self.ranks and len(self.told) == len(self.ranks):
                return
            if time.monotonic() > self.last_alive + self.silence_seconds / 6:
                say({"alive": True})
                self.last_alive = time.monotonic()

    def read(self) -> None:
        content = os.read(0, 1 << 20)
        if not content:
            raise ConnectionLost("its connection has ended")
        self.listen_for(self.silence_seconds)
        *lines, self._unread = (self._unread + content).split(b"\n")
        for line in lines:
            match json.loads(line):
                case {"job": job}:
                    self.start(job)
                case {"signal": number, "rank": rank}:
                    if self.ranks[rank].poll() is None:
                        self.ranks[rank].send_signal(number)
                case {"kill_group": rank}:
                    self.ranks[rank].kill_group()

    def listen_for(self, seconds: float) -> None:
        """An alarm, not a look at the clock: this process may hang in a write that nobody reads."""
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def start(self, job: dict[str, Any]) -> None:
        """Start the ranks of the job; raises ConfigError where this host is not as it must be."""
        self.silence_seconds = job["silence_seconds"]
        check(job)
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        numbers: list[int] = job["ranks"]
        environment = rank_environment(len(numbers)) | job["variables"]
        logs = Path(job["run_dir"]) / "logs"
        self.log = log_file(logs, numbers[0])
        for local_rank, number in enumerate(numbers):
            own = environment | {"RANK": str(number), "LOCAL_RANK": str(local_rank)}
            if number == 0:
                self.output = open_output(log_file(logs, 0))
                self.ranks[0] = start_rank(job["command"], own, self.output.stdout, self.output.stderr)
                self.output.is_taken()
            else:
                with log_file(logs, number).open("ab") as log:
                    self.ranks[number] = start_rank(job["command"], own, log.fileno(), log.fileno())


def start_rank(words: list[str], environment: dict[str, str], stdout: int, stderr: int) -> LocalRank:
    command = [sys.executable, *words]
    return LocalRank(
        command,
        environment,
        stdin=subprocess.DEVNULL,  # the launcher's words are not theirs
        stdout=stdout,
        stderr=stderr,
        preexec_fn=die_with_parent,
    )


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check(job: dict[str, Any]) -> None:
    """Raises ConfigError where a folder is missing here or is another one, or where GPUs are."""
    if not Path(job["folder"]).is_dir():
        raise ConfigError(f"there is no folder {job['folder']}, in which the command was given")
    deadline = time.monotonic() + SAME_FOLDER_SECONDS
    while not Path(job["proof"]).exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir={job['run_dir']} is not the folder that it is where the command was given: "
                f"choose one on a file system that all hosts share"
            )
        time.sleep(0.2)
    num_gpus = 0 if job["environment"].get("DS_ACCELERATOR") == "cpu" else count_gpus()
    if 0 < num_gpus < len(job["ranks"]):
        raise ConfigError(f"it has {num_gpus} GPUs, and the hostfile says slots={len(job['ranks'])}")


def say(record: dict[str, Any]) -> None:
    """In one write: it stays whole between what rank 0 writes to the same pipe."""
    content = RECORD + json.dumps(record).encode() + b"\n"
    try:
        os.write(1, content)
    except OSError as error:
        raise ConnectionLost(f"its connection is broken ({error})") from None


def main() -> int:
    host = Host()

    def lost(number: int, frame: object) -> None:
        raise ConnectionLost("nothing was heard of it" if number == signal.SIGALRM else f"signal {number}")

    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lost)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        host.serve()
    except ConfigError as error:
        say({"error": str(error)})
        return 2
    except ConnectionLost as why:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        ranks: list[Process] = list(host.ranks.values())
        if host.log:
            with host.log.open("a") as log:
                log.write(f"millstream: the launcher is gone ({why}): the ranks of this host are ended\n")
        end(ranks, GRACE_SECONDS)
        return 1
    for rank in host.ranks.values():
        rank.kill_group()
    return 0


if __name__ == "__main__":
    os._exit(main())
