"""`run_dir/incidents.jsonl`: what went wrong in a run, one line each, appended by whoever met it.

Rank 0 and the launcher both write, so it lies in `configs/`, below both. Nothing but the standard library.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "incidents.jsonl"


def append_incident(
    run_dir: str | Path, kind: str, text: str, *, step: int | None = None, rank: int | None = None, **more: Any
) -> None:
    """Append {"time" (ISO 8601, UTC), "kind", "step", "rank", "text", ...more} in one write, so that lines never mix.

    `kind` is one word for programs (stall, rank_failed, restart, non_finite, ...), `text` one sentence for people. A
    number that is NaN or infinite is written as JavaScript names it (NaN), which Python's `json` reads back.
    """
    record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, "step": step, "rank": rank}
    line = json.dumps(record | {"text": text} | more, ensure_ascii=False) + "\n"
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_incidents(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every incident, oldest first; none where there is no file. A line that was cut off by a full disk is left out."""
    path = Path(run_dir) / FILE
    incidents = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            incidents.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return incidents
