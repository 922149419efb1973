"""What `millstream doctor` starts on each host, one process a host: `python -m pretrain.host_checks REQUEST`.

It reports {"doctor": kind, "rank": n, ...}: the host's facts before anything that could fail, then what torch says,
then what the hosts measure together: clocks, the shared folder, the links between all pairs. Whoever does not appear in
time is left out. It never judges, and it ends itself after LIMIT_SECONDS whatever hangs.

A report is JSON in pieces of PIECE characters, each a line `doctor RANK + PIECE` (`.` instead of + for the last one):
srun mixes the longer lines of its tasks.

REQUEST is JSON: folder, cache, hosts (names to resolve), packages, token.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from pretrain.device_checks import torch_facts
from pretrain.host_facts import facts
from pretrain.placement import Placement, address, placement

PIECE = 700
LIMIT_SECONDS = 55.0
GATHER_SECONDS = 30.0  # from the start: a cold `import torch` from a shared file system takes its time
STEP_SECONDS = 15.0
PORT_SECONDS = 15.0
PAIR_SECONDS = 1.0  # for one round at most
NUM_PINGS = 8
STARTED = time.monotonic()


def check(place: Placement, request: dict[str, Any], say: Callable[..., None]) -> int:
    """Report everything; returns the exit code."""
    doing = {"what": "looking at its folders, names and GPUs"}
    stop_in_time(say, doing)
    rank, num_hosts = int(place.rank), int(place.world_size)
    problem, listener = open_port(place) if rank == 0 and num_hosts > 1 else (None, None)
    names = request["hosts"] or [place.master_addr]
    say("facts", **facts(request["folder"], request["cache"], names, request["packages"]))
    if num_hosts > 1:
        if rank:
            problem = reach_port(place)
        say("port", port=place.master_port, address=place.master_addr, **({"error": problem} if problem else {}))
    doing["what"] = "importing torch"
    say("torch", **torch_facts())
    if problem:
        return 1
    hosts = Hosts.alone(doing)
    if num_hosts > 1:
        doing["what"] = f"joining the others at {place.master_addr}:{place.master_port}"
        hosts = join(place, listener, doing)
        doing["what"] = "comparing clocks"
        if rank == 0:
            answer_pings(hosts)
        else:
            offset, error = ask_time(hosts)
            say("clock", offset_seconds=offset, error_seconds=error)
    measure_together(hosts, place, request, say)
    say("end")
    hosts.barrier("end", stays=True)
    return 0


def own_placement() -> Placement:
    """From the variables that doctor or srun have set; alone without any."""
    if "RANK" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        return Placement(*(os.environ[name] for name in names))
    found = placement(os.environ) or Placement("0", "1", "0", "1", "127.0.0.1", "0")
    return replace(found, master_addr=address(found.master_addr))


def reporter(place: Placement) -> Callable[..., None]:
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    lock = threading.Lock()

    def say(kind: str, **values: Any) -> None:
        rank = int(place.rank)
        text = json.dumps({"doctor": kind, "rank": rank, "hosts": int(place.world_size), "node": host} | values)
        with lock:
            for start in range(0, len(text), PIECE):
                end = "." if start + PIECE >= len(text) else "+"
                print(f"doctor {rank} {end} {text[start : start + PIECE]}", flush=True)

    return say


def stop_in_time(say: Callable[..., None], doing: dict[str, str]) -> None:
    """Whatever hangs, even in C, this host reports what it waited for and ends."""

    def stop() -> None:
        say("stuck", what=doing["what"])
        os._exit(1)

    timer = threading.Timer(LIMIT_SECONDS - (time.monotonic() - STARTED), stop)
    timer.daemon = True
    timer.start()


def open_port(place: Placement) -> tuple[str | None, socket.socket | None]:
    """Listen on the rendezvous port: what is wrong with it, and the open port.

    Without torch, so that a firewall is told from everything else, and before anything that takes its time. The
    kernel takes connections from then on; torch's store gets the port later.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return None, socket.create_server(
            ("", int(place.master_port)), family=family, dualstack_ipv6=both, backlog=1024
        )
    except OSError as error:
        return f"cannot listen: {error}", None


def reach_port(place: Placement) -> str | None:
    """Connect to it: what is wrong."""
    deadline, problem = time.monotonic() + PORT_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((place.master_addr, int(place.master_port)), timeout=5).close()
            return None
        except OSError as error:
            problem = str(error)
            time.sleep(0.2)
    return problem


@dataclass
class Hosts:
    """The hosts that have come, and the store through which they speak."""

    store: Any  # torch.distributed.Store, None for one host alone
    me: int  # place among the members
    members: list[int]  # their ranks
    doing: dict[str, str]

    @staticmethod
    def alone(doing: dict[str, str]) -> Hosts:
        return Hosts(None, 0, [0], doing)

    def barrier(self, name: str, stays: bool = False) -> None:
        """Wait until all members have come here. The first host holds the store: it `stays` until all have read."""
        if len(self.members) == 1:
            return
        self.doing["what"] = f"waiting for the others: {name}"
        if self.store.add(f"barrier/{name}", 1) == len(self.members):
            self.store.set(f"passed/{name}", "")
        self.store.wait([f"passed/{name}"], timedelta(seconds=STEP_SECONDS))
        if stays and self.store.add(f"gone/{name}", 1) and self.me == 0:
            deadline = time.monotonic() + 5
            while self.store.add(f"gone/{name}", 0) < len(self.members) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.2)  # the last answer is on its way


def join(place: Placement, listener: socket.socket | None, doing: dict[str, str]) -> Hosts:
    """Meet at the first host's store; those that have come in time are the members, the same on all."""
    import torch.distributed as dist

    rank, num_hosts = int(place.rank), int(place.world_size)
    wait = timedelta(seconds=max(5.0, GATHER_SECONDS + 5 - (time.monotonic() - STARTED)))
    port = int(place.master_port)
    if rank == 0:
        assert listener is not None
        store = dist.TCPStore(
            "localhost", port, is_master=True, timeout=wait, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    else:
        store = dist.TCPStore(place.master_addr, port, is_master=False, timeout=wait, wait_for_workers=False)
    store.set(f"here/{rank}", "")
    if rank == 0:
        while time.monotonic() - STARTED < GATHER_SECONDS:
            members = [other for other in range(num_hosts) if store.check([f"here/{other}"])]
            if len(members) == num_hosts:
                break
            time.sleep(0.05)
        store.set("members", json.dumps(members))
    members = json.loads(store.get("members"))
    if rank not in members:
        raise TimeoutError("came too late: the others have begun")
    return Hosts(store, members.index(rank), members, doing)


def answer_pings(hosts: Hosts) -> None:
    for other in hosts.members[1:]:
        for number in range(NUM_PINGS):
            hosts.store.wait([f"ping/{other}/{number}"], timedelta(seconds=STEP_SECONDS))
            hosts.store.set(f"pong/{other}/{number}", repr(time.time()))


def ask_time(hosts: Hosts, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """This host's clock minus that of the first one, and by how much that may be wrong, both in seconds."""
    exchanges = []
    me = hosts.members[hosts.me]
    for number in range(NUM_PINGS):
        asked = clock()
        hosts.store.set(f"ping/{me}/{number}", "")
        answer = float(hosts.store.get(f"pong/{me}/{number}"))
        exchanges.append((asked, answer, clock()))
    return clock_offset(exchanges)


def clock_offset(exchanges: list[tuple[float, float, float]]) -> tuple[float, float]:
    """From (asked, the other's time, answered) of several exchanges, by the quickest, as NTP does. Pure."""
    asked, answer, answered = min(exchanges, key=lambda exchange: exchange[2] - exchange[0])
    return (asked + answered) / 2 - answer, (answered - asked) / 2


def measure_together(hosts: Hosts, place: Placement, request: dict[str, Any], say: Callable[..., None]) -> None:
    from pretrain.folder_checks import check_folder

    folder, num_hosts = Path(request["folder"]).expanduser(), len(hosts.members)
    say("folder", **check_folder(folder, request["token"], hosts.me, num_hosts, hosts.barrier))
    if num_hosts == 1:
        return
    import torch

    from pretrain.pair_checks import measure_pair, own_address, rounds

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    here = own_address(place.master_addr)
    planned, left = rounds(num_hosts), LIMIT_SECONDS - 10 - (time.monotonic() - STARTED)
    seconds = min(PAIR_SECONDS, 0.5 * left / len(planned))
    for number, pairs in enumerate(planned):
        hosts.doing["what"] = f"an all-reduce of two hosts, round {number + 1} of {len(planned)}"
        for lower, higher in pairs:
            if hosts.me in (lower, higher):
                hosts.doing["what"] += f" (ranks {hosts.members[lower]} and {hosts.members[higher]})"
                rate = measure_pair(hosts.store, lower, higher, hosts.me, here, seconds, on_gpu)
                if hosts.me == lower or "error" in rate:
                    say("pair", pair=[hosts.members[lower], hosts.members[higher]], on_gpu=on_gpu, **rate)
        if hosts.me == 0:  # one clock decides for all
            enough = time.monotonic() - STARTED > LIMIT_SECONDS - 8
            hosts.store.set(f"round/{number}", "stop" if enough else "go on")
        hosts.barrier(f"round {number}")
        if hosts.store.get(f"round/{number}") == b"stop":
            break
    if hosts.me == 0:
        say("rounds", measured=number + 1, planned=len(planned))


def main() -> int:
    place = own_placement()
    say = reporter(place)
    try:
        return check(place, json.loads(sys.argv[1]), say)
    except Exception as error:
        say("failed", error=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of gloo abort an interpreter that goes down
