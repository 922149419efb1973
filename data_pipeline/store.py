"""Where the files of a dataset directory are: in a folder, or at an address, with a cache on this machine.

    data.cache.dir/               shared by all processes of a node, and by all datasets
        .lock                     held while room is made
        CHECKSUM/                 one dataset, named by its manifest's checksum: another manifest, another folder
            manifest.json, tokenizer.json, ..., shard-00000.tokens
            .lock-shard-00001.tokens              held by the process that transfers this file, as large as it will be
            .partial-0123456789ab-shard-00001.tokens    the transfer; gets its name when its checksum is right

All locks are flocks: the kernel drops them when their process ends, however it ends. What a killed process leaves is
removed by the next one that opens a dataset in this cache, or that needs the same file or room.

A shard is transferred whole, once for all processes of a node. When the cache is full, the shards used longest ago are
removed. A process that has one in memory can go on with it: the kernel keeps the bytes until the last one lets go.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from configs.schema import CacheConfig
from data_pipeline import remote_sources
from data_pipeline.errors import DataError

COPY_AGAIN = "copy it again or build the dataset again"
SHARD_SUFFIX = ".tokens"  # only shards are removed to make room
WRITING, LOCK, PARTIAL = ".writing-", ".lock-", ".partial-"  # how the names of files start that are no result
READ_BYTES = 1 << 22
FIRST_WAIT_SECONDS = 0.5  # after a failed transfer; doubled each time
END_SECONDS = 2  # for the transfers of a process that ends
POLL_SECONDS = 0.1  # while other processes' transfers fill the cache

_open_locks: set[int] = set()  # descriptors of this process
Entry = dict[str, Any]  # of a manifest: file, bytes, xxh3_128 and more


class Folder:
    """The files of a dataset directory in a folder of this machine."""

    remedy = COPY_AGAIN

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, entry: Entry) -> BinaryIO:
        path = self.path / entry["file"]
        try:
            return path.open("rb")
        except OSError as error:
            raise DataError(unreadable(path, error, self.remedy)) from error

    def prefetch(self, entries: Iterable[Entry]) -> None:
        """Nothing is to be done: all files are here."""


class Cache:
    """The files of the dataset directory at `url`, transferred into a folder of the cache when they are needed."""

    def __init__(self, url: str, config: CacheConfig, checksum: str) -> None:
        self.url, self.config = url.rstrip("/"), config
        self.root = Path(config.dir).expanduser().absolute()
        self.path = self.root / checksum
        self.remedy = f"remove it, then it is transferred again from {self.url}"
        self._pid, self._transfers = os.getpid(), dict[str, Future[Path]]()
        self._is_ending = threading.Event()
        atexit.register(self._end)
        os.register_at_fork(after_in_child=_close_inherited_locks)
        with self._local_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)

    def write_manifest(self, content: bytes) -> None:
        """Put the manifest beside the files it describes."""
        path = self.path / "manifest.json"
        with self._local_errors(), locked(path.with_name(LOCK + path.name)):
            for leftover in self.path.glob(f"{WRITING}*"):
                leftover.unlink()
            with writing(path) as file:
                file.write(content)

    def open(self, entry: Entry) -> BinaryIO:
        """The file of a manifest entry, transferred now if it has to be. Raises DataError with shard and address."""
        while True:
            transfer = self._transfers.get(entry["file"]) if self._pid == os.getpid() else None
            path = transfer.result() if transfer else self.fetch(entry)
            try:
                _note_use(path)
                return path.open("rb")
            except FileNotFoundError:  # removed to make room a moment ago
                self._transfers.pop(entry["file"], None)
            except OSError as error:
                raise DataError(unreadable(path, error, self.remedy)) from error

    def prefetch(self, entries: Iterable[Entry]) -> None:
        """Begin to transfer the first of these files that are not here, as long as few enough are on their way."""
        if self._pid != os.getpid():  # a fork has no threads
            self._pid, self._transfers = os.getpid(), {}
        for file in [file for file, transfer in self._transfers.items() if transfer.done()]:
            self._transfers.pop(file, None)
        for entry in entries:
            if len(self._transfers) >= self.config.prefetch_shards:
                return
            if entry["file"] not in self._transfers and not self._is_here(entry):
                self._transfers[entry["file"]] = self._begin(entry)

    def is_current(self, file: str, inode: int, used: bool) -> bool:
        """Whether an open file is still in the cache; with `used`, note that it was used just now."""
        try:
            if used:
                _note_use(Path(file))
            return os.stat(file).st_ino == inode
        except FileNotFoundError:
            return False

    def fetch(self, entry: Entry) -> Path:
        """The file in the cache, once it is there and its checksum is right."""
        path = self.path / entry["file"]
        if self._is_here(entry):
            return path
        with self._local_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(LOCK + path.name)) as lock:
                if not self._is_here(entry):  # no other process was faster
                    remove_partials(path)
                    self._make_room(entry["bytes"], lock)
                    url = f"{self.url}/{path.name}"
                    remote_sources.attempt(url, lambda: self._transfer(url, path, entry), _waits(self.config))
        return path

    def _begin(self, entry: Entry) -> Future[Path]:
        """Fetch in a thread: a daemon, because Python waits for the end of others before it ends itself."""
        transfer: Future[Path] = Future()

        def run() -> None:
            try:
                transfer.set_result(self.fetch(entry))
            except BaseException as error:
                transfer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return transfer

    def _end(self) -> None:
        """When the process ends: stop the transfers, and give them a moment to clean up."""
        self._is_ending.set()
        if self._pid == os.getpid():
            wait(self._transfers.values(), END_SECONDS)

    def _is_here(self, entry: Entry) -> bool:
        try:
            return (self.path / entry["file"]).stat().st_size == entry["bytes"]
        except OSError:
            return False

    def _transfer(self, url: str, path: Path, entry: Entry) -> None:
        """One attempt. Raises OSError for what is worth another one, DataError for what is not."""
        partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}-{path.name}")
        over = threading.Event()
        options = {"max_concurrency": 1} if url.startswith("s3://") else {}  # else s3fs holds 500 MB in memory
        with self._local_errors():
            partial.open("xb").close()
        try:
            remote = remote_sources.filesystem(url)
            remote.get_file(url, str(partial), callback=_stopping_when(over, self._is_ending), **options)
            found = describe(partial)
            if (found["bytes"], found["xxh3_128"]) != (entry["bytes"], entry["xxh3_128"]):
                raise OSError(
                    f"{found['bytes']} bytes with xxh3_128 {found['xxh3_128']} arrived, the manifest says "
                    f"{entry['bytes']} with {entry['xxh3_128']}: damaged on the way, or replaced since it was opened"
                )
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._unusable(error) from error
            raise
        finally:
            over.set()  # after Ctrl-C fsspec's thread would go on
            partial.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, lock: int) -> None:
        """Remove shards used longest ago until `num_bytes` fit, and reserve them: the lock gets that size."""
        while True:
            with locked(self.root / ".lock", remove=False):
                taken, reserved, shards = _contents(self.root)
                room = self.config.max_bytes - taken - reserved
                if num_bytes <= room:
                    in_use = sum(size for _, size, _ in shards)
                    for _, size, path in sorted(shards):
                        if in_use + num_bytes <= room:
                            break
                        path.unlink(missing_ok=True)
                        in_use -= size
                    os.ftruncate(lock, num_bytes)
                    return
            if num_bytes > self.config.max_bytes - taken:
                raise DataError(
                    f"data.cache.max_bytes={self.config.max_bytes}: a file of {num_bytes} bytes of {self.url} does not "
                    f"fit beside {taken} bytes of tokenizers and manifests; raise it"
                )
            time.sleep(POLL_SECONDS)  # others' transfers will end, and then be shards like all
            remove_leftovers(self.root)

    @contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"data.cache.dir={self.config.dir}: cannot be used ({error}); set it to a folder that can be written, on a "
            f"disk with file locks and room for data.cache.max_bytes={self.config.max_bytes}"
        )


def read_remote(url: str, config: CacheConfig) -> bytes:
    """The content of a small file at an address. Raises DataError."""
    return remote_sources.attempt(url, lambda: remote_sources.filesystem(url).cat_file(url), _waits(config))


@contextmanager
def locked(path: Path, wait: bool = True, remove: bool = True) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor. Raises BlockingIOError if it is taken and not to be waited for.

    With `remove` the file is gone afterwards. Whoever waited for a file that is gone then holds nothing, so it looks
    whether the name still is the file's, and begins again if not.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _open_locks.add(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _inode(path) != os.fstat(lock).st_ino:
                continue
            try:
                yield lock
                return
            finally:
                if remove:
                    path.unlink(missing_ok=True)
        finally:
            _open_locks.discard(lock)
            os.close(lock)


def _close_inherited_locks() -> None:
    """In a forked child: a lock lasts until all processes have closed it, and the child may outlive a killed parent."""
    for lock in _open_locks:
        os.close(lock)
    _open_locks.clear()


def remove_leftovers(root: Path) -> None:
    """Remove what killed processes left in a cache: transfers and locks that nobody holds."""
    for lock in root.glob(f"*/{LOCK}*"):
        try:
            with locked(lock, wait=False):
                remove_partials(lock.with_name(lock.name.removeprefix(LOCK)))
        except BlockingIOError:
            continue


def remove_partials(path: Path) -> None:
    """Remove the begun transfers of the file `path`, whose lock is held."""
    for partial in path.parent.glob(f"{PARTIAL}*-{path.name}"):
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """`with writing(path) as file`: what is written to `file` appears at `path` complete and on disk, or never."""
    aside = path.with_name(f"{WRITING}{uuid.uuid4().hex[:12]}-{path.name}")  # no other writer's
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def describe(path: Path, report: Callable[[int], None] | None = None) -> Entry:
    """The manifest entry of a file: its name, size and checksum. `report` gets the bytes read, piece by piece."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
            if report is not None:
                report(len(block))
    return {"file": path.name, "bytes": size, "xxh3_128": digest.hexdigest()}


def check_file(path: Path, entry: Entry, remedy: str, report: Callable[[int], None] | None = None) -> None:
    """Compare a whole file with its manifest entry. Raises DataError."""
    try:
        found = describe(path, report)
    except OSError as error:
        raise DataError(unreadable(path, error, remedy)) from error
    if found["bytes"] != entry["bytes"]:
        raise DataError(wrong_size(path, found["bytes"], entry, remedy))
    if found["xxh3_128"] != entry["xxh3_128"]:
        raise DataError(
            f"{path}: is damaged or was changed after the build: its {found['bytes']} bytes have the xxh3_128 "
            f"{found['xxh3_128']}, the manifest says {entry['xxh3_128']}; {remedy}"
        )


def unreadable(path: Path | str, error: OSError, remedy: str) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "allow more open files than the dataset has shards (ulimit -n)"
    return f"{path}: cannot be read ({error.strerror}); {remedy}"


def wrong_size(path: Path | str, found: int, entry: Entry, remedy: str) -> str:
    return f"{path}: has {found} bytes, the manifest says {entry['bytes']}: it is truncated or was changed; {remedy}"


def _waits(config: CacheConfig) -> list[float]:
    return [FIRST_WAIT_SECONDS * 2**number for number in range(config.retries)]


def _contents(root: Path) -> tuple[int, int, list[tuple[float, int, Path]]]:
    """(bytes that stay, bytes reserved for transfers, (time of last use, bytes, path) of all shards) of a cache."""
    taken, reserved, shards = 0, 0, []
    for path in root.glob("*/*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # removed meanwhile
            continue
        if path.name.startswith(LOCK):
            reserved += stat.st_size
        elif path.name.endswith(SHARD_SUFFIX) and not path.name.startswith("."):
            shards.append((stat.st_mtime, stat.st_size, path))
        elif not path.name.startswith(PARTIAL):  # those are reserved
            taken += stat.st_size
    return taken, reserved, shards


def _note_use(path: Path) -> None:
    """The time of a shard's last use is its file's time. Raises FileNotFoundError."""
    try:
        os.utime(path)
    except PermissionError:  # another user's, in a cache shared by several
        return


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _stopping_when(*events: threading.Event) -> Any:
    """A callback of fsspec that ends a transfer nobody waits for any more."""
    from fsspec.callbacks import Callback

    class Stopping(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if any(event.is_set() for event in events):
                raise DataError("the transfer is not needed any more")

    return Stopping()
