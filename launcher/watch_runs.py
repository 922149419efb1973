"""`millstream watch RUN_DIR ... [--terminal] [--host H] [--port N]`: runs as they go on."""

from __future__ import annotations

from pathlib import Path

from configs.errors import ConfigError

USAGE = "expected millstream watch RUN_DIR ... [--host H] [--port N], or millstream watch RUN_DIR ... --terminal"


def watch_command(words: list[str]) -> int:
    """Watch until Ctrl-C; returns 0. Raises ConfigError for what is not understood and for what is no run."""
    host, port = take(words, "--host"), take(words, "--port")
    if port is not None and not (port.isdigit() and int(port) < 65536):
        raise ConfigError(f"--port {port}: expected a number, 0 to 65535 (0: any free one)")
    in_terminal = "--terminal" in words
    run_dirs = [Path(word) for word in words if word != "--terminal"]
    if not run_dirs or any(str(path).startswith("--") for path in run_dirs) or (in_terminal and (host or port)):
        raise ConfigError(f"not understood; {USAGE}")
    from launcher.board import Board

    board = Board(run_dirs)
    if in_terminal:
        from launcher.terminal import show

        return show(board)
    from launcher.page import serve

    return serve(board, host or "127.0.0.1", None if port is None else int(port))


def take(words: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` from the words; returns the value."""
    if flag not in words:
        return None
    place = words.index(flag)
    if place + 1 == len(words):
        raise ConfigError(f"{flag}: a value is missing; {USAGE}")
    value = words[place + 1]
    del words[place : place + 2]
    return value
