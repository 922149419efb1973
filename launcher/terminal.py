"""`millstream watch RUN_DIR ... --terminal`: the same as the page, in the terminal, redrawn every second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.board import Board, Watched
from launcher.logs import CONTROLS
from launcher.run_state import BAD, duration
from launcher.status import incident_line, state_line, straggler_line

REDRAW_SECONDS = 1.0
BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = (
    ("loss", "loss"),
    ("eval_loss", "held out"),
    ("lr", "lr"),
    ("grad_norm", "grad norm"),
    ("tokens_per_second", "tokens/s"),
)
RANK_ROWS = 16  # of a run; further ranks are counted by their phases
INCIDENTS = 5
COLOURS = {
    "data": "yellow",
    "forward": "blue",
    "backward": "bright_blue",
    "step": "green",
    "save": "red",
    "evaluate": "magenta",
}


def show(board: Board) -> int:
    """Redraw until Ctrl-C; returns 0."""
    console = Console()
    try:
        board.keep_fresh()
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(view(board, console.width), refresh=True)
                time.sleep(REDRAW_SECONDS)
    except KeyboardInterrupt:
        return 0


def view(board: Board, width: int) -> RenderableType:
    """All runs, one under the other; the details of a run only where there is one."""
    alone = len(board.runs) == 1
    return Group(
        *(Panel(body(run, width - 4, alone), title=Text(plain(run.name)), title_align="left") for run in board.runs)
    )


def body(run: Watched, width: int, with_details: bool) -> RenderableType:
    state = run.state
    parts: list[RenderableType] = [Text(plain(state_line(state)), style="red" if state.state in BAD else "green")]
    progress = f"step {state.step:,}" + (f" of {state.num_steps:,}" if state.num_steps else "")
    if state.seconds_left:
        progress += f", about {duration(state.seconds_left)} left"
    if run.mfu is not None:
        progress += f", MFU {run.mfu:.1%}"
    if state.checkpoint is not None:
        progress += f", checkpoint {state.checkpoint:,}"
    parts.append(Text(progress))
    if state.num_steps:
        bar = Table.grid()  # by itself a bar ends without a new line
        bar.add_row(
            ProgressBar(total=state.num_steps, completed=min(state.step, state.num_steps), width=min(width, 60))
        )
        parts.append(bar)
    parts.append(curve_table(run, width))
    if state.is_running and state.rings:
        parts.append(rank_table(run) if with_details else phase_counts(run))
    if state.straggler:
        parts.append(Text(plain(f"behind: {straggler_line(state.straggler)}")))
    for incident in state.incidents[-(INCIDENTS if with_details else 1) :]:
        parts.append(Text(plain(incident_line(incident)), style="yellow", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def curve_table(run: Watched, width: int) -> Table:
    """Of each curve its newest value and a line of blocks."""
    table = Table.grid(padding=(0, 2))
    points = run.curves.points()
    for key, name in CURVES:
        if values := [point[1] for point in points.get(key, [])]:
            newest = f"{values[-1]:,.0f}" if abs(values[-1]) >= 1000 else f"{values[-1]:.4g}"
            table.add_row(name, newest, Text(sparkline(values, max(10, min(80, width - 26))), style="cyan"))
    return table


def rank_table(run: Watched) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    state = run.state
    for rank, ring in enumerate(state.rings[:RANK_ROWS]):
        if ring is None:
            table.add_row(f"rank {rank}", "no mark yet")
            continue
        age = duration(max(0.0, time.time() - ring.since))
        phase = Text(ring.phase, style=COLOURS.get(ring.phase, ""))
        table.add_row(
            f"rank {rank}", phase, f"step {ring.step + 1:,}", f"for {age}", state.processes[rank], plain(ring.host)
        )
    return Group(table, phase_counts(run)) if len(state.rings) > RANK_ROWS else table


def phase_counts(run: Watched) -> Text:
    counted = Counter(ring.phase if ring else "no mark yet" for ring in run.state.rings)
    return Text(f"{len(run.state.rings)} ranks: " + ", ".join(f"{n} in {phase}" for phase, n in counted.most_common()))


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most `width` blocks, each the mean of as many neighbours; the lowest is the lowest block."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def plain(text: Any) -> str:
    return CONTROLS.sub(" ", str(text))
