"""`millstream logs RUN_DIR [--rank N] [--follow]`: the ranks' logs, or one of them.

Where a rank has failed, its traceback comes first: the others fail because it has left, and their logs only say so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from configs.errors import ConfigError
from configs.incidents import read_incidents
from launcher.logs import CONTROLS, TRACEBACK_LINES, last_lines, log_file, log_files, rank_of, traceback
from launcher.run_state import check_is_run, look, newest_start, seconds_of

LAST_LINES = 20  # of each rank, where all are shown


def logs_command(words: list[str]) -> int:
    """`millstream logs`, given what follows; Ctrl-C ends following. Raises ConfigError for what is not understood."""
    rank, rest = None, [word for word in words if word != "--follow"]
    if "--rank" in rest:
        place = rest.index("--rank")
        value = rest[place + 1] if place + 1 < len(rest) else ""
        if not value.isdigit():
            raise ConfigError(f"--rank {value}: expected the number of a rank, 0 or more")
        rank, rest = int(value), rest[:place] + rest[place + 2 :]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise ConfigError(f"not understood: millstream logs {' '.join(words)}; expected RUN_DIR [--rank N] [--follow]")
    run_dir = Path(rest[0])
    check_is_run(run_dir)
    try:
        if "--follow" in words:
            follow_logs(run_dir, rank, lambda: look(run_dir).is_running)
        else:
            show_logs(run_dir, rank, newest_start(run_dir))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def first_failure(run_dir: Path, since: float = 0.0) -> tuple[int, str] | None:
    """(rank, why) of the rank that failed first in the newest start, which began at `since` (seconds since 1970).

    The launcher has noted it as an incident; without one, it is the rank whose log with a traceback was written first.
    """
    failed = [
        i for i in read_incidents(run_dir) if i.get("kind") == "rank_failed" and seconds_of(i.get("time")) >= since
    ]
    if failed and isinstance(failed[-1].get("rank"), int):
        return failed[-1]["rank"], str(failed[-1].get("text", ""))
    ended = [
        (path.stat().st_mtime, rank)
        for path in log_files(run_dir)
        if (rank := rank_of(path)) is not None and path.stat().st_mtime >= since and traceback(path)
    ]
    return (min(ended)[1], f"rank {min(ended)[1]} has the earliest traceback") if ended else None


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
