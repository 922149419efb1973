"""All that has to be measured on one GPU, in less than eight minutes: `python -m benchmarks.gpu --output FOLDER`.

    correctness   every kernel against float64, in three dtypes and odd shapes, twice for equal bits
    kernels       time of forward and backward, and which share of the copy bandwidth the bytes that must move come to,
                  beside torch's operators, torch.compile, and liger, apex and flash-attn where they can be imported
    training      GPT and BERT through the ZeRO-3 engine: tokens/s, MFU (PaLM's), memory, with and without the kernels
    profile       where a step's time on the GPU goes
    sanitizer     compute-sanitizer over all kernels in small, where it is installed

FOLDER/gpu.json and FOLDER/gpu.md are written anew after each part; a part that fails is an entry there, and the others
go on. `--tiny` goes through all of it in small, also on a CPU: its times mean nothing, it is there to find errors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import Case, cases, whole_loss
from configs.hardware import gpu
from pretrain.kernels import native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ALLOWED_ROUNDINGS = 32  # at the largest element of a result
ODD_SHAPES = {
    "norm": [(5, 1), (3, 7), (33, 768), (9, 1023), (5, 4097)],
    "embeddings": [(3, 64), (1280, 768)],
    "rotary": [(5, 6), (1023, 768)],
    "mlp": [(5, 7), (33, 3072), (3, 1023)],
    "loss": [(7, 1023), (5, 4097), (9, 50_257)],
}
TIMED_SHAPES = {
    "norm": [(65_536, 768), (32_768, 2048), (16_384, 4096)],
    "embeddings": [(32_768, 1024)],
    "rotary": [(16_384, 2048)],
    "mlp": [(32_768, 3072), (16_384, 8192)],
    "loss": [(8192, 50_257), (8192, 128_256)],
}
TINY_SHAPES = {"norm": [(9, 40)], "embeddings": [(9, 40)], "rotary": [(9, 32)], "mlp": [(9, 24)], "loss": [(5, 101)]}
WHOLE_LOSSES = [(16_384, 768, 50_257), (8192, 2048, 50_257)]  # rows, hidden_size, vocab
JOBS: list[dict[str, Any]] = [
    {"architecture": "gpt", "preset": "gpt3-125m", "seq_len": 2048, "micro_batch_size": 16},
    {"architecture": "gpt", "preset": "gpt3-350m", "seq_len": 2048, "micro_batch_size": 8},
    {"architecture": "gpt", "preset": "gpt3-1.3b", "seq_len": 2048, "micro_batch_size": 4},
    {"architecture": "bert", "preset": "large", "seq_len": 128, "micro_batch_size": 256},
    {"architecture": "bert", "preset": "large", "seq_len": 512, "micro_batch_size": 48},
]
TINY_SIZE = {"num_layers": 1, "hidden_size": 32, "num_heads": 2}
TINY_JOBS: list[dict[str, Any]] = [
    {
        "architecture": "gpt",
        "preset": "nano",
        "seq_len": 16,
        "micro_batch_size": 2,
        "model": TINY_SIZE,
        "vocab_size": 99,
    }
]
PEAKS = {"h200": "h200", "h100": "h100-80g", "a100": "a100-80g"}  # in torch's name of a GPU: row of the hardware table
REPEATS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="the folder for gpu.json and gpu.md")
    parser.add_argument("--budget-seconds", type=float, default=450, help="no training run begins after it")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if DEVICE.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU that torch can use; --tiny goes through the code on a CPU")
    deadline = time.monotonic() + arguments.budget_seconds
    parts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "machine": lambda _: machine(arguments.tiny),
        "correctness": lambda _: correctness(TINY_SHAPES if arguments.tiny else ODD_SHAPES),
        "training": lambda _: training(TINY_JOBS if arguments.tiny else JOBS, arguments.tiny, deadline),
        "kernels": lambda found: kernel_times(found["machine"], arguments.tiny),
        "sanitizer": lambda _: sanitizer(),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, part in parts.items():
        began = time.monotonic()
        try:
            found[name] = part(found)
        except Exception:
            traceback.print_exc()
            found[name] = {"failed": traceback.format_exc()}
        found.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        (arguments.output / "gpu.json").write_text(json.dumps(found, indent=2))
        (arguments.output / "gpu.md").write_text(markdown(found))
        print(f"{name}: {found['seconds'][name]} s", flush=True)
    print(markdown(found))
    if any(isinstance(value, dict) and "failed" in value for value in found.values()):
        sys.exit(1)


def machine(is_tiny: bool) -> dict[str, Any]:
    """What it is, the bandwidth of a copy (bytes read and written a second) and the rate of a bf16 matrix product."""
    elements = 1 << 12 if is_tiny else 1 << 29
    size = 64 if is_tiny else 8192
    source = torch.ones(elements, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=DEVICE).bfloat16()
    began = time.monotonic()
    has_kernels = native.library() is not None
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.orig_argv),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": has_kernels,
        "kernels_ready_seconds": round(time.monotonic() - began, 1),
        "copy_bytes_per_second": 4 * elements / milliseconds(lambda: target.copy_(source)) * 1e3,
        "matmul_flops": 2 * size**3 / milliseconds(lambda: a @ b) * 1e3,
    }


def correctness(shapes: dict[str, list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """The largest error of any result or gradient of each case, in roundings of its dtype. New memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rows = []
    for dtype in ROUNDING:
        for case in cases(DEVICE, dtype, shapes):
            row: dict[str, Any] = {
                "operation": case.operation, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")
            }  # fmt: skip
            first, second = results(case), results(case)
            row["same_bits"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            if "dropout" not in case.operation:
                expected = results(case, case.exact, torch.float64)
                errors = [error(a, b) for a, b in zip(first, expected, strict=True)]
                row["roundings"] = round(max(errors), 2)
            row["passed"] = row["same_bits"] and row.get("roundings", 0.0) <= ALLOWED_ROUNDINGS
            rows.append(row)
    torch.use_deterministic_algorithms(False)
    return rows


def sanitizer() -> list[dict[str, Any]]:
    """What compute-sanitizer's tools say of all kernels on small shapes."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return [{"tool": "none", "result": "compute-sanitizer is not installed"}]
    code = "from benchmarks import gpu; assert all(row['passed'] for row in gpu.correctness(gpu.TINY_SHAPES))"
    rows = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=90)
            last = (result.stdout.strip().splitlines() or ["no output"])[-1]
            rows.append({"tool": tool, "exit_code": result.returncode, "result": last})
        except subprocess.TimeoutExpired:
            rows.append({"tool": tool, "result": "it took more than 90 s"})
    return rows


def results(case: Case, operation: Callable | None = None, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Outputs and gradients of a contestant on copies of the inputs."""
    torch.manual_seed(1)  # of dropout
    inputs = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad) for t in case.inputs]
    found = (operation or case.contestants["ours"])(*inputs)
    outputs = list(found) if isinstance(found, tuple) else [found]
    if not case.grads:
        return [output.detach() for output in outputs]
    grads = [grad.detach().to(output.dtype) for grad, output in zip(case.grads, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, inputs, grads)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """In roundings of found's dtype at the largest exact element; infinite if anything is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    difference = (found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-6)
    return float(difference) / ROUNDING[found.dtype]


def kernel_times(machine: dict[str, Any], is_tiny: bool) -> list[dict[str, Any]]:
    """A row for each case, contestant and direction."""
    rows = []
    bandwidth = machine["copy_bytes_per_second"]
    for case in cases(DEVICE, torch.bfloat16, TINY_SHAPES if is_tiny else TIMED_SHAPES):
        rows += [timed(case, name, bandwidth) for name in case.contestants]
        case.inputs.clear()
    for shape in [(9, 8, 101)] if is_tiny else WHOLE_LOSSES:
        case = whole_loss(*shape, DEVICE, torch.bfloat16)
        rows += [timed(case, name, bandwidth) for name in case.contestants]
    return rows


def timed(case: Case, name: str, bandwidth: float) -> dict[str, Any]:
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "contestant": name}
    try:
        operation = case.contestants[name]
        row["forward_ms"] = milliseconds(lambda: operation(*case.inputs))
        if case.forward_bytes:
            row["forward_share"] = case.forward_bytes / row["forward_ms"] * 1e3 / bandwidth
        if case.grads:
            found = operation(*case.inputs)
            outputs = list(found) if isinstance(found, tuple) else [found]
            grads = [grad.to(output.dtype) for grad, output in zip(case.grads, outputs, strict=True)]
            backward = lambda: torch.autograd.grad(outputs, case.inputs, grads, retain_graph=True)  # noqa: E731
            row["backward_ms"] = milliseconds(backward)
            if case.forward_bytes:
                row["backward_share"] = case.backward_bytes / row["backward_ms"] * 1e3 / bandwidth
    except Exception as failure:  # a peer that does not bear this shape or version
        row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    return row


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of REPEATS times of `run` on the device, its inputs not in the cache.

    Before each, the device is kept busy, so that the host has issued all of `run` before the clock starts.
    """
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        run()
        return max(1e-6, 1e3 * (time.perf_counter() - began))
    flushed = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    times = []
    for number in range(REPEATS + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def training(jobs: list[dict[str, Any]], is_tiny: bool, deadline: float) -> list[dict[str, Any]]:
    """Each model with the kernels, the first one without them too, the first of each architecture with a profile."""
    rows = []
    torch.cuda.empty_cache()
    profiled: set[str] = set()
    for number, job in enumerate(jobs):
        for kernels in ("on", "off") if number in (0, len(jobs) - 1) else ("on",):
            row = {**job, "kernels": kernels}
            rows.append(row)
            if time.monotonic() > deadline:
                row["failed"] = "the budget of seconds was spent"
                continue
            is_profiled = job["architecture"] not in profiled
            profiled.add(job["architecture"])
            row |= run_job({**job, "steps": 2 if is_tiny else 10, "is_profiled": is_profiled}, kernels)
            if "tokens_per_second" in row:
                flops = row["tokens_per_second"] * row["flops_per_token"]
                row["tflops"] = flops / 1e12
                if peak := peak_flops():
                    row["mfu"] = flops / peak
    return rows


def run_job(job: dict[str, Any], kernels: str) -> dict[str, Any]:
    """What benchmarks/gpu_training.py says of a job, or {"failed": why}."""
    environment = os.environ | {"MILLSTREAM_KERNELS": kernels}
    if DEVICE.type == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "benchmarks.gpu_training", json.dumps(job)]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        return {"failed": "it took more than 150 s"}
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        return {"failed": (result.stderr.strip().splitlines() or ["no output"])[-1], "stderr": result.stderr[-4000:]}
    return json.loads(lines[-1])


def peak_flops() -> float | None:
    """Of bf16 matrix products by the data sheet, where the hardware table has this GPU."""
    name = torch.cuda.get_device_name().lower() if DEVICE.type == "cuda" else ""
    return next((gpu(ours).matmul_flops for theirs, ours in PEAKS.items() if theirs in name), None)


def markdown(found: dict[str, Any]) -> str:
    lines = ["# One GPU", ""]
    for name, content in found.items():
        if isinstance(content, dict) and "failed" in content:
            lines += [f"**{name} failed**", "", "```", content["failed"], "```", ""]
        elif isinstance(content, dict):
            lines += [f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}"
                      for key, value in content.items()] + [""]  # fmt: skip
        else:
            hidden = ("profile", "stderr", "seconds", "model", "flops_per_token")
            keys = list(dict.fromkeys(key for row in content for key in row if key not in hidden))
            lines += [f"## {name}", "", *table(keys, content), ""]
            for row in content:
                if "profile" in row:
                    title = f"### A step of {row['preset']} at {row['seq_len']} tokens, kernels {row['kernels']}"
                    lines += [title, "", *table(["name", "ms", "share"], row["profile"]), ""]
    return "\n".join(lines)


def table(keys: list[str], rows: list[dict[str, Any]]) -> list[str]:
    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")

    body = ["| " + " | ".join(shown(row.get(key, "")) for key in keys) + " |" for row in rows]
    return ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys), *body]


if __name__ == "__main__":
    main()
