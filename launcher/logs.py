"""The ranks' log files, run_dir/logs/rank-N.log, and `millstream logs RUN_DIR [--rank N] [--follow]`.

Where a rank has failed, its traceback comes first: the others fail because it has left, and their logs only say so.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import ConfigError
from configs.incidents import read_incidents

STARTED_AGAIN = "--- started again at"
TRACEBACK = "Traceback (most recent call last)"
LAST_LINES = 20  # of each rank, where all are shown
LAST_BYTES = 1 << 20  # of a file are looked at for its last lines
TRACEBACK_LINES = 30
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a log must not steer a terminal


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def begin_logs(logs: Path, num_ranks: int) -> None:
    """Separate what the ranks of this start will write from what those of earlier ones wrote."""
    for path in (log_file(logs, rank) for rank in range(num_ranks)):
        if path.exists() and path.stat().st_size:
            with path.open("a") as log:
                log.write(f"{STARTED_AGAIN} {datetime.now(UTC).isoformat(timespec='seconds')}\n")


def log_files(run_dir: Path) -> list[Path]:
    """All that lie in run_dir/logs, those of the ranks first, in their order."""
    files = [path for path in (run_dir / "logs").glob("*") if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: (rank_of(path) is None, rank_of(path) or 0, path.name))


def rank_of(path: Path) -> int | None:
    found = re.fullmatch(r"rank-(\d+)\.log", path.name)
    return int(found[1]) if found else None


def last_lines(path: Path, number: int) -> list[str]:
    """Of what the newest start wrote, without what would steer a terminal; reads LAST_BYTES at most."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    begins = max((place + 1 for place, line in enumerate(lines) if line.startswith(STARTED_AGAIN)), default=0)
    return [CONTROLS.sub("", line) for line in lines[begins:][-number:]]


def traceback(path: Path) -> list[str]:
    """From the last traceback of the newest start to the end, at most TRACEBACK_LINES of its end; else empty."""
    lines = last_lines(path, 10_000)
    places = [place for place, line in enumerate(lines) if TRACEBACK in line]
    return lines[places[-1] :][-TRACEBACK_LINES:] if places else []


def first_failure(run_dir: Path, since: float = 0.0) -> tuple[int, str] | None:
    """(rank, why) of the rank that failed first in the newest start, which began at `since` (seconds since 1970).

    The launcher has noted it as an incident; without one, it is the rank whose log with a traceback was written first.
    """
    failed = [i for i in read_incidents(run_dir) if i.get("kind") == "rank_failed" and _seconds(i) >= since]
    if failed and isinstance(failed[-1].get("rank"), int):
        return failed[-1]["rank"], str(failed[-1].get("text", ""))
    ended = [
        (path.stat().st_mtime, rank)
        for path in log_files(run_dir)
        if (rank := rank_of(path)) is not None and path.stat().st_mtime >= since and traceback(path)
    ]
    return (min(ended)[1], f"rank {min(ended)[1]} has the earliest traceback") if ended else None


def _seconds(incident: dict[str, object]) -> float:
    try:
        return datetime.fromisoformat(str(incident.get("time"))).timestamp()
    except ValueError:
        return 0.0


def show_logs(run_dir: Path, rank: int | None, since: float = 0.0) -> None:
    """Print the first failing rank's traceback, then the end of every log; with `rank` the whole of that one.

    Raises ConfigError where there is no such log.
    """
    if rank is not None:
        with _of_rank(run_dir, rank).open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                print(CONTROLS.sub("", line.rstrip("\n")))
        return
    failure = first_failure(run_dir, since)
    if failure and (path := log_file(run_dir / "logs", failure[0])).exists():
        print(failure[1], *(traceback(path) or last_lines(path, TRACEBACK_LINES)), "", sep="\n")
    for path in _some_logs(run_dir):
        print(f"==> {path} <==", *last_lines(path, LAST_LINES), "", sep="\n")


def follow_logs(run_dir: Path, rank: int | None, is_running: Callable[[], bool]) -> None:
    """Print what is added to the logs, each line behind its rank, until the run is over (or Ctrl-C)."""
    places = {path: max(0, path.stat().st_size - 2000) for path in log_files(run_dir)}
    rests: dict[Path, bytes] = {}
    look_again, goes_on = 0.0, True
    while goes_on:
        if time.monotonic() >= look_again:  # asking is dearer than reading; what is written until then is printed below
            look_again, goes_on = time.monotonic() + 2.0, is_running()
        for path in [_of_rank(run_dir, rank)] if rank is not None else log_files(run_dir):
            mark = "" if rank is not None else f"{path.stem} | "
            for line in _added(path, places, rests):
                print(mark + CONTROLS.sub("", line.decode(errors="replace")))
        sys.stdout.flush()
        time.sleep(0.2)


def _added(path: Path, places: dict[Path, int], rests: dict[Path, bytes]) -> list[bytes]:
    """Whole lines that the file has got since the last call; one that became shorter is read from its beginning."""
    begin = places.get(path, 0)
    if path.stat().st_size < begin:
        begin, rests[path] = 0, b""
    with path.open("rb") as file:
        file.seek(begin)
        *lines, rests[path] = (rests.get(path, b"") + file.read()).split(b"\n")
        places[path] = file.tell()
    return lines


def _of_rank(run_dir: Path, rank: int) -> Path:
    path = log_file(run_dir / "logs", rank)
    if not path.exists():
        there = ", ".join(str(number) for p in _some_logs(run_dir) if (number := rank_of(p)) is not None)
        raise ConfigError(f"{path}: no log of rank {rank}; there are those of ranks {there}")
    return path


def _some_logs(run_dir: Path) -> list[Path]:
    if not (found := log_files(run_dir)):
        raise ConfigError(f"{run_dir / 'logs'}: no log; a run that the command has started writes rank-0.log there")
    return found
