"""What the hosts' numbers mean together: versions, names, ports, clocks, the shared folder, the links. Pure."""

from __future__ import annotations

import statistics
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from launcher.findings import Finding, State

Facts = dict[str, Any]
LEAST_PYTHON = (3, 11)
MUST_AGREE = (
    "torch",
    "deepspeed",
    "transformers",
    "numpy",
    "safetensors",
)  # what ranks exchange or number goes by them
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 60.0
SLOW_SYNC_MS, SLOW_WRITE_MB_S, SLOW_READ_MB_S = 100.0, 20.0, 20.0
SLOW_PAIR, VERY_SLOW_PAIR = 0.5, 0.1  # of what is usual
SLOW_LINK_GB_S = {False: 0.1, True: 2.0}  # on_gpu: below a link of 1 and of 20 Gbit/s
NETWORK_CURE = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface to use"


def judge_versions(facts: dict[str, Facts], requirements: list[Requirement]) -> list[Finding]:
    """Python and packages of each host against what setup.py asks for, and the hosts against each other."""
    found: list[Finding] = []
    pythons = {host: one["python"] for host, one in facts.items()}
    for host, python in pythons.items():
        if tuple(map(int, python.split(".")[:2])) < LEAST_PYTHON:
            least = ".".join(map(str, LEAST_PYTHON))
            found.append(Finding("python", "fail", python, f"Python {least} or newer (make venv PYTHON=...)", (host,)))
    minors = {host: python.rpartition(".")[0] for host, python in pythons.items()}
    found += differing("python", minors, "fail", "the same Python on all hosts, best from one shared environment")
    for need in requirements:
        versions = {host: one["packages"].get(need.name) for host, one in facts.items()}
        for host, version in versions.items():
            if version is None:
                text = f"{need.name} is not installed"
                found.append(Finding("packages", "fail", text, f"pip install -c constraints.txt '{need}'", (host,)))
            elif not need.specifier.contains(Version(version).base_version):
                text = f"{need.name} {version} is outside of setup.py's {need.specifier}"
                found.append(Finding("packages", "fail", text, f"pip install -c constraints.txt '{need}'", (host,)))
        state: State = "fail" if need.name in MUST_AGREE else "warn"
        present = {host: f"{need.name} {version}" for host, version in versions.items() if version}
        found += differing("packages", present, state, "one shared environment, or the same constraints.txt on all")
    codes = {host: one["code"] for host, one in facts.items()}
    found += differing("millstream", codes, "fail", "the same checkout on all hosts, best on the shared file system")
    return found + unmentioned(found, facts)


def unmentioned(found: list[Finding], facts: dict[str, Facts]) -> list[Finding]:
    """A line of ok for what nothing was found of."""
    first = next(iter(facts.values()))
    named = ", ".join(f"{name} {first['packages'][name]}" for name in MUST_AGREE if first["packages"].get(name))
    count = sum(version is not None for version in first["packages"].values())
    texts = {"python": first["python"], "packages": f"{named}; {count} in all, in setup.py's ranges"}
    if len(facts) > 1:
        texts["millstream"] = f"the same sources ({first['code']})"
    noted = {finding.check for finding in found}
    return [Finding(check, "ok", text, "", tuple(facts)) for check, text in texts.items() if check not in noted]


def differing(check: str, values: dict[str, str], state: State, cure: str) -> list[Finding]:
    """One finding if not all hosts have the same; it names those that are not like the most."""
    if len(set(values.values())) < 2:
        return []
    usual = statistics.mode(values.values())
    others = {host: value for host, value in values.items() if value != usual}
    text = f"{', '.join(sorted(set(others.values())))} here, {usual} on the other hosts"
    return [Finding(check, state, text, cure, tuple(others))]


def judge_torch(torches: dict[str, Facts]) -> list[Finding]:
    found = []
    for host, torch in torches.items():
        if torch.get("error"):
            cure = "install it again in this host's environment (make venv)"
            found.append(Finding("import torch", "fail", torch["error"], cure, (host,)))
        elif torch["import_seconds"] > 20:
            text = f"takes {torch['import_seconds']:.0f} s"
            cure = "the environment on a faster file system, or a copy on each host: every start waits for it"
            found.append(Finding("import torch", "warn", text, cure, (host,), -torch["import_seconds"]))
    nccl = {host: f"NCCL {torch['nccl']}" for host, torch in torches.items() if torch.get("nccl")}
    return found + differing("NCCL", nccl, "fail", "the same torch on all hosts")


def judge_names(facts: dict[str, Facts], links_work: bool) -> list[Finding]:
    """Can every host find the others by name, and, if links don't work, does a host's own name lead to the network?"""
    found = []
    for host, one in facts.items():
        if unknown := [name for name, address in one["names"].items() if address is None]:
            cure = "DNS or /etc/hosts of this host, or addresses in the hostfile"
            found.append(Finding("host names", "fail", f"cannot resolve {', '.join(unknown[:5])}", cure, (host,)))
        own = str(one["own_address"] or "")
        if len(facts) > 1 and not links_work and not one["socket_interface"] and (not own or own.startswith("127.")):
            names = " or ".join(one["interfaces"]) or "the network's interface"
            text = f"its own name leads to {own or 'nowhere'}, so gloo may listen where no other host reaches it"
            cure = f"GLOO_SOCKET_IFNAME={names}, or its address in /etc/hosts"
            found.append(Finding("host names", "warn", text, cure, (host,)))
    return found or [Finding("host names", "ok", "all resolve", "", tuple(facts))] if facts else []


def judge_ports(ports: dict[str, Facts], first: str) -> list[Finding]:
    """The rendezvous port of the first host: opened by it, reached by the others."""
    if not ports:
        return []
    port = next(iter(ports.values()))["port"]
    if first in ports and (error := ports[first].get("error")):
        text = f"{first} cannot listen on {port}: {error.removeprefix('cannot listen: ')}"
        cure = f"end what listens there (ss -ltnp 'sport = :{port}'), often what is left of a run, or set MASTER_PORT"
        return [Finding("rendezvous port", "fail", text, cure, (first,))]
    found = []
    for host, one in ports.items():
        if error := one.get("error"):
            text = f"no connection to {one['address']}:{port} ({error})"
            cure = f"open port {port} and those above 1024 between the hosts, or choose MASTER_PORT; {NETWORK_CURE}"
            if "timed out" not in error and "route" not in error:
                cure = f"is {one['address']} the right host, and does a firewall refuse its port {port}?"
            found.append(Finding("rendezvous port", "fail", text, cure, (host,)))
    return found or [Finding("rendezvous port", "ok", f"{first}:{port} is reached", "", tuple(ports))]


def judge_clock(host: str, first: str, offset_seconds: float, error_seconds: float) -> Finding:
    """Against the first host. Logs and file times of hosts are compared, and credentials (munge, TLS) have times."""
    away = abs(offset_seconds)
    behind = "ahead of" if offset_seconds > 0 else "behind"
    text = (
        f"{away:.3g} s {behind} {first}" if away > error_seconds else f"within {error_seconds * 1000:.2g} ms of {first}"
    )
    cure = "start chronyd or ntpd on this host (chronyc tracking; timedatectl set-ntp true)"
    if away - error_seconds > CLOCK_WARN_SECONDS:
        state: State = "fail" if away > CLOCK_FAIL_SECONDS else "warn"
        return Finding("clocks", state, text, cure, (host,), -away)
    return Finding("clocks", "ok", text, "", (host,), -away)


def judge_folder(host: str, found: Facts, place: Facts, first: str, num_hosts: int) -> list[Finding]:
    """`found` is what pretrain/folder_checks.py measured, `place` the folder's file system on this host."""
    where, kind = place["path"], place["type"]
    check = "shared folder" if num_hosts > 1 else "folder"
    if error := found.get("error"):
        cure = "choose a folder that all hosts can write to; a full disk or a lost mount looks like this too"
        return [Finding(check, "fail", f"{where} ({kind}): {error}", cure, (host,), -1)]
    if not found["visible"]:
        text = f"what {first} has written in {where} is not there: {kind} of its own"
        cure = "a folder on a file system that all hosts mount (df -T on each), given as the last word and as run_dir"
        return [Finding(check, "fail", text, cure, (host,), -1)]
    if found.get("next_missing"):
        text = f"what another host has written in {where} does not appear within seconds"
        cure = "shorter attribute caches (NFS: actimeo=3), or another file system for run_dir"
        return [Finding(check, "fail", text, cure, (host,), -1)]
    if found.get("same_bytes") is False:
        cure = "have the file system checked; turn client caches off (actimeo=0 of NFS) and try again"
        return [Finding(check, "fail", f"another host's file in {where} reads as other bytes", cure, (host,), -1)]
    seen = "seen by all, " if num_hosts > 1 else ""
    return [
        Finding(check, "ok", f"{where} ({kind}): {seen}renames and locks tried", "", (host,)),
        *rename_and_lock(host, found, check),
        speed(host, found, kind, check),
    ]


def rename_and_lock(host: str, found: Facts, check: str) -> list[Finding]:
    findings = []
    if torn := found["torn_reads"]:
        text = f"{torn} of {found['reads']} reads of a file that is replaced met half of it or none"
        cure = "another file system for run_dir: manifests of checkpoints rely on renames that are atomic"
        findings.append(Finding(check, "warn" if torn < 0.01 * found["reads"] else "fail", text, cure, (host,), -torn))
    if found["lock"] != "kept":
        text = "a lock (flock) that another host holds is not noticed"
        cure = "mount with locks (lustre: -o flock; NFS: without nolock, local_lock=none); keep data.cache.dir local"
        findings.append(Finding(check, "warn", text, cure, (host,)))
    return findings


def speed(host: str, found: Facts, kind: str, check: str) -> Finding:
    """Of writing 16 MB with a sync, all hosts at once, of reading what another host wrote, and of a small sync."""
    write, read, sync = found["write_mb_s"], found.get("read_mb_s"), found["sync_ms"]
    text = f"writes {write:.0f} MB/s" + (f", reads {read:.0f} MB/s" if read else "") + f", {sync:.2g} ms a sync"
    slow = write < SLOW_WRITE_MB_S or sync > SLOW_SYNC_MS or (read or SLOW_READ_MB_S) < SLOW_READ_MB_S
    cure = "a faster file system for run_dir, or checkpoint.local_dir on each host's own disk, copied from there"
    check = f"{check}: speed"
    return Finding(check, "warn" if slow else "ok", text, cure if slow else "", (host,), min(write, read or write))


def judge_pairs(pairs: list[Facts], names: dict[int, str], measured: int, planned: int) -> list[Finding]:
    """`pairs`: {"pair": (rank, rank), "gb_s", "latency_us"} or {"pair", "error"}; `names` of the ranks."""
    check = "links between hosts"
    found = []
    broken = {tuple(one["pair"]): one["error"] for one in pairs if "error" in one}
    for (a, b), error in broken.items():
        text = f"{names[a]} and {names[b]} cannot reduce a tensor: {error[:120]}"
        cure = f"ports above 1024 must be open between them (firewall); {NETWORK_CURE}"
        found.append(Finding(check, "fail", text, cure, (names[a], names[b])))
    rates = {tuple(one["pair"]): one["gb_s"] for one in pairs if "gb_s" in one and tuple(one["pair"]) not in broken}
    if not rates:
        return found
    best = {rank: max(rate for pair, rate in rates.items() if rank in pair) for rank in {r for p in rates for r in p}}
    usual = statistics.median(best.values())  # of all pairs it would be that of a slow host's where hosts are few
    latency = statistics.median(one["latency_us"] for one in pairs if "latency_us" in one)
    on_gpu = any(one.get("on_gpu") for one in pairs)
    text = f"{min(rates.values()):.3g} to {max(rates.values()):.3g} GB/s, " if len(rates) > 1 else f"{usual:.3g} GB/s, "
    text += f"{latency:.0f} us for 8 bytes ({'NCCL' if on_gpu else 'gloo'}, {len(rates)} pairs)"
    if measured < planned:
        text += f"; {measured} of {planned} rounds of pairs in the time"
    found += slow_pairs(rates, usual, names)
    if usual < SLOW_LINK_GB_S[on_gpu]:
        cure = f"is this the fast network? {NETWORK_CURE}; NCCL_IB_HCA the InfiniBand device (ibstat, ethtool)"
        found.append(Finding(check, "warn", text, cure))
    elif not found:
        found.append(Finding(check, "ok", text))
    return found


def slow_pairs(rates: dict[Any, float], usual: float, names: dict[int, str]) -> list[Finding]:
    """Slower than half of `usual`, what a host reaches with its best partner; a host that is slow with all, alone."""
    slow = {pair: rate for pair, rate in rates.items() if rate < SLOW_PAIR * usual}
    found = []
    for rank in sorted({rank for pair in slow for rank in pair}):
        own = {pair: rate for pair, rate in rates.items() if rank in pair}
        if len(own) > 1 and all(pair in slow for pair in own):
            best = max(own.values())
            text = f"{names[rank]} reaches no host faster than {best:.3g} GB/s, usual is {usual:.3g}"
            cure = f"cable, port and interface of {names[rank]} (ethtool, ibstat, ip -s link); leave it out until then"
            state: State = "fail" if best < VERY_SLOW_PAIR * usual else "warn"
            found.append(Finding("links between hosts", state, text, cure, (names[rank],)))
            slow = {pair: rate for pair, rate in slow.items() if rank not in pair}
    for (a, b), rate in slow.items():
        text = f"{names[a]} and {names[b]}: {rate:.3g} GB/s, usual is {usual:.3g}"
        cure = "the switch or route between these two (traceroute, iperf3); place them in one rack or leave one out"
        state = "fail" if rate < VERY_SLOW_PAIR * usual else "warn"
        found.append(Finding("links between hosts", state, text, cure, (names[a], names[b])))
    return found
