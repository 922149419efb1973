"""Findings of many hosts as lines of one table."""

from __future__ import annotations

from launcher.findings import Finding, amount, merge, name_hosts


def test_hosts_with_the_same_state_and_cure_share_a_line_that_shows_the_worst():
    found = [
        Finding("open files", "warn", "4,096 allowed", "ulimit -n 16384", ("h1",), 4096),
        Finding("clocks", "ok", "within 1 ms", "", ("h2",)),
        Finding("open files", "warn", "2,048 allowed", "ulimit -n 16384", ("h2",), 2048),
        Finding("open files", "ok", "65,536 allowed", "", ("h3",), 65536),
    ]
    merged = merge(found)
    assert [(one.check, one.state, one.text, one.hosts) for one in merged] == [
        ("open files", "warn", "2,048 allowed (on h2, the worst of 2)", ("h1", "h2")),
        ("open files", "ok", "65,536 allowed", ("h3",)),
        ("clocks", "ok", "within 1 ms", ("h2",)),
    ]


def test_many_hosts_are_named_shortly():
    hosts = tuple(f"h{number}" for number in range(6))
    assert name_hosts(hosts, 6) == "all 6"
    assert name_hosts(hosts, 9) == "h0, h1, h2, h3 and 2 more"
    assert name_hosts(hosts[:2], 9) == "h0, h1"
    assert name_hosts(("this",), 1) == ""


def test_amounts_have_units():
    assert [amount(n) for n in (0, 999, 64_000_000, 61_518_417_920)] == ["0 bytes", "999 bytes", "64 MB", "61.5 GB"]
