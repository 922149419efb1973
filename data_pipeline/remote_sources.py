"""Sources at an address: http(s):// and s3://, through fsspec. What fails for a moment is tried again.

An address is read by ranges, the next range on its way while one is used. An http server that knows no ranges is read
as a stream: to go back, or to go on after a failure, such a stream starts again and passes over what was read.

Credentials and endpoints come from where the systems look for them: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL
and the like, and for fsspec ~/.config/fsspec (for example {"s3": {"anon": true}}).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from data_pipeline.errors import DataError

SCHEMES = ("http://", "https://", "s3://")
WAITS_SECONDS = (0.5, 1, 2, 4, 8)  # before each new attempt
SMALLEST_RANGE, LARGEST_RANGE = 1 << 18, 1 << 23  # bytes; the smallest after a jump, twice as many with each in order
NETWORK_LIBRARIES = {"aiohttp", "aiobotocore", "botocore", "fsspec", "s3fs"}
RETRIED_STATUS = {408, 425, 429}  # of 4xx; the others stay what they are
T = TypeVar("T")


def is_remote(file: str) -> bool:
    return file.startswith(SCHEMES)


def find(source: str, suffixes: tuple[str, ...]) -> list[str]:
    """The addresses that `source` stands for: itself, or on s3 what its glob or folder holds, sorted."""
    if not source.startswith("s3://"):
        if _info(source) is None:
            raise DataError(f"{source}: there is nothing at this address; globs and folders need s3://")
        return [source]
    fs = filesystem(source)
    if any(sign in source for sign in "*?["):
        found = attempt(source, lambda: fs.glob(source))
        if not found:
            raise DataError(f"{source}: matches nothing")
        return [f"s3://{path}" for path in sorted(found)]
    info = _info(source)
    if info is not None and info["type"] == "file":
        return [source]
    found = sorted(f"s3://{path}" for path in attempt(source, lambda: fs.find(source)) if path.endswith(suffixes))
    if not found:
        raise DataError(f"{source}: there is no such object, nor a folder with files of a known kind {suffixes}")
    return found


def stamp(url: str) -> tuple[int | None, str]:
    """(size in bytes, what tells this version from others); parts the server does not give are None or empty."""
    info = _info(url)
    if info is None:
        raise DataError(f"{url}: is not there (any more)")
    return info.get("size"), str(info.get("ETag") or info.get("LastModified") or info.get("Last-Modified") or "")


def exists(url: str) -> bool:
    """Whether there is a file or folder at an address. Raises DataError where that cannot be found out."""
    return _info(url) is not None


def attempt(url: str, do: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """do(), again after `waits` (none: WAITS_SECONDS) if it fails as networks fail.

    At the end DataError that names the address.
    """
    waits = WAITS_SECONDS if waits is None else waits
    for wait in (*waits, None):
        try:
            return do()
        except Exception as error:  # aiohttp and botocore have hierarchies of their own
            if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in NETWORK_LIBRARIES:
                raise
            if _is_final(error):
                raise DataError(f"{url}: cannot be read ({_said(error)}); check the address and your access") from error
            if wait is None:
                tries = len(waits) + 1
                raise DataError(f"{url}: cannot be read after {tries} attempts ({_said(error)}); try later") from error
            time.sleep(wait)
    raise AssertionError("not reached")


class RemoteFile(io.RawIOBase):
    """A file at an address, for reading. `seekable()` is false where the server knows no ranges."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.opened = attempt(url, lambda: _open(url))
        self.size: int | None = self.opened.size
        self.window, self.window_start = b"", 0
        self.thread: ThreadPoolExecutor | None = None
        self.ahead: tuple[int, Future[bytes]] | None = None  # (start, bytes) of a range on its way

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self.size is None:
            raise io.UnsupportedOperation(f"{self.url}: the server knows no ranges")
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.size is None:
            data = attempt(self.url, lambda: self._read_stream(len(buffer)))
        else:
            if not self.window_start <= self.position < self.window_start + len(self.window):
                self._move_window(self.size)
            start = self.position - self.window_start
            data = self.window[start : start + len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)
        if not self.closed:
            self.opened.close()
        super().close()

    def _move_window(self, size: int) -> None:
        """Get the range at `position`, and in order also the one after it."""
        in_order = self.position == self.window_start + len(self.window)
        length = min(max(2 * len(self.window), SMALLEST_RANGE), LARGEST_RANGE) if in_order else SMALLEST_RANGE
        if self.ahead is not None and self.ahead[0] == self.position:
            self.window = self.ahead[1].result()
        else:
            self.window = self._range(self.position, min(self.position + length, size)).result()
        self.window_start, self.ahead = self.position, None
        after = self.position + len(self.window)
        if in_order and after < size:
            self.ahead = after, self._range(after, min(after + length, size))

    def _range(self, start: int, stop: int) -> Future[bytes]:
        def get() -> bytes:
            data = self.opened._fetch_range(start, stop) if stop > start else b""
            if len(data) != stop - start:
                raise OSError(f"bytes {start} to {stop} were asked for, {len(data)} bytes came")
            return data

        self.thread = self.thread or ThreadPoolExecutor(1)
        return self.thread.submit(attempt, self.url, get)

    def _read_stream(self, num_bytes: int) -> bytes:
        try:
            if self.opened.closed:
                self.opened = _open(self.url)
            while self.opened.loc < self.position and self.opened.read(min(self.position - self.opened.loc, 1 << 20)):
                pass
            return self.opened.read(num_bytes)
        except Exception:
            self.opened.close()
            raise


def _open(url: str) -> Any:
    """fsspec's file: one that fetches ranges, or a stream (without a size) if the server does not know them."""
    fs = filesystem(url)
    opened = fs.open(url, "rb", cache_type="none")
    if url.startswith("s3://") or opened.size is None:
        return opened
    try:
        opened._fetch_range(min(1, opened.size - 1), opened.size and 2)
    except ValueError:
        return fs.open(url, "rb", block_size=0)
    return opened


def _info(url: str) -> dict[str, Any] | None:
    """What the server says of a file or folder now; None if it is not there."""

    def get() -> dict[str, Any] | None:
        try:
            return fs.info(url)
        except FileNotFoundError as error:
            if error.__cause__ is not None and not _is_final(error.__cause__):
                raise error.__cause__ from None  # fsspec calls every failure of http not found
            return None

    fs = filesystem(url)
    return attempt(url, get)


def filesystem(url: str) -> Any:
    """fsspec's file system for an address, with bounded waits for an answer and no attempts of its own."""
    import fsspec

    if url.startswith("s3://"):
        return fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            config_kwargs={"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60},
        )
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    return fsspec.filesystem(
        "http",
        use_listings_cache=False,
        headers={"Accept-Encoding": "identity"},  # the file as it is, also if it is a .gz
        client_kwargs={"timeout": timeout, "auto_decompress": False, "trust_env": True},
    )


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would end the same way."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return True
    status = getattr(error, "status", None)  # of aiohttp
    if response := getattr(error, "response", None):  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int):
        return 400 <= status < 500 and status not in RETRIED_STATUS
    return type(error).__name__ in ("NoCredentialsError", "FileExpired", "InvalidURL", "ParamValidationError")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
