"""`millstream doctor [--hosts FILE | --slurm [srun options]] [FOLDER]`: is this machine, or are these, fit for a run?

One process on each host (pretrain/host_checks.py), started by ssh or srun, reports what it finds; here it is judged
(host_judgements, gpu_judgements, cluster_judgements) and shown as one table. It takes a minute at most from the first
host's first word, whatever hangs.
"""

from __future__ import annotations

import ast
import collections
import importlib.metadata
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError
from launcher import cluster_judgements as cluster
from launcher.exports import PREFIXES, exports, is_secret
from launcher.findings import Finding, merge, name_hosts
from launcher.gpu_judgements import judge_gpu_speeds, judge_gpus
from launcher.host_judgements import judge_host
from launcher.hosts import read_hostfile
from launcher.ssh import address_of, ssh_options

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "pretrain.host_checks"
LIMIT_SECONDS = 60.0  # the hosts' programs end themselves 5 s earlier
USUAL_PORT = "29500"  # torch's and deepspeed's own default
COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
SSH_CURES = {
    "Permission denied": "ssh-copy-id to this host: it has to work without a password (BatchMode)",
    "Host key verification failed": "ssh to this host once by hand, compare its key and accept it",
    "Could not resolve": "DNS, /etc/hosts or ~/.ssh/config of this machine; a misspelt name in the hostfile",
    "Connection refused": "start sshd there, or name its port in ~/.ssh/config",
    "timed out": "is the host up, and does a firewall keep port 22 closed?",
    "No route to host": "is the host up, and in the same network?",
    "No such file or directory": f"the same checkout and environment at {ROOT} on all hosts (shared)",
    "No module named": "the same environment on all hosts, best on a shared file system",
}
Reports = dict[str, dict[str, Any]]  # of one host: kind of line -> line; pairs are apart


@dataclass(frozen=True)
class Where:
    kind: Literal["local", "hosts", "slurm"]
    folder: Path
    hosts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # for srun


@dataclass
class Answers:
    """What the started processes have said."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)  # process -> the end of what it wrote to stderr
    codes: dict[str, int | None] = field(default_factory=dict)  # None: it did not end in time


def doctor(words: list[str]) -> int:
    """Check, show the table; returns 1 if something failed, else 0. Raises ConfigError for what is not understood."""
    where = parse(words)
    requirements = own_requirements()
    began = time.monotonic()
    answers = ask(where, request(where, requirements))
    findings = merge(judge(where, answers, requirements))
    num_hosts = max(len(where.hosts), *(line.get("hosts", 1) for line in answers.lines), 1)
    show(findings, num_hosts, time.monotonic() - began)
    return int(any(finding.state == "fail" for finding in findings))


def parse(words: list[str]) -> Where:
    """Of the words behind `doctor`. Options of srun are written in one word, so that the folder is told from values."""
    words = list(words)
    kind: Literal["local", "hosts", "slurm"] = "local"
    hosts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    if words[:1] == ["--hosts"]:
        if len(words) < 2:
            raise ConfigError("--hosts: expected a hostfile behind it")
        kind, hosts, words = "hosts", tuple(read_hostfile(words[1])), words[2:]
    elif words[:1] == ["--slurm"]:
        if not shutil.which("srun"):
            raise ConfigError("--slurm: there is no srun on this machine; run it on a login node of the cluster")
        kind = "slurm"
        options = tuple(word for word in words[1:] if word.startswith("-"))
        words = [word for word in words[1:] if not word.startswith("-")]
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise ConfigError(
            f"not understood: millstream doctor ... {' '.join(words)}; expected [--hosts FILE | --slurm [srun options "
            f"in one word each, as --nodes=2 or -N2]] [FOLDER]"
        )
    return Where(kind, Path(words[0] if words else ".").expanduser().absolute(), hosts, options)


def own_requirements() -> list[Requirement]:
    """What setup.py asks for: of the checkout, or of the installed package where there is none."""
    setup = ROOT / "setup.py"
    if setup.is_file():
        for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "install_requires":
                return [Requirement(text) for text in ast.literal_eval(node.value)]
    found = [Requirement(text) for text in importlib.metadata.requires("millstream") or []]
    return [need for need in found if need.marker is None]


def request(where: Where, requirements: list[Requirement]) -> dict[str, Any]:
    """What pretrain/host_checks.py is asked."""
    from configs.load import load
    from configs.schema import CacheConfig, PretrainConfig

    cache = CacheConfig().dir
    if (config := where.folder / "config.yaml").is_file():
        try:
            loaded = load(str(config), []).config
            cache = loaded.data.cache.dir if isinstance(loaded, PretrainConfig) else cache
        except ConfigError:  # of another version: the default is near enough
            pass
    return {
        "folder": str(where.folder),
        "cache": cache,
        "hosts": [address_of(host) for host in where.hosts],
        "packages": [need.name for need in requirements],
        "token": secrets.token_hex(6),
    }


def commands(where: Where, request: dict[str, Any]) -> dict[str, list[str]]:
    """The command to start for each host; for SLURM one for all."""
    program = [sys.executable, "-m", PROGRAM, json.dumps(request)]
    if where.kind == "local":
        return {"this machine": program}
    if where.kind == "slurm":
        own = ["--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--chdir={ROOT}"]
        return {"srun": ["srun", *own, *where.options, *program]}
    # On a command line, which others can read: what deepspeed's file has beside the network's settings stays here.
    passed = {n: value for n, value in exports(os.environ).items() if n.startswith(PREFIXES) and not is_secret(n)}
    port = os.environ.get("MASTER_PORT", USUAL_PORT)
    passed |= {"WORLD_SIZE": str(len(where.hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
    passed["MASTER_ADDR"] = address_of(where.hosts[0])
    found = {}
    for rank, host in enumerate(where.hosts):
        settings = [f"{name}={value}" for name, value in passed.items()]
        line = f"cd {shlex.quote(str(ROOT))} && exec env {shlex.join([f'RANK={rank}', *settings, *program])}"
        found[host] = ["ssh", *ssh_options(), host, line]
    return found


def ask(where: Where, request: dict[str, Any]) -> Answers:
    """Start the processes and wait for their answers, LIMIT_SECONDS at most; those of SLURM may have to queue first."""
    answers = Answers()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if where.kind == "local":
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": USUAL_PORT}
    processes, readers = {}, []
    try:
        for name, command in commands(where, request).items():
            process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, errors="replace", process_group=0,
            )  # fmt: skip
            processes[name] = process
            for target, stream in ((read_answers, process.stdout), (read_errors, process.stderr)):
                reader = threading.Thread(target=target, args=[stream, name, answers, where.kind], daemon=True)
                reader.start()
                readers.append(reader)
        deadline = time.monotonic() + LIMIT_SECONDS
        while any(process.poll() is None for process in processes.values()) and time.monotonic() < deadline:
            if where.kind == "slurm" and not answers.lines:  # in the queue
                deadline = time.monotonic() + LIMIT_SECONDS
            time.sleep(0.05)
    finally:
        for name, process in processes.items():
            answers.codes[name] = process.poll()
            if process.poll() is None:
                os.killpg(process.pid, 15 if where.kind == "slurm" else 9)  # srun takes its tasks with it
    for reader in readers:
        reader.join(2)
    return answers


def read_answers(stream: IO[str], name: str, answers: Answers, kind: str) -> None:
    """Put the pieces of each host's reports together; other lines (a login's greeting) are left out."""
    pieces: dict[str, str] = collections.defaultdict(str)
    for text in stream:
        words = text.removesuffix("\n").split(" ", 3)
        if len(words) == 4 and words[0] == "doctor" and words[2] in "+.":
            pieces[words[1]] += words[3]
            if words[2] == ".":
                report = json.loads(pieces.pop(words[1]))
                answers.lines.append(report | {"node": name} if kind == "hosts" else report)


def read_errors(stream: IO[str], name: str, answers: Answers, kind: str) -> None:
    kept: collections.deque[str] = collections.deque(maxlen=20)
    for text in stream:
        kept.append(text)
        answers.errors[name] = "".join(kept)
        if kind == "slurm" and not answers.lines:  # that it waits, and for what
            print(text, end="", file=sys.stderr)


def judge(where: Where, answers: Answers, requirements: list[Requirement]) -> list[Finding]:
    """All findings, in the order of the table. Pure."""
    names = {line["rank"]: line["node"] for line in answers.lines if "node" in line}
    hosts: dict[str, Reports] = {name: {} for _, name in sorted(names.items())}
    pairs = []
    for line in answers.lines:
        if line["doctor"] == "pair":
            pairs.append(line)
        elif line["rank"] in names:
            hosts[names[line["rank"]]][line["doctor"]] = line
    first = names.get(0) or (where.hosts[0] if where.hosts else "")
    facts = {host: one["facts"] for host, one in hosts.items() if "facts" in one}
    torches = {host: one["torch"] for host, one in hosts.items() if "torch" in one}
    found = silent(where, answers, set(hosts))
    if facts:
        found += cluster.judge_versions(facts, requirements)
    found += cluster.judge_torch(torches)
    for host, torch in torches.items():
        found += judge_gpus(host, facts[host], torch)
    found += judge_gpu_speeds(torches)
    for host, one in facts.items():
        found += judge_host(host, one)
    if len(facts) > 1 or len(where.hosts) > 1:
        reached = bool(pairs) and not any("error" in pair for pair in pairs)
        found += cluster.judge_names(facts, reached)
        found += cluster.judge_ports({host: one["port"] for host, one in hosts.items() if "port" in one}, first)
    made = hosts.get(first, {}).get("folder", {"visible": True})["visible"]
    seen = all(one["folder"]["visible"] for one in hosts.values() if "folder" in one)
    for host, one in hosts.items():
        if "clock" in one:
            clock = one["clock"]
            found.append(cluster.judge_clock(host, first, clock["offset_seconds"], clock["error_seconds"]))
        if "folder" in one and (made or host == first):
            measured = one["folder"] | ({} if seen else {"next_missing": False})  # it is the other host's fault
            found += cluster.judge_folder(host, measured, one["facts"]["folder"], first, one["folder"]["hosts"])
    rounds = hosts.get(first, {}).get("rounds", {"measured": 0, "planned": 0})
    if pairs:
        found += cluster.judge_pairs(pairs, names, rounds["measured"], rounds["planned"])
    return found + unfinished(hosts, {host for finding in found if finding.state == "fail" for host in finding.hosts})


def silent(where: Where, answers: Answers, heard: set[str]) -> list[Finding]:
    """Hosts of which nothing came, with what ssh or srun said instead."""
    expected = where.hosts or (() if heard else tuple(answers.codes))
    found = []
    for host in expected:
        if host in heard:
            continue
        words = answers.errors.get(host, "").strip().splitlines()
        text = words[-1] if words else f"no answer within {LIMIT_SECONDS:.0f} s"
        if answers.codes.get(host) is not None and not words:
            text = f"ended with code {answers.codes[host]} and said nothing"
        cure = next((cure for part, cure in SSH_CURES.items() if part in text), f"try it by hand: ssh {host} true")
        if where.kind != "hosts":
            cure = "look at the options and the queue (sinfo, squeue)" if where.kind == "slurm" else "make venv"
        found.append(Finding("reachable", "fail", text, cure, (host,)))
    seen = {line["rank"] for line in answers.lines}
    num_tasks = max((line.get("hosts", 1) for line in answers.lines), default=0)
    if where.kind == "slurm" and heard and (missing := sorted(set(range(num_tasks)) - seen)):
        text = f"tasks {', '.join(map(str, missing[:8]))} of {num_tasks} said nothing"
        found.append(Finding("reachable", "fail", text, "scontrol show node; is the checkout seen from there?"))
    return found


def unfinished(hosts: dict[str, Reports], failed: set[str]) -> list[Finding]:
    """Hosts that stood still or broke off, if nothing that failed there explains it."""
    found = []
    for host, one in hosts.items():
        if host in failed or "end" in one:
            continue
        if "stuck" in one:
            text = f"stood still: {one['stuck']['what']}"
        elif "failed" in one:
            text = one["failed"]["error"]
        else:
            text = "ended in the middle"
        cure = "first what failed above; a folder that hangs (df) or a firewall between the hosts looks like this"
        found.append(Finding("finished", "warn" if failed else "fail", text, cure, (host,)))
    return found


def show(findings: list[Finding], num_hosts: int, seconds: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, min_width=4)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(max_width=30)
    for finding in findings:
        text = finding.text + (f"\n-> {finding.cure}" if finding.state != "ok" else "")
        state = f"[{COLORS[finding.state]}]{finding.state}[/]"
        table.add_row(state, finding.check, _plain(text), _plain(name_hosts(finding.hosts, num_hosts)))
    console.print(table)
    counts = collections.Counter(finding.state for finding in findings)
    hosts = f"{num_hosts} hosts" if num_hosts > 1 else "one host"
    console.print(f"{hosts} in {seconds:.0f} s: {counts['fail']} failed, {counts['warn']} warnings", highlight=False)


def _plain(text: str) -> str:
    """Square brackets are text, not markup."""
    from rich.markup import escape

    return escape(text)
