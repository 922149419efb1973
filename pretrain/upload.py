"""Copies of finished checkpoints at an address (s3, http, or any of fsspec's), made in the background; and back.

    ADDRESS/step-00000100/rank-00000.safetensors, ..., manifest.json    the same files as in run_dir/checkpoints

The manifest travels last and its hashes are compared when a checkpoint comes back, so a copy that was interrupted, or
that was laid over an earlier one, is never taken for a checkpoint. The first rank copies, in one thread: what fails is
tried again, then told as an incident, and never stops the run. Nothing is ever removed at the address.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.incidents import append_incident
from configs.load import ConfigError
from data_pipeline import remote_sources
from data_pipeline.errors import DataError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, CheckpointError
from pretrain.copies import bring, described, on_first
from pretrain.runtime import Runtime

WAITS_SECONDS = (1, 4, 16, 64)  # before each new attempt at a file
END_SECONDS = 1800  # at most, at the end of a run, for what is on its way
POLL_SECONDS = 0.2
MANIFEST = "manifest.json"
HAVE_NO_FOLDERS = {"s3", "http", "https", "gs", "gcs", "abfs", "az"}  # making one could make a bucket there


class Uploader:
    """Copies checkpoints of `run_dir` to `address`, the newest of those that wait first; the first rank has one.

    It begins with those that an earlier process has left uncopied.
    """

    def __init__(self, run_dir: Path, address: str) -> None:
        self.run_dir, self.address = run_dir, address.rstrip("/")
        self.files = filesystem(address)
        self.changed = threading.Condition()  # held while checkpoints are removed: the next may be one of those
        self.current: Path | None = None  # on its way; not to be removed
        self._waiting = checkpoint.step_directories(run_dir)
        threading.Thread(target=self._work, name="upload", daemon=True).start()

    @property
    def is_busy(self) -> bool:
        with self.changed:
            return bool(self._waiting) or self.current is not None

    def add(self, path: Path) -> None:
        with self.changed:
            if path not in self._waiting:
                self._waiting.append(path)
            self.changed.notify()

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self._waiting:
                    self.changed.wait()
                path = max(self._waiting, key=lambda path: checkpoint.step_of(path.name) or 0)
                self._waiting.remove(path)
                self.current = path
            try:
                self._upload(path)
            except Exception as error:  # nothing that happens here is worth the run
                self.tell("upload_failed", path, f"was not copied to {self.address} ({described(error)})")
            with self.changed:
                self.current = None

    def _upload(self, path: Path) -> None:
        if not path.is_dir():
            self.tell("upload_skipped", path, f"was removed before its turn: {self.address} is slower than the saves")
            return
        content, target = (path / MANIFEST).read_bytes(), f"{self.address}/{path.name}"
        if self._has(f"{target}/{MANIFEST}", content):
            return
        found = checkpoint.open_checkpoint(path)  # what was damaged meanwhile is not spread
        if self.address.partition("://")[0] not in HAVE_NO_FOLDERS:
            self.files.makedirs(target, exist_ok=True)
        for name in (*sorted(checkpoint.file_names(found)), MANIFEST):
            self._put(path / name, f"{target}/{name}")

    def _has(self, url: str, content: bytes) -> bool:
        try:
            return bool(self.files.cat_file(url) == content)
        except Exception:  # not there, or not to be found out: copying will tell
            return False

    def _put(self, file: Path, url: str) -> None:
        size = file.stat().st_size
        for wait in (*WAITS_SECONDS, None):
            try:
                if url.startswith(("http://", "https://")):  # a length of its own: some servers take no chunks
                    self.files.put_file(str(file), url, method="put", headers={"Content-Length": str(size)})
                else:
                    self.files.put_file(str(file), url)
                there = self.files.info(url).get("size")
                if there not in (None, size):
                    raise OSError(f"{url}: {size} bytes were sent, {there} are there")
                return
            except Exception:  # networks fail in many ways
                if wait is None:
                    raise
                time.sleep(wait)

    def tell(self, kind: str, path: Path, text: str) -> None:
        """Note an incident of a checkpoint; the run goes on."""
        text = f"{path}: {text}. The run goes on, the checkpoint itself is not concerned"
        print(f"warning: {text}", file=sys.stderr)
        try:
            append_incident(self.run_dir, kind, text, step=checkpoint.step_of(path.name), rank=0)
        except OSError:
            pass  # it was told


def wait_at_end(uploader: Uploader | None, step: int, runtime: Runtime, limit_seconds: float = END_SECONDS) -> None:
    """Wait until what is on its way has arrived, at most `limit_seconds`; every rank calls it, the first has one.

    What has not arrived then is told, and copied when the same command is started again.
    """
    deadline, is_told = time.monotonic() + limit_seconds, False
    while runtime.any(uploader is not None and uploader.is_busy and time.monotonic() < deadline)[0]:
        if uploader is not None and not is_told:
            print(f"waiting for checkpoints on their way to {uploader.address}, at most {limit_seconds:.0f} s")
            is_told = True
        runtime.mark("save", step)  # the others wait for the first rank here, which is no stall
        time.sleep(POLL_SECONDS)
    if uploader is not None and (path := uploader.current) is not None:
        limit = f"is not yet at {uploader.address} after {limit_seconds:.0f} s"
        uploader.tell("upload_unfinished", path, f"{limit}; the same command, started again, goes on with it")


def fetch_newest(address: str, run_dir: Path, say: Callable[[str], None], runtime: Runtime) -> Checkpoint | None:
    """Bring the newest valid checkpoint at `address` into `run_dir`; None if there is none. Every rank calls it.

    What is damaged or unfinished is named through `say` and passed over. Raises ConfigError on every rank if the
    address cannot be read or `run_dir` not be written: a run must not start anew because a network is down.
    """
    for name in reversed(list_steps(address, runtime)):
        try:
            return _fetch(f"{address.rstrip('/')}/{name}", run_dir / "checkpoints" / name, say, runtime)
        except CheckpointError as error:
            say(f"{error}; going back to an earlier checkpoint")
    return None


def list_steps(address: str, runtime: Runtime) -> list[str]:
    """The names of what may be checkpoints at `address`, the oldest first; every rank calls it and gets the same.

    An http server has to list the files of a folder when it is asked for it. Raises ConfigError as `fetch_newest`.
    """
    files = filesystem(address)
    root = address.rstrip("/")

    def listed() -> list[str]:
        try:
            paths = files.ls(f"{root}/" if root.startswith("http") else root, detail=False)
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error):
                raise
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        steps = {step: name for name in names if (step := checkpoint.step_of(name)) is not None}
        return [steps[step] for step in sorted(steps)]

    return on_first(address, lambda: remote_sources.attempt(root, listed), runtime)


def filesystem(address: str) -> Any:
    """fsspec's file system for an address. Raises ConfigError if there is none, or its library is missing."""
    try:
        if remote_sources.is_remote(address):
            return remote_sources.filesystem(address)
        import fsspec

        return fsspec.core.url_to_fs(address, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"checkpoint.upload={address}: {error}; `pip install millstream[s3]` brings what s3:// needs, for others "
            f"see fsspec's documentation"
        ) from error


def _fetch(source: str, target: Path, say: Callable[[str], None], runtime: Runtime) -> Checkpoint:
    files = filesystem(source)

    def manifest() -> bytes | None:
        try:
            content: bytes = remote_sources.attempt(source, lambda: files.cat_file(f"{source}/{MANIFEST}"))
            return content
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def get(name: str, path: Path) -> None:
        try:
            remote_sources.attempt(f"{source}/{name}", lambda: files.get_file(f"{source}/{name}", str(path)))
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return  # the check will name it: this checkpoint is damaged, an earlier one may do
        checkpoint.flush(path)

    content: bytes | None = on_first(source, manifest, runtime)
    if content is None:
        raise CheckpointError(f"{source}: is unfinished (has no {MANIFEST})")
    say(f"getting {source}")
    return bring(source, content, get, lambda names: names[runtime.rank :: runtime.world_size], target, runtime)
