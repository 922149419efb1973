"""What one host's numbers are judged to be: each limit, from both sides."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.gpu_judgements import judge_gpu_speeds, judge_gpus
from launcher.host_judgements import cores, disk, judge_host, locked_memory, open_files, shm

SPACE = {
    "path": "/runs", "existing": "/runs", "type": "ext4", "total": 10**12, "free": 10**11, "free_files": 10**6,
    "writable": True,
}  # fmt: skip
CORES = {"machine": 8, "allowed": 8, "quota": None, "threads": None}
ROW = {
    "index": "0", "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.82.07", "memory.total": "81559",
    "memory.used": "4", "ecc.errors.uncorrected.volatile.total": "0", "clocks.sm": "1755", "clocks.max.sm": "1980",
    "persistence_mode": "Enabled", "temperature.gpu": "41", "compute_mode": "Default", "throttle": "0x0000000000000004",
}  # fmt: skip
TORCH = {
    "cuda": "13.0", "available": True, "nccl": "2.27.7", "kernels": ["sm_80", "sm_90", "compute_90"],
    "devices": [{"name": "H100", "capability": "90", "tflops": 700.0}], "loaded": [ROW],
}  # fmt: skip


def facts(**changes: Any) -> dict[str, Any]:
    usual = {
        "open_files": [65536, 65536], "shm": SPACE, "cores": CORES, "folder": SPACE, "cache": SPACE, "infiniband": [],
        "locked_memory": [8 << 20, 8 << 20], "gpus": None,
    }  # fmt: skip
    return usual | changes


def gpus(**changes: str) -> dict[str, Any]:
    return {"rows": [ROW | changes], "processes": [], "driver_cuda": "13.0"}


def states(found: list[Any]) -> dict[str, str]:
    return {finding.check: finding.state for finding in found if finding.state != "ok"}


def test_a_good_host_has_no_warning_and_locked_memory_is_asked_for_with_infiniband_only():
    found = judge_host("h1", facts())
    assert not states(found)
    assert "locked memory" not in [finding.check for finding in found]
    assert states(judge_host("h1", facts(infiniband=["mlx5_0"]))) == {"locked memory": "fail"}
    assert locked_memory(facts(infiniband=["mlx5_0"], locked_memory=[-1, -1])).state == "ok"


@pytest.mark.parametrize(
    ("limits", "state"),
    [([512, 4096], "fail"), ([1024, 65536], "warn"), ([16384, 16384], "ok"), ([-1, -1], "ok")],
)
def test_open_files(limits, state):
    assert open_files(facts(open_files=limits)).state == state


def test_raising_the_open_files_over_the_hard_limit_is_said_to_need_root():
    assert "root" not in open_files(facts(open_files=[1024, 65536])).cure
    assert "root: the hard limit is 4,096" in open_files(facts(open_files=[1024, 4096])).cure


@pytest.mark.parametrize(("free", "state"), [(10_000_000, "fail"), (64_000_000, "warn"), (10**10, "ok")])
def test_shared_memory(free, state):
    assert shm(facts(shm=SPACE | {"free": free})).state == state


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"free": 10**9}, "fail"),
        ({"free": 10**10}, "warn"),
        ({"free": 10**11, "checkpoint_bytes": 2 * 10**11}, "fail"),
        ({"free": 10**11, "checkpoint_bytes": 5 * 10**10}, "warn"),
        ({"free_files": 50}, "fail"),
        ({"free_files": None}, "ok"),
        ({"writable": False}, "fail"),
        ({"type": "tmpfs"}, "warn"),
    ],
)
def test_disks(changes, state):
    finding = disk("disk: folder", SPACE | changes)
    assert finding.state == state
    assert bool(finding.cure) == (state != "ok")


@pytest.mark.parametrize(
    ("changes", "num_gpus", "state"),
    [
        ({}, 0, "ok"),
        ({"quota": 2.0}, 0, "warn"),  # torch would start 8 threads
        ({"quota": 2.0, "threads": "2"}, 0, "ok"),
        ({"threads": "16"}, 0, "warn"),
        ({"allowed": 1}, 4, "warn"),
        ({}, 4, "ok"),
    ],
)
def test_cores(changes, num_gpus, state):
    rows = {"rows": [ROW] * num_gpus} if num_gpus else None
    assert cores(facts(cores=CORES | changes, gpus=rows)).state == state


def test_a_good_gpu_under_its_power_cap_has_no_warning():
    assert not states(judge_gpus("h1", {"gpus": gpus()}, TORCH))
    assert judge_gpus("h1", {"gpus": None}, TORCH) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"ecc.errors.uncorrected.volatile.total": "3"}, {"GPU memory errors": "fail"}),
        ({"ecc.errors.uncorrected.volatile.total": "[N/A]"}, {}),
        ({"memory.used": "40213"}, {"GPU memory in use": "warn"}),
        ({"persistence_mode": "Disabled"}, {"persistence mode": "warn"}),
        ({"compute_mode": "Prohibited"}, {"compute mode": "fail"}),
    ],
)
def test_gpu_health(row, expected):
    assert states(judge_gpus("h1", {"gpus": gpus(**row)}, TORCH)) == expected


@pytest.mark.parametrize(
    ("row", "state"),
    [
        ({"throttle": "0x0000000000000040"}, "warn"),
        ({"throttle": "0x0000000000000001", "clocks.sm": "1755"}, None),
        ({"clocks.sm": "345"}, "warn"),
    ],
)
def test_clocks_are_those_under_load(row, state):
    found = judge_gpus("h1", {"gpus": gpus(**{"clocks.sm": "345"})}, TORCH | {"loaded": [ROW | row]})
    assert states(found).get("GPU clocks") == state


@pytest.mark.parametrize(
    ("torch", "driver"),
    [
        ({"cuda": None, "available": False}, "13.0"),
        ({"cuda": "13.0"}, "12.8"),
        ({"available": False}, "13.0"),
        ({"kernels": ["sm_75", "sm_80"]}, "13.0"),
        ({"device_error": "CUDA error: out of memory"}, "13.0"),
    ],
)
def test_a_torch_that_cannot_use_the_gpus_fails(torch, driver):
    found = judge_gpus("h1", {"gpus": gpus() | {"driver_cuda": driver}}, TORCH | torch)
    assert states(found) == {"driver and CUDA": "fail"}


def test_an_older_cuda_or_a_newer_minor_one_than_the_drivers_works():
    for built in ("12.8", "13.2"):
        assert not states(judge_gpus("h1", {"gpus": gpus()}, TORCH | {"cuda": built}))


def test_a_driver_that_does_not_answer_fails_with_its_words():
    found = judge_gpus("h1", {"gpus": {"error": "Driver/library version mismatch"}}, TORCH)
    assert states(found) == {"GPUs": "fail"}
    assert "version mismatch" in found[0].text


def test_one_slow_gpu_among_those_of_all_hosts_is_named():
    torches = {"h1": {"devices": [{"tflops": 700.0}] * 2}, "h2": {"devices": [{"tflops": 702.0}, {"tflops": 510.0}]}}
    (finding,) = judge_gpu_speeds(torches)
    assert (finding.state, finding.hosts) == ("warn", ("h2",))
    assert "GPU 1 of h2: 510" in finding.text
    torches["h2"]["devices"][1]["tflops"] = 690.0
    assert judge_gpu_speeds(torches)[0].state == "ok"
