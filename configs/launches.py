"""`run_dir/launch.json`: how this run was started last and where it can be found, for every launcher.

    {"kind": "slurm", "job": "1234", "pid": null, "host": "login1", "num_ranks": 16,
     "command": ["millstream", "submit", "slurm", "configs/gpt/nano.yaml", "--nodes", "2"],
     "started": "2026-11-25T14:20:31.123+00:00", "script": "/runs/mine/slurm/job.sbatch", "cluster": "example"}

Whoever starts a run writes it: the command on its machine, `submit`, and a SLURM job again when it starts, because it
may be a later one of a chain. It is never removed: it says where a run was, not that it runs. `pid` on `host` is the
process that passes signals on to the ranks, and only if it began before `started`: a number is used again. To stop a
SLURM run as SIGTERM stops another one, `scancel --signal=TERM JOB`: the ranks save, and the job ends for good. What a
command line must not hold, a secret, is not in here either. Nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

FILE = "launch.json"
# mpi and torchrun: another program started the ranks, and `pid` is that of rank 0
Kind = Literal["local", "hosts", "slurm", "mpi", "torchrun"]


@dataclass(frozen=True)
class Launch:
    """One start of a run. `host` is where the command was given; without `job`, also where `pid` is."""

    kind: Kind
    command: list[str]
    job: str | None = None  # slurm: the number of the job
    pid: int | None = None  # others: the process that a signal goes to
    num_ranks: int | None = None  # none: not known before it starts
    script: str | None = None  # slurm: what was submitted
    cluster: str | None = None  # slurm: the file or name given with --cluster
    host: str = ""
    started: str = ""  # ISO 8601, UTC


def write_launch(run_dir: str | Path, launch: Launch) -> Launch:
    """Write `launch`, with this host and the time where it has none, in place of an earlier one; returns it.

    Raises OSError where `run_dir` cannot be made or written.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    values = asdict(launch) | {"host": launch.host or socket.gethostname(), "started": launch.started or now}
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{os.getpid()}-{FILE}"
    aside.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.rename(folder / FILE)
    return Launch(**values)


def read_launch(run_dir: str | Path) -> Launch | None:
    """How the run of `run_dir` was started last; None if nobody wrote it, as under a bare `deepspeed` or `srun`."""
    try:
        values = json.loads((Path(run_dir) / FILE).read_text(encoding="utf-8"))
        return Launch(**{name: values[name] for name in Launch.__dataclass_fields__ if name in values})
    except (OSError, ValueError, TypeError):
        return None
