"""Attention on a CPU, torch's fused one against plain matrix products: `python -m benchmarks.attention_cpu`.

Forward and backward on one thread with a mask for padding, as BERT's in transformers has it, at the shapes of
fine-tuning. Rounds go round-robin; a row is the median of milliseconds, and of the ratio in the same round, with range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

SHAPES = [  # rows, heads, seq, head_dim, dropout
    (32, 12, 20, 32, 0.1),
    (32, 12, 180, 32, 0.0),
    (8, 12, 384, 32, 0.0),
    (32, 12, 20, 64, 0.1),
    (16, 12, 128, 64, 0.0),
    (8, 12, 384, 64, 0.0),
    (4, 12, 512, 64, 0.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows x heads x seq x head_dim | dropout | | fused, ms | plain, ms | fused / plain (range) |")
    print("|---" * 6 + "|")
    for *shape, dropout in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            measure([int(size) for size in shape], dropout, dtype, arguments.rounds)


def measure(shape: list[int], dropout: float, dtype: torch.dtype, rounds: int) -> None:
    rows, _, seq, head_dim = shape
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.zeros(rows, 1, 1, seq, dtype=dtype)
    mask[..., seq - seq // 8 :] = torch.finfo(dtype).min
    mask = mask.expand(rows, 1, seq, seq)

    def fused() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)

    def plain() -> torch.Tensor:
        weights = ((query @ key.transpose(2, 3)) * head_dim**-0.5 + mask).softmax(-1)
        return F.dropout(weights, dropout) @ value

    pairs = [(milliseconds(fused), milliseconds(plain)) for _ in range(rounds + 1)][1:]  # the first warms up
    ratios = [one / other for one, other in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    name = " x ".join(map(str, shape))
    print(
        f"| {name} | {dropout} | {str(dtype).removeprefix('torch.')} | {medians[0]:.1f} | {medians[1]:.1f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |",
        flush=True,
    )


def milliseconds(attention: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    attention().sum().backward()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
