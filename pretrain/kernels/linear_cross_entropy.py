"""The output layer and its cross entropy in one operation that never holds all logits.

    loss = sum_i logsumexp(W h_i + b) - (W h_i + b)[y_i]

Logits of (4096, 16384) take 268 MB in fp32, four times over in a plain implementation (logits, their fp32 copy, the
softmax, its gradient). Here a chunk of rows at a time goes through matmul, softmax and both gradient products, and only
the gradients stay: they do not depend on what comes after, except for one factor. The idea is that of Liger-Kernel's
fused linear cross entropy (Hsu et al. 2024) and of Wijmans et al. 2024; this is plain PyTorch, for any device.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 1 << 23  # logits in memory at once; on a 2-core CPU smaller and larger chunks were slower
# On a CPU the softmax goes through a chunk in blocks whose fp32 copy (1 MiB) stays in the cache: 2.7 times faster.
CACHED_ELEMENTS = 1 << 18


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of cross entropies of `hidden @ weight.T + bias` over the rows whose label is not IGNORE_INDEX.

    hidden (num, hidden_size), weight (vocab, hidden_size), bias (vocab,) or None: fp32 or bf16, one dtype; labels
    (num,) int64. Returns an fp32 scalar; the softmax is computed in fp32. Raises ValueError for a label that is
    neither IGNORE_INDEX nor in [0, vocab).
    """
    kept = labels != IGNORE_INDEX
    hidden, labels = hidden[kept], labels[kept]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}, but the vocabulary has {weight.shape[0]} "
            f"entries: the dataset was made with another tokenizer than the model"
        )
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        needs_grad = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        # fp32: a chunk adds little to what the earlier ones have summed up, and bf16 would round it away.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t() if bias is None else torch.addmm(bias, hidden[rows], weight.t())
            loss += _softmax_gradient_(logits, labels[rows, None])
            if grad_hidden is None or grad_weight is None:
                continue
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
            grad_hidden[rows] = logits @ weight
            grad_weight += logits.t() @ hidden[rows]
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor):
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.grads]
        return *scaled, None


def _softmax_gradient_(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the sum of cross entropies of `logits` (rows, vocab), fp32, and turn them into its gradient, in place.

    target (rows, 1) int64. The gradient is softmax(logits) - onehot(target), computed in fp32 and rounded once.
    """
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    num_rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        log_probabilities = torch.log_softmax(logits[rows], dim=1, dtype=torch.float32)
        loss -= log_probabilities.gather(1, target[rows]).sum()
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, target[rows], torch.full_like(target[rows], -1, dtype=torch.float32))
        logits[rows] = gradient
    return loss
