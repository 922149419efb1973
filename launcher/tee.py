"""Writes what rank 0 prints to the terminal and, as whole lines, to its log file.

It is a process of its own, so that rank 0 can still print after its launcher was killed, and what it printed before it
died itself is not lost. Where the command stands in a terminal, rank 0 prints into a pseudo-terminal: its progress
line then looks as it does without a log. In the file stands what a line was when it ended.

    python launcher/tee.py LOG FD_OF_STDOUT FD_OF_STDERR     reads both until nobody holds their other ends any more
"""

from __future__ import annotations

import fcntl
import os
import re
import selectors
import subprocess
import sys
import termios
import tty
from dataclasses import dataclass
from pathlib import Path

CHUNK = 65536
SECONDS_TO_END = 2.0  # for the last lines, once rank 0 is gone; what it has started may hold its output open
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]")  # ECMA-48: control sequences and single functions
LONGEST_LINE = 1 << 20  # bytes that are kept of a line without an end


@dataclass(frozen=True)
class Output:
    """Where rank 0 is to print: the arguments of its Popen, and the process that reads them."""

    stdout: int
    stderr: int
    process: subprocess.Popen[bytes]

    def is_taken(self) -> None:
        """Call it when rank 0 has been started: this process holds its ends no longer."""
        os.close(self.stdout)
        os.close(self.stderr)

    def drain(self, seconds: float = SECONDS_TO_END) -> None:
        """Wait until what rank 0 has printed is on the terminal."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return  # it goes on by itself


def open_output(log: Path) -> Output:
    """Start the process that copies to `log` and to this process's own stdout and stderr."""
    out, err = _channel(1), _channel(2)
    readers = (out[0], err[0])
    command = [sys.executable, "-I", "-S", __file__, str(log), *map(str, readers)]
    process = subprocess.Popen(command, pass_fds=readers, stdin=subprocess.DEVNULL, process_group=0)
    for reader in readers:
        os.close(reader)
    return Output(out[1], err[1], process)


def _channel(number: int) -> tuple[int, int]:
    """(reading end, writing end): a pseudo-terminal like the terminal that this process prints to, or a pipe."""
    if not os.isatty(number):
        return os.pipe()
    reader, writer = os.openpty()
    tty.setraw(writer)  # line ends stay as they are: the real terminal does the rest
    _copy_size(number, writer)
    return reader, writer


def _copy_size(source: int, target: int) -> None:
    try:
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8))
    except OSError:  # one of them is no terminal
        return


class Lines:
    """Whole lines, as they stand when they end: without colours and what a progress line was before."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, content: bytes) -> bytes:
        *lines, self._rest = (self._rest + content).split(b"\n")
        self._rest = self._rest[-LONGEST_LINE:] if b"\r" not in self._rest else _last_state(self._rest)
        return b"".join(plain(line) + b"\n" for line in lines)

    def end(self) -> bytes:
        rest = plain(self._rest)
        return rest + b"\n" if rest else b""


def plain(line: bytes) -> bytes:
    """What is seen of a line in the end: the text after its last return, without escape sequences."""
    return ESCAPES.sub(b"", _last_state(line.rstrip(b"\r")))


def _last_state(line: bytes) -> bytes:
    return line[line.rindex(b"\r") :].lstrip(b"\r") if b"\r" in line else line


def copy(log: int, readers: tuple[int, int]) -> None:
    """Copy the first reader to stdout and the second to stderr, both to `log`, until both have ended."""
    lines = {reader: Lines() for reader in readers}
    targets: dict[int, int | None] = dict(zip(readers, (1, 2), strict=True))
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(timeout=1.0):
                content = _read(key.fd)
                target = targets[key.fd]
                if target is not None and not _write(target, content):
                    targets[key.fd] = None  # the terminal is gone: the log goes on
                _write(log, lines[key.fd].take(content) if content else lines[key.fd].end())
                if not content:
                    selector.unregister(key.fd)
            for reader, target in targets.items():
                if target is not None:
                    _copy_size(target, reader)  # the window may have another size now


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, CHUNK)
    except OSError:  # how a pseudo-terminal ends
        return b""


def _write(target: int, content: bytes) -> bool:
    """False if nothing can be written there any more, or not now: a full disk must not end a run."""
    try:
        while content:
            content = content[os.write(target, content) :]
    except OSError:
        return False
    return True


if __name__ == "__main__":
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    copy(log, (int(sys.argv[2]), int(sys.argv[3])))
