"""Rotary positions (Su et al. 2021): pairs of a head's elements are rotated by angles that grow with the position.

    (a, b) -> (a cos(p w) - b sin(p w), b cos(p w) + a sin(p w)),   w_i = theta^(-2 i / head_dim)

A pair is element i of the first and of the second half of a head, as in Llama's and ModernBERT's code of transformers.
Products of a query and a key then depend on the distance of their positions alone. Angles and products are fp32: a
rounded angle of a late position would be another position.

On a GPU it is one kernel (csrc/rotary.cu) that reads queries, keys and values where the matrix product left them and
writes them once; backward is the same kernel with the angles turned round. It was never run on a GPU so far
(docs/kernels.md).
"""

from __future__ import annotations

import torch

from pretrain.kernels import native

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (batch or 1, seq, 1, head_dim / 2) fp32


def rotation(position_ids: torch.Tensor, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines of the angles at position_ids, (batch, seq) or (seq,) int64; head_dim is even."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotary(x: torch.Tensor, rotation: Rotation, num_heads: int | None = None) -> torch.Tensor:
    """x (batch, seq, heads, head_dim) with its first `num_heads` heads (default: all) rotated by their token's angles.

    Same shape and dtype.
    """
    cos, sin = rotation
    if native.runs_on(x):
        return _rotary(x, cos, sin, x.shape[2] if num_heads is None else num_heads, False)
    if num_heads is not None:
        rotated, others = x.split([num_heads, x.shape[2] - num_heads], 2)
        return torch.cat([rotary(rotated, rotation), others], 2)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@torch.library.custom_op("millstream::rotary", mutates_args=())
def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, is_backward: bool) -> torch.Tensor:
    assert cos.dtype == sin.dtype == torch.float32
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    batch, seq, heads, head_dim = x.shape
    half = head_dim // 2
    angle_rows = max(1, cos.numel() // half)  # seq, or batch x seq
    native.launch(
        "rotary_positions", x, x, cos, sin, out, batch * seq, heads, num_heads, half, angle_rows,
        -1.0 if is_backward else 1.0,
    )  # fmt: skip
    return out


@_rotary.register_fake
def _fake_rotary(x, cos, sin, num_heads, is_backward):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    _, cos, sin, ctx.num_heads, ctx.is_backward = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_out):
    grad = torch.ops.millstream.rotary(grad_out, *ctx.saved_tensors, ctx.num_heads, not ctx.is_backward)
    return grad, None, None, None, None


_rotary.register_autograd(_backward, setup_context=_keep)
