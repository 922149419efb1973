"""The ranks' log files: run_dir/logs/rank-N.log, one for all starts of the run, the newest one at the end."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

STARTED_AGAIN = "--- started again at"
TRACEBACK = "Traceback (most recent call last)"
LAST_BYTES = 1 << 20  # of a file are looked at for its last lines
TRACEBACK_LINES = 30
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a log must not steer a terminal


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def begin_logs(logs: Path, num_ranks: int, first_rank: int = 0) -> None:
    """Separate what the ranks of this start will write from what those of earlier ones wrote."""
    for path in (log_file(logs, rank) for rank in range(first_rank, first_rank + num_ranks)):
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
