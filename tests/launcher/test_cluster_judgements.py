"""What hosts are judged to be together."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.requirements import Requirement

from launcher import cluster_judgements as cluster
from launcher.doctor import own_requirements

NEEDS = [Requirement("torch>=2.11,<2.14"), Requirement("rich")]
PLACE = {"path": "/runs", "type": "nfs4"}
FOLDER = {
    "visible": True, "write_mb_s": 500.0, "read_mb_s": 900.0, "sync_ms": 2.0, "same_bytes": True, "reads": 5000,
    "torn_reads": 0, "lock": "kept",
}  # fmt: skip


def facts(**changes: Any) -> dict[str, Any]:
    usual = {
        "python": "3.11.7", "packages": {"torch": "2.13.0+cpu", "rich": "15.0.0"}, "code": "c0ffee",
        "names": {"h1": "10.0.0.1", "h2": "10.0.0.2"}, "own_address": "10.0.0.1", "interfaces": {"eth0": "10.0.0.1"},
        "socket_interface": None,
    }  # fmt: skip
    return usual | changes


def versions(**packages: str | None) -> dict[str, Any]:
    return facts(packages={"torch": "2.13.0+cpu", "rich": "15.0.0"} | packages)


def bad(found: list[Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(finding.check, finding.state, finding.hosts) for finding in found if finding.state != "ok"]


def test_the_ranges_are_those_of_setup_py():
    needs = {need.name: str(need.specifier) for need in own_requirements()}
    assert needs["torch"] == "<2.14,>=2.11"
    assert {"deepspeed", "transformers", "pydantic"} <= set(needs)


def test_equal_hosts_have_no_warning():
    found = cluster.judge_versions({"h1": facts(), "h2": facts()}, NEEDS)
    assert not bad(found)
    assert [finding.check for finding in found] == ["python", "packages", "millstream"]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (facts(python="3.10.4"), [("python", "fail", ("h3",)), ("python", "fail", ("h3",))]),
        (facts(python="3.11.2"), []),
        (facts(python="3.12.1"), [("python", "fail", ("h3",))]),
        (versions(torch="2.10.0"), [("packages", "fail", ("h3",)), ("packages", "fail", ("h3",))]),
        (versions(torch="2.12.1"), [("packages", "fail", ("h3",))]),  # in the range, but not the same
        (versions(rich="14.0.0"), [("packages", "warn", ("h3",))]),
        (versions(rich=None), [("packages", "fail", ("h3",))]),
        (facts(code="decade"), [("millstream", "fail", ("h3",))]),
    ],
)
def test_the_host_that_differs_is_named(other, expected):
    assert bad(cluster.judge_versions({"h1": facts(), "h2": facts(), "h3": other}, NEEDS)) == expected


def test_a_torch_that_does_not_load_and_another_nccl_are_named():
    good = {"import_seconds": 2.0, "nccl": "2.27.7"}
    assert not cluster.judge_torch({"h1": good, "h2": good})
    slow = cluster.judge_torch({"h1": good | {"import_seconds": 31.0}})
    assert bad(slow) == [("import torch", "warn", ("h1",))]
    found = cluster.judge_torch({"h1": good, "h2": good, "h3": {"error": "OSError: libcudart.so.13"}})
    assert bad(found) == [("import torch", "fail", ("h3",))]
    found = cluster.judge_torch({"h1": good, "h2": good, "h3": good | {"nccl": "2.26.2"}})
    assert bad(found) == [("NCCL", "fail", ("h3",))]


def test_names_that_do_not_resolve_fail_and_a_name_that_leads_to_loopback_matters_where_links_do_not_work():
    lost = facts(names={"h1": "10.0.0.1", "h2": None})
    assert bad(cluster.judge_names({"h1": facts(), "h2": lost}, True)) == [("host names", "fail", ("h2",))]
    loop = facts(own_address="127.0.1.1")
    assert not bad(cluster.judge_names({"h1": facts(), "h2": loop}, True))
    found = cluster.judge_names({"h1": facts(), "h2": loop}, False)
    assert bad(found) == [("host names", "warn", ("h2",))]
    assert "GLOO_SOCKET_IFNAME=eth0" in found[0].cure
    named = facts(own_address="127.0.1.1", socket_interface="eth0")
    assert not bad(cluster.judge_names({"h1": facts(), "h2": named}, False))


def test_a_port_in_use_is_the_first_hosts_fault_and_a_closed_one_that_of_who_cannot_reach_it():
    good = {"port": "29500", "address": "h1"}
    assert not bad(cluster.judge_ports({"h1": good, "h2": good}, "h1"))
    taken = {"h1": good | {"error": "cannot listen: Address already in use"}, "h2": good}
    found = cluster.judge_ports(taken, "h1")
    assert bad(found) == [("rendezvous port", "fail", ("h1",))]
    assert "MASTER_PORT" in found[0].cure
    found = cluster.judge_ports({"h1": good, "h2": good | {"error": "timed out"}}, "h1")
    assert bad(found) == [("rendezvous port", "fail", ("h2",))]


@pytest.mark.parametrize(
    ("offset", "error", "state"),
    [(0.0001, 0.001, "ok"), (-0.9, 0.001, "ok"), (1.5, 0.001, "warn"), (-3.0, 2.5, "ok"), (-61.0, 0.1, "fail")],
)
def test_clocks(offset, error, state):
    finding = cluster.judge_clock("h2", "h1", offset, error)
    assert finding.state == state
    if abs(offset) > error:
        assert ("behind h1" in finding.text) == (offset < 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"visible": False}, [("shared folder", "fail")]),
        ({"error": "[Errno 28] No space left on device"}, [("shared folder", "fail")]),
        ({"next_missing": True}, [("shared folder", "fail")]),
        ({"same_bytes": False}, [("shared folder", "fail")]),
        ({"torn_reads": 2}, [("shared folder", "warn")]),
        ({"torn_reads": 200}, [("shared folder", "fail")]),
        ({"lock": "not kept"}, [("shared folder", "warn")]),
        ({"write_mb_s": 5.0}, [("shared folder: speed", "warn")]),
        ({"read_mb_s": 5.0}, [("shared folder: speed", "warn")]),
        ({"sync_ms": 250.0}, [("shared folder: speed", "warn")]),
    ],
)
def test_folders(changes, expected):
    found = cluster.judge_folder("h2", FOLDER | changes, PLACE, "h1", 2)
    assert [(finding.check, finding.state) for finding in found if finding.state != "ok"] == expected
    assert all(finding.cure for finding in found if finding.state != "ok")


NAMES = {rank: f"h{rank}" for rank in range(4)}


def pairs(**rates: float) -> list[dict[str, Any]]:
    every = {f"p{a}{b}": 1.0 for a in range(4) for b in range(a + 1, 4)} | rates
    return [{"pair": [int(name[1]), int(name[2])], "gb_s": rate, "latency_us": 100.0} for name, rate in every.items()]


def test_equal_links_are_one_line():
    (finding,) = cluster.judge_pairs(pairs(), NAMES, 3, 3)
    assert (finding.state, finding.text) == ("ok", "1 to 1 GB/s, 100 us for 8 bytes (gloo, 6 pairs)")
    (finding,) = cluster.judge_pairs(pairs(), NAMES, 2, 3)
    assert finding.text.endswith("; 2 of 3 rounds of pairs in the time")


def test_a_slow_pair_is_named_and_a_host_whose_pairs_are_all_slow_is_named_alone():
    found = cluster.judge_pairs(pairs(p12=0.4), NAMES, 3, 3)
    assert [(one.state, one.hosts) for one in found] == [("warn", ("h1", "h2"))]
    found = cluster.judge_pairs(pairs(p12=0.05), NAMES, 3, 3)
    assert [(one.state, one.hosts) for one in found] == [("fail", ("h1", "h2"))]
    found = cluster.judge_pairs(pairs(p02=0.3, p12=0.4, p23=0.2), NAMES, 3, 3)
    assert [(one.state, one.hosts) for one in found] == [("warn", ("h2",))]


def test_a_pair_that_cannot_reduce_fails_and_all_links_of_a_slow_network_are_a_warning():
    broken = [*pairs()[1:], {"pair": [0, 1], "error": "connect timeout"}, {"pair": [0, 1], "error": "timeout"}]
    found = cluster.judge_pairs(broken, NAMES, 3, 3)
    assert [(one.state, one.hosts) for one in found] == [("fail", ("h0", "h1"))]
    slow = [{"pair": [0, 1], "gb_s": 0.05, "latency_us": 100.0}]
    assert [one.state for one in cluster.judge_pairs(slow, NAMES, 1, 1)] == ["warn"]
    on_gpu = [{"pair": [0, 1], "gb_s": 1.0, "latency_us": 100.0, "on_gpu": True}]
    assert [one.state for one in cluster.judge_pairs(on_gpu, NAMES, 1, 1)] == ["warn"]
