"""`millstream watch RUN_DIR ...`: a local web page that follows runs, and /metrics for Prometheus.

It only reads, and there is nothing it could be told to do. Only the few paths below exist; none is a file name.
Bound to loopback unless `--host` says otherwise; then only requests for a loopback name are answered, so that a page
of another site, whose name was made to point here (DNS rebinding), reads nothing. All that runs write is put into the
page as text, never as markup, and a policy forbids scripts, styles and requests from anywhere else.
"""

from __future__ import annotations

import json
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from configs.errors import ConfigError
from launcher.board import Board
from launcher.prometheus import CONTENT_TYPE, metrics_text

PORT = 8642
LOOPBACK = ("localhost", "127.0.0.1", "::1")
WEB = Path(__file__).with_name("web")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """Serves one board; each request in a thread."""

    daemon_threads = True

    def __init__(self, board: Board, host: str, port: int) -> None:
        """Raises OSError where the address cannot be had."""
        self.board, self.host = board, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def address(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{shown}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout: ClassVar[int] = 10  # seconds in which a request must have come
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "millstream", ""

    def do_GET(self) -> None:
        if not self._is_for_us():
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers to loopback names only\n")
        path = self.path.partition("?")[0]
        if path in FILES:
            name, content_type = FILES[path]
            return self._answer(HTTPStatus.OK, content_type, (WEB / name).read_bytes())
        board = self.server.board
        if path == "/state.json":
            return self._answer_json(board.states())
        if path == "/curves.json":
            return self._answer_json(board.curves())
        if path == "/metrics":
            return self._answer(HTTPStatus.OK, CONTENT_TYPE, metrics_text(board).encode())
        self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there are /, /state.json, /curves.json and /metrics\n")

    do_HEAD = do_GET

    def _is_for_us(self) -> bool:
        if self.server.host not in LOOPBACK:
            return True
        name = self.headers.get("Host", "")
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        return name in LOOPBACK

    def _answer_json(self, value: object) -> None:
        self._answer(HTTPStatus.OK, "application/json", json.dumps(value, allow_nan=False).encode())

    def _answer(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass  # one line a second and viewer would hide what matters on this terminal


def serve(board: Board, host: str, port: int | None) -> int:
    """Serve until Ctrl-C. Without a port: PORT, or a free one if it is taken. Raises ConfigError for a bad address."""
    server = open_server(board, host, port)
    try:
        board.keep_fresh()
        print(f"watching {', '.join(run.name for run in board.runs)} at {server.address} (Ctrl-C ends)", flush=True)
        if host not in LOOPBACK:
            print(f"bound to {host}: everybody who reaches this machine there can read metrics, samples and incidents")
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    return 0


def open_server(board: Board, host: str, port: int | None) -> Server:
    try:
        return Server(board, host, PORT if port is None else port)
    except OSError as error:
        if port is None and host in LOOPBACK:
            return Server(board, host, 0)
        raise ConfigError(f"--host {host} --port {port or PORT}: {error.strerror}; choose another one") from None
