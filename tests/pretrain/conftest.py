"""The CUDA kernels, run on this CPU, for the tests of all operations that have one."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.kernels import native
from tests.pretrain.kernels_on_cpu import compiled


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    headers = [f"-I{Path(__file__).with_name('cuda_on_cpu')}"]
    return compiled(folder, [str(path) for path in sorted(native.SOURCES.glob("*.cu"))], headers)


@pytest.fixture
def kernels(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Operations on CPU tensors go to the kernels; new memory is full of NaN, so nothing unwritten passes."""
    monkeypatch.setattr(native, "library", lambda: emulated)
    monkeypatch.setattr(native, "device_type", lambda: "cpu")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield emulated
    torch.use_deterministic_algorithms(False)
    emulated.emulation_order(0)
