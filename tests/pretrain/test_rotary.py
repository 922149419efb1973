"""Rotary positions against complex numbers in float64: (a + b i) e^(i p w)."""

from __future__ import annotations

import pytest
import torch

from pretrain.kernels.rotary import rotary, rotation


def in_complex_numbers(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = position_ids.double()[..., None, None] * speeds
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("seq", [1, 7, 33])
def test_heads_and_gradients_are_those_of_complex_numbers(dtype, tolerance, head_dim, seq):
    torch.manual_seed(seq)
    x = torch.randn(2, seq, 3, 2 * head_dim).to(dtype)[..., ::2].requires_grad_()  # not contiguous
    exact = x.detach().double().requires_grad_()
    positions = torch.randint(0, 50, (2, seq))
    weights = torch.randn(2, seq, 3, head_dim)
    expected = in_complex_numbers(exact, positions, 1e4)
    (expected * weights).sum().backward()
    found = rotary(x, rotation(positions, head_dim, 1e4))
    (found * weights).sum().backward()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


def test_products_depend_on_the_distance_alone_also_at_late_positions():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)
    products = []
    for start in (0, 17, 8000):
        turned = [rotary(x, rotation(torch.tensor([[start + place]]), 64, 1e4)) for x, place in ((q, 5), (k, 2))]
        products.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(products[1], products[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(products[2], products[0], atol=5e-3, rtol=1e-3)  # an fp32 angle of 8000: 5e-4


def test_no_tokens_are_no_error():
    x = torch.empty(1, 0, 2, 8)
    assert rotary(x, rotation(torch.empty(1, 0, dtype=torch.int64), 8, 1e4)).shape == x.shape
