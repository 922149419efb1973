"""Normalisation with residual and dropout: the kernels, run on the CPU, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pretrain.kernels import add_norm, native
from pretrain.kernels.activation import linear_activation
from tests.pretrain.kernels_on_cpu import DTYPES, close, dropout_factors

SHAPES = [(1, 1), (3, 7), (19, 768), (2, 1023), (9, 1024), (2, 4097), (1, 8192), (2, 3, 40)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> list[torch.Tensor]:
    """x, residual, weight, bias and gradients of both results."""
    generator = torch.Generator().manual_seed(sum(shape))
    draw = [torch.randn(s, generator=generator) for s in (shape, shape, shape[-1:], shape[-1:], shape, shape)]
    x, residual, weight, bias, grad_y, grad_added = draw
    return [t.to(dtype) for t in (x * scale + shift, residual * scale + shift, weight + 1, bias, grad_y, grad_added)]


def exact_norm(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool):
    centred = rows if rms else rows - rows.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return normal if bias is None else normal + bias


def check(tensors, rms: bool, with_bias: bool, dropout: float, monkeypatch, units: float = 6.0) -> list[torch.Tensor]:
    """Run the operation and compare results and gradients with float64; returns all of them."""
    x, residual, weight, bias, grad_y, grad_added = tensors
    monkeypatch.setattr(native, "dropout_seed", lambda device: torch.tensor([0x123456789ABCDEF]))
    given = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    bias_given = given[3] if with_bias else None
    if rms:
        y, added = add_norm.add_rms_norm(given[0], given[1], given[2], 1e-5, dropout)
    else:
        y, added = add_norm.add_layer_norm(given[0], given[1], given[2], bias_given, 1e-5, dropout)
    torch.autograd.backward([y, added], [grad_y, grad_added])

    exact = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    factors = dropout_factors(0x123456789ABCDEF, x.shape, dropout)
    summed = exact[1] + exact[0] * factors
    rounded = summed + (summed.detach().to(x.dtype).double() - summed).detach()  # the sum is rounded as it is stored
    y_exact = exact_norm(rounded, exact[2], exact[3] if with_bias else None, 1e-5, rms)
    torch.autograd.backward([y_exact, rounded], [grad_y.double(), grad_added.double()])
    close(added, summed.detach(), 1)
    close(y, y_exact.detach(), units)
    for tensor, reference in zip(given[: 4 if with_bias else 3], exact, strict=False):
        close(tensor.grad, reference.grad, units)
    return [y, added, *(t.grad for t in given if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rms", [False, True])
def test_results_and_gradients_are_those_of_float64(shape, dtype, rms, kernels, monkeypatch):
    check(inputs(shape, dtype), rms, not rms, 0.0, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (5, 256), (2, 1028), (1, 1025)])
@pytest.mark.parametrize("dropout", [0.1, 1.0])
def test_backward_drops_what_forward_dropped(shape, dtype, dropout, kernels, monkeypatch):
    check(inputs(shape, dtype), False, True, dropout, monkeypatch)


def test_without_bias_there_is_no_gradient_of_one(kernels, monkeypatch):
    check(inputs((5, 48), torch.float32), False, False, 0.0, monkeypatch)


@pytest.mark.parametrize(("scale", "shift"), [(1e4, 0.0), (1.0, 300.0), (1e-4, 0.0)])
def test_rows_far_from_zero_and_of_any_size_are_exact(scale, shift, kernels, monkeypatch):
    check(inputs((5, 515), torch.float32, scale, shift), False, True, 0.0, monkeypatch, units=500 if shift else 8)


@pytest.mark.parametrize("rms", [False, True])
def test_alone_a_norm_is_that_of_float64(rms, kernels):
    x, _, weight, bias, grad_y, _ = inputs((33, 96), torch.bfloat16)
    given = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = add_norm.rms_norm(*given[:2], 1e-6) if rms else add_norm.layer_norm(*given, 1e-6)
    y.backward(grad_y)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y_exact = exact_norm(exact[0], exact[1], None if rms else exact[2], 1e-6, rms)
    y_exact.backward(grad_y.double())
    close(y, y_exact.detach())
    for tensor, reference in zip(given[: 3 - rms], exact, strict=False):
        close(tensor.grad, reference.grad)


def test_an_empty_batch_gives_empty_rows_and_zero_gradients(kernels):
    x, residual, weight, bias, *_ = (t.requires_grad_() for t in inputs((0, 40), torch.bfloat16))
    y, added = add_norm.add_layer_norm(x, residual, weight, bias, 1e-5)
    (y.sum() + added.sum()).backward()
    assert y.shape == x.grad.shape == (0, 40)
    assert not weight.grad.any() and not bias.grad.any()


def test_rows_that_are_not_contiguous_are_read_in_their_own_order(kernels):
    x, residual, weight, bias, *_ = inputs((6, 64), torch.float32)
    transposed = [t.t().contiguous().t() for t in (x, residual)]
    found = add_norm.add_layer_norm(*transposed, weight, bias, 1e-5)
    expected = add_norm.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_view_off_the_16_byte_grid_is_read_element_by_element(kernels):
    x, residual, weight, bias, *_ = inputs((6, 64), torch.bfloat16)
    moved = torch.cat([torch.zeros(1).bfloat16(), x.flatten()])[1:].view(6, 64)
    found = add_norm.add_layer_norm(moved, residual, weight, bias, 1e-5)
    for row, expected in zip(found, add_norm.add_layer_norm(x, residual, weight, bias, 1e-5), strict=True):
        torch.testing.assert_close(row, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("shape", [(19, 96), (3, 2056)])
def test_the_same_bits_in_whatever_order_threads_run(shape, kernels, monkeypatch):
    kernels.emulation_order(0)
    ascending = check(inputs(shape, torch.bfloat16), False, True, 0.1, monkeypatch)
    kernels.emulation_order(1)
    descending = check(inputs(shape, torch.bfloat16), False, True, 0.1, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(ascending, descending, strict=True))


def test_only_the_sum_used_gives_the_residual_its_own_gradient(kernels):
    x, residual, weight, bias, _, grad = inputs((5, 24), torch.float32)
    given = [t.clone().requires_grad_() for t in (x, residual)]
    add_norm.add_layer_norm(*given, weight, bias, 1e-5)[1].backward(grad)
    assert torch.equal(given[0].grad, grad) and torch.equal(given[1].grad, grad)


def test_opcheck_accepts_the_operation(kernels):
    x, residual, weight, bias, *_ = (t.requires_grad_() for t in inputs((4, 24), torch.float32))
    seed = torch.tensor([5])
    torch.library.opcheck(torch.ops.millstream.add_norm, (x, residual, weight, bias, seed, 1e-5, 0.1, False))
    torch.library.opcheck(torch.ops.millstream.add_norm, (x, None, weight, None, None, 1e-5, 0.0, True))


def test_without_kernels_a_cpu_tensor_takes_the_operators_of_torch():
    x, residual, weight, bias, *_ = inputs((4, 24), torch.float32)
    y, added = add_norm.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(added, residual + x)
    assert torch.equal(y, torch.nn.functional.layer_norm(residual + x, (24,), weight, bias, 1e-5))


def test_rows_too_wide_for_the_kernels_take_the_operators_of_torch(kernels):
    x, residual, weight, bias, *_ = inputs((1, 50257), torch.float32)
    y, _ = add_norm.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(y, torch.nn.functional.layer_norm(residual + x, (50257,), weight, bias, 1e-5))


def test_mixed_dtypes_take_the_operators_of_torch(kernels):
    assert not native.runs_on(torch.zeros(1), torch.zeros(1).bfloat16())


def test_a_kernel_that_cannot_start_is_an_error_with_the_shape(kernels):
    assert isinstance(kernels, ctypes.CDLL)
    with pytest.raises(native.KernelError, match=r"add_norm_forward: CUDA error 9 for \(1, 9000\)"):
        torch.ops.millstream.add_norm(torch.zeros(1, 9000), None, torch.ones(9000), None, None, 1e-5, 0.0, False)


def test_a_compiled_block_has_the_kernels_in_one_graph(kernels):
    def block(x, residual, weight, bias):
        y, added = add_norm.add_layer_norm(x, residual, weight, bias, 1e-5, 0.1)
        return linear_activation(y, weight.diag(), None, "gelu") + added

    given = [t.requires_grad_() for t in inputs((6, 24), torch.float32)[:4]]
    found = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        out = run(*given)
        found.append([out, *torch.autograd.grad(out.sum(), given)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_activation_checkpointing_drops_the_same_elements_again(kernels):
    def block(x, residual, weight, bias):
        return add_norm.add_layer_norm(x, residual, weight, bias, 1e-5, 0.5)[0]

    given = [t.requires_grad_() for t in inputs((6, 24), torch.float32)[:4]]
    found = []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run(*given).square().sum(), given))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_on_a_cpu_the_operators_of_torch_are_in_one_graph():
    x, residual, weight, bias, *_ = inputs((4, 24), torch.float32)
    compiled = torch.compile(add_norm.add_layer_norm, fullgraph=True, backend="aot_eager")
    for found, plain in zip(
        compiled(x, residual, weight, bias, 1e-5),
        add_norm.add_layer_norm(x, residual, weight, bias, 1e-5),
        strict=True,
    ):
        assert torch.equal(found, plain)
