"""Steps made before they are asked for: by a thread, or by `data.num_workers` processes for each rank.

A worker is `python -m data_pipeline.workers`. It is given one end of a socket, over which it gets the configuration and
then request after request, and `STEPS_PER_WORKER` slots: anonymous files in memory, mapped by both sides as long as
they do not grow, into which it writes the arrays, one step after the other. A slot belongs to the worker from the
request for its step to the answer, then to the rank, until that has copied the arrays and asks for the step after
next; so the worker makes one step while the one before waits, and neither ever reads what the other writes.

Nothing has a name in /dev/shm or anywhere else, so nothing can be left behind, and when the rank ends, however it does,
the socket closes and the worker ends with it. It imports no torch, so it is there within a second; until then, and in
the place of a worker that was lost, the rank makes its batches itself. torch's DataLoader was considered: its first
batch waits for its workers, and they hand tensors over in /dev/shm, which is small in many containers.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from configs.schema import PretrainConfig
from data_pipeline.rows import Arrays
from data_pipeline.samples import Split, open_samples

ALIGNMENT = 64  # bytes
STEPS_PER_WORKER = 2  # made ahead, at most: one in the making, one waiting
REQUEST = struct.Struct("<3q")
AS_BEFORE = b""  # an answer: the arrays lie as those of the answer before did
Request = tuple[int, int, int]  # step, rank, world_size
Entries = dict[str, tuple[str, tuple[int, ...], int]]  # of a micro batch: name -> dtype, shape, first byte
Layout = tuple[list[Entries], int]  # of a step's micro batches; the bytes that they take


class Ahead:
    """Hands out what `make` would make of a request, and has the steps after it made meanwhile.

    `workers` may be empty: then a thread makes one step ahead. Errors of `make` are raised when its step is asked for.
    The arrays handed out are the caller's own. `get` belongs to one thread.
    """

    def __init__(self, make: Callable[[Request], list[Arrays]], workers: list[Worker]) -> None:
        self._make, self.workers = make, workers
        self._thread = ThreadPoolExecutor(1)
        self._pending: dict[Request, Future[list[Arrays]]] = {}  # what the thread makes
        self._ready: list[Worker] = []  # those that have started and are not lost
        for worker in workers:
            threading.Thread(target=self._greet, args=[worker], daemon=True).start()

    def get(self, request: Request) -> list[Arrays]:
        """The micro batches of a request, made already if it is the step after the last request's."""
        batches = self._made_ahead(request)
        if batches is None:
            batches = self._make(request)
        self._prepare(request)
        return batches

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.close()

    def _greet(self, worker: Worker) -> None:
        if worker.is_ready():
            self._ready.append(worker)

    def _made_ahead(self, request: Request) -> list[Arrays] | None:
        if request in self._pending:
            return self._pending.pop(request).result()
        for worker in list(self._ready):
            if request in worker.asked:
                try:
                    return worker.take(request)
                except (EOFError, OSError):
                    self._ready.remove(worker)
        return None

    def _prepare(self, request: Request) -> None:
        """Have the steps after this one made, as far as they are not in the making."""
        step, rank, world_size = request
        ready = list(self._ready)
        num_steps = STEPS_PER_WORKER * len(ready) or 1
        wanted = [(step + number, rank, world_size) for number in range(1, num_steps + 1)]
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        asked = self._pending.keys() | {other for worker in ready for other in worker.asked}
        missing = deque(other for other in wanted if other not in asked)
        if missing and not ready:
            self._pending[missing[0]] = self._thread.submit(self._make, missing[0])
        for worker in ready * STEPS_PER_WORKER:  # in turns
            try:
                worker.drop_answers(wanted)
                if missing and len(worker.asked) < STEPS_PER_WORKER:
                    worker.ask(missing[0])
                    missing.popleft()
            except (EOFError, OSError):
                self._ready = [other for other in self._ready if other is not worker]


class Worker:
    """The rank's side of one worker; its methods belong to one thread at a time.

    `asked` holds the requests that it has not been seen to answer, the oldest first; there may be STEPS_PER_WORKER of
    them. `ask`, `take` and `drop_answers` raise EOFError or OSError if the worker is gone.
    """

    def __init__(self, config: PretrainConfig, split: Split) -> None:
        self.asked: deque[Request] = deque()
        self._slots = [Slot(_anonymous_file(), mmap.ACCESS_READ) for _ in range(STEPS_PER_WORKER)]
        self._next_slot = cycle(self._slots)  # of the next answer
        self._layout: Layout | None = None
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        numbers = [theirs.fileno(), *(slot.file for slot in self._slots)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_pipeline.workers", *map(str, numbers)],
            pass_fds=numbers,
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

    def ask(self, request: Request) -> None:
        """Have a request's micro batches made."""
        self._connection.send_bytes(REQUEST.pack(*request))
        self.asked.append(request)

    def take(self, request: Request) -> list[Arrays] | None:
        """A copy of the micro batches of a request that was asked for; None if they could not be made there."""
        while self.asked[0] != request:
            self._receive()
        layout, slot = self._receive()
        return None if layout is None else slot.read(layout)

    def drop_answers(self, wanted: list[Request]) -> None:
        """Make room for other requests: take the answers to those not in `wanted`, as far as they are there."""
        while self.asked and self.asked[0] not in wanted and self._connection.poll():
            self._receive()

    def kill(self) -> None:
        self._process.kill()  # it holds nothing that would have to be put in order
        self._process.wait()

    def close(self) -> None:
        self._connection.close()
        for slot in self._slots:
            slot.close()

    def _receive(self) -> tuple[Layout | None, Slot]:
        answer = self._connection.recv_bytes()
        self.asked.popleft()
        if answer != AS_BEFORE:
            self._layout = pickle.loads(answer)
        return self._layout, next(self._next_slot)


class Slot:
    """An anonymous file in memory that holds the arrays of one step, as one of its two sides sees it."""

    def __init__(self, file: int, access: int) -> None:
        self.file, self._access = file, access
        self._memory: mmap.mmap | None = None

    def write(self, batches: list[Arrays]) -> Layout:
        layout = _layout(batches)
        entries, num_bytes = layout
        memory = self._mapped(num_bytes)
        for batch, places in zip(batches, entries, strict=True):
            for name, array in batch.items():
                _array(memory, *places[name])[...] = array
        return layout

    def read(self, layout: Layout) -> list[Arrays]:
        """The arrays, in memory of their own: the slot is free again, and what is held for long stays as it is."""
        entries, num_bytes = layout
        copy = np.frombuffer(self._mapped(num_bytes), np.uint8, num_bytes).copy()  # one call, not one an array
        return [{name: _array(copy, *place) for name, place in places.items()} for places in entries]

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
        os.close(self.file)

    def _mapped(self, num_bytes: int) -> mmap.mmap:
        """At least so many bytes. To map a file takes longer than to copy a step: it is done anew only as it grows."""
        if self._memory is None or len(self._memory) < num_bytes:
            size = os.fstat(self.file).st_size
            if size < num_bytes:  # only the worker meets this: it has written before the rank reads
                size = max(num_bytes, 2 * size)
                os.ftruncate(self.file, size)
            if self._memory is not None:
                self._memory.close()
            self._memory = mmap.mmap(self.file, size, access=self._access)
        return self._memory


def main() -> None:
    """A worker's life: get ready, then make what is asked for, until the rank closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are sent to whole groups of processes; the rank decides
        signal.signal(number, signal.SIG_IGN)
    connection, *files = map(int, sys.argv[1:])
    try:
        _serve(Connection(connection), [Slot(file, mmap.ACCESS_WRITE) for file in files])
    except (EOFError, OSError):  # the rank has ended
        return


def _serve(connection: Connection, slots: list[Slot]) -> None:
    text, split = connection.recv()
    samples = open_samples(PretrainConfig.model_validate_json(text), split)
    connection.send(True)
    before: Layout | None = None
    for slot in cycle(slots):
        request = REQUEST.unpack(connection.recv_bytes())
        try:
            layout = slot.write(list(samples.micro_batches(*request)))
        except (ValueError, OSError):  # damaged or lost data: the rank makes it itself, and meets the error if it lasts
            layout = None
        connection.send_bytes(AS_BEFORE if layout == before else pickle.dumps(layout))
        before = layout


def _layout(batches: list[Arrays]) -> Layout:
    entries: list[Entries] = []
    end = 0
    for batch in batches:
        places = {}
        for name, array in batch.items():
            places[name] = (array.dtype.str, array.shape, end)
            end = -(-(end + array.nbytes) // ALIGNMENT) * ALIGNMENT
        entries.append(places)
    return entries, end


def _array(memory: mmap.mmap | np.ndarray, dtype: str, shape: tuple[int, ...], start: int) -> np.ndarray:
    return np.ndarray(shape, dtype, memory, start)


def _anonymous_file() -> int:
    """A descriptor of a file without a name: in memory on Linux, elsewhere a removed temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("millstream-batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


if __name__ == "__main__":
    main()
