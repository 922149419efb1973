"""What `millstream doctor` finds: one judgement each, and how those of many hosts become one line of a table. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["ok", "warn", "fail"]
SHOWN_HOSTS = 4


@dataclass(frozen=True)
class Finding:
    """fail: a run will not start, will hang or may be wrong. warn: it works, slower or with a risk."""

    check: str
    state: State
    text: str  # what was found
    cure: str = ""  # what to do; every warn and fail has one
    hosts: tuple[str, ...] = ()  # where; nowhere in particular if empty
    worst: float = 0.0  # among hosts of one state the text of the one with the lowest number is shown


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for all hosts of the same check, state and cure, in the order of their first one."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.check, finding.state, finding.cure), []).append(finding)
    merged = []
    for group in groups.values():
        shown = min(group, key=lambda finding: finding.worst)
        hosts = tuple(dict.fromkeys(host for finding in group for host in finding.hosts))
        text = shown.text
        if len({finding.text for finding in group}) > 1:
            text += f" (on {shown.hosts[0]}, the worst of {len(hosts)})" if shown.hosts else ""
        merged.append(replace(shown, text=text, hosts=hosts))
    order = list(dict.fromkeys(finding.check for finding in merged))
    return sorted(merged, key=lambda finding: order.index(finding.check))


def name_hosts(hosts: tuple[str, ...], num_hosts: int) -> str:
    """`all` for all of several hosts, otherwise their names, the first four of many."""
    if num_hosts < 2:
        return ""
    if len(hosts) == num_hosts:
        return f"all {num_hosts}"
    more = f" and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else ""
    return ", ".join(hosts[:SHOWN_HOSTS]) + more


def amount(num_bytes: float) -> str:
    """61518417920 -> 61.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
