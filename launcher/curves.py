"""The curves of a run, read from metrics.jsonl as it grows, in memory that does not grow with it.

A curve is at most NUM_BUCKETS buckets of as many steps each, with the mean and the extremes of what they hold, so that
a spike of one step among a million is still seen. When a step lies beyond the last bucket, neighbours are merged and
buckets hold twice as many steps. So a file is read once, whatever its length (docs/watching.md has the speed).
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import orjson

NUM_BUCKETS = 800  # about as many as a screen has points
CHUNK_BYTES = 1 << 18

Bucket = list[float]  # count, sum, lowest, highest


class Curves:
    """Of some keys of one file of JSON lines that have a `step`. A file that was replaced is read anew."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys
        self.version = 0  # grows when there is something new
        self._lock = threading.Lock()  # one thread reads the file, others ask for points
        self._start_again()

    def _start_again(self) -> None:
        self.width = 1  # steps in a bucket
        self._buckets: dict[str, dict[int, Bucket]] = {key: {} for key in self.keys}
        self._file: tuple[int, int] | None = None  # device and inode
        self._place, self._rest = 0, b""
        self.share_read = 0.0  # of the file

    def read(self, seconds: float) -> bool:
        """Read what is new, for about that long at most; False if there is more."""
        deadline = time.monotonic() + seconds
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if self._file != (stat.st_dev, stat.st_ino) or stat.st_size < self._place:
                    with self._lock:
                        self._start_again()
                    self._file = (stat.st_dev, stat.st_ino)
                file.seek(self._place)
                while content := file.read(CHUNK_BYTES):
                    self._place += len(content)
                    with self._lock:
                        self._take(content)
                    self.share_read = self._place / max(stat.st_size, self._place)
                    if time.monotonic() > deadline:
                        return self._place >= stat.st_size
        except OSError:
            pass  # not there yet: there is nothing to read
        self.share_read = 1.0
        return True

    def _take(self, content: bytes) -> None:
        *lines, self._rest = (self._rest + content).split(b"\n")
        self.version += bool(lines)
        for line in lines:
            values = parse(line)
            step = values.get("step")
            if not isinstance(step, int) or step < 0:
                continue
            while step >= self.width * NUM_BUCKETS:
                self._halve()
            place = step // self.width
            for key, buckets in self._buckets.items():
                value = values.get(key)
                if value is None or not isinstance(value, int | float) or not math.isfinite(value):
                    continue
                bucket = buckets.get(place)
                if bucket is None:
                    buckets[place] = [1, value, value, value]
                    continue
                bucket[0] += 1
                bucket[1] += value
                if value < bucket[2]:
                    bucket[2] = value
                elif value > bucket[3]:
                    bucket[3] = value

    def _halve(self) -> None:
        self.width *= 2
        for key, buckets in self._buckets.items():
            merged: dict[int, Bucket] = {}
            for place, (count, total, lowest, highest) in buckets.items():
                into = merged.setdefault(place // 2, [0, 0.0, lowest, highest])
                into[0], into[1] = into[0] + count, into[1] + total
                into[2], into[3] = min(into[2], lowest), max(into[3], highest)
            self._buckets[key] = merged

    def points(self) -> dict[str, list[list[float]]]:
        """Of each key that has values: [first step of the bucket, mean, lowest, highest], by step; of a bucket of one
        step or one value only [step, value]."""
        found = {}
        with self._lock:
            width, buckets_of = self.width, {key: sorted(buckets.items()) for key, buckets in self._buckets.items()}
        for key, buckets in buckets_of.items():
            rows = []
            for place, (count, total, lowest, highest) in buckets:
                row = [place * width, _short(total / count)]
                rows.append(row if lowest == highest else [*row, _short(lowest), _short(highest)])
            if rows:
                found[key] = rows
        return found


def parse(line: bytes) -> dict[str, Any]:
    """A line; empty if it is none. Numbers that are NaN or infinite, which only Python's `json` reads, are rare."""
    try:
        values = orjson.loads(line)
    except ValueError:
        try:
            values = json.loads(line)
        except ValueError:
            return {}
    return values if isinstance(values, dict) else {}


def _short(value: float) -> float:
    """Six digits are more than a screen shows."""
    return float(f"{value:.6g}")
