"""Bringing a checkpoint into the run directory from elsewhere: the ranks share its files, as they share checking them.

What arrives is checked as a whole before it gets its name, so a bad copy is never a checkpoint.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.load import ConfigError
from data_pipeline.errors import DataError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, CheckpointError
from pretrain.runtime import Runtime

POLL_SECONDS = 0.2


class _Getting(threading.Thread):
    def __init__(self, get: Callable[[str, Path], None], names: list[str], aside: Path) -> None:
        super().__init__(name="get", daemon=True)
        self.get, self.names, self.aside = get, names, aside
        self.problem: str | None = None

    def run(self) -> None:
        try:
            for name in self.names:
                self.get(name, self.aside / name)
        except Exception as error:  # whatever it is, the other ranks have to hear of it
            self.problem = described(error)


def bring(
    source: str,
    content: bytes,
    get: Callable[[str, Path], None],
    share: Callable[[list[str]], list[str]],
    target: Path,
    runtime: Runtime,
) -> Checkpoint:
    """Copy the checkpoint whose manifest is `content` from `source` to `target` and check it; every rank calls it.

    `share(names)` are those files that this rank gets, by `get(name, path)` in a thread: this one goes on making marks.
    Raises CheckpointError if it is damaged, ConfigError if it cannot be read or written, both on every rank.
    """
    names = sorted(checkpoint.parse_manifest(content, source)["files"])
    if not all(re.fullmatch(r"rank-\d{5,}\.safetensors", name) for name in names):
        raise CheckpointError(f"{source}: its manifest.json names files that are none of a checkpoint: {names}")
    aside = target.with_name(f".writing-{target.name}")

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    on_first(source, begin, runtime)
    getting = _Getting(get, share(names), aside)
    getting.start()
    while runtime.any(getting.is_alive())[0]:
        runtime.mark("start", 0)
        time.sleep(POLL_SECONDS)
    agree(source, getting.problem, runtime)
    on_first(source, lambda: (aside / "manifest.json").write_bytes(content), runtime)
    try:
        found = checkpoint.open_checkpoint(aside, runtime)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    on_first(source, lambda: checkpoint.give_name(aside, target), runtime)
    return replace(found, path=target)


def copy_file(
    source: Path,
    target: Path,
    expected: dict[str, Any] | None = None,
    count: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, Any]:
    """Copy a file, flushed to disk; returns its size and hash. Raises OSError if they are not those `expected`.

    `count` as in `checkpoint.write_hashed`.
    """
    with source.open("rb", buffering=0) as file:
        blocks = iter(lambda: memoryview(file.read(checkpoint.BLOCK_BYTES) or b""), memoryview(b""))
        entry = checkpoint.write_hashed(target, blocks, count)
    if expected not in (None, entry):
        raise OSError(f"{source}: is damaged ({entry}, {expected} was written)")
    return entry


def on_first(source: str, action: Callable[[], Any], runtime: Runtime) -> Any:
    """What `action` gives on the first rank, on every rank; what it raises is raised on every rank, as ConfigError."""
    value, problem = None, None
    if runtime.is_first:
        try:
            value = action()
        except (OSError, DataError) as error:
            problem = described(error)
    agree(source, problem, runtime)
    return runtime.gather(value)[0]


def agree(source: str, problem: str | None, runtime: Runtime) -> None:
    """Raise on every rank if any rank had a problem."""
    problems = [found for found in runtime.gather(problem) if found is not None]
    if problems:
        raise ConfigError(
            f"{source}: cannot be brought into run_dir ({problems[0]}). Mend that and start the same command again, or "
            f"start anew with another run_dir and address"
        )


def described(error: Exception) -> str:
    return str(error) if isinstance(error, (DataError, CheckpointError)) else f"{type(error).__name__}: {error}"
