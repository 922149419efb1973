"""What torch says of this host's GPUs, and how fast and at which clock each of them works."""

from __future__ import annotations

import os
import time
from typing import Any

from pretrain.host_facts import GPU_FIELDS, THROTTLE_FIELDS, nvidia_smi, parse_rows

SIZE = 8192  # of the matrices
LOAD_SECONDS = 1.5  # long enough for the clocks to settle and for nvidia-smi to look


def torch_facts() -> dict[str, Any]:
    """Of torch: its CUDA and NCCL, whether it sees the GPUs, and how fast and at which clock each works under load."""
    began = time.monotonic()
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {"cuda": torch.version.cuda, "import_seconds": time.monotonic() - began, "devices": []}
    found["available"] = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if found["available"]:
        found["kernels"] = torch.cuda.get_arch_list()
        try:
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            found["devices"], found["loaded"] = load_devices()
        except (RuntimeError, AttributeError) as error:
            found["device_error"] = str(error).splitlines()[0]
    return found


def load_devices() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Multiply matrices on all GPUs at once for a second or two: speed of each, and its row of nvidia-smi meanwhile."""
    import torch

    matrices = [
        torch.randn(SIZE, SIZE, device=torch.device("cuda", number), dtype=torch.bfloat16)
        for number in range(torch.cuda.device_count())
    ]
    counts = []
    for matrix in matrices:
        for count in (2, 5):  # the first time warms up
            first, last = multiply(matrix, count)
            torch.cuda.synchronize(matrix.device)
        counts.append(min(800, max(5, int(LOAD_SECONDS * 1000 * 5 / first.elapsed_time(last)))))
    timed = [multiply(matrix, count) for matrix, count in zip(matrices, counts, strict=True)]
    rows = loaded_rows()
    devices = []
    for matrix, count, (first, last) in zip(matrices, counts, timed, strict=True):
        torch.cuda.synchronize(matrix.device)
        major, minor = torch.cuda.get_device_capability(matrix.device)
        tflops = 2 * SIZE**3 * count / (first.elapsed_time(last) * 1e-3) / 1e12
        name = torch.cuda.get_device_name(matrix.device)
        devices.append({"name": name, "capability": f"{major}{minor}", "tflops": tflops})
    return devices, rows


def multiply(matrix: Any, count: int) -> tuple[Any, Any]:
    """Queue `count` products on the matrix's GPU; returns the events before and after them, without waiting."""
    import torch

    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(matrix.device):
        first.record()
        for _ in range(count):
            torch.mm(matrix, matrix)
        last.record()
    return first, last


def loaded_rows() -> list[dict[str, str]]:
    for throttle in THROTTLE_FIELDS:
        code, text = nvidia_smi(f"--query-gpu={','.join((*GPU_FIELDS, throttle))}")
        if code == 0:
            return parse_rows(text)
    return []
