"""`python launcher/rank.py MODULE RUN_DIR WORDS`: one rank of a run that another launcher has started.

It goes on as `python -m MODULE WORDS`; what it prints goes to run_dir/logs/rank-N.log as well as to where it went.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launcher.local import make_logs
from launcher.logs import log_file
from launcher.tee import open_output

NUMBERS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def become(module: str, words: list[str], run_dir: Path, number: int) -> NoReturn:
    """Go on as `python -m module words`, rank `number` of a run."""
    output = open_output(log_file(make_logs(run_dir), number))
    os.dup2(output.stdout, 1)
    os.dup2(output.stderr, 2)
    output.is_taken()
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    os.execve(sys.executable, [sys.executable, "-m", module, *words], os.environ | {"PYTHONPATH": paths})


def rank_of(environment: Mapping[str, str]) -> int:
    return int(next(environment[name] for name in NUMBERS if name in environment))


if __name__ == "__main__":
    become(sys.argv[1], sys.argv[3:], Path(sys.argv[2]), rank_of(os.environ))
