"""What this host is: versions, limits, disks, cores, names, GPUs. `facts` gathers numbers and judges none of them;
`millstream doctor` (launcher/doctor.py) does. Nothing but the standard library, so that a host whose torch is broken
still says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "data_pipeline", "pretrain", "finetune", "launcher")
NVIDIA_SMI_SECONDS = 15.0  # without persistence mode it wakes the driver up first
GPU_FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
    "clocks.sm", "clocks.max.sm", "persistence_mode", "temperature.gpu", "compute_mode",
)  # fmt: skip
THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the name since driver 535, before
SIOCGIFADDR = 0x8915


def facts(folder: str, cache: str, hosts: list[str], packages: list[str]) -> dict[str, Any]:
    """Everything about this host that can be told without another one. Sizes in bytes."""
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "code": code_fingerprint(),
        "cores": {
            "machine": os.cpu_count() or 1,
            "allowed": len(os.sched_getaffinity(0)),
            "quota": cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory": memory(),
        "shm": space("/dev/shm"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),  # soft, hard; -1 is no limit
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "folder": space(folder) | {"checkpoint_bytes": newest_checkpoint_bytes(Path(folder))},
        "cache": space(cache),
        "names": {name: resolve(name) for name in hosts},
        "own_address": resolve(socket.gethostname()),
        "interfaces": interfaces(),
        "socket_interface": os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME"),
        "gpus": gpus(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_fingerprint() -> str:
    """The same on hosts that have the same millstream: of the sources, in the order of their names."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_quota(own: Path, root: Path) -> float | None:
    """The cores' time that the control groups allow, in cores; None without a limit. Both versions of cgroups."""
    limits = []
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, place in groups:
        if controllers == "":  # version 2: each level may have a limit
            parts = [part for part in place.split("/") if part]
            for depth in range(len(parts) + 1):
                quota, _, period = _read(root.joinpath(*parts[:depth]) / "cpu.max").partition(" ")
                if quota.isdigit() and period.strip().isdigit():
                    limits.append(int(quota) / int(period))
        elif "cpu" in controllers.split(","):
            folder = root / "cpu" / place.strip("/")
            folder = folder if folder.is_dir() else root / "cpu"  # a container sees its own group as the root
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            if quota.strip().isdigit() and period.strip().isdigit():
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def memory() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("total", "MemTotal"), ("free", "MemAvailable"))}


def space(place: str) -> dict[str, Any]:
    """Of the file system that `place` lies on, or would lie on: its type, its size, what is free, who may write."""
    path = Path(place).expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return {
        "path": place,
        "existing": str(path),
        "type": file_system(path),
        "total": found.f_frsize * found.f_blocks,
        "free": found.f_frsize * found.f_bavail,
        "free_files": found.f_favail if found.f_files else None,  # some file systems do not count
        "writable": os.access(path, os.W_OK | os.X_OK),
    }


def file_system(path: Path) -> str:
    """Its type as the kernel names it: nfs4, lustre, ext4, tmpfs, ..."""
    device = os.stat(path).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == name:
            return after.split()[0]
    return "unknown"


def newest_checkpoint_bytes(run_dir: Path) -> int:
    """What the newest finished checkpoint of a run takes; 0 where there is none."""
    finished = sorted(path.parent for path in run_dir.glob("checkpoints/step-*/manifest.json"))
    return sum(path.stat().st_size for path in finished[-1].iterdir()) if finished else 0


def resolve(name: str) -> str | None:
    """The address that this host has for a name, None if it knows none."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """IPv4 address of each network interface that has one, without the loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if not (address := socket.inet_ntoa(answer[20:24])).startswith("127."):
                found[name] = address
    return found


def gpus() -> dict[str, Any] | None:
    """What nvidia-smi says, None where there is none: {"rows": [...], "processes": [...]} or {"error": text}."""
    if not shutil.which("nvidia-smi"):
        return None
    for throttle in THROTTLE_FIELDS:
        fields = (*GPU_FIELDS, throttle)
        code, text = nvidia_smi(f"--query-gpu={','.join(fields)}")
        if code == 0:
            break
    if code != 0:
        return {"error": text.strip().splitlines()[-1] if text.strip() else f"nvidia-smi ends with {code}"}
    _, processes = nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
    _, shown = nvidia_smi()
    return {"rows": parse_rows(text), "processes": parse_processes(processes), "driver_cuda": parse_driver_cuda(shown)}


def nvidia_smi(*words: str) -> tuple[int, str]:
    command = ["nvidia-smi", *words, *(["--format=csv,noheader,nounits"] if words else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def parse_rows(text: str) -> list[dict[str, str]]:
    """Lines of `nvidia-smi --query-gpu`, one a GPU, as {field: value}; the field of throttle reasons is `throttle`."""
    names = (*GPU_FIELDS, "throttle")
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def parse_processes(text: str) -> list[dict[str, str]]:
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(("gpu", "pid", "name", "megabytes"), row, strict=True)) for row in rows if len(row) == 4]


def parse_driver_cuda(shown: str) -> str | None:
    """The newest CUDA that the driver serves, from the table that nvidia-smi prints."""
    after = shown.partition("CUDA Version:")[2].split()
    return after[0] if after else None
