"""Our CPU kernels against torch's operators, bf16, forward and backward: `python -m benchmarks.kernels_cpu`.

Each round times every contestant once, one after the other, because the speed of a shared machine drifts; a row is the
median over the rounds of milliseconds, and of the ratio to torch's of the same round, with its range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pretrain.kernels.attention import attention
from pretrain.kernels.linear_cross_entropy import linear_cross_entropy, linear_token_losses

# batch, heads, seq, head_dim, causal
ATTENTION_SHAPES = [(32, 2, 128, 64, False), (8, 6, 512, 64, True), (8, 12, 512, 64, False), (8, 12, 1024, 64, True)]
# batch, heads, seq, head_dim, window, causal: of ModernBERT and GPT-Neo, and as long as a document may be
LOCAL_SHAPES = [
    (8, 12, 512, 64, 128, False), (4, 12, 1024, 64, 128, False), (1, 12, 4096, 64, 128, False),
    (2, 12, 2048, 64, 256, True),
]  # fmt: skip
LOSS_SHAPES = [(4096, 128, 4096), (4096, 384, 16_384), (2048, 768, 50_257)]  # rows, hidden_size, vocab

Contestants = dict[str, Callable[[], torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds} rounds\n")
    print("| operator | shape | torch, ms | ours, ms | ratio (range) |\n|---|---|---|---|---|")
    for shape in ATTENTION_SHAPES:
        inputs, contestants = attention_contestants(*shape)
        print(row("attention" + (", causal" if shape[-1] else ""), shape[:-1], inputs, contestants, rounds), flush=True)
    for *local_shape, window, causal in LOCAL_SHAPES:
        inputs, contestants = local_contestants(*local_shape, window, causal)
        name = f"attention to {window} tokens" + (", causal" if causal else "")
        print(row(name, tuple(local_shape), inputs, contestants, rounds), flush=True)
    for loss_shape in LOSS_SHAPES:
        inputs, contestants = loss_contestants(*loss_shape)
        print(row("output layer and loss", loss_shape, inputs, contestants, rounds), flush=True)
        inputs, contestants = loss_contestants(*loss_shape, label_smoothing=0.1, z_loss=1e-4)
        print(row("with label smoothing and z-loss", loss_shape, inputs, contestants, rounds), flush=True)


def attention_contestants(batch: int, heads: int, seq: int, head_dim: int, causal: bool):
    qkv = torch.randn(batch, seq, 3, heads, head_dim, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    inputs = [tensor.detach().requires_grad_() for tensor in qkv]
    contestants: Contestants = {
        "torch": lambda: F.scaled_dot_product_attention(*inputs, is_causal=causal).sum(),
        "ours": lambda: attention(*inputs, causal=causal).sum(),
    }
    return inputs, contestants


def local_contestants(batch: int, heads: int, seq: int, head_dim: int, window: int, causal: bool):
    qkv = torch.randn(batch, seq, 3, heads, head_dim, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    inputs = [tensor.detach().requires_grad_() for tensor in qkv]
    distance = torch.arange(seq) - torch.arange(seq)[:, None]
    near = (distance > -window) & (distance <= 0) if causal else distance.abs() <= window // 2
    contestants: Contestants = {
        "torch": lambda: F.scaled_dot_product_attention(*inputs, attn_mask=near).sum(),
        "ours": lambda: attention(*inputs, causal=causal, window=window).sum(),
    }
    return inputs, contestants


def loss_contestants(rows: int, hidden_size: int, vocab: int, label_smoothing: float = 0.0, z_loss: float = 0.0):
    hidden = torch.randn(rows, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden_size) * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (rows,))
    contestants: Contestants = {
        "torch": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"),
        "ours": lambda: linear_cross_entropy(hidden, weight, None, labels),
    }
    if label_smoothing or z_loss:
        contestants = {
            "torch": lambda: torch_losses(hidden, weight, labels, label_smoothing, z_loss),
            "ours": lambda: linear_token_losses(hidden, weight, None, labels, label_smoothing, z_loss).minimised,
        }
    return [hidden, weight], contestants


def torch_losses(hidden, weight, labels, label_smoothing: float, z_loss: float) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    smoothed = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return smoothed + z_loss * logits.logsumexp(1).square().sum()


def row(name: str, shape: tuple[int, ...], inputs: list[torch.Tensor], contestants: Contestants, rounds: int) -> str:
    times: dict[str, list[float]] = {key: [] for key in contestants}
    for number in range(rounds + 1):
        for key, run in contestants.items():
            began = time.perf_counter()
            run().backward()
            if number:  # the first round warms up
                times[key].append(1e3 * (time.perf_counter() - began))
            for tensor in inputs:
                tensor.grad = None
    ratios = [theirs / ours for theirs, ours in zip(times["torch"], times["ours"], strict=True)]
    middle = {key: statistics.median(values) for key, values in times.items()}
    return (
        f"| {name} | {' x '.join(map(str, shape))} | {middle['torch']:.1f} | {middle['ours']:.1f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |"
    )


if __name__ == "__main__":
    main()
