"""What a host measures of itself and with others: the parsers, the plan of rounds, clocks, folders."""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain import folder_checks, host_checks, pair_checks
from pretrain.host_checks import clock_offset
from pretrain.host_facts import (
    cpu_quota,
    facts,
    newest_checkpoint_bytes,
    parse_driver_cuda,
    parse_processes,
    parse_rows,
)
from pretrain.pair_checks import measure_pair, rounds
from pretrain.placement import Placement


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 7, 16])
def test_every_pair_meets_once_and_nobody_is_in_a_round_twice(num_hosts):
    planned = rounds(num_hosts)
    assert len(planned) == num_hosts - 1 + num_hosts % 2
    met = [pair for pairs in planned for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(num_hosts), 2))
    for pairs in planned:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts))


def test_the_quickest_exchange_tells_the_clocks_offset():
    # this clock is 90 s ahead; the second answer took 2 s on its way back
    exchanges = [(1090.0, 1000.005, 1090.010), (1100.0, 1010.0, 1102.0)]
    offset, error = clock_offset(exchanges)
    assert offset == pytest.approx(90.0)
    assert error == pytest.approx(0.005)


def test_lines_of_nvidia_smi_become_rows_by_field():
    text = "0, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 4, 0, 345, 1980, Enabled, 31, Default, 0x0000000000000001\n"
    (row,) = parse_rows(text)
    assert row["name"] == "NVIDIA H100 80GB HBM3"
    assert row["ecc.errors.uncorrected.volatile.total"] == "0"
    assert row["throttle"] == "0x0000000000000001"
    (process,) = parse_processes("GPU-5f, 4711, /usr/bin/python3, 40200\n")
    assert (process["pid"], process["megabytes"]) == ("4711", "40200")
    table = "| NVIDIA-SMI 580.82.07    Driver Version: 580.82.07    CUDA Version: 13.0     |"
    assert parse_driver_cuda(table) == "13.0"
    assert parse_driver_cuda("NVIDIA-SMI has failed") is None


def test_the_smallest_quota_of_the_control_groups_above_counts(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/box\n")
    (tmp_path / "fs/pod/box").mkdir(parents=True)
    (tmp_path / "fs/pod/box/cpu.max").write_text("max 100000\n")
    assert cpu_quota(own, tmp_path / "fs") is None
    (tmp_path / "fs/pod/cpu.max").write_text("250000 100000\n")
    assert cpu_quota(own, tmp_path / "fs") == 2.5
    own.write_text("4:cpu,cpuacct:/job\n")  # version 1
    (tmp_path / "fs/cpu/job").mkdir(parents=True)
    (tmp_path / "fs/cpu/job/cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "fs/cpu/job/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(own, tmp_path / "fs") == 4.0


def test_a_host_knows_itself(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000.safetensors").write_bytes(b"x" * 5000)
    assert newest_checkpoint_bytes(tmp_path) == 0  # without a manifest there is none
    (checkpoint / "manifest.json").write_text("{}")
    found = facts(
        str(tmp_path / "not" / "yet"), str(tmp_path), ["localhost", "no-such-host.invalid"], ["torch", "nope"]
    )
    assert found["folder"]["existing"] == str(tmp_path)
    assert found["packages"]["torch"] and found["packages"]["nope"] is None
    assert found["names"]["localhost"] in ("127.0.0.1", "::1") and found["names"]["no-such-host.invalid"] is None
    assert newest_checkpoint_bytes(tmp_path) == 5002


def check_from(folders: list[Path]) -> list[dict]:
    """The folder's checks by as many hosts as there are folders, here threads."""
    meeting, found = threading.Barrier(len(folders)), [{} for _ in folders]

    def host(rank: int) -> None:
        found[rank] = folder_checks.check_folder(folders[rank], "t", rank, len(folders), lambda _: meeting.wait(20))

    threads = [threading.Thread(target=host, args=[rank]) for rank in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_shared_folder_is_seen_and_nothing_stays_in_it(tmp_path):
    for found in check_from([tmp_path, tmp_path]):
        assert found["visible"] and found["same_bytes"] and found["lock"] == "kept"
        assert found["reads"] > 10 and found["torn_reads"] == 0
        assert min(found["write_mb_s"], found["read_mb_s"], found["sync_ms"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ones_own_is_not_a_shared_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_checks, "VISIBLE_SECONDS", 0.2)
    monkeypatch.setattr(folder_checks, "FILE_SECONDS", 0.2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = check_from([tmp_path / "a", tmp_path / "b"])
    assert first["visible"] and not second["visible"]
    assert first["next_missing"] and "read_mb_s" not in second


def test_a_writer_that_does_not_rename_and_locks_that_are_not_kept_are_noticed(tmp_path, monkeypatch):
    def in_place(aside: Path, path: Path) -> None:
        with path.open("wb") as file:
            content = aside.read_bytes()
            file.write(content[:100])
            file.flush()
            file.write(content[100:])

    monkeypatch.setattr(os, "replace", in_place)
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    found = check_from([tmp_path, tmp_path])
    assert found[1]["torn_reads"] > 0
    assert found[1]["lock"] == "not kept"


def test_a_folder_that_cannot_be_made_is_an_error_for_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = check_from([tmp_path / "file" / "runs"])
    assert "Not a directory" in found[0]["error"]


def place(port: int) -> Placement:
    return Placement("0", "2", "0", "1", "127.0.0.1", str(port))


def test_the_rendezvous_port_is_reached_once_it_is_open_and_refused_where_it_is_taken(monkeypatch):
    monkeypatch.setattr(host_checks, "PORT_SECONDS", 0.3)
    problem, listener = host_checks.open_port(place(0))
    assert problem is None and listener is not None
    port = listener.getsockname()[1]
    assert host_checks.reach_port(place(port)) is None
    problem, none = host_checks.open_port(place(port))
    assert none is None and "cannot listen" in problem and "in use" in problem
    listener.close()
    assert "refused" in host_checks.reach_port(place(port))


def measure(addresses: list[str]) -> list[dict]:
    """A pair of hosts, here threads."""
    store, found = dist.HashStore(), [{}, {}]

    def host(me: int) -> None:
        found[me] = measure_pair(store, 0, 1, me, addresses[me], 0.2, on_gpu=False)

    threads = [threading.Thread(target=host, args=[me]) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_pair_measures_its_link():
    for found in measure(["127.0.0.1", "127.0.0.1"]):
        assert found["gb_s"] > 0.01 and found["latency_us"] > 1


def test_a_pair_without_a_way_says_so_on_both_sides_within_seconds(monkeypatch):
    monkeypatch.setattr(pair_checks, "REACH_SECONDS", 0.2)
    first, second = measure(["240.0.0.1", "127.0.0.1"])  # an address that nobody may have
    assert first == second and first["error"].startswith("no connection to 240.0.0.1:")
