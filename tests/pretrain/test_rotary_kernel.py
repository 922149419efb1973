"""Rotary positions: the kernel, run on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch

from pretrain.kernels import native
from pretrain.kernels.rotary import rotary, rotation
from tests.pretrain.kernels_on_cpu import DTYPES, close


def exact(x: torch.Tensor, angles, num_heads: int) -> torch.Tensor:
    """x (batch, seq, heads, head_dim) in float64, pairs as complex numbers."""
    cos, sin = angles
    pairs = torch.complex(*x[:, :, :num_heads].chunk(2, -1)) * torch.complex(cos.double(), sin.double())
    return torch.cat([torch.cat([pairs.real, pairs.imag], -1), x[:, :, num_heads:]], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_heads"), [((1, 1, 1, 2), 1), ((2, 7, 3, 6), 2), ((2, 9, 6, 64), 4), ((3, 5, 2, 80), 2)]
)
def test_heads_and_their_gradients_are_those_of_float64(shape, num_heads, own_positions, dtype, kernels):
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    positions = torch.randint(9999, shape[:2], generator=generator) if own_positions else torch.arange(shape[1])
    angles = rotation(positions, shape[-1], 10_000.0)
    given = x.clone().requires_grad_()
    out = rotary(given, angles, num_heads)
    out.backward(grad)
    double = x.double().requires_grad_()
    expected = exact(double, angles, num_heads)
    expected.backward(grad.double())
    close(out.detach(), expected.detach(), 2)
    close(given.grad, double.grad, 2)


def test_without_the_kernel_the_numbers_are_the_same_to_rounding(kernels, monkeypatch):
    x, angles = torch.randn(2, 5, 4, 16), rotation(torch.arange(5), 16, 100.0)
    with_kernel = [rotary(x, angles, 3), rotary(x, angles)]
    monkeypatch.setattr(native, "device_type", lambda: "none")
    for found, plain in zip(with_kernel, [rotary(x, angles, 3), rotary(x, angles)], strict=True):
        torch.testing.assert_close(found, plain)


def test_views_and_empty_batches_are_read_as_they_are(kernels):
    x, angles = torch.randn(2, 5, 4, 16), rotation(torch.arange(5), 16, 100.0)
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(view, angles, 3), rotary(x, angles, 3))
    assert rotary(x[:0], angles, 3).shape == (0, 5, 4, 16)


def test_opcheck_accepts_the_operation(kernels):
    cos, sin = rotation(torch.arange(3), 8, 100.0)
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.millstream.rotary, (x, cos, sin, 3, False))
