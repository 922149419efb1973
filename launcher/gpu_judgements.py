"""Drivers, GPUs and torch's build for them. Pure: what nvidia-smi and torch say in, findings out."""

from __future__ import annotations

import statistics
from typing import Any

from launcher.findings import Finding

Facts = dict[str, Any]
# Bits of nvidia-smi's clocks_event_reasons.active. Idle (0x1), the user's own clocks (0x2) and the power cap (0x4),
# which every GPU under full load meets, are no faults.
THROTTLED = {
    0x8: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake of the machine",
}
SLOW_SHARE = 0.9  # of the median GPU's speed: one that is slower holds up all ranks
SLOW_CLOCK_SHARE = 0.6  # of the largest clock, under load
USED_MEGABYTES = 1000


def judge_gpus(host: str, facts: Facts, torch: Facts) -> list[Finding]:
    """Of one host; nothing for a host without GPUs and without a torch that expects some."""
    gpus = facts["gpus"]
    found: list[Finding] = []
    if gpus is None or torch.get("error"):
        return []
    if "error" in gpus:
        cure = "reload or reinstall the driver, or restart the host; nvidia-smi has to work first"
        return [Finding("GPUs", "fail", f"nvidia-smi: {gpus['error']}", cure, (host,))]
    rows = gpus["rows"]
    if not rows:
        return [Finding("GPUs", "fail", "nvidia-smi knows no GPU", "restart the host; look at dmesg for Xid", (host,))]
    found += [driver_match(gpus, torch), *memory_errors(rows), *in_use(rows, gpus["processes"]), *persistence(rows)]
    found += [*compute_mode(rows), *clocks(torch.get("loaded") or rows, bool(torch.get("loaded")))]
    kinds = sorted({row["name"] for row in rows})
    if not any(finding.state == "fail" for finding in found):
        found.insert(0, Finding("GPUs", "ok", f"{len(rows)} x {', '.join(kinds)}, driver {rows[0]['driver_version']}"))
    return [Finding(f.check, f.state, f.text, f.cure, (host,), f.worst) for f in found]


def driver_match(gpus: Facts, torch: Facts) -> Finding:
    """A driver serves the CUDA it was made for, newer minor versions of the same major one, and all older ones."""
    check, driver, built = "driver and CUDA", gpus["driver_cuda"] or "unknown", torch["cuda"]
    if built is None:
        cure = "install the CUDA build of torch (pytorch.org names the index)"
        return Finding(check, "fail", "torch is built without CUDA and there are GPUs", cure)
    if driver[0].isdigit() and int(driver.split(".")[0]) < int(built.split(".")[0]):
        cure = f"a driver for CUDA {built}, or torch built for CUDA {driver.split('.')[0]}"
        return Finding(check, "fail", f"the driver serves CUDA {driver}, torch is built for {built}", cure)
    if not torch["available"]:
        text = f"torch {built} sees no GPU, nvidia-smi does (driver: CUDA {driver})"
        cure = "CUDA_VISIBLE_DEVICES and DS_ACCELERATOR must not hide them; in a container the driver's files must be "
        return Finding(check, "fail", text, cure + "there; python -c 'import torch; torch.cuda.init()' says why")
    if error := torch.get("device_error"):
        return Finding(check, "fail", f"a GPU cannot be used: {error}", "look at dmesg for Xid; restart the host")
    for device in torch["devices"]:
        majors = {name.rpartition("_")[2].rstrip("af")[:-1] for name in torch["kernels"]}
        if device["capability"][:-1] not in majors:
            text = f"torch has no kernels for {device['name']} (sm_{device['capability']}; it has {torch['kernels']})"
            return Finding(check, "fail", text, "another build of torch, with kernels for this GPU")
    return Finding(check, "ok", f"torch for CUDA {built}, NCCL {torch.get('nccl')}; the driver serves CUDA {driver}")


def memory_errors(rows: list[dict[str, str]]) -> list[Finding]:
    errors = {row["index"]: row["ecc.errors.uncorrected.volatile.total"] for row in rows}
    bad = [f"GPU {index}: {count}" for index, count in errors.items() if count.isdigit() and int(count)]
    if bad:
        cure = "nvidia-smi -r of this GPU or a restart of the host; if it comes back, have the GPU replaced"
        return [Finding("GPU memory errors", "fail", f"uncorrected since the start: {', '.join(bad)}", cure)]
    counted = [index for index, count in errors.items() if count.isdigit()]
    return [Finding("GPU memory errors", "ok", "none" if counted else "not counted (no ECC)")]


def in_use(rows: list[dict[str, str]], processes: list[dict[str, str]]) -> list[Finding]:
    used = [row for row in rows if row["memory.used"].isdigit() and int(row["memory.used"]) > USED_MEGABYTES]
    if not used:
        return [Finding("GPU memory in use", "ok", "none to speak of")]
    text = ", ".join(f"GPU {row['index']}: {int(row['memory.used']):,} MB" for row in used)
    who = ", ".join(f"{process['pid']} ({process['name']})" for process in processes)
    cure = f"end process {who}" if who else "another user's or an ended process: sudo fuser -v /dev/nvidia*"
    return [Finding("GPU memory in use", "warn", text, cure)]


def persistence(rows: list[dict[str, str]]) -> list[Finding]:
    if all(row["persistence_mode"] == "Enabled" for row in rows):
        return [Finding("persistence mode", "ok", "on")]
    return [Finding("persistence mode", "warn", "off: each start waits for the driver", "root: nvidia-smi -pm 1")]


def compute_mode(rows: list[dict[str, str]]) -> list[Finding]:
    if bad := [row["index"] for row in rows if row["compute_mode"] == "Prohibited"]:
        return [Finding("compute mode", "fail", f"GPU {', '.join(bad)}: prohibited", "root: nvidia-smi -c DEFAULT")]
    return []


def clocks(rows: list[dict[str, str]], loaded: bool) -> list[Finding]:
    """`rows` of nvidia-smi, `loaded`: taken while the GPUs worked. Idle GPUs have low clocks, which says nothing."""
    found = []
    for row in rows:
        throttle = int(row["throttle"], 16) if row["throttle"].startswith("0x") else 0
        if reasons := [name for bit, name in THROTTLED.items() if throttle & bit]:
            text = f"GPU {row['index']} is held back: {', '.join(reasons)}, {row['temperature.gpu']} C"
            found.append(Finding("GPU clocks", "warn", text, "cooling and power of this host; take it out until then"))
        elif loaded and row["clocks.sm"].isdigit() and row["clocks.max.sm"].isdigit():
            now, largest = int(row["clocks.sm"]), int(row["clocks.max.sm"])
            if now < SLOW_CLOCK_SHARE * largest:
                text = f"GPU {row['index']} works at {now} of {largest} MHz"
                found.append(Finding("GPU clocks", "warn", text, "nvidia-smi -q -d CLOCK,POWER; nvidia-smi -rgc"))
    if found:
        return found
    slowest = min((int(row["clocks.sm"]) for row in rows if row["clocks.sm"].isdigit()), default=0)
    return [Finding("GPU clocks", "ok", f"{slowest} MHz under load" if loaded else "nothing holds them back")]


def judge_gpu_speeds(torches: dict[str, Facts]) -> list[Finding]:
    """The GPUs of all hosts against each other: one slow GPU makes every step slow."""
    speeds = {
        (host, number): device["tflops"]
        for host, torch in torches.items()
        for number, device in enumerate(torch.get("devices", []))
    }
    if not speeds:
        return []
    median = statistics.median(speeds.values())
    slow = {place: speed for place, speed in speeds.items() if speed < SLOW_SHARE * median}
    text = f"{min(speeds.values()):.0f} to {max(speeds.values()):.0f} TFLOP/s (bf16, {len(speeds)} GPUs)"
    if not slow:
        return [Finding("GPU speed", "ok", text)]
    names = ", ".join(f"GPU {number} of {host}: {speed:.0f}" for (host, number), speed in slow.items())
    cure = "look at its clocks, temperature and other processes; leave it out of the run until then"
    return [Finding("GPU speed", "warn", f"{names} TFLOP/s, the median is {median:.0f}", cure,
                    tuple(dict.fromkeys(host for host, _ in slow)))]  # fmt: skip
