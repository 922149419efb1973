"""How the CUDA kernels are built, found and chosen; and that their emulation on a CPU notices what it should."""

from __future__ import annotations

import ctypes
import shutil
import threading

import pytest
import torch

from pretrain.kernels import native
from tests.pretrain.kernels_on_cpu import compiled

BROKEN = """
#include "gpu.cuh"

__global__ void reverse_without_barrier(float* out) {
    __shared__ float kept[64];
    kept[threadIdx.x] = float(threadIdx.x);
    out[threadIdx.x] = kept[63 - threadIdx.x];
}

__global__ void barrier_for_some(float* out) {
    if (threadIdx.x < 32) warp_sum(1.0f);
    if (threadIdx.x < 7) row_sum(1.0f);
    __syncthreads();
}

extern "C" int run(int64_t which, float* out) {
    return launch(nullptr, dim3(1), dim3(64), which ? barrier_for_some : reverse_without_barrier, out);
}
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory, request):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cu").write_text(BROKEN)
    headers = [f"-I{native.SOURCES}", f"-I{request.path.with_name('cuda_on_cpu')}"]
    return compiled(folder, [str(folder / "broken.cu")], headers)


def test_a_missing_barrier_shows_as_other_numbers_in_the_other_order(broken):
    results = []
    for order in (0, 1):
        broken.emulation_order(order)
        out = torch.zeros(64)
        assert broken.run(ctypes.c_int64(0), ctypes.c_void_p(out.data_ptr())) == 0
        results.append(out)
    assert not torch.equal(*results)


def test_a_barrier_that_not_all_threads_reach_is_an_error(broken, capfd):
    assert broken.run(ctypes.c_int64(1), ctypes.c_void_p(torch.zeros(64).data_ptr())) == 719
    assert "not all threads" in capfd.readouterr().err


def test_the_library_gets_another_name_when_a_source_changes(tmp_path, monkeypatch):
    shutil.copytree(native.SOURCES, tmp_path / "csrc")
    before = native.library_name("90a")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "csrc")
    assert native.library_name("90a") == before != native.library_name("80")
    with open(tmp_path / "csrc" / "gpu.cuh", "a") as file:
        file.write("\n")
    assert native.library_name("90a") != before


def test_processes_that_need_the_library_at_once_build_it_once(tmp_path, monkeypatch, capfd):
    calls = []

    def write(path, architectures):
        calls.append(architectures)
        path.write_text("library")

    monkeypatch.setattr(native, "compile_sources", write)
    path = tmp_path / "cache" / "kernels.so"
    threads = [threading.Thread(target=native.build, args=(path, ["90a"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [["90a"]] and path.read_text() == "library"
    assert sorted(p.name for p in path.parent.iterdir()) == ["kernels.lock", "kernels.so"]
    assert "building the CUDA kernels for sm_90a, once" in capfd.readouterr().err


def test_a_build_that_fails_leaves_no_library(tmp_path, monkeypatch):
    def fail(path, architectures):
        raise native.KernelError("nvcc does not compile")

    monkeypatch.setattr(native, "compile_sources", fail)
    with pytest.raises(native.KernelError):
        native.build(tmp_path / "kernels.so", ["80"])
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.lock"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if this machine had an H100, and nothing was built yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(native, "CACHE", tmp_path)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_nvcc_one_line_says_why_plain_pytorch_is_used(gpu, monkeypatch, capsys):
    monkeypatch.setattr(native, "nvcc", lambda: None)
    assert native.device_type() == native.device_type() == "none"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nvcc is not on the PATH" in said


def test_kernels_can_be_turned_off(gpu, monkeypatch, capsys):
    monkeypatch.setenv("MILLSTREAM_KERNELS", "off")
    assert native.library() is None
    assert "MILLSTREAM_KERNELS=off" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(native.nvcc() is None, reason="nvcc is not installed: the kernels are not compiled for GPUs")
def test_the_kernels_compile_for_a100_and_h100(tmp_path):
    native.build(tmp_path / "kernels.so", native.ARCHITECTURES)
    library = ctypes.CDLL(str(tmp_path / "kernels.so"))
    assert library.add_norm_forward and library.softmax_gradient_in_place and library.bias_activation_backward
