"""What is shown of watched runs, for the page, the terminal and Prometheus: refreshed by one thread, read by many.

Nothing here writes, and readers get what the thread found last: ten viewers cost the file system what one does.
"""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import stragglers
from launcher.curves import Curves
from launcher.run_state import RunState, look, metrics_file, seconds_of
from launcher.utilisation import share_per_token

KEYS = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second")
MEMORY_KEYS = ("memory_bytes", "gpu_bytes")
READ_SECONDS = 0.5  # at a time, of one run's metrics
LOOK_SECONDS = 1.0
QUEUE_LOOK_SECONDS = 10.0  # asking SLURM costs its controller
MOST_RANKS = 64  # that are shown one by one
MOST_INCIDENTS = 100
MARKS_SECONDS = 12.0  # of the ranks' phases
LARGEST_SAMPLES = 1 << 20  # bytes


@dataclass
class Watched:
    """One run that is watched."""

    run_dir: Path
    name: str
    curves: Curves
    memory: Curves
    state: RunState
    looked: float = 0.0  # by time.monotonic
    samples: list[str] = field(default_factory=list)
    device: tuple[str, int] | None = None  # the GPU and the number of ranks that `share` is for
    share: float | None = None  # of the GPUs' peak, of one token a second

    @property
    def version(self) -> int:
        return self.curves.version + self.memory.version

    @property
    def mfu(self) -> float | None:
        speed = self.state.tokens_per_second
        return None if self.share is None or speed is None else self.share * speed

    def points(self) -> dict[str, list[list[float]]]:
        points = self.curves.points() | self.memory.points()
        if self.share is not None and "tokens_per_second" in points:
            points["mfu"] = [
                [step, *(self.share * each for each in rest)] for step, *rest in points["tokens_per_second"]
            ]
        return points

    def look_again(self) -> None:
        self.state, self.looked = look(self.run_dir), time.monotonic()
        self.samples = read_samples(self.run_dir)
        device = str((self.state.straggler or {}).get("device", "")), len(self.state.rings)
        if device[0] and device != self.device:
            self.device, self.share = device, share_per_token(self.run_dir, *device)


class Board:
    """The runs, in the order given; `refresh` is called by one thread, the rest by any."""

    def __init__(self, run_dirs: list[Path]) -> None:
        """Raises ConfigError if one of them is no run."""
        names = names_of(run_dirs)
        self.runs = [
            Watched(
                path, name, Curves(metrics_file(path), KEYS), Curves(path / stragglers.FILE, MEMORY_KEYS),
                look(path),
            )
            for path, name in zip(run_dirs, names, strict=True)
        ]  # fmt: skip

    def refresh(self) -> bool:
        """Look at every run once; False if there are metrics left to read."""
        is_done = True
        for run in self.runs:
            patience = QUEUE_LOOK_SECONDS if run.state.launch and run.state.launch.kind == "slurm" else LOOK_SECONDS
            if time.monotonic() - run.looked >= patience:
                run.look_again()
            if (path := metrics_file(run.run_dir)) != run.curves.path:  # fine-tuning has begun its next seed
                run.curves = Curves(path, KEYS)
            is_done = run.curves.read(READ_SECONDS) and is_done
            run.memory.read(READ_SECONDS)
        return is_done

    def keep_fresh(self) -> None:
        """Refresh now, so that there is something to show, and then from a thread, as long as this process lives."""
        self.refresh()

        def work() -> None:
            while True:
                try:
                    is_done = self.refresh()
                except Exception as error:  # a run directory that was removed meanwhile; the others go on
                    print(f"millstream watch: {error}", flush=True)
                    is_done = True
                time.sleep(LOOK_SECONDS if is_done else 0.01)

        threading.Thread(target=work, name="refresh", daemon=True).start()

    def states(self) -> dict[str, Any]:
        """The runs without their curves, for the page; small."""
        return {"time": time.time(), "runs": [describe(run) for run in self.runs]}

    def curves(self) -> dict[str, Any]:
        return {
            "runs": [{"version": run.version, "width": run.curves.width, "points": run.points()} for run in self.runs]
        }


def names_of(run_dirs: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    paths = [path.resolve() for path in run_dirs]
    for number in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-number:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def describe(run: Watched) -> dict[str, Any]:
    """One run for the page: plain numbers and texts. NaN becomes a text, because JSON has none."""
    state = run.state
    return {
        "name": run.name,
        "version": run.version,
        "read": round(run.curves.share_read, 3),
        "state": state.state,
        "why": state.why,
        "launcher": state.launch.kind if state.launch else None,
        "step": state.step,
        "num_steps": state.num_steps,
        "seconds_left": state.seconds_left,
        "loss": finite(state.line.get("loss")),
        "eval_loss": finite(state.evaluation.get("eval_loss")),
        "tokens": finite(state.line.get("tokens")),
        "tokens_per_second": finite(state.tokens_per_second),
        "step_seconds": finite(state.step_seconds),
        "mfu": finite(run.mfu),
        "checkpoint": state.checkpoint,
        "last_mark": state.last_mark,
        "num_ranks": len(state.rings),
        "ranks": ranks(state) if state.is_running else [],
        "straggler": straggler(state.straggler) if state.straggler else None,
        "incidents": [incident(each) for each in state.incidents[-MOST_INCIDENTS:]],
        "num_incidents": len(state.incidents),
        "samples": run.samples,
    }


def ranks(state: RunState) -> list[dict[str, Any]]:
    """The first ranks' newest marks: [seconds before the newest of all, step, phase], oldest first."""
    newest = state.last_mark or 0.0
    shown = []
    for rank, (ring, process) in enumerate(zip(state.rings[:MOST_RANKS], state.processes, strict=False)):
        entry: dict[str, Any] = {"rank": rank, "process": process, "marks": []}
        if ring:
            marks = [mark for mark in ring.marks if newest - mark[0] <= MARKS_SECONDS]
            marks = marks or list(ring.marks[-1:])
            entry |= {"host": ring.host, "pid": ring.pid, "step": ring.step + 1, "phase": ring.phase}
            entry["marks"] = [[round(newest - when, 4), step + 1, phase] for when, step, phase in marks]
        shown.append(entry)
    return shown


def straggler(line: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: finite(line.get(name)) for name in ("rank", "seconds", "step_seconds", "step")}
    return numbers | {"phase": str(line.get("phase")), "time": seconds_of(line.get("time"))}


def incident(each: dict[str, Any]) -> dict[str, Any]:
    """What is shown of it; numbers of its kind, which may be long lists, stay in the file."""
    return {
        "time": seconds_of(each.get("time")),
        "kind": str(each.get("kind")),
        "step": finite(each.get("step")),
        "rank": finite(each.get("rank")),
        "text": str(each.get("text", "")),
    }


def read_samples(run_dir: Path) -> list[str]:
    path = run_dir / "samples.json"
    try:
        if path.stat().st_size > LARGEST_SAMPLES:
            return []
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(sample) for sample in samples][:8] if isinstance(samples, list) else []


def finite(value: Any) -> float | str | None:
    """The number as it is, or NaN and infinity as texts."""
    if not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else str(float(value))
