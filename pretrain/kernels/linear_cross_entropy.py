"""The output layer and its cross entropy in one operation that never holds all logits.

    loss = sum_i log Z_i - (W h_i + b)[y_i]        log Z_i = logsumexp(W h_i + b)

Logits of (4096, 16384) take 268 MB in fp32, four times over in a plain implementation (logits, their fp32 copy, the
softmax, its gradient). Here a chunk of rows at a time goes through matmul, softmax and both gradient products, and only
the gradients stay: they do not depend on what comes after, except for one factor. The idea is that of Liger-Kernel's
fused linear cross entropy (Hsu et al. 2024) and of Wijmans et al. 2024; this is plain PyTorch, for any device.

Two terms can be added, each a line more in the softmax's gradient p - onehot(y):

    label smoothing s   the target is 1 - s at y plus s / V everywhere       p - (1 - s) onehot(y) - s / V
                        (Szegedy et al. 2016)
    z-loss c            c log^2 Z is added, which keeps logits from          + 2 c log Z p
                        drifting (PaLM, Chowdhery et al. 2022, section 5)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pretrain.kernels import native
from pretrain.kernels.softmax_gradient import softmax_gradient_

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 1 << 23  # logits in memory at once; on a 2-core CPU smaller and larger chunks were slower
# On a CPU the softmax goes through a chunk in blocks whose fp32 copy (1 MiB) stays in the cache: 2.7 times faster.
CACHED_ELEMENTS = 1 << 18


class TokenLosses(NamedTuple):
    """Sums over the same rows, fp32 scalars; only `minimised` has a gradient."""

    minimised: torch.Tensor  # smoothed + z_loss x squared_log_z
    cross_entropy: torch.Tensor  # without label smoothing
    smoothed: torch.Tensor  # (1 - s) cross_entropy + s x the mean of -log p over the vocabulary
    squared_log_z: torch.Tensor  # 0 where z_loss is 0: it is not computed then


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of cross entropies of `hidden @ weight.T + bias` over the rows whose label is not IGNORE_INDEX.

    hidden (num, hidden_size), weight (vocab, hidden_size), bias (vocab,) or None: fp32 or bf16, one dtype; labels
    (num,) int64. Returns an fp32 scalar; the softmax is computed in fp32. Raises ValueError for a label that is
    neither IGNORE_INDEX nor in [0, vocab).
    """
    return linear_token_losses(hidden, weight, bias, labels).minimised


def linear_token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLosses:
    """As `linear_cross_entropy`, with a smoothed target, label_smoothing in [0, 1), and z_loss x log^2 Z added."""
    kept = labels != IGNORE_INDEX
    hidden, labels = hidden[kept], labels[kept]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}, but the vocabulary has {weight.shape[0]} "
            f"entries: the dataset was made with another tokenizer than the model"
        )
    return TokenLosses(*_LinearTokenLosses.apply(hidden, weight, bias, labels, label_smoothing, z_loss))


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        label_smoothing: float,
        z_loss: float,
    ) -> tuple[torch.Tensor, ...]:
        needs_grad = any(ctx.needs_input_grad)
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        # fp32: a chunk adds little to what the earlier ones have summed up, and bf16 would round it away.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t() if bias is None else torch.addmm(bias, hidden[rows], weight.t())
            sums += _softmax_gradient_(logits, labels[rows, None], label_smoothing, z_loss)
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
        cross_entropy, uniform, squared_log_z = sums.unbind()
        smoothed = cross_entropy + label_smoothing * (uniform - cross_entropy) if label_smoothing else cross_entropy
        minimised = smoothed + z_loss * squared_log_z if z_loss else smoothed
        reported = cross_entropy.clone(), smoothed.clone(), squared_log_z.clone()
        ctx.mark_non_differentiable(*reported)
        return minimised.clone(), *reported

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor):
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.grads]
        return *scaled, None, None, None


def _softmax_gradient_(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """Return sums over `logits` (rows, vocab) and turn them into the gradient of what is minimised, in place.

    target (rows, 1) int64. The sums are (3,) fp32: of the cross entropies; of the means of -log p over the vocabulary,
    if label_smoothing; of log^2 Z, if z_loss. The gradient is computed in fp32 and rounded once.
    """
    if native.runs_on(logits):
        return softmax_gradient_(logits, target[:, 0], label_smoothing, z_loss)
    sums = torch.zeros(3, dtype=torch.float32, device=logits.device)
    num_rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        log_probabilities = torch.log_softmax(logits[rows], dim=1, dtype=torch.float32)
        of_target = log_probabilities.gather(1, target[rows])  # (rows, 1)
        sums[0] -= of_target.sum()
        if label_smoothing:
            sums[1] -= log_probabilities.mean(1).sum()
        gradient = log_probabilities.exp_()
        if z_loss:
            log_z = logits[rows].gather(1, target[rows]).float() - of_target
            sums[2] += log_z.square().sum()
            gradient *= 1 + 2 * z_loss * log_z
        if label_smoothing:
            gradient -= label_smoothing / logits.shape[1]
        gradient.scatter_add_(1, target[rows], torch.full_like(of_target, label_smoothing - 1))
        logits[rows] = gradient
    return sums
