"""How far a build is: bars on a terminal, few lines elsewhere, and what is done is said rightly."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline import progress
from data_pipeline.progress import Progress, duration


def shown(width: int, is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=is_terminal, color_system=None), out


def test_without_a_terminal_each_phase_is_a_line_that_is_not_wrapped(tmp_path):
    console, out = shown(20, False)
    with Progress(console) as bars:
        with bars.phase("clean", 2_500_000) as advance:
            advance(1_000_000)
            time.sleep(0.1)
            advance(1_500_000)
        with bars.phase("duplicates"):
            pass
        with bars.phase("done before", 0):
            pass
    first, second = out.getvalue().splitlines()
    assert first.startswith("clean: 2.5/2.5 MB, 2") and first.endswith("MB/s, 0.1 s")
    assert second == "duplicates: 0.0 s"


def test_long_phase_without_a_terminal_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.05)
    console, out = shown(80, False)
    with Progress(console) as bars, bars.phase("clean", 4_000_000) as advance:
        advance(1_000_000)
        time.sleep(0.2)
    first = out.getvalue().splitlines()[0]
    assert first.startswith("clean: 1.0/4.0 MB, ") and first.endswith(" left")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bars_fit_into_the_terminal_and_end_full(width):
    console, out = shown(width, True)
    with Progress(console) as bars:
        with bars.phase("tokenize", 123_456_789_012) as advance:
            advance(123_456_000_000)
        with bars.phase("duplicates"):
            pass
    last = [line.split("\r")[-1].split("\x1b[2K")[-1].rstrip() for line in out.getvalue().splitlines()[-3:]]
    assert all(len(line) <= width for line in last)
    assert any("123.5/123.5 GB" in line for line in last)


def test_files_that_appear_advance_the_bar_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    console, _ = shown(80, False)
    (tmp_path / "other").touch()
    with Progress(console) as bars, bars.phase("clean", 30, tmp_path, {"a": 10, "b": 20}):
        (tmp_path / "b").touch()
        assert settles_at(bars, 20)
        (tmp_path / "a").touch()
        assert settles_at(bars, 30)


def settles_at(bars: Progress, expected: int) -> bool:
    deadline = time.monotonic() + 10
    while bars.bars.tasks[0].completed != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # and stays there
    return bars.bars.tasks[0].completed == expected


def test_phase_that_fails_is_not_said_to_be_done(tmp_path):
    console, out = shown(80, False)
    with pytest.raises(ValueError), Progress(console) as bars, bars.phase("clean", 100, Path(tmp_path), {"a": 100}):
        raise ValueError
    assert out.getvalue() == ""


def test_durations_are_short():
    assert [duration(seconds) for seconds in (0.04, 59.9, 61, 3599, 7325, 100 * 3600)] == [
        "0.0 s", "59.9 s", "1 min 1 s", "59 min 59 s", "2 h 2 min", "100 h 0 min",
    ]  # fmt: skip
