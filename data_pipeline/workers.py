"""Steps made before they are asked for: by a thread, or by `data.num_workers` processes for each rank.

A worker is `python -m data_pipeline.workers`, given two descriptors: one end of a socket, over which it gets the
configuration and then step after step, and an anonymous file in memory, into which it writes the arrays. Nothing has a
name in /dev/shm or anywhere else, so nothing can be left behind, and when the rank ends, however it does, the socket
closes and the worker ends with it. It imports no torch, so it is there within a second; until then, and in the place of
a worker that was lost, the rank makes its batches itself. torch's DataLoader was considered: its first batch waits for
its workers, and they hand tensors over in /dev/shm, which is small in many containers.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from configs.schema import PretrainConfig
from data_pipeline.rows import Arrays
from data_pipeline.samples import Split, open_samples

ALIGNMENT = 64  # bytes
STEPS_PER_WORKER = 2  # made ahead, at most: one in the making, one waiting
Request = tuple[int, int, int]  # step, rank, world_size
Layout = list[dict[str, tuple[str, tuple[int, ...], int]]]  # per micro batch: name -> dtype, shape, first byte


class Ahead:
    """Hands out what `make` would make of a request, and lets the steps after it be made meanwhile.

    `workers` may be empty: then a thread makes one step ahead. Errors of `make` are raised when its step is asked for.
    """

    def __init__(self, make: Callable[[Request], list[Arrays]], workers: list[Worker]) -> None:
        self._make, self.workers = make, workers
        self._pending: dict[Request, Future[list[Arrays]]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._askers = ThreadPoolExecutor(max(1, len(workers)))  # each waits for a worker, and for what it makes
        self._free: SimpleQueue[Worker | None] = SimpleQueue()  # None: a worker was lost, its asker makes the batches
        self._ready: list[Worker] = []  # those that have been asked for something, or can be
        for worker in workers:
            threading.Thread(target=self._greet, args=[worker], daemon=True).start()

    def get(self, request: Request) -> list[Arrays]:
        """The micro batches of a request, made already if it is the step after the last request's."""
        pending = self._pending.pop(request, None)
        batches = self._make(request) if pending is None else pending.result()
        num_ready = len(self._ready)
        step, rank, world_size = request
        steps = STEPS_PER_WORKER * num_ready or 1
        wanted = [(step + number, rank, world_size) for number in range(1, steps + 1)]
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for other in wanted:
            if other not in self._pending:
                submitted = (
                    self._askers.submit(self._ask, other) if num_ready else self._thread.submit(self._make, other)
                )
                self._pending[other] = submitted
        return batches

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for pool in (self._thread, self._askers):
            pool.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.close()

    def _greet(self, worker: Worker) -> None:
        if worker.is_ready():
            self._free.put(worker)
            self._ready.append(worker)

    def _ask(self, request: Request) -> list[Arrays]:
        worker = self._free.get()
        batches = None
        if worker is not None:
            try:
                batches = worker.micro_batches(*request)
            except (EOFError, OSError):
                worker = None
        self._free.put(worker)
        return self._make(request) if batches is None else batches


class Worker:
    """The rank's side of one worker. Its methods may block and belong to one thread at a time."""

    def __init__(self, config: PretrainConfig, split: Split) -> None:
        self._memory = _anonymous_file()
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_pipeline.workers", str(theirs.fileno()), str(self._memory)],
            pass_fds=(theirs.fileno(), self._memory),
            env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = ours
        self._connection.send((config.model_dump_json(), split))

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self) -> bool:
        """Waits until the worker can be asked; False if it could not start."""
        try:
            return bool(self._connection.recv())
        except (EOFError, OSError):
            return False

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Arrays] | None:
        """As `Samples.micro_batches`; None if it failed there. Raises EOFError or OSError if the worker is gone."""
        self._connection.send((step, rank, world_size))
        layout: Layout | None = self._connection.recv()
        if layout is None:
            return None
        with mmap.mmap(self._memory, 0, access=mmap.ACCESS_READ) as memory:
            return [{name: _array(memory, *entry).copy() for name, entry in batch.items()} for batch in layout]

    def kill(self) -> None:
        self._process.kill()  # it holds nothing that would have to be put in order
        self._process.wait()

    def close(self) -> None:
        self._connection.close()
        os.close(self._memory)


def main() -> None:
    """A worker's life: get ready, then make what is asked for, until the rank closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are sent to whole groups of processes; the rank decides
        signal.signal(number, signal.SIG_IGN)
    connection, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    try:
        text, split = connection.recv()
        samples = open_samples(PretrainConfig.model_validate_json(text), split)
        connection.send(True)
        while True:
            step, rank, world_size = connection.recv()
            try:
                layout = _write(memory, list(samples.micro_batches(step, rank, world_size)))
            except ValueError:  # damaged data: the rank makes it itself, and so meets the error with its message
                layout = None
            connection.send(layout)
    except (EOFError, OSError):  # the rank has ended
        return


def _write(memory: int, batches: list[Arrays]) -> Layout:
    """Lay the arrays into the memory file, which grows as needed."""
    layout: Layout = []
    end = 0
    for batch in batches:
        entries = {}
        for name, array in batch.items():
            entries[name] = (array.dtype.str, array.shape, end)
            end = -(-(end + array.nbytes) // ALIGNMENT) * ALIGNMENT
        layout.append(entries)
    if os.fstat(memory).st_size < end:
        os.ftruncate(memory, end)
    with mmap.mmap(memory, 0) as mapped:
        for batch, entries in zip(batches, layout, strict=True):
            for name, array in batch.items():
                _array(mapped, *entries[name])[...] = array
    return layout


def _array(memory: mmap.mmap, dtype: str, shape: tuple[int, ...], start: int) -> np.ndarray:
    return np.ndarray(shape, dtype, memory, start)


def _anonymous_file() -> int:
    """A descriptor of a file without a name: in memory on Linux, elsewhere a removed temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("millstream-batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


if __name__ == "__main__":
    main()
