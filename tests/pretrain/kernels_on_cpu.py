"""The CUDA kernels on this CPU: compiled by g++ against `cuda_on_cpu/`, and put where the operations look for them.

With the fixture `kernels` (conftest.py) the operations take CPU tensors to the kernels, through all of their Python.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def compiled(folder: Path, sources: list[str], headers: list[str]) -> ctypes.CDLL:
    """Sources in CUDA C++ as a library for this CPU."""
    objects = [str(folder / f"{Path(source).stem}.o") for source in sources]
    for source, output in zip(sources, objects, strict=True):
        subprocess.run(["g++", *FLAGS, *headers, "-x", "c++", "-c", source, "-o", output], check=True)
    library = folder / "kernels.so"
    subprocess.run(["g++", "-shared", *FLAGS, *objects, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def dropout_factors(seed: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """0 or 1 / (1 - p) for each element, float64: Philox 4x32-10 as published, 16 bits an element."""
    num = int(np.prod(shape))
    counter = np.arange(-(-num // 8), dtype=np.uint64)
    c = [counter & 0xFFFFFFFF, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    words = np.stack(c, 1).astype("<u4")  # (blocks, 4)
    kept = words.view("<u2").reshape(-1)[:num].astype(np.int64) >= round(p * 65536)
    return torch.from_numpy(kept.reshape(shape)).double() / max(1 - round(p * 65536) / 65536, 2**-16)


def close(found: torch.Tensor, exact: torch.Tensor, units: float = 4.0) -> None:
    """`found` is what float64 says, within `units` roundings of its dtype at the largest element of each row."""
    assert found.shape == exact.shape and torch.isfinite(found).all()
    if not found.numel():
        return
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    error = ((found.double() - exact) / scale).abs().max().item()
    assert error <= units * PRECISION[found.dtype], f"{error:.2e}, {error / PRECISION[found.dtype]:.1f} roundings"
