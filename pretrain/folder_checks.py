"""Is a folder one and the same on all hosts, how fast is it, and does it keep what a run relies on?

A run relies on: a file that one host has written and synced is read whole by the others (checkpoints), a rename
replaces a file at once (manifests), a lock of one host keeps the others out (caches). Every host calls `check_folder`
at the same time; the steps are kept apart by `barrier`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_BYTES = 16_000_000
NUM_SYNCS = 8
VISIBLE_SECONDS = 5.0  # NFS may look at a folder again only after some seconds
FILE_SECONDS = 3.0
RENAME_SECONDS = 0.7
VALUE_BYTES = 65_536


def check_folder(folder: Path, token: str, rank: int, num_hosts: int, barrier: Callable[[str], None]) -> dict[str, Any]:
    """Measure `folder` together with the other hosts; the files go into a folder of its own, named by `token`.

    Returns what is known: "visible" (this host sees the folder that the first one made), "write_mb_s", "sync_ms",
    "read_mb_s" (not for one host: it would read its own memory) or "next_missing", "reads" and "torn_reads" of a file
    that is replaced all the time, "lock" (kept, not kept, or the error), "error".
    """
    place, found = folder / f".millstream-doctor-{token}", dict[str, Any]()
    try:
        if rank == 0:
            place.mkdir(parents=True)
    except OSError as error:
        found["error"] = str(error)
    barrier("folder made")
    found["visible"] = "error" not in found and wait_for(place, VISIBLE_SECONDS)
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("write", lambda: write(place / f"host-{rank}", rank)),
        ("read", lambda: read(place, (rank + 1) % num_hosts) if num_hosts > 1 else {}),
        ("rename", lambda: rename(place / "value", rank)),
        ("lock", lambda: hold_lock(place / "lock", rank)),
        ("locked", lambda: try_lock(place / "lock")),
    ]
    try:
        for name, step in steps:
            try:
                if found["visible"]:
                    found |= step()
            except OSError as error:
                found.setdefault("error", f"{name}: {error}")
            barrier(f"folder {name}")
    finally:
        release()
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    return found


def wait_for(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def content(rank: int) -> bytes:
    return bytes([rank % 251]) * NUM_BYTES


def write(path: Path, rank: int) -> dict[str, Any]:
    """Speed of writing with one sync at the end, MB/s, all hosts at once; a small write with sync, median in ms."""
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(content(rank))
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    waits = []
    with path.with_suffix(".sync").open("wb") as file:
        for _ in range(NUM_SYNCS):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            waits.append(time.perf_counter() - began)
    return {"write_mb_s": NUM_BYTES / seconds / 1e6, "sync_ms": statistics.median(waits) * 1000}


def read(place: Path, of_rank: int) -> dict[str, Any]:
    """Read what the next host has written."""
    path, expected = place / f"host-{of_rank}", content(of_rank)
    if not wait_for(path, FILE_SECONDS):
        return {"next_missing": True}
    began = time.perf_counter()
    found = path.read_bytes()
    speed = NUM_BYTES / (time.perf_counter() - began) / 1e6
    return {"read_mb_s": speed, "same_bytes": found == expected}


def rename(path: Path, rank: int) -> dict[str, Any]:
    """The first host replaces a file over and over, all read it: each must find one of its versions, whole."""
    deadline = time.monotonic() + RENAME_SECONDS
    writer = threading.Thread(target=_replace_until, args=[path, deadline])
    if rank == 0:
        writer.start()
    reads = torn = 0
    if wait_for(path, FILE_SECONDS):
        while time.monotonic() < deadline - 0.1 or not reads:
            try:
                value = path.read_bytes()
            except OSError:  # away, or a stale handle
                value = b""
            reads += 1
            torn += len(value) != VALUE_BYTES or value.count(value[:1]) != VALUE_BYTES
    if rank == 0:
        writer.join()
    return {"reads": reads, "torn_reads": torn}


def _replace_until(path: Path, deadline: float) -> None:
    aside, number = path.with_suffix(".writing"), 0
    while time.monotonic() < deadline or number == 0:
        aside.write_bytes(bytes([number % 251]) * VALUE_BYTES)
        os.replace(aside, path)
        number += 1


_held: list[int] = []


def hold_lock(path: Path, rank: int) -> dict[str, Any]:
    if rank == 0:
        _held.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        fcntl.flock(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    return {}


def try_lock(path: Path) -> dict[str, Any]:
    """Try to take the lock that the first host holds."""
    other = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return {"lock": "not kept"}
    except BlockingIOError:
        return {"lock": "kept"}
    finally:
        os.close(other)


def release() -> None:
    while _held:
        os.close(_held.pop())
