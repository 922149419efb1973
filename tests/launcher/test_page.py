"""The page of `millstream watch`: what its server answers, and what a real browser makes of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.incidents import append_incident
from launcher import board as board_module
from launcher.board import Board, names_of
from launcher.cli import main
from launcher.page import PORT, Server, open_server
from tests.conftest import ROOT
from tests.launcher.browser import chromium, opened
from tests.launcher.run_directories import make_ring, make_run, step_line

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run that is running, with an incident and a sample that try to be markup."""
    run_dir = make_run(tmp_path / EVIL)
    append_incident(run_dir, "spike", f"{EVIL} at step 7", step=7)
    (run_dir / "samples.json").write_text(json.dumps(["A </pre><script>alert(2)</script> sample"]))
    now = time.time()
    make_ring(run_dir, 0, 2, [(now - 2, 40, "forward"), (now - 1, 40, "backward")])
    make_ring(run_dir, 1, 2, [(now - 2, 40, "data"), (now - 1, 40, "reduce")])
    return run_dir


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def start(board: Board, host: str = "127.0.0.1") -> Server:
        board.refresh()
        servers.append(open_server(board, host, 0))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def test_state_and_curves_of_several_runs(run_dir, tmp_path, serve):
    server = serve(Board([run_dir, make_run(tmp_path / "other", steps=100)]))
    first, other = json.loads(ask(server, "/state.json")[1])["runs"]
    assert (first["state"], first["step"], first["num_steps"], first["checkpoint"]) == ("running", 40, 100, 40)
    assert [rank["phase"] for rank in first["ranks"]] == ["backward", "reduce"]
    assert (other["name"], other["state"]) == ("other", "finished")
    curves = json.loads(ask(server, "/curves.json")[1])["runs"]
    assert [len(curve["points"]["loss"]) for curve in curves] == [40, 100]


@pytest.mark.parametrize(
    "path", ["/../board.py", "/%2e%2e/board.py", "/web/index.html", "//etc/passwd", "/page.js/../../board.py", "/?x"]
)
def test_nothing_but_the_few_paths_exists(run_dir, serve, path):
    status, content, _ = ask(serve(Board([run_dir])), path)
    assert (status == 404) or (path == "/?x" and status == 200 and "<title>millstream watch" in content)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(run_dir, serve, method):
    assert ask(serve(Board([run_dir])), "/", method)[0] == 501


def test_loopback_server_answers_to_loopback_names_only(run_dir, serve):
    server = serve(Board([run_dir]))
    assert [ask(server, "/state.json", Host=name)[0] for name in ("localhost:1", "127.0.0.1", "[::1]:8642")] == [
        200
    ] * 3
    assert ask(server, "/state.json", Host="evil.example:8642")[0] == 403


def test_every_answer_forbids_scripts_from_elsewhere(run_dir, serve):
    for path in ("/", "/state.json", "/metrics", "/nothing"):
        _, _, headers = ask(serve(Board([run_dir])), path)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_page_needs_nothing_from_the_network_and_puts_in_no_markup():
    for name in ("index.html", "page.css", "page.js"):
        content = (ROOT / "launcher/web" / name).read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", content)
        assert "innerHTML" not in content and "insertAdjacentHTML" not in content


def test_metrics_are_prometheus_text(run_dir, serve):
    status, text, headers = ask(serve(Board([run_dir])), "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'^[a-z_]+\{([a-z_]+="([^"\\\n]|\\.)*",?)+\} (NaN|[+-]Inf|-?[0-9.e+-]+)$')
    typed: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in typed
            typed.add(name)
        elif not line.startswith("#"):
            assert sample.match(line) and line.partition("{")[0] in typed, line
    assert f'millstream_step{{run="{EVIL}"}} 40\n' in text
    assert f'millstream_incidents_total{{run="{EVIL}",kind="spike"}} 1\n' in text
    assert f'millstream_state{{run="{EVIL}",state="running"}} 1.0\n' in text


def test_names_are_as_long_as_it_takes_to_tell_runs_apart():
    assert names_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert names_of([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]


def test_taken_port_is_an_error_if_asked_for_and_else_another_is_found(run_dir, serve, capsys):
    server = serve(Board([run_dir]))
    port = server.server_address[1]
    assert main(["watch", str(run_dir), "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in capsys.readouterr().err
    first = open_server(server.board, "127.0.0.1", None)
    second = open_server(server.board, "127.0.0.1", None)
    assert first.server_address != second.server_address and PORT < 65536
    first.server_close()
    second.server_close()


@pytest.mark.parametrize("words", [["--port", "x"], ["--port"], ["--all"], ["--terminal", "--port", "1"]])
def test_mistakes_on_the_command_line_are_named(run_dir, capsys, words):
    assert main(["watch", str(run_dir), *words]) == 2 and "expected" in capsys.readouterr().err


def test_command_says_where_the_page_is_and_ends_with_ctrl_c(run_dir):
    command = [sys.executable, "-u", "-m", "launcher.cli", "watch", str(run_dir), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = process.stdout.readline()
    assert re.search(r"watching .* at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends\)", said)
    process.send_signal(2)
    assert process.wait(timeout=10) == 0


def page_in_browser(url: str, tmp_path: Path, *flags: str) -> str:
    """The document as it is after the page has asked for news a few times; nothing may have been complained about."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
               "--virtual-time-budget=5000", "--enable-logging=stderr", *flags, "--dump-dom", url]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    return shown.stdout


@pytest.mark.slow
def test_browser_draws_runs_curves_ranks_incidents_and_samples_as_text_and_keeps_up(
    run_dir, tmp_path, serve, monkeypatch
):
    monkeypatch.setattr(board_module, "LOOK_SECONDS", 0.0)

    class Growing(Board):
        """A run that makes a step whenever the page asks."""

        def states(self):
            step = self.runs[0].state.step + 1
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(step_line(step)) + "\n")
            self.refresh()
            return super().states()

    server = serve(Growing([run_dir, make_run(tmp_path / "second", steps=30, floor=1.5)]))
    shown = page_in_browser(server.address, tmp_path)
    assert shown.count('class="card chart"') == 4  # loss, learning rate, gradient norm, tokens a second
    assert shown.count('class="line c0"') >= 4 and shown.count('class="line c1"') >= 4
    assert 'class="backward"' in shown and 'class="reduce"' in shown
    assert "&lt;img src=x onerror=alert(1)&gt; at step 7" in shown and "<img" not in shown
    assert "A &lt;/pre&gt;&lt;script&gt;alert(2)&lt;/script&gt; sample" in shown
    steps = int(re.search(r"step (\d+) of 100", shown)[1])
    assert steps >= 43  # it has asked at least three times, without a reload
    assert "live · " in shown


@pytest.mark.slow
def test_browser_takes_a_picture(run_dir, tmp_path, serve):
    server = serve(Board([run_dir]))
    picture = tmp_path / "page.png"
    page_in_browser(server.address, tmp_path, "--window-size=1200,900", f"--screenshot={picture}")
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert (0x1F, 0x6F, 0xB2) in {colour for _, colour in colours}  # the curves are there


@pytest.mark.slow
def test_mouse_shows_values_and_a_run_can_be_taken_away_while_the_page_keeps_up(run_dir, tmp_path, serve):
    board = Board([run_dir, make_run(tmp_path / "second", steps=30, floor=1.5)])
    server = serve(board)

    async def look() -> None:
        async with opened(server.address, tmp_path) as page:
            await page.wait_for("document.querySelectorAll('.line.c1').length >= 4")
            await page.evaluate("window.sameDocument = true")
            box = json.loads(
                await page.evaluate("JSON.stringify(document.querySelector('.chart > svg').getBoundingClientRect())")
            )
            x, y = box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5
            await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            shown = await page.evaluate("document.getElementById('tip').innerText")
            found = re.search(r"second, step (\d+): (\S+)\n", shown)
            assert found and 15 <= int(found[1]) <= 25 and shown.count("held out") == 2
            assert found[2] == f"{step_line(int(found[1]), 1.5)['loss']:.3f}"

            await page.evaluate("document.querySelectorAll('.run input')[1].click()")
            assert await page.evaluate("document.querySelectorAll('#charts .line.c1').length") == 0
            await page.evaluate("document.querySelectorAll('.run input')[1].click()")
            assert await page.evaluate("document.querySelectorAll('#charts .line.c1').length") >= 4

            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(step_line(41)) + "\n")
            board.runs[0].looked = 0.0
            board.refresh()
            await page.wait_for("document.querySelector('.progress').textContent.includes('step 41 of 100')")
            assert await page.evaluate("window.sameDocument") is True

    asyncio.run(look())
