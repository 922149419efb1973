"""The CUDA kernels of `csrc/` as a shared library: built with nvcc alone, loaded with ctypes, chosen by `runs_on`.

The kernels have a plain C interface that takes addresses and a stream, and no header of torch, so that one library
serves every version of torch and is built in seconds rather than minutes. `setup.py` builds it where nvcc is found
(into `lib/` beside this file); otherwise the first process that needs it does, into ~/.cache/millstream/kernels, for
the GPU at hand, and all others wait for it. The library's name holds a hash of the sources: it is never an old one.

Without a GPU, or without nvcc and a library, every operation takes its plain PyTorch path, and one line says why.
MILLSTREAM_KERNELS=off asks for that.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
AHEAD = Path(__file__).with_name("lib")
CACHE = Path("~/.cache/millstream/kernels")
ARCHITECTURES = ("80", "90a")  # what setup.py builds for: A100 and its like, H100 and H200
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class KernelError(RuntimeError):
    """nvcc refused the sources, or a kernel could not be started."""


def runs_on(*tensors: torch.Tensor | None) -> bool:
    """Whether these tensors go to the kernels: all on one GPU, of one dtype of DTYPES, and the library is there.

    Not under autocast, which decides itself in which dtype an operator of torch computes.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    first = given[0]
    alike = all(t.device == first.device and t.dtype == first.dtype for t in given)
    if not (alike and first.device.type == device_type() and first.dtype in DTYPES):
        return False
    return not torch.is_autocast_enabled(first.device.type)


@torch.compiler.assume_constant_result
def device_type() -> str:
    """Of the tensors that kernels take: "cuda", or "none" where there is no library."""
    return "cuda" if library() is not None else "none"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built now if they have to be; None, with one line that says why, where there are none."""
    if os.environ.get("MILLSTREAM_KERNELS") == "off":
        _say_without("MILLSTREAM_KERNELS=off")
        return None
    if not torch.cuda.is_available():
        return None  # on a CPU the plain path is the one that is meant
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        _say_without(f"{torch.cuda.get_device_name()} is of before sm_80")
        return None
    architecture = f"{major}{minor}" + "a" * (major >= 9)
    name = library_name(architecture)
    ahead = AHEAD / library_name(None)
    if ahead.exists() and architecture in ARCHITECTURES:
        return ctypes.CDLL(str(ahead))
    path = CACHE.expanduser() / name
    if not path.exists():
        if not nvcc():
            _say_without("nvcc is not on the PATH; install the CUDA toolkit of torch's version")
            return None
        try:
            build(path, [architecture])
        except (KernelError, OSError) as error:
            _say_without(str(error))
            return None
    return ctypes.CDLL(str(path))


def _say_without(reason: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"fused CUDA kernels are not used, plain PyTorch is: {reason}", file=sys.stderr, flush=True)


def library_name(architecture: str | None) -> str:
    """Of the library for one architecture ("90a"), or for all of ARCHITECTURES; the sources' hash is in it."""
    text = b"".join(path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir()))
    return f"kernels-{hashlib.sha256(text).hexdigest()[:16]}-{architecture or '-'.join(ARCHITECTURES)}.so"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def build(path: Path, architectures: Sequence[str]) -> None:
    """Compile all kernels into the library `path`, once for all processes that ask for it at the same time.

    Raises KernelError with what nvcc said.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # another process has built it
            return
        began = time.monotonic()
        for_whom = ", ".join(f"sm_{name}" for name in architectures)
        print(f"building the CUDA kernels for {for_whom}, once, into {path}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder, path.name)
            compile_sources(unfinished, architectures)
            unfinished.replace(path)
        print(f"built in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def compile_sources(path: Path, architectures: Sequence[str]) -> None:
    """The nvcc call itself: one process a source file. Raises KernelError."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC"]
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    jobs = []
    for source in sorted(SOURCES.glob("*.cu")):
        output = path.with_name(f"{source.stem}.o")
        command = [str(nvcc()), *flags, "-c", str(source), "-o", str(output)]
        jobs.append((output, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
    said = [job.communicate()[0] for _, job in jobs]
    if any(job.returncode for _, job in jobs):
        raise KernelError(f"nvcc does not compile the kernels in {SOURCES}:\n" + "".join(said))
    link = [str(nvcc()), "-shared", *flags, *(str(output) for output, _ in jobs), "-o", str(path)]
    result = subprocess.run(link, capture_output=True, text=True)
    if result.returncode:
        raise KernelError(f"nvcc does not link the kernels:\n{result.stdout}{result.stderr}")


def launch(function: str, like: torch.Tensor, *arguments: torch.Tensor | float | int | None) -> None:
    """Call a function of the library on the device of `like` and torch's current stream there.

    Tensors become addresses (None a null pointer), floats C floats and integers 64-bit integers; stream and dtype come
    first. Tensors must be contiguous, and alive until the stream has come past. Raises KernelError.
    """
    values: list[ctypes._SimpleCData] = []
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            assert argument is None or argument.is_contiguous()
            values.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            values.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
    kernels = library()
    assert kernels is not None
    with torch.cuda.device(like.device) if like.is_cuda else _Nowhere():
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        error = getattr(kernels, function)(ctypes.c_void_p(stream), ctypes.c_int64(DTYPES[like.dtype]), *values)
    if error:
        raise KernelError(f"{function}: CUDA error {error} for {tuple(like.shape)} {like.dtype}")


class _Nowhere:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dropout_threshold(p: float) -> int:
    """Of 16 random bits: elements below it are dropped, so `p` is rounded to a multiple of 2^-16."""
    return round(p * 65536)


def dropout_seed(device: torch.device) -> torch.Tensor:
    """(1,) int64, drawn from torch's generator on the device, so it is restored with it by activation checkpointing."""
    return torch.randint(0, 2**63 - 1, (1,), device=device)
