"""Starts a run again after a failure, at most `launch.restarts` times in a row without progress.

The run goes on from its newest checkpoint, on as many ranks as are left: elastic resume makes any number do, with the
same order of samples. Progress is a checkpoint beyond the step which the run had reached when it failed last; from then
on its failures count anew. What a user has to mend (exit code 2), what the guard has stopped (70) and what was asked to
stop (128 + the signal) is not started again.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from configs.deepspeed_json import deepspeed_json
from configs.incidents import append_incident
from configs.launches import Kind, Launch, write_launch
from configs.load import ConfigError
from configs.schema import PretrainConfig
from configs.tuning import FinetuneConfig
from launcher.local import GUARD, MISTAKE, Outcome, Signals, default_num_ranks, run_local, visible_devices
from launcher.ssh import hosts_that_answer, run_hosts
from launcher.started import Node

Config = PretrainConfig | FinetuneConfig


@dataclass(frozen=True)
class Attempt:
    """What the next start is made from."""

    num_ranks: int
    devices: tuple[str, ...] | None  # none: all that are visible
    failures: int = 0  # in a row without progress
    rank: int | None = None  # the one that failed last
    step: int = -1  # which the run had reached when it failed last


def run(
    module: str, words: list[str], config: Config, num_ranks: int | None, hosts: dict[str, int] | None = None
) -> int:
    """Run to the end, or until it is not to be started again; returns the exit code of the last start.

    With `hosts` (name: slots) the ranks run there; what is said of devices is then said of slots.
    """
    run_dir, launch = Path(config.run_dir), config.launch
    signals = Signals()
    attempt = Attempt(num_ranks or (sum(hosts.values()) if hosts else default_num_ranks()), None)
    while True:
        note_launch(run_dir, attempt.num_ranks, "hosts" if hosts else "local")
        outcome = run_once(module, words, attempt, config, signals, hosts)
        if signals.number is not None or not may_start_again(outcome) or not launch.restarts:
            return outcome.code
        step = newest_checkpoint(run_dir)
        devices = slot_names(hosts, hosts_that_answer(hosts)) if hosts else visible_devices()
        if hosts and not devices:
            say("given up: no host of the hostfile answers")
            return outcome.code
        failed, attempt = attempt, after(attempt, outcome, step, config, devices)
        if hosts and attempt.devices is None:
            attempt = replace(attempt, devices=tuple(devices))
        if attempt.failures > launch.restarts:
            say(f"given up after {attempt.failures} failures without progress; launch.restarts={launch.restarts}")
            return outcome.code
        seconds = launch.backoff_seconds * 2 ** (attempt.failures - 1)
        fewer = f" instead of {failed.num_ranks}" if attempt.num_ranks < failed.num_ranks else ""
        where = f"on {attempt.num_ranks} ranks{fewer}, from step {step}"
        text = f"restart {attempt.failures} of {launch.restarts} in {seconds:g} s, {where}"
        say(text)
        numbers = {"num_ranks": attempt.num_ranks, "code": outcome.code}
        append_incident(run_dir, "restart", text, step=step, rank=outcome.rank, **numbers)
        if signals.come_within(seconds):
            return 128 + (signals.number or 0)


def run_once(
    module: str, words: list[str], attempt: Attempt, config: Config, signals: Signals, hosts: dict[str, int] | None
) -> Outcome:
    run_dir, launch = Path(config.run_dir), config.launch
    if hosts is None:
        return run_local(module, words, attempt.num_ranks, run_dir, signals, launch.stall_seconds, attempt.devices)
    slots = slots_used(attempt, hosts)
    command = ["-m", module, *words]
    return run_hosts(command, slots, run_dir, signals, launch.stall_seconds, launch.silence_seconds)


def slot_names(hosts: dict[str, int], names: Iterable[str]) -> list[str]:
    """HOST:0, HOST:1, ... of these hosts, in the order of the hostfile. Pure."""
    chosen = set(names)
    return [f"{host}:{slot}" for host, number in hosts.items() if host in chosen for slot in range(number)]


def slots_used(attempt: Attempt, hosts: dict[str, int]) -> dict[str, int]:
    """The number of ranks on each host that has any, hosts in the order of the hostfile. Pure."""
    used = (attempt.devices or slot_names(hosts, hosts))[: attempt.num_ranks]
    return dict(Counter(slot.rpartition(":")[0] for slot in used))


def run_on_node(module: str, words: list[str], config: Config, num_ranks: int | None, node: Node) -> int:
    """Run the ranks of this machine, one of several, once: who starts all the machines starts them again."""
    each, run_dir = num_ranks or node.num_ranks or default_num_ranks(), Path(config.run_dir)
    if node.number == 0:
        note_launch(run_dir, each * node.count, "hosts")
    return run_local(module, words, each, run_dir, Signals(), config.launch.stall_seconds, node=node).code


def note_launch(run_dir: Path, num_ranks: int, kind: Kind = "local") -> None:
    """Write run_dir/launch.json for this process. Raises ConfigError where `run_dir` cannot be written."""
    try:
        command = ["millstream", *sys.argv[1:]]
        job = os.environ.get("SLURM_JOB_ID") if kind == "slurm" else None
        write_launch(run_dir, Launch(kind, command, job, None if job else os.getpid(), num_ranks))
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written ({error}); choose a directory you can write to"
        ) from None


def may_start_again(outcome: Outcome) -> bool:
    return outcome.kind in ("failed", "stalled") and outcome.code not in (MISTAKE, GUARD)


def after(attempt: Attempt, outcome: Outcome, checkpoint: int, config: Config, devices: list[str]) -> Attempt:
    """The next attempt, given the newest checkpoint's step and the devices there are now. Pure.

    As many ranks as before; fewer where there are fewer devices, or where the same rank failed again without progress:
    then its device is left out, and the size is the largest one below that divides the batch.
    """
    progress = checkpoint > attempt.step
    failures = 1 if progress else attempt.failures + 1
    again = not progress and outcome.rank is not None and outcome.rank == attempt.rank
    using = [device for device in devices if attempt.devices is None or device in attempt.devices]
    if again and outcome.rank is not None and outcome.rank < len(using) > 1:
        del using[outcome.rank]
    largest = attempt.num_ranks - 1 if again else attempt.num_ranks
    if using:
        largest = min(largest, len(using))
    return replace(
        attempt,
        num_ranks=size_that_fits(config, max(1, largest)),
        devices=tuple(using) if attempt.devices is not None or len(using) < len(devices) else None,
        failures=failures,
        rank=outcome.rank,
        step=max(attempt.step, outcome.step, checkpoint),
    )


def size_that_fits(config: Config, largest: int) -> int:
    """The largest number of ranks, at most `largest`, over which the batch divides."""
    for num_ranks in range(largest, 1, -1):
        try:
            deepspeed_json(config, num_ranks)
        except ConfigError:
            continue
        return num_ranks
    return 1


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint that was finished; 0 without one."""
    finished = (manifest.parent.name for manifest in run_dir.glob("checkpoints/step-*/manifest.json"))
    return max((int(name.removeprefix("step-")) for name in finished), default=0)


def say(text: str) -> None:
    print(f"millstream: {text}", file=sys.stderr, flush=True)
