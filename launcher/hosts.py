"""Hostfiles, in deepspeed's format: a line `NAME slots=N` for each machine, N processes on it; # begins a comment."""

from __future__ import annotations

import re
from pathlib import Path

from configs.errors import ConfigError

LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """The number of slots of each host, in the file's order. Raises ConfigError naming the line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hosts {path}: cannot be read ({error}); give a file with a line `NAME slots=N` a host"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = LINE.fullmatch(line)
        if not match or match[1].startswith("-") or int(match[2]) < 1:
            raise ConfigError(f"{path}:{number}: found `{line}`, expected `NAME slots=N` with N of 1 or more")
        if match[1] in slots:
            raise ConfigError(f"{path}:{number}: host {match[1]} for the second time; give it one line with all slots")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"{path}: names no host; expected a line `NAME slots=N` for each")
    return slots
