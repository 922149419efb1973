"""GELU, SwiGLU and GeGLU with a bias: the kernels, run on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.kernels import activation
from pretrain.kernels.activation import KINDS, linear_activation, linear_gated_activation
from tests.pretrain.kernels_on_cpu import DTYPES, close

fused = torch.ops.millstream.bias_activation


def inputs(rows: int, columns: int, is_gated: bool, dtype: torch.dtype, scale: float = 2.0) -> list[torch.Tensor]:
    """x, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(rows + columns)
    width = 2 * columns if is_gated else columns
    shapes = ((rows, width), (width,), (rows, columns))
    x, bias, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x * scale, bias, grad]


def exact(x: torch.Tensor, bias: torch.Tensor | None, kind: str, is_gated: bool) -> torch.Tensor:
    x = x if bias is None else x + bias
    gate, up = x.chunk(2, -1) if is_gated else (x, 1)
    return activation.activated(gate, kind) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (37, 64), (3, 1023), (9, 2056)])
def test_results_and_gradients_are_those_of_float64(rows, columns, is_gated, kind, dtype, kernels):
    x, bias, grad = inputs(rows, columns, is_gated, dtype)
    given = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    out = fused(*given, KINDS.index(kind), is_gated)
    out.backward(grad)
    doubles = [x.double().requires_grad_(), bias.double().requires_grad_()]
    expected = exact(*doubles, kind, is_gated)
    expected.backward(grad.double())
    close(out, expected.detach(), 2)
    for tensor, reference in zip(given, doubles, strict=True):
        close(tensor.grad, reference.grad, 8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs_do_not_overflow(kind, kernels):
    x = torch.tensor([[-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4]], requires_grad=True)
    out = fused(x, None, KINDS.index(kind), False)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), x.detach().clamp(min=0))
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0, 0, 0.5, 1, 1, 1]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_gated", [False, True])
def test_an_empty_batch_gives_no_rows_and_a_zero_gradient(is_gated, kernels):
    x, bias, _ = (t.requires_grad_() for t in inputs(0, 8, is_gated, torch.bfloat16))
    out = fused(x, bias, 0, is_gated)
    out.sum().backward()
    assert out.shape == (0, 8) and x.grad.shape == x.shape and not bias.grad.any()


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("columns", [64, 71])
def test_the_same_bits_in_whatever_order_threads_run(columns, is_gated, kernels):
    results = []
    for order in (0, 1):
        kernels.emulation_order(order)
        x, bias, grad = inputs(41, columns, is_gated, torch.bfloat16)
        x, bias = x.requires_grad_(), bias.requires_grad_()
        fused(x, bias, 0, is_gated).backward(grad)
        results.append([x.grad, bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("is_gated", [False, True])
def test_rows_that_are_not_contiguous_are_read_in_their_own_order(is_gated, kernels):
    x, bias, _ = inputs(6, 16, is_gated, torch.float32)
    assert torch.equal(fused(x.t().contiguous().t(), bias, 1, is_gated), fused(x, bias, 1, is_gated))


@pytest.mark.parametrize("layer", [linear_activation, linear_gated_activation])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_the_kernel_is_the_layer_without(layer, kind, kernels, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 3, 8), (12, 8), (12,)))
    with_kernel = layer(x, weight, bias, kind)
    monkeypatch.setattr(activation.native, "device_type", lambda: "none")
    torch.testing.assert_close(with_kernel, layer(x, weight, bias, kind))


def test_under_autocast_the_operators_of_torch_are_taken(kernels, monkeypatch):
    x, weight, bias = torch.randn(3, 8), torch.randn(12, 8), torch.randn(12)
    monkeypatch.setattr(activation.native, "launch", None)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_activation(x, weight, bias, "gelu")
        assert out.dtype == torch.bfloat16 and torch.equal(out, F.gelu(F.linear(x, weight, bias)))


def test_without_kernels_a_layer_is_bit_for_bit_that_of_torch():
    x, weight, bias = torch.randn(3, 8), torch.randn(12, 8), torch.randn(12)
    assert torch.equal(linear_activation(x, weight, bias, "gelu"), F.gelu(F.linear(x, weight, bias)))


def test_opcheck_accepts_the_operation(kernels):
    x, bias, _ = (t.requires_grad_() for t in inputs(3, 8, True, torch.float32))
    torch.library.opcheck(fused, (x, bias, 2, True))
    torch.library.opcheck(fused, (x, None, 1, False))
