"""`millstream prove kills CONFIG [--ranks N] [kills=100] [steps=40] [seed=0] [key=value ...]`: is any moment safe?

An undisturbed run of `steps` steps; then the same command again and again in another directory, its ranks killed at
random moments (`kills`), until it comes to its end; and that anew until there were enough kills. After each kill:

1. every line of metrics.jsonl is the undisturbed run's, bit for bit, clocks aside;
2. the newest checkpoint is at most one interval older than the newest whose saving had begun before the last finished
   step (see `oldest_allowed`);
3. the next start goes on from exactly that checkpoint, so it is whole, and from no earlier one;
4. the launcher would have started the run again by itself, had launch.restarts allowed it.

At the end of each run all of metrics.jsonl and the final checkpoint are the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import ConfigError, load, load_pretrain
from configs.phases import read_ring, ring_path
from configs.schema import PretrainConfig
from launcher.kills import Killer, Life, Moment, draw
from launcher.local import Outcome, default_num_ranks, run_local
from launcher.restarts import may_start_again, newest_checkpoint
from launcher.resume_comparison import read_lines

DEFAULTS = {"kills": 100, "steps": 40, "seed": 0}
LEAST = {"kills": 1, "steps": 8, "seed": 0}
CLOCKS = ("seconds", "_per_second")  # how the names of those numbers end that are measured with a clock
SHOWN_LINES = 30  # of a run that ended by itself
Line = dict[str, Any]  # of metrics.jsonl


class Differs(Exception):
    """The first difference between what was found and what was promised, as a sentence."""


@dataclass(frozen=True)
class Plan:
    """What is run: every start has the same words, in one of several run directories of `folder`."""

    config: PretrainConfig
    words: list[str]
    num_ranks: int
    folder: Path

    @property
    def num_steps(self) -> int:
        return self.config.train.num_steps


@dataclass(frozen=True)
class Kill:
    """One kill, and what there was afterwards."""

    ranks: tuple[int, ...]  # that were killed
    is_all: bool
    phase: str  # of the first of them
    step: int
    lost: int  # steps that were finished and are to be made again
    checkpoint: int  # step of the newest
    is_unfinished: bool  # a save or a removal was cut off: its directory is there
    seconds: float | None  # from its start to its first step; none: it did not come so far

    def __str__(self) -> str:
        place = "before the first mark" if self.phase == "import" else f"in phase {self.phase} of step {self.step}"
        left = ", a directory half written or half removed" if self.is_unfinished else ""
        who = "all ranks" if self.is_all else f"rank {', '.join(map(str, self.ranks))}"
        return f"{who} killed {place}{left}: steps lost {self.lost}, checkpoint {self.checkpoint}"


def prove_kills(file: str, words: list[str], num_ranks: int | None) -> int:
    """Run, kill, compare and print; 0, or 1 at the first difference. Raises ConfigError where no proof can be made."""
    numbers, overrides = take_numbers(words)
    ranks = num_ranks or default_num_ranks()
    own = own_words(file, overrides, numbers["steps"])
    config = load_pretrain(file, [*overrides, *own])
    parent = Path(config.run_dir).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove-kills-", dir=parent))
    plan = Plan(config, ["--config", file, *overrides, *own], ranks, folder)
    if load_pretrain(file, overrides).train.budget is not None:
        print("train.budget is left out: with it the rate follows the clock, and no two runs are equal", flush=True)
    try:
        kills = run_and_kill(plan, numbers["kills"], random.Random(numbers["seed"]))
    except Differs as difference:
        print(f"\nDIFFERS: {difference}\nkept for a look at it: {folder}")
        return 1
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    print(summary(kills, config))
    return 0


def take_numbers(words: list[str]) -> tuple[dict[str, int], list[str]]:
    """The command's own numbers, kills, steps and seed, and the other words."""
    numbers, others = dict(DEFAULTS), []
    for word in words:
        name, _, value = word.partition("=")
        if name not in DEFAULTS:
            others.append(word)
        elif not value.isdigit() or int(value) < LEAST[name]:
            raise ConfigError(f"{word}: expected a number, at least {LEAST[name]}")
        else:
            numbers[name] = int(value)
    return numbers, others


def own_words(file: str, overrides: list[str], steps: int) -> list[str]:
    """In what the runs differ from the user's: their length, how often they save, and nothing leaves this machine.

    Eight intervals of saves, unless the command line gives checkpoint.every_steps. There is no wall-clock budget: with
    one the learning rate is a function of the clock, and no two runs are equal.
    """
    given = load(file, overrides)
    config = load_pretrain(file, overrides)
    every = config.checkpoint.every_steps if given.origin("checkpoint.every_steps") == "command line" else steps // 8
    if every > steps:
        raise ConfigError(f"checkpoint.every_steps={every}: expected at most steps={steps}")
    return [
        f"train.num_steps={steps}",
        f"train.schedule.warmup_steps={min(config.train.schedule.warmup_steps, steps)}",
        f"checkpoint.every_steps={every}",
        "checkpoint.upload=null",
        "checkpoint.local_dir=null",
        "train.resume=auto",
        "log.tensorboard=false",  # seconds of every start
        "train.budget=null",
    ]


def run_and_kill(plan: Plan, number: int, numbers: random.Random) -> list[Kill]:
    """The undisturbed run, then as many runs to their end as `number` kills need. Raises Differs."""
    undisturbed = plan.folder / "undisturbed"
    life, outcome = live(plan, undisturbed, None)
    if outcome.kind != "finished":
        raise ConfigError(f"prove kills: the undisturbed run ended with exit code {outcome.code}, see above")
    expected = comparable(undisturbed)
    step_seconds = statistics.median(line["step_seconds"] for line in read_metrics(undisturbed) if "loss" in line)
    every, start_seconds = plan.config.checkpoint.every_steps, life.seconds_to_first_step
    print(
        f"undisturbed: {plan.num_steps} steps of {step_seconds:.3f} s, the first after {start_seconds:.1f} s",
        flush=True,
    )
    kills: list[Kill] = []
    num_runs = 0
    while len(kills) < number:
        num_runs += 1
        run_dir, checkpoint = plan.folder / f"killed-{num_runs}", 0
        while True:
            moment = None
            if len(kills) < number:
                moment = draw(numbers, plan.num_ranks, every, start_seconds, step_seconds)
            life, outcome = live(plan, run_dir, moment)
            check_start(life, checkpoint)
            check_lines(comparable(run_dir), expected)
            checkpoint = newest_checkpoint(run_dir)
            if outcome.kind == "finished":
                break
            if not life.killed or not may_start_again(outcome):
                raise Differs(f"the run ended with exit code {outcome.code} ({outcome.kind}), which is no kill of ours")
            check_age(run_dir, checkpoint, plan.config)
            kills.append(describe(plan, run_dir, life, checkpoint))
            print(f"{len(kills):>4}  {kills[-1]}", flush=True)
        check_end(run_dir, undisturbed, plan.num_steps)
        print(f"      run {num_runs} is at its end: metrics and final checkpoint are equal", flush=True)
        shutil.rmtree(run_dir)
    return kills


def live(plan: Plan, run_dir: Path, moment: Moment | None) -> tuple[Life, Outcome]:
    """Start the run once; what it prints goes to a file, and is shown if it ends as it should not."""
    killer = Killer(run_dir, plan.num_ranks, plan.num_steps, moment)
    printed = plan.folder / "output.txt"
    printed.unlink(missing_ok=True)
    stall_seconds = plan.config.launch.stall_seconds
    with output_to(printed):
        try:
            words = [*plan.words, f"run_dir={run_dir}"]
            outcome = run_local("pretrain.train", words, plan.num_ranks, run_dir, killer, stall_seconds)
        finally:
            life = killer.end()
    if killer.number is not None:
        raise ConfigError(f"prove kills: stopped by {signal.Signals(killer.number).name}, nothing is proven")
    if outcome.kind != "finished" and (not life.killed or not may_start_again(outcome)):
        print(*printed.read_text(errors="replace").splitlines()[-SHOWN_LINES:], sep="\n", flush=True)
    return life, outcome


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Meanwhile what this process and those that it starts print goes to the end of `file`."""
    copies = []
    with file.open("ab") as target:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            copies.append(os.dup(number))
            os.dup2(target.fileno(), number)
    try:
        yield
    finally:
        for stream, number, copy in zip((sys.stdout, sys.stderr), (1, 2), copies, strict=True):
            stream.flush()
            os.dup2(copy, number)
            os.close(copy)


def read_metrics(run_dir: Path) -> list[Line]:
    return read_lines(run_dir / "metrics.jsonl")


def comparable(run_dir: Path) -> list[Line]:
    """The complete lines of metrics.jsonl without what is measured with a clock."""
    return [
        {name: value for name, value in line.items() if not name.endswith(CLOCKS)} for line in read_metrics(run_dir)
    ]


def check_lines(found: list[Line], expected: list[Line]) -> None:
    """Raises Differs unless `found` is how `expected` begins, to the last bit of every number."""
    for number, line in enumerate(found, 1):
        if number > len(expected):
            raise Differs(f"metrics.jsonl has {len(found)} lines, the undisturbed run's {len(expected)}")
        other = expected[number - 1]
        for name in [*other, *(name for name in line if name not in other)]:
            values = [json.dumps(of.get(name)) for of in (other, line)]  # floats with all of their digits, nan too
            if values[0] != values[1]:
                place = f"metrics.jsonl, line {number} (step {other['step']}), {name}"
                raise Differs(f"{place}: {values[0]} undisturbed, {values[1]} after kills")


def check_start(life: Life, checkpoint: int) -> None:
    """Raises Differs unless the start, if it came so far, went on from the newest checkpoint that it had found."""
    if life.first_step is not None and life.first_step != checkpoint:
        raise Differs(f"the run went on from step {life.first_step}, the newest checkpoint was of step {checkpoint}")


def check_age(run_dir: Path, checkpoint: int, config: PretrainConfig) -> None:
    """Raises Differs if the newest checkpoint is older than promised."""
    reached = newest_step(run_dir)
    allowed = oldest_allowed(reached, config.checkpoint.every_steps, config.checkpoint.background)
    if checkpoint < allowed:
        raise Differs(
            f"{reached} steps were finished, the newest checkpoint is of step {checkpoint} instead of {allowed}"
        )


def oldest_allowed(reached: int, every_steps: int, background: bool) -> int:
    """The step of the oldest checkpoint that may be the newest one when `reached` steps were finished. Pure.

    The newest save that has begun for sure is that of the last multiple of `every_steps` before `reached`: step n + 1
    begins when the save of step n has returned. Without `background` it is safe by then. With it, it may still be on
    its way to the disk; but it does not begin before the one an interval earlier is safe.
    """
    begun = max(reached - 1, 0) // every_steps * every_steps
    return max(0, begun - every_steps) if background else begun


def newest_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir) if "loss" in line), default=0)


def describe(plan: Plan, run_dir: Path, life: Life, checkpoint: int) -> Kill:
    ring = read_ring(ring_path(run_dir, life.killed[0]))
    came_to_steps = life.first_step is not None  # if not, steps and leftovers are those of an earlier start
    return Kill(
        is_all=len(life.killed) == plan.num_ranks,
        ranks=life.killed,
        phase=ring.phase if ring else "import",
        step=ring.step if ring else 0,
        lost=max(0, newest_step(run_dir) - checkpoint) if came_to_steps else 0,
        checkpoint=checkpoint,
        is_unfinished=came_to_steps and any((run_dir / "checkpoints").glob(".*")),
        seconds=life.seconds_to_first_step if came_to_steps else None,
    )


def check_end(run_dir: Path, undisturbed: Path, num_steps: int) -> None:
    """Raises Differs unless the metrics and the final checkpoint are those of the undisturbed run."""
    found, expected = comparable(run_dir), comparable(undisturbed)
    check_lines(found, expected)
    if len(found) < len(expected):
        raise Differs(f"metrics.jsonl has {len(found)} lines at the end, the undisturbed run's {len(expected)}")
    folders = [of / "checkpoints" / f"step-{num_steps:08d}" for of in (undisturbed, run_dir)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    if names[0] != names[1]:
        raise Differs(f"the final checkpoint has the files {names[1]}, the undisturbed run's {names[0]}")
    for name in names[0]:
        contents = [(folder / name).read_bytes() for folder in folders]
        if name == "manifest.json":
            contents = [without_clock(content) for content in contents]
        if contents[0] != contents[1]:
            raise Differs(f"{name} of the final checkpoint is not that of the undisturbed run")


def without_clock(manifest: bytes) -> bytes:
    """The manifest of a checkpoint without the seconds in its state, and so without its own checksum."""
    content = json.loads(manifest)
    content["state"] = {name: value for name, value in content["state"].items() if not name.endswith(CLOCKS)}
    content.pop("checksum")
    return json.dumps(content, sort_keys=True).encode()


def summary(kills: list[Kill], config: PretrainConfig) -> str:
    """A table of where the kills fell, and what they have cost."""
    phases = Counter(kill.phase for kill in kills)
    alls = Counter(kill.phase for kill in kills if kill.is_all)
    unfinished = Counter(kill.phase for kill in kills if kill.is_unfinished)
    lost = [kill.lost for kill in kills]
    seconds = [kill.seconds for kill in kills if kill.seconds is not None]
    lines = ["", f"{'in phase':12}{'kills':>8}{'of all ranks':>16}{'unfinished save':>18}"]
    for phase, count in [*phases.most_common(), ("together", len(kills))]:
        of = (alls.total(), unfinished.total()) if phase == "together" else (alls[phase], unfinished[phase])
        lines.append(f"{phase:12}{count:>8}{of[0]:>16}{of[1]:>18}")
    every = config.checkpoint.every_steps
    lines += ["", f"steps lost         median {statistics.median(lost):g}, largest {max(lost)} (saved every {every})"]
    if seconds:
        lines.append(f"seconds to go on   median {statistics.median(seconds):.1f}, largest {max(seconds):.1f}")
    lines.append("metrics, final loss and final checkpoint: equal, bit for bit")
    return "\n".join(lines)
