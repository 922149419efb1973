"""A fault for tests."""

from __future__ import annotations

import torch


def flip(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with one bit flipped in its first element, the lowest of an fp32 or bf16 number's exponent."""
    bits = tensor.detach().clone().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    bits.view(-1)[0] ^= 1 << (23 if tensor.element_size() == 4 else 7)
    return bits.view(tensor.dtype).view(tensor.shape)
