"""Rotary positions (Su et al. 2021): pairs of a head's elements are rotated by angles that grow with the position.

    (a, b) -> (a cos(p w) - b sin(p w), b cos(p w) + a sin(p w)),   w_i = theta^(-2 i / head_dim)

A pair is element i of the first and of the second half of a head, as in Llama's and ModernBERT's code of transformers.
Products of a query and a key then depend on the distance of their positions alone. Angles and products are fp32: a
rounded angle of a late position would be another position.
"""

from __future__ import annotations

import torch

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (batch or 1, seq, 1, head_dim / 2) fp32


def rotation(position_ids: torch.Tensor, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines of the angles at position_ids, (batch, seq) or (seq,) int64; head_dim is even."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotary(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x (batch, seq, heads, head_dim), each head rotated by its token's angles; same shape and dtype."""
    cos, sin = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
